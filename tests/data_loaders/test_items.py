"""Names of items and users of a data set that `prepare` did not shard by hash."""

from pathlib import Path

import numpy as np
import pytest

from data_loaders.items import action_names, find_users, raw_items, titles, train_counts
from data_loaders.synthetic import ACTIONS, write_synthetic


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("data"))
    write_synthetic(path, 50, 40, 8.0, 3, num_shards=3, rows_per_group=4, empty_shards=1)
    return path


def test_names_in_the_order_asked(url: str) -> None:
    assert titles(url, [40, 1, 40]) == ["Item 40", "Item 1", "Item 40"]
    assert raw_items(url, np.array([7])) == ["item-7"]
    assert titles(url, []) == []
    assert train_counts(url).shape == (40,)


def test_kinds_of_action_by_id(url: str, tmp_path: Path) -> None:
    assert action_names(url) == ()
    write_synthetic(str(tmp_path), 5, 5, 3.0, 3, actions=True)
    assert action_names(str(tmp_path)) == ACTIONS


def test_users_in_any_shard(url: str) -> None:
    raw = ["user-50", "user-1", "user-23", "user-1"]
    assert find_users(url, raw).tolist() == [50, 1, 23, 1]
    assert find_users(url, []).tolist() == []


def test_unknown_ids_are_named(url: str) -> None:
    with pytest.raises(ValueError, match="item id 41 is not in 1…40"):
        titles(url, [1, 41])
    with pytest.raises(ValueError, match=r"users \['nobody'\] are not in the prepared data set"):
        find_users(url, ["user-1", "nobody"])


def test_missing_part_is_named(tmp_path: Path) -> None:
    write_synthetic(str(tmp_path), 5, 5, 3.0, 3)
    (tmp_path / "items" / "part-00000.parquet").unlink()
    with pytest.raises(ValueError, match=r"items/part-00000.parquet is missing.*--force"):
        titles(str(tmp_path), [1])
