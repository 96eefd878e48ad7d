"""The one batch type of training and evaluation: user sequences laid end to end.

Shape legend: B sequences, T total tokens of all sequences, R negatives, K losers of a preference.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class JaggedBatch:
    """Sequences of one rank's micro batch; token t of a sequence predicts `target_ids[t]`.

    Item ids are dense, 1…num_items; 0 means none. Sequences may be empty and B may be 0 (a rank
    without data).
    """

    sample_ids: Tensor
    """[B] int64, position of the user in the data set; keys all per-sample randomness."""
    user_ids: Tensor
    """[B] int64, dense user id, 1…num_users."""
    offsets: Tensor
    """[B+1] int64; sequence b owns tokens offsets[b]:offsets[b+1]."""
    item_ids: Tensor
    """[T] int64, input items."""
    timestamps: Tensor
    """[T] int64 seconds, time of each input event."""
    next_timestamps: Tensor
    """[T] int64 seconds, time of the event after it (the request time of the prediction)."""
    target_ids: Tensor
    """[T] int64, item to predict; 0 = no prediction here."""
    ratings: Tensor | None = None
    """[T] float32, rating of the input event where the source maps one."""
    dwell_times: Tensor | None = None
    """[T] float32 seconds that the user stayed with the input event's item, NaN where the log does
    not say; where the source maps one."""
    durations: Tensor | None = None
    """[T] float32 seconds that the input event's item lasts, NaN or 0 where the log does not say;
    where the source maps them."""
    action_ids: Tensor | None = None
    """[T] int64, behaviour of the input event where the source maps one."""
    labels: Tensor | None = None
    """[T] int64 bit mask of what the user did at the input event, where the source maps labels."""
    user_features: dict[str, Tensor] = field(default_factory=dict)
    """name → [B] int64 dense category of the user; 0 = unknown."""
    item_codes: Tensor | None = None
    """[T, L] int64 semantic id of each input item where a tokenizer gave one; 0s for item 0."""
    side_features: dict[str, Tensor] = field(default_factory=dict)
    """name → [T] int64 dense category of the event; 0 = unknown."""

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.sample_ids.numel()

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.item_ids.numel()

    @property
    def lengths(self) -> Tensor:
        """[B] int64 tokens of each sequence."""
        return self.offsets[1:] - self.offsets[:-1]

    def to(self, device: torch.device | str) -> "JaggedBatch":
        """Copy of the batch on `device` (itself if it is there already)."""
        return self.mapped(lambda values: values.to(device, non_blocking=True))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "JaggedBatch":
        """The batch of what `change` makes of each tensor."""
        changed: dict[str, object] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                changed[entry.name] = change(value)
            elif isinstance(value, dict):
                changed[entry.name] = {name: change(values) for name, values in value.items()}
        return replace(self, **changed)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PreferenceBatch:
    """Preferences of a micro batch: in one context, one item is liked over others, mostly one."""

    batch: JaggedBatch
    """Contexts, never empty. `sample_ids` are the pair ids; the last target is the chosen item."""
    pair_ids: Tensor
    """[B] int64, 0…pairs-1."""
    chosen_ids: Tensor
    """[B] int64, liked items."""
    rejected_ids: Tensor
    """[B, K] int64, disliked items; 0 behind the last one, of which there is at least one."""
    reference_chosen: Tensor
    """[B] float32, log-probability of the chosen item under the reference; 0 where not computed."""
    reference_rejected: Tensor
    """[B, K] float32, the same of the rejected items; anything where there is none."""

    def to(self, device: torch.device | str) -> "PreferenceBatch":
        """Copy of the batch on `device` (itself if it is there already)."""

        def moved(values: Tensor) -> Tensor:
            return values.to(device, non_blocking=True)

        return PreferenceBatch(
            batch=self.batch.to(device),
            pair_ids=moved(self.pair_ids),
            chosen_ids=moved(self.chosen_ids),
            rejected_ids=moved(self.rejected_ids),
            reference_chosen=moved(self.reference_chosen),
            reference_rejected=moved(self.reference_rejected),
        )
