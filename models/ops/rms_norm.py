"""Root-mean-square norm (arXiv 1910.07467): x / sqrt(mean(x²) + eps) ⊙ weight.

Shape legend: T tokens (product of the leading dimensions), D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops import native

_CHUNK = 256  # tokens whose part of the weight's gradient is summed together; see csrc/rms_norm.cpp


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm of ``x`` [..., D] over its last dimension, times ``weight`` [D].

    On the CPU, where PyTorch has no fused one, a kernel of ours in float32.
    """
    if not (x.dtype == weight.dtype == torch.float32 and native.runs_native(x, weight)):
        return F.rms_norm(x, weight.shape, weight, eps)
    out: Tensor = _NativeRMSNorm.apply(x, weight, eps)
    return out


class _NativeRMSNorm(torch.autograd.Function):
    """The kernels of csrc/rms_norm.cpp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        width = weight.numel()
        tokens = x.numel() // width
        out, inverse = torch.empty_like(x), x.new_empty(tokens)
        threads = torch.get_num_threads()
        native.call("tandem_rms_forward", x, weight, tokens, width, eps, threads, out, inverse)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        tokens, width = inverse.numel(), weight.numel()
        d_x = torch.empty_like(x)
        parts = x.new_empty(-(-tokens // _CHUNK), width)
        arguments = (x, weight, inverse, grads[0].contiguous(), tokens, width, _CHUNK)
        native.call("tandem_rms_backward", *arguments, torch.get_num_threads(), d_x, parts)
        return d_x, parts.sum(0), None
