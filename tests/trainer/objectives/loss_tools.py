"""Calls a loss module as the training step does, with tables played by plain tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharding.loss_module import LossModule, LossOutput


def run_loss(
    module: LossModule, inputs: Any, tables: dict[str, Tensor], others: Sequence[int] = ()
) -> LossOutput:
    """Unique rows in, positions beside them; differentiable in the tables.

    `others` are ids that other micro batches of the step want of every table.
    """
    rows: dict[str, Tensor] = {}
    index: dict[str, dict[str, Tensor]] = {}
    for table, features in module.required_ids(inputs).items():
        flat = torch.cat(
            [*(ids.flatten() for ids in features.values()), torch.tensor(others).long()]
        )
        unique, places = torch.unique(flat, return_inverse=True)
        rows[table] = tables[table][unique] * (unique > 0)[:, None]
        parts = places.split([*(ids.numel() for ids in features.values()), len(others)])
        index[table] = {
            name: part.view(ids.shape)
            for (name, ids), part in zip(features.items(), parts, strict=False)
        }
    return module.forward(inputs, rows, index)
