"""Names of items and users of a data set that `prepare` did not shard by hash."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import storage
from data_loaders.items import action_names, find_users, item_parts, raw_items, titles, train_counts
from data_loaders.manifest import read_manifest
from data_loaders.shards import open_part, read_table
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


READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "titles": ("items/part-00000.parquet", lambda url: titles(url, [3])),
    "raw_items": ("items/part-00000.parquet", lambda url: raw_items(url, [3])),
    "train_counts": ("items/part-00000.parquet", train_counts),
    "item_parts": ("items/part-00000.parquet", lambda url: item_parts(url)[0].column("item")),
    "action_names": ("vocabularies/actions.parquet", action_names),
    "find_users": ("sequences/part-00000.parquet", lambda url: find_users(url, ["user-1"])),
}


@pytest.mark.parametrize("reader", READERS)
def test_damage_is_never_silent_and_one_sentence(tmp_path: Path, reader: str) -> None:
    """Bits flipped anywhere in a file, footer and page headers among it, and a file cut short."""
    name, read = READERS[reader]
    write_synthetic(str(tmp_path / "whole"), 40, 30, 4.0, 3, actions=True, num_shards=1)
    whole = (tmp_path / "whole" / name).read_bytes()
    bits = np.random.default_rng(0).choice(8 * len(whole), 25, replace=False)
    damaged = [whole[: len(whole) // 2], b"", whole[: -len(whole) // 4]]
    for place, bit in (divmod(int(bit), 8) for bit in bits):
        damaged.append(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
    expected = read(str(tmp_path / "whole"))
    assert len(expected)
    write_synthetic(str(tmp_path / "bad"), 40, 30, 4.0, 3, actions=True, num_shards=1)
    for content in damaged:  # nothing of the file was whole when it was first read
        (tmp_path / "bad" / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} .*(damaged|cannot be read).*--force") as e:
            read(str(tmp_path / "bad"))
        assert "\n" not in str(e.value)
    (tmp_path / "bad" / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing.*--force"):
        read(str(tmp_path / "bad"))


def test_a_part_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_synthetic(str(tmp_path), 5, 5, 3.0, 3)
    hashed: list[str] = []
    real = storage.sha256_file
    monkeypatch.setattr(storage, "sha256_file", lambda url: hashed.append(url) or real(url))
    for _ in range(3):
        titles(str(tmp_path), [1])
        train_counts(str(tmp_path))
    paths = [entry.path for entry in read_manifest(str(tmp_path)).items if entry.rows]
    assert sorted(hashed) == [str(tmp_path / path) for path in sorted(paths)]


def test_a_staged_part_that_is_damaged_is_named(tmp_path: Path) -> None:
    write_synthetic(str(tmp_path), 5, 5, 3.0, 3)
    url = str(tmp_path / "items" / "part-00000.parquet")
    message = r"part-00000.parquet is missing or damaged \(.*--force"
    with pytest.raises(ValueError, match=message), open_part(url) as parquet:
        parquet.read(["item"]).column("nothing")
    Path(url).write_bytes(b"PAR1 no longer")
    with pytest.raises(ValueError, match=r"is missing or damaged \(.*; run the same command again"):
        read_table(url)
