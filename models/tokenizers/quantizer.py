"""What every quantizer is: embeddings to codes and back, frozen after fitting.

Shape legend: n rows, C rows of a block, D width, L code levels, K codes of a level.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from configs.tokenizers import Quantizer as QuantizerConfig
from models.tokenizers.nearest import by_blocks


class Quantizer(nn.Module, ABC):
    """Maps an embedding to one code per level. Codes of a row depend on nothing but the row."""

    config: QuantizerConfig
    ordered: bool
    """Whether level l refines level l − 1 (residuals), or digits stand side by side (slices)."""
    width: int
    """D."""
    codebook_sizes: tuple[int, ...]
    """Codes of each level; L of them."""

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes of embeddings `x` [n, D] float32: int64 [n, L].

        Raises:
            ValueError: `x` is not a float32 matrix of width D.
        """
        self._check(x)
        return by_blocks(self._encode_block, x)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Embeddings that `codes` int64 [n, L] stand for: float32 [n, D]."""
        return by_blocks(self._decode_block, codes)

    @torch.no_grad()
    def ranked_last_level(self, x: Tensor, codes: Tensor) -> Tensor:
        """Codes of the last level from nearest to farthest, given the others: int64 [n, K].

        Args:
            x: [n, D] float32 embeddings.
            codes: [n, L] int64; the last column is not read.

        Where `codes` come from `encode`, the first candidate is its last code.
        """
        self._check(x)
        return by_blocks(self._rank_block, x, codes)

    def _rank_block(self, x: Tensor, codes: Tensor) -> Tensor:
        return self._last_costs(x, codes).argsort(dim=1, stable=True)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.width or x.dtype != torch.float32:
            raise ValueError(
                f"this tokenizer was fitted to float32 embeddings of width {self.width}, got "
                f"{x.dtype} of shape {tuple(x.shape)}; use the encoder that it was fitted with"
            )

    @abstractmethod
    def _encode_block(self, x: Tensor) -> Tensor:
        """Codes [C, L] of a block of rows [C, D]."""

    @abstractmethod
    def _decode_block(self, codes: Tensor) -> Tensor:
        """Embeddings [C, D] of a block of codes [C, L]."""

    @abstractmethod
    def _last_costs(self, x: Tensor, codes: Tensor) -> Tensor:
        """Cost [C, K] of each code of the last level, given codes [C, L] of the others."""
