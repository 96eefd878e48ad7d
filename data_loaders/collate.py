"""Slices of user sequences become jagged batches: inputs, and what follows each of them.

Shape legend: B sequences, T tokens.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from data_loaders.dataset import Slices
from models.batch import JaggedBatch

SIDE, USER = "side_", "user_"


@dataclass(frozen=True)
class Following:
    """What comes after the last input of each sequence, each int64 [B]."""

    item_ids: np.ndarray
    """0 where nothing is predicted."""
    timestamps: np.ndarray


def split_last(slices: Slices) -> tuple[Slices, Following]:
    """Cut the last event off each slice: it is only predicted. Empty slices stay empty."""
    filled = slices.lengths > 0
    last = slices.offsets[1:][filled] - 1
    following = Following(*(np.zeros(len(filled), dtype=np.int64) for _ in range(2)))
    following.item_ids[filled] = slices.events["item_ids"][last]
    following.timestamps[filled] = slices.events["timestamps"][last]
    kept = np.ones(slices.offsets[-1], dtype=bool)
    kept[last] = False
    offsets = slices.offsets.copy()
    offsets[1:] -= np.cumsum(filled)
    events = {name: values[kept] for name, values in slices.events.items()}
    return replace(slices, offsets=offsets, events=events), following


def jagged_batch(slices: Slices, following: Following) -> JaggedBatch:
    """Each event predicts the next one of its sequence, the last one `following`."""
    last = slices.offsets[1:][slices.lengths > 0] - 1
    filled = slices.lengths > 0

    def shifted(values: np.ndarray, final: np.ndarray) -> torch.Tensor:
        moved = np.roll(values, -1)
        moved[last] = final[filled]
        return torch.from_numpy(moved)

    events, rows = slices.events, slices.rows
    tensors = {name: torch.from_numpy(values) for name, values in events.items()}
    return JaggedBatch(
        sample_ids=torch.from_numpy(slices.sample_ids),
        user_ids=torch.from_numpy(rows["user_id"]),
        offsets=torch.from_numpy(slices.offsets),
        item_ids=tensors["item_ids"],
        timestamps=tensors["timestamps"],
        next_timestamps=shifted(events["timestamps"], following.timestamps),
        target_ids=shifted(events["item_ids"], following.item_ids),
        ratings=tensors.get("ratings"),
        dwell_times=tensors.get("dwell_times"),
        durations=tensors.get("durations"),
        action_ids=tensors.get("action_ids"),
        labels=tensors.get("labels"),
        user_features={
            name.removeprefix(USER): torch.from_numpy(values)
            for name, values in rows.items()
            if name.startswith(USER) and name != "user_id"
        },
        side_features={
            name.removeprefix(SIDE): values
            for name, values in tensors.items()
            if name.startswith(SIDE)
        },
    )
