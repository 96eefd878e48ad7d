"""TIGER is T5 with the same weights; the bench says what it measured, and notices what differs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from configs.decoders import TIGERConfig
from configs.generation import BeamConfig
from launch.cli import main
from models.base import CatalogueSizes
from models.batch import JaggedBatch
from models.generation.catalogue_trie import CatalogueTrie
from models.generation.search import Generated, generate
from models.tiger import TIGER
from trainer.bench import generation, t5_rival
from trainer.bench.t5_rival import CachedDictTrie, T5Rival

needs_extra = pytest.mark.skipif(not t5_rival.is_installed(), reason="needs the extra `bench`")
LEVELS, SIZE, HISTORY, REQUESTS = 3, 8, 14, 3


@pytest.fixture
def found() -> tuple[TIGER, Tensor, Tensor, Generated]:
    """A small model, its catalogue, the histories' codes [N, S, L] and what was found for them."""
    torch.manual_seed(0)
    config = TIGERConfig(
        width=16, num_encoder_layers=3, num_decoder_layers=2, num_heads=2, head_width=5,
        feedforward_width=24, dropout=0.0, history=HISTORY, relative_buckets=8,
        relative_distance=20,
    )  # fmt: skip
    model = TIGER(config, (), CatalogueSizes(200, 0, {}, {}, (SIZE,) * LEVELS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a norm's scale of 1 would hide which norm it is
            parameter.add_(torch.randn_like(parameter) * 0.3)
    codes = torch.randint(SIZE, (200, LEVELS))
    read = torch.randint(200, (REQUESTS * HISTORY,))
    times = torch.arange(read.numel())
    batch = JaggedBatch(
        sample_ids=torch.arange(REQUESTS),
        user_ids=torch.arange(REQUESTS) + 1,
        offsets=torch.arange(REQUESTS + 1) * HISTORY,
        item_ids=read + 1,
        timestamps=times,
        next_timestamps=times + 1,
        target_ids=torch.zeros_like(read),
        item_codes=codes[read],
    )
    trie = CatalogueTrie.build(codes, (SIZE,) * LEVELS)
    with torch.no_grad():
        context = model.encode(batch, {}, 0, "last")
        beams = generate(model, context, REQUESTS, trie, BeamConfig(beams=6))
    return model, codes, codes[read].unflatten(0, (REQUESTS, HISTORY)), beams


@needs_extra
def test_t5_with_our_weights_returns_our_ids_and_scores(
    found: tuple[TIGER, Tensor, Tensor, Generated],
) -> None:
    model, codes, read, ours = found
    rival = T5Rival(model)
    theirs, scores = rival.generate(read, 6, CachedDictTrie(codes, SIZE), scored=True)
    assert scores is not None
    torch.testing.assert_close(ours.scores, scores, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.codes, theirs)
    assert rival.num_parameters == sum(x.numel() for x in model.parameters()) + 16  # no start head


@needs_extra
def test_t5_with_other_weights_is_noticed(found: tuple[TIGER, Tensor, Tensor, Generated]) -> None:
    model, codes, read, ours = found
    rival = T5Rival(model)
    with torch.no_grad():
        rival.model.lm_head.weight[0] += 0.1
    theirs, scores = rival.generate(read, 6, CachedDictTrie(codes, SIZE), scored=True)
    assert scores is not None
    with pytest.raises(AssertionError):
        generation.check_alike(ours, theirs, scores)


def test_other_ids_are_noticed_unless_rounding_swaps_them(
    found: tuple[TIGER, Tensor, Tensor, Generated],
) -> None:
    ours = found[-1]
    generation.check_alike(ours, ours.codes, ours.scores)
    swapped = ours.codes[:, [1, 0, 2, 3, 4, 5]]
    with pytest.raises(AssertionError, match="other ids"):
        generation.check_alike(ours, swapped, ours.scores)
    equal = ours.scores.clone()
    equal[:, 1] = equal[:, 0]
    generation.check_alike(replace(ours, scores=equal), swapped, equal)


def test_dict_trie_lists_what_follows_each_prefix() -> None:
    codes = torch.randint(4, (30, 3), generator=torch.Generator().manual_seed(0))
    trie = CachedDictTrie(codes, 4)
    start = torch.tensor([12])
    for prefix in ([], *codes[:, :1].tolist(), *codes[:, :2].tolist()):
        level = len(prefix)
        match = (codes[:, :level] == torch.tensor(prefix, dtype=torch.int64)).all(1)
        tokens = torch.tensor(prefix, dtype=torch.int64) + 4 * torch.arange(level)
        expected = {int(code) + 4 * level for code in codes[match, level]}
        listed = trie(0, torch.cat([start, tokens]))
        assert set(listed) == expected and len(listed) == len(expected)


@pytest.mark.parametrize("installed", [False, pytest.param(True, marks=needs_extra)])
def test_bench_leaves_a_table_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr(t5_rival, "is_installed", lambda: installed)
    arguments = ["bench", "beam", "--output", str(tmp_path), "--part", "generation"]
    sizes = ["--batch", "2", "--repeats", "1", "--threads", "1", "--beams", "3", "--beams", "65"]
    result = CliRunner().invoke(main, [*arguments, *sizes, "--items", "400"])
    assert result.exit_code == 0, result.output
    assert ("pip install '.[bench]'" in result.stdout) is not installed
    written = json.loads((tmp_path / "generation.json").read_text())
    rows = {(row["beams"], row["contestant"]): row for row in written["generation"]}
    rivals = [generation.CONSTRAINED, generation.FREE] if installed else []
    assert list(rows) == [
        *((3, name) for name in (generation.OURS, *rivals)), (65, generation.OURS),
    ]  # fmt: skip
    for row in rows.values():
        assert row["users_per_s"] == pytest.approx(2 / row["ms"] * 1e3)
        searched = [1, row["beams"], row["beams"], row["beams"]]
        if row["contestant"] != generation.OURS:
            assert row["asked"] == searched
        assert row["asked_share"] == pytest.approx(sum(row["asked"]) / sum(searched))
    wide = rows[65, generation.OURS]  # of 360 ids, most prefixes of three codes have one id
    assert wide["asked"][3] < 33 and f"({wide['asked_share']:.0%})" in result.stdout
    for times in written["summary"]["times"]:
        expected = rows[3, times["over"]]["ms"] / rows[3, generation.OURS]["ms"]
        assert times["users"] == pytest.approx(expected)
    assert written["machine"]["threads"] == 1 and written["summary"]["met"] is None
    assert not (tmp_path / "beam.json").exists()
