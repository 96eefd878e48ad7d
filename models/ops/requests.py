"""User sequences cut into requests: a history, and the events that followed as candidates.

Shape legend: B sequences, T total tokens, N requests, M candidates of a request.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.batch import JaggedBatch
from models.ops.dropout import token_keys
from models.ops.hashing import GOLDEN_64, as_signed, mix64
from models.ops.jagged import lengths_to_offsets, positions_in_sequence, segment_ids
from models.ops.windows import select_tokens

_PHASE_SALT, _DRAW_SALT = 0x7068617365, 0x72657175657374  # streams of their own


@dataclass(frozen=True)
class Requests:
    """N requests cut from a batch of sequences."""

    batch: JaggedBatch
    """Histories, some maybe empty. `next_timestamps` of a last event is the time of the request:
    that of its first candidate. `sample_ids` hash (sample, place), so that keyed randomness
    depends on no batching; `target_ids` are 0."""
    tokens: Tensor
    """[N, M] int64, where the candidates lie in the batch that was cut; -1 where there are none."""


def cut_requests(
    batch: JaggedBatch,
    candidates: int,
    max_history: int,
    *,
    first: Tensor | None = None,
    per_sequence: int | None = None,
    phase: tuple[int, int] | None = None,
) -> Requests:
    """Every event becomes a candidate of one request, M consecutive ones sharing it.

    Args:
        batch: B sequences, at least those events that are to be candidates.
        candidates: M.
        max_history: events of a history at most, the latest ones.
        first: [B] place of each sequence's first candidate; None: its first event.
        per_sequence: requests of a sequence at most, a draw of `phase`. None keeps all.
        phase: (seed, step) that shift where requests begin, so that each event comes to stand at
            each place among the candidates; None begins at `first`.

    Costs host synchronisations on an accelerator; cut requests before moving a batch there.
    """
    lengths = batch.lengths
    first = torch.zeros_like(lengths) if first is None else torch.minimum(first, lengths)
    shift = torch.zeros_like(lengths)
    if phase is not None and candidates > 1:
        shift = _draws(batch.sample_ids, _PHASE_SALT, phase).remainder(candidates)
    counts = torch.where(lengths > first, (lengths - first + shift + candidates - 1), 0)
    owned = lengths_to_offsets(counts // candidates)
    total = int(owned[-1])
    sequence = segment_ids(owned, total)
    begin = first[sequence] - shift[sequence]
    begin = begin + positions_in_sequence(owned, total) * candidates
    end = torch.minimum(begin + candidates, lengths[sequence])
    begin = torch.maximum(begin, first[sequence])
    if per_sequence is not None:
        assert phase is not None, "a draw has a seed and a step"
        kept = _drawn(batch, sequence, begin, per_sequence, phase)
        sequence, begin, end = sequence[kept], begin[kept], end[kept]
    start = batch.offsets[sequence]
    place = begin[:, None] + torch.arange(candidates, device=begin.device)
    tokens = torch.where(place < end[:, None], start[:, None] + place, -1)
    return Requests(_histories(batch, sequence, start + begin, begin, max_history), tokens)


def request_slice(requests: Requests, begin: int, count: int) -> Requests:
    """Requests begin … begin + count - 1, as many of them as there are."""
    rows = torch.arange(len(requests.tokens), device=requests.tokens.device)[begin : begin + count]
    batch, lengths = requests.batch, requests.batch.lengths[rows]
    offsets = lengths_to_offsets(lengths)
    total = int(offsets[-1])
    tokens = torch.repeat_interleave(batch.offsets[rows], lengths, output_size=total)
    tokens = tokens + positions_in_sequence(offsets, total)
    kept = select_tokens(batch, tokens, offsets, rows, batch.sample_ids[rows])
    return Requests(kept, requests.tokens[rows])


def _histories(
    batch: JaggedBatch, sequence: Tensor, ends: Tensor, before: Tensor, max_history: int
) -> JaggedBatch:
    """The latest of the `before` [N] events before token `ends` [N], as sequences of their own."""
    kept = before.clamp(max=max_history)
    offsets = lengths_to_offsets(kept)
    total = int(offsets[-1])
    tokens = torch.repeat_interleave(ends - kept, kept, output_size=total)
    tokens = tokens + positions_in_sequence(offsets, total)
    keys = token_keys(0, 0, batch.sample_ids, batch.offsets)[ends]
    return select_tokens(batch, tokens, offsets, sequence, keys)


def _draws(values: Tensor, salt: int, phase: tuple[int, int]) -> Tensor:
    """int64 ≥ 0 for each value, a pure function of both and the salt."""
    seed, step = phase
    stream = as_signed((seed + salt) * GOLDEN_64 + step + 1)
    return mix64(mix64(values) + stream) & 0x7FFFFFFFFFFFFFFF


def _drawn(
    batch: JaggedBatch, sequence: Tensor, begin: Tensor, count: int, phase: tuple[int, int]
) -> Tensor:
    """Requests that are kept, ascending: at most `count` of each sequence."""
    draws = _draws(batch.sample_ids[sequence] * (1 << 32) + begin, _DRAW_SALT, phase)
    order = draws.argsort()
    order = order[sequence[order].argsort(stable=True)]
    owned = lengths_to_offsets(sequence.bincount(minlength=batch.num_sequences))
    return order[positions_in_sequence(owned, len(sequence)) < count].sort().values
