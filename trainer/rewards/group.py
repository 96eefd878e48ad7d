"""What rewards see of a rollout.

Shape legend: N prompts, G candidates of a prompt (its group), L code levels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.batch import JaggedBatch


@dataclass(frozen=True)
class Group:
    """The candidates of N prompts, and what the users really took."""

    items: Tensor
    """[N, G] int64 generated items; 0 where the written id is none of the catalogue's."""
    codes: Tensor | None
    """[N, G, L] int64 generated semantic ids; None of a model that scores items."""
    valid: Tensor
    """[N, G] bool, whether there is a candidate at all: a small catalogue has fewer than G."""
    log_probs: Tensor
    """[N, G] float32 log π of each candidate; -inf where not valid."""
    target_ids: Tensor
    """[N] int64, the item that the user took next."""
    target_codes: Tensor | None
    """[N, L] int64, its semantic id."""
    contexts: JaggedBatch
    """N histories, whose last tokens the candidates follow."""

    def __post_init__(self) -> None:
        shape = self.items.shape
        assert self.valid.shape == shape and self.log_probs.shape == shape
        assert self.target_ids.shape == shape[:1]
        assert (self.codes is None) == (self.target_codes is None)

    def to(self, device: torch.device | str) -> "Group":
        """Copy on `device`."""
        return self._mapped(lambda values: values.to(device))

    def clone(self) -> "Group":
        """Copy that shares no memory."""
        return self._mapped(torch.clone)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Group":
        def changed(values: Tensor | None) -> Tensor | None:
            return None if values is None else change(values)

        return replace(
            self,
            items=change(self.items),
            codes=changed(self.codes),
            valid=change(self.valid),
            log_probs=change(self.log_probs),
            target_ids=change(self.target_ids),
            target_codes=changed(self.target_codes),
            contexts=self.contexts.mapped(change),
        )

    @property
    def legal(self) -> Tensor:
        """[N, G] bool, whether a candidate is an item of the catalogue."""
        return self.valid & (self.items > 0)

    @property
    def alike(self) -> Tensor:
        """[N, G, G] bool, whether two candidates are one outcome, as independent draws may be: the
        same id written, or the same item of a model that scores items. No outcome is not one."""
        outcomes = self.items[..., None] if self.codes is None else self.codes
        same = (outcomes[:, :, None] == outcomes[:, None]).all(-1)
        return same & self.valid[:, :, None] & self.valid[:, None]
