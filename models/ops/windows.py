"""Windows over user sequences, for models that predict after the last event only.

Shape legend: B sequences, T total tokens, N windows, S items of a session.
"""

from dataclasses import replace

import torch
from torch import Tensor

from models.batch import JaggedBatch
from models.ops.dropout import token_keys
from models.ops.jagged import lengths_to_offsets, positions_in_sequence, segment_ids

_DRAW_SALT = 0x77696E646F77  # a stream of its own, apart from dropout's of the same seed


def sliding_windows(
    batch: JaggedBatch, max_history: int, *, per_sequence: int | None, seed: int, step: int
) -> tuple[JaggedBatch, Tensor]:
    """Every token with a target becomes a sequence of the events up to it (GRID, 2507.22224).

    Args:
        batch: B sequences; `target_ids` > 0 mark the tokens that become windows.
        max_history: events of a window at most, the latest ones.
        per_sequence: windows of a sequence at most; which is a draw, a pure function of (seed,
            step, sample). None keeps all.
        seed: of the draw.
        step: of the draw.

    Returns:
        N sequences, none empty, in the order of their last tokens. `sample_ids` are a hash of
        (sample, position), so that keyed randomness depends on no batching; `target_ids` are 0
        but at last tokens. And the targets, [N] int64.

    Costs host synchronisations on an accelerator; cut windows before moving a batch there.
    """
    ends = window_ends(batch, per_sequence, seed, step)
    return windows_ending_at(batch, ends, max_history), batch.target_ids[ends]


def sliding_sessions(
    batch: JaggedBatch,
    max_history: int,
    session_items: int,
    *,
    per_sequence: int | None,
    seed: int,
    step: int,
) -> tuple[JaggedBatch, Tensor]:
    """As `sliding_windows`, with the next S items as targets: [N, S] int64.

    0 from where the sequence, or what of it is to be predicted, ends.
    """
    ends = window_ends(batch, per_sequence, seed, step)
    sequences = segment_ids(batch.offsets, batch.num_tokens)[ends]
    tokens = ends[:, None] + torch.arange(session_items, device=ends.device)
    inside = tokens < batch.offsets[1:][sequences][:, None]
    targets = batch.target_ids[tokens.clamp(max=max(batch.num_tokens - 1, 0))]
    unbroken = (inside & (targets > 0)).cumprod(dim=1)
    return windows_ending_at(batch, ends, max_history), targets * unbroken


def latest_events(
    batch: JaggedBatch, embeddings: dict[str, Tensor], count: int
) -> tuple[JaggedBatch, dict[str, Tensor], int]:
    """The last `count` events of each sequence, and their looked-up rows.

    Third comes the longest length, at least 1. Costs one host synchronisation, a second one where
    something is cut.
    """
    longest = int(batch.lengths.max()) if batch.num_sequences else 0
    if longest <= count:
        return batch, embeddings, max(longest, 1)
    total = batch.num_tokens
    ends = torch.repeat_interleave(batch.offsets[1:], batch.lengths, output_size=total)
    tokens = (torch.arange(total, device=ends.device) >= ends - count).nonzero().squeeze(1)
    kept = {
        name: rows if name.startswith("user_") else rows.index_select(0, tokens)
        for name, rows in embeddings.items()
    }
    offsets = lengths_to_offsets(batch.lengths.clamp(max=count))
    return _of_tokens(batch, tokens, offsets), kept, count


def window_ends(batch: JaggedBatch, per_sequence: int | None, seed: int, step: int) -> Tensor:
    """Last tokens of the windows of `sliding_windows`, ascending: [N] int64."""
    ends = (batch.target_ids > 0).nonzero().squeeze(1)
    if per_sequence is None:
        return ends
    draws = token_keys(seed ^ _DRAW_SALT, step, batch.sample_ids, batch.offsets)[ends]
    sequences = segment_ids(batch.offsets, batch.num_tokens)[ends]
    # Sorted by sequence, and by draw within: the first of each sequence are kept.
    order = draws.argsort()
    order = order[sequences[order].argsort(stable=True)]
    candidates = lengths_to_offsets(sequences.bincount(minlength=batch.num_sequences))
    first = positions_in_sequence(candidates, ends.numel()) < per_sequence
    return ends[order[first]].sort().values


def windows_ending_at(batch: JaggedBatch, ends: Tensor, max_history: int) -> JaggedBatch:
    """The windows of `sliding_windows` whose last tokens are `ends` [N] int64, ascending."""
    sequences = segment_ids(batch.offsets, batch.num_tokens)[ends]
    lengths = (ends - batch.offsets[sequences] + 1).clamp(max=max_history)
    offsets = lengths_to_offsets(lengths)
    total = int(offsets[-1])
    first = torch.repeat_interleave(ends - lengths + 1, lengths, output_size=total)
    tokens = first + positions_in_sequence(offsets, total)
    keys = token_keys(0, 0, batch.sample_ids, batch.offsets)[ends]
    windows = select_tokens(batch, tokens, offsets, sequences, keys)
    targets = torch.zeros_like(windows.item_ids)
    targets[offsets[1:] - 1] = batch.target_ids[ends]
    return replace(windows, target_ids=targets)


def select_tokens(
    batch: JaggedBatch, tokens: Tensor, offsets: Tensor, sequences: Tensor, sample_ids: Tensor
) -> JaggedBatch:
    """Tokens [T'] as N sequences of their own, which predict nothing.

    `offsets` [N + 1] cut the tokens, `sequences` [N] tells whose they are, and `sample_ids` [N] is
    what the new ones are called.
    """
    chosen = _of_tokens(batch, tokens, offsets)
    return replace(
        chosen,
        sample_ids=sample_ids,
        user_ids=batch.user_ids[sequences],
        user_features={name: x[sequences] for name, x in batch.user_features.items()},
        target_ids=torch.zeros_like(chosen.item_ids),
    )


def _of_tokens(batch: JaggedBatch, tokens: Tensor, offsets: Tensor) -> JaggedBatch:
    """The batch with these tokens [T'] and offsets; what belongs to sequences stays."""

    def taken(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[tokens]

    return replace(
        batch,
        offsets=offsets,
        item_ids=batch.item_ids[tokens],
        timestamps=batch.timestamps[tokens],
        next_timestamps=batch.next_timestamps[tokens],
        target_ids=batch.target_ids[tokens],
        ratings=taken(batch.ratings),
        dwell_times=taken(batch.dwell_times),
        durations=taken(batch.durations),
        action_ids=taken(batch.action_ids),
        labels=taken(batch.labels),
        item_codes=taken(batch.item_codes),
        side_features={name: x[tokens] for name, x in batch.side_features.items()},
    )
