"""How large an elastic group is: sizes that divide the batches, and find places."""

import pytest

from configs.load import load_recipe
from launch.elastic import fitting, free_places

NODES = {"a": {"CPU": 5.0, "GPU": 4.0}, "b": {"CPU": 1.0, "GPU": 4.0}, "c": {"CPU": 8.0}}


@pytest.mark.parametrize(
    ("needed", "held", "places"),
    [
        ({"CPU": 1.0}, {}, {"a": 5, "b": 1, "c": 8}),
        ({"CPU": 2.0}, {"b": 1}, {"a": 2, "b": 1, "c": 4}),
        ({"CPU": 1.0, "GPU": 1.0}, {"a": 4}, {"a": 8, "b": 1, "c": 0}),
        ({"CPU": 0.5, "GPU": 0.0}, {}, {"a": 10, "b": 2, "c": 16}),
        ({"CPU": 0.1}, {}, {"a": 50, "b": 10, "c": 80}),
        ({"CPU": 0.2}, {}, {"a": 25, "b": 5, "c": 40}),
    ],
)
def test_places_are_what_runs_and_what_is_free(
    needed: dict[str, float], held: dict[str, int], places: dict[str, int]
) -> None:
    assert free_places(NODES, needed, held) == places


@pytest.mark.parametrize(
    ("strategy", "size"), [("PACK", 8), ("SPREAD", 8), ("STRICT_SPREAD", 2), ("STRICT_PACK", 4)]
)
def test_the_largest_size_that_fits(strategy: str, size: int) -> None:
    assert fitting((1, 2, 4, 8, 16), {"a": 7, "b": 2, "c": 0}, strategy) == size
    assert fitting((16,), {"a": 7, "b": 2}, strategy) == 0


def test_sizes_divide_every_batch() -> None:
    def sizes(*overrides: str) -> tuple[int, ...]:
        batches = ["data.loader.global_batch=48", "alignment.pairs_per_step=96"]
        more = ["cluster.data_cpus=64", *batches, *overrides]
        return load_recipe("quickstart", more).recipe.worker_sizes()

    assert sizes("cluster.num_workers=16", "cluster.min_workers=2") == (2, 3, 4, 6, 8, 12, 16)
    assert sizes("cluster.num_workers=16") == (16,)
    for wrong, sentence in {
        "cluster.min_workers=5": "global_batch=48 must be a multiple of cluster.min_workers=5",
        "cluster.min_workers=24": "min_workers=24 exceeds num_workers=16",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            sizes("cluster.num_workers=16", wrong)
