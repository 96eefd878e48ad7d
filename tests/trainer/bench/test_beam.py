"""The bench measures what it says, on the same inputs, and notices a contestant that errs."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from launch.cli import main
from trainer.bench import beam, rivals


def test_bench_beam_leaves_a_table_and_json(tmp_path: Path) -> None:
    arguments = ["bench", "beam", "--output", str(tmp_path), "--batch", "2", "--repeats", "1"]
    cases = ["--items", "40", "--items", "3000", "--beams", "5", "--beams", "30"]
    cases += ["--part", "constraint"]
    result = CliRunner().invoke(main, [*arguments, *cases])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("mean step") == 4 and "compare timed" not in result.stdout
    found = json.loads((tmp_path / "beam.json").read_text())
    assert len(found["constraint"]) == 4 * (beam.LEVELS + 1)
    means = found["summary"]["mean_steps"]
    assert [(case["items"], case["beams"]) for case in means] == [
        (40, 5), (40, 30), (3000, 5), (3000, 30),
    ]  # fmt: skip
    for case in means:
        rows = [
            row["ms"]
            for row in found["constraint"]
            if (row["items"], row["beams"]) == (case["items"], case["beams"])
            and row["step"] != beam.TO_ITEMS
        ]
        ours, by_dict = (sum(row[name] for row in rows) for name in ("ours", "dict"))
        assert case["ours_ms"] == pytest.approx(ours / beam.LEVELS)
        assert case["over dict"] == pytest.approx(by_dict / ours)
    assert means[0]["over fewest items"] == 1.0
    growth = found["summary"]["growth_at_equal_children"]
    assert [(case["items"], case["beams"]) for case in growth] == [(3000, 5), (3000, 30)]
    within = all(case["times"] <= beam.MOST_GROWTH for case in growth)
    assert found["summary"]["growth_met"] is within
    assert result.stdout.count("over the same prefixes and children") == 2


def test_a_catalogue_that_codes_cannot_name_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["bench", "beam", "--output", str(tmp_path), "--items", "5000000000"]
    )
    assert result.exit_code == 2 and "4 levels of 256 codes" in result.stderr


def test_fewer_ids_than_beams_are_refused(tmp_path: Path) -> None:
    sizes = ["--items", "100", "--beams", "101", "--part", "constraint"]
    result = CliRunner().invoke(main, ["bench", "beam", "--output", str(tmp_path), *sizes])
    assert result.exit_code == 2 and "lower --beams or raise --items" in result.stderr


def test_contestants_make_the_same_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(4, (60, 3), generator=generator)
    trie = rivals.DictTrie(codes)
    for level in range(3):
        prefixes = codes[torch.randint(60, (3, 7), generator=generator), :level]
        expected = torch.zeros(3, 7, 4, dtype=torch.bool)
        for n in range(3):
            for w in range(7):
                match = (codes[:, :level] == prefixes[n, w]).all(1)
                expected[n, w, codes[match, level]] = True
        for mask in (trie.mask, trie.mask_numpy, rivals.PrefixComparison(codes).mask):
            assert torch.equal(mask(prefixes, 4), expected)


def test_a_contestant_with_other_results_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_but_nothing(self: object, prefixes: Tensor, size: int) -> Tensor:
        return torch.ones(*prefixes.shape[:2], size, dtype=torch.bool)

    monkeypatch.setattr(rivals.DictTrie, "mask_numpy", all_but_nothing)
    with pytest.raises(AssertionError):
        beam.bench_beam(
            str(tmp_path), items=[40], beams=[5], batch=2, repeats=1, seed=0, say=lambda _: None
        )


def test_catalogues_share_prefixes_as_real_ones_do() -> None:
    codes = beam.tree_codes(12_101, torch.Generator().manual_seed(0))
    assert torch.equal(codes, beam.tree_codes(12_101, torch.Generator().manual_seed(0)))
    ids = torch.unique(codes, dim=0)
    assert ids.shape[0] == 12_101 - 1_210 and ids.min() == 0 and ids.max() == beam.CODES - 1
    for level, real in ((2, 0.55), (3, 0.19)):  # balanced residual k-means of as many items
        _, group, count = torch.unique(
            ids[:, :level], dim=0, return_inverse=True, return_counts=True
        )
        assert float((count[group] > 1).double().mean()) == pytest.approx(real, abs=0.02)
