"""In-batch positives: a draw of the global batch, whoever holds which part of it."""

import torch

from models.batch import JaggedBatch
from models.ops.dropout import token_keys
from sharding.process_group import current_context
from tests.harness import run_ranks
from trainer.in_batch import gather_positives

SEQUENCES, ITEMS, SEED = 12, 500, 7
COUNTS = (1, 9, 1000)


def batch_of(rows: list[int]) -> JaggedBatch:
    """Some sequences of the global batch; sequence r has r % 5 events, some without a target."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(1, ITEMS, (SEQUENCES, 5), generator=generator)
    targets[torch.rand(SEQUENCES, 5, generator=generator) < 0.2] = 0
    lengths = torch.tensor([r % 5 for r in rows], dtype=torch.int64)
    flat = torch.cat([torch.zeros(0, dtype=torch.int64), *(targets[r, : r % 5] for r in rows)])
    return JaggedBatch(
        sample_ids=torch.tensor(rows, dtype=torch.int64),
        user_ids=torch.tensor(rows, dtype=torch.int64) + 1,
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        item_ids=torch.ones_like(flat),
        timestamps=torch.zeros_like(flat),
        next_timestamps=torch.zeros_like(flat),
        target_ids=flat,
    )


def drawn(deals: list[list[list[list[int]]]]) -> list[list[list[int]]]:
    """For each way to deal sequences (rank → micro batch → rows): the draws of each count."""
    ctx = current_context("cpu")
    draws = []
    for deal in deals:
        batches = [batch_of(rows) for rows in deal[ctx.rank]]
        draws.append([gather_positives(batches, n, SEED, 4, ctx).tolist() for n in COUNTS])
    return draws


def lowest_keys(step: int) -> list[int]:
    """Every target of the global batch, by key."""
    whole = batch_of(list(range(SEQUENCES)))
    keys = token_keys(SEED, step, whole.sample_ids, whole.offsets).tolist()
    pairs = zip(keys, whole.target_ids.tolist(), strict=True)
    return [target for _, target in sorted(p for p in pairs if p[1])]


def test_the_draw_is_of_the_global_batch_in_every_world_and_micro_batching() -> None:
    rows = list(range(SEQUENCES))
    alone = [[[rows]], [[rows[8:], rows[:3], [], rows[3:8]]]]
    shared = [
        [[rows[::2]], [rows[1::2]]],
        [[rows[:2], rows[2:3]], [rows[3:9], rows[9:]]],
        [[rows], [[]]],
    ]
    expected = [lowest_keys(4)[:count] for count in COUNTS]
    assert len(expected[2]) < COUNTS[2] and len(set(expected[2])) > 10
    assert lowest_keys(5) != lowest_keys(4)
    assert run_ranks(1, drawn, alone) == [[expected] * len(alone)]
    assert run_ranks(2, drawn, shared) == [[expected] * len(shared)] * 2
