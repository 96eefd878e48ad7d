"""Distinct ids of a step, and where each requested id lies among them.

Shape legend: n ids, U distinct ids, V table rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BITMAP_ROWS = 1 << 16  # tables of so few rows always use the bitmap


def distinct_ids(table: str, ids: Sequence[Tensor], num_rows: int) -> tuple[Tensor, list[Tensor]]:
    """Sorted distinct ids [U] of all `ids`, and positions in them shaped like each of `ids`.

    Uses a bitmap of the table's rows where that is cheaper than sorting.

    Raises:
        ValueError: an id lies outside 0…V-1.
    """
    flat = [values.reshape(-1) for values in ids]
    together = torch.cat(flat) if len(flat) > 1 else flat[0]
    if num_rows <= max(BITMAP_ROWS, 4 * together.numel()):
        distinct, positions = _by_bitmap(table, together, num_rows)
    else:
        distinct, positions = torch.unique(together, return_inverse=True)
        if distinct.numel() and not 0 <= int(distinct[0]) <= int(distinct[-1]) < num_rows:
            raise _outside(table, distinct, num_rows)
    pieces = positions.split([values.numel() for values in flat])
    return distinct, [piece.view(values.shape) for piece, values in zip(pieces, ids, strict=True)]


def _by_bitmap(table: str, ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    present = torch.zeros(num_rows, dtype=torch.bool, device=ids.device)
    try:
        present.index_fill_(0, ids, True)
    except (IndexError, RuntimeError) as error:
        raise _outside(table, ids, num_rows) from error
    distinct = present.nonzero().view(-1)
    place = torch.empty(num_rows, dtype=torch.int64, device=ids.device)
    place.index_copy_(0, distinct, torch.arange(distinct.numel(), device=ids.device))
    return distinct, place.gather(0, ids)


def _outside(table: str, ids: Tensor, num_rows: int) -> ValueError:
    return ValueError(
        f"table {table!r} has rows 0 to {num_rows - 1:,}, but ids {int(ids.min()):,} to "
        f"{int(ids.max()):,} were looked up; the data set and the model's sizes disagree"
    )
