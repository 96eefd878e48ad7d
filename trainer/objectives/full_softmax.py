"""Cross entropy of the next item against the whole catalogue.

Shape legend: T tokens, V catalogue, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.ops import native
from models.ops.softmax_loss import full_softmax_loss


def full_softmax(
    queries: Tensor, keys: Tensor, positives: Tensor, temperature: float, chunk_tokens: int
) -> Tensor:
    """Loss of each position: [T] float32, differentiable in `queries` and `keys`.

    Args:
        queries: [T, D] float32.
        keys: [V, D] float32 of all items.
        positives: [T] rows of `keys`; below 0 the position predicts nothing and its loss is 0.
        temperature: divides the products.
        chunk_tokens: positions scored at once where the fused kernel, which holds no logits at
            all, does not run: memory is bounded by chunk × V, and logits are computed again in the
            backward pass.
    """
    if native.runs_native(queries, keys):
        return full_softmax_loss(queries, keys, positives, temperature)
    return full_softmax_by_chunks(queries, keys, positives, temperature, chunk_tokens)


def full_softmax_by_chunks(
    queries: Tensor, keys: Tensor, positives: Tensor, temperature: float, chunk_tokens: int
) -> Tensor:
    """`full_softmax` in PyTorch."""
    chunks = zip(queries.split(chunk_tokens), positives.split(chunk_tokens), strict=True)
    losses = [
        checkpoint(_chunk_losses, query, keys, rows, temperature, use_reentrant=False)
        for query, rows in chunks
    ]
    return torch.cat(losses)


def _chunk_losses(queries: Tensor, keys: Tensor, positives: Tensor, temperature: float) -> Tensor:
    logits = (queries @ keys.T).float() / temperature  # float32 also where autocast rounds products
    return F.cross_entropy(logits, positives.clamp(min=-1), ignore_index=-1, reduction="none")


@torch.no_grad()
def log_partition(queries: Tensor, keys: Tensor, temperature: float, chunk_tokens: int) -> Tensor:
    """log Σ_e exp(query · key_e / τ) of each query over all keys: [T], without gradient."""
    chunks = queries.split(chunk_tokens)
    return torch.cat([torch.logsumexp((q @ keys.T).float() / temperature, dim=-1) for q in chunks])
