"""Public sets: made-up publishers' files become copies; ready copies are used as they are."""

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import storage
from configs.data import PublicName
from data_loaders import public
from data_loaders.download import UnavailableError, mismatch
from data_loaders.public import get, list_sets, source_of

Files = dict[str, str | bytes]


def _zip(path: Path, files: Files) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test of this file reaches the network, and the user's cache stays as it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def nothing_answers(*_: object) -> Path:
        raise UnavailableError("no answer")

    monkeypatch.setattr(public, "mismatch", lambda path, checksum: None)  # files here are made up
    monkeypatch.setattr(public, "fetch", nothing_answers)
    monkeypatch.setattr(public, "fetch_wheel", nothing_answers)


def _rows(url: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = pq.read_table(url).to_pylist()
    return rows


def test_every_name_of_the_schema_is_a_set_with_addresses() -> None:
    sets = list_sets()
    assert {entry.name for entry in sets} == set(get_args(PublicName))
    for entry in sets:
        assert all(remote.addresses for remote in entry.originals)
        for remote in entry.originals:
            assert remote.checksum is None or remote.checksum.startswith(("md5:", "sha256:"))


def test_movielens_100k_and_its_mirror_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "|".join(str(int(index in (3, 5))) for index in range(19))
    _zip(
        tmp_path / "own" / "ml-100k.zip",
        {
            "ml-100k/u.data": "196\t242\t3\t881250949\n186\t302\t3\t891717742\n",
            "ml-100k/u.item": f"242|Amélie (1997)|24-Jan-1997||http://x|{flags}\n".encode(
                "latin-1"
            ),
            "ml-100k/u.user": "196|49|M|writer|02139\n",
        },
    )
    folder = "recbole/dataset_example/ml-100k/ml-100k"
    inter = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    _zip(
        tmp_path / "toy.whl",
        {
            f"{folder}.inter": inter + "196\t242\t3\t881250949\n186\t302\t3\t891717742\n",
            f"{folder}.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\t"
            "class:token_seq\n242\tAmélie\t1997\tAnimation Comedy\n",
            f"{folder}.user": "user_id:token\tage:token\tgender:token\toccupation:token\t"
            "zip_code:token\n196\t49\tM\twriter\t02139\n",
        },
    )
    lines: list[str] = []
    own = get("ml-100k", str(tmp_path / "own"), lines.append)
    assert any("research use" in line for line in lines)
    monkeypatch.setattr(public, "fetch_wheel", lambda *_: tmp_path / "toy.whl")
    mirror = get("ml-100k", str(tmp_path / "mirror"), lines.append)
    assert len(own) == len(mirror) == 3
    for left, right in zip(own, mirror, strict=True):
        assert _rows(left) == _rows(right)
    assert _rows(own[1])[0]["title"] == "Amélie (1997)"
    assert _rows(own[1])[0]["genres"] == "Animation|Comedy"
    record = json.loads((tmp_path / "mirror" / "source.json").read_text())
    assert any("(no answer); used recbole==1.2.1" in line for line in lines)
    assert lines[-1].endswith("from recbole==1.2.1")
    assert set(record["files"]) == {"ratings.parquet", "movies.parquet", "users.parquet"}
    assert record["from"] == "recbole==1.2.1" and len(record["sha256"]["toy.whl"]) == 64
    source = source_of("ml-100k", str(tmp_path / "own"))
    assert source.columns.rating == "rating" and source.user_table is not None
    assert source.user_table.features == ("gender", "age", "occupation")
    assert source.item_text is not None and source.item_text.title == "title"


def test_movielens_1m(tmp_path: Path) -> None:
    _zip(
        tmp_path / "ml-1m.zip",
        {
            "ml-1m/ratings.dat": "1::1193::5::978300760\n",
            "ml-1m/movies.dat": "1193::It: 'Quoted' \"Film\" (1975)::Drama\n",
            "ml-1m/users.dat": "1::F::1::10::06810\n",
        },
    )
    ratings, movies, users = get("ml-1m", str(tmp_path))
    assert _rows(ratings) == [{"userId": 1, "movieId": 1193, "rating": 5, "timestamp": 978300760}]
    assert _rows(movies)[0]["title"] == "It: 'Quoted' \"Film\" (1975)"
    assert _rows(users)[0]["zip"] == "06810"


def test_movielens_latest_small_has_no_users(tmp_path: Path) -> None:
    _zip(
        tmp_path / "ml-latest-small.zip",
        {
            "ml-latest-small/ratings.csv": "userId,movieId,rating,timestamp\n1,2,4.5,964982703\n",
            "ml-latest-small/movies.csv": 'movieId,title,genres\n2,"Film, The (1995)",Drama\n',
        },
    )
    source = source_of("ml-latest-small", str(tmp_path))
    assert source.user_table is None and source.item_text is not None
    assert _rows(source.item_text.url)[0]["title"] == "Film, The (1995)"


def test_amazon_orders_by_time_and_then_as_the_file(tmp_path: Path) -> None:
    reviews = [("u1", "b", 5.0, 200), ("u2", "a", 1.0, 100), ("u1", "c", 4.0, 100)]
    names = ("reviewerID", "asin", "overall", "unixReviewTime")
    lines = [json.dumps(dict(zip(names, review, strict=True))) for review in reviews]
    known = "{'asin': 'a', 'title': \"It's\", 'categories': [['Beauty', 'Hair']]}\n"
    meta = known + "{'asin': 'z', 'title': 'no'}\n{'asin': 'b'}\n"
    (tmp_path / "reviews_Beauty_5.json.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "meta_Beauty.json.gz").write_bytes(gzip.compress(meta.encode()))
    source = source_of("amazon-beauty", str(tmp_path))
    assert [(r["user"], r["item"]) for r in _rows(source.url)] == [
        ("u2", "a"),
        ("u1", "c"),
        ("u1", "b"),
    ]
    assert source.columns.rating == "rating"
    assert source.item_text is not None
    assert _rows(source.item_text.url) == [
        {"item": "a", "title": "It's", "categories": [["Beauty", "Hair"]]},
        {"item": "b", "title": None, "categories": None},
    ]


def test_amazon_copies_that_number_events_are_ordered_by_it(tmp_path: Path) -> None:
    rows = {"user": [1, 1], "item": [7, 8], "timestamp": [5, 5], "pos": [1, 0]}
    pq.write_table(pa.table(rows), tmp_path / "interactions.parquet")
    columns = source_of("amazon-beauty", str(tmp_path)).columns
    assert columns.order == "pos" and columns.rating is None


def test_kuairand_joins_its_logs(tmp_path: Path) -> None:
    members = {
        "log_standard_4_22_to_5_08_pure.csv": "user_id,video_id,time_ms,is_click,tab\n1,2,20,0,4\n",
        "log_standard_4_08_to_4_21_pure.csv": "user_id,video_id,time_ms,is_click,tab\n1,3,10,1,1\n",
        "log_random_4_22_to_5_08_pure.csv": "user_id\n9\n",
        "user_features_pure.csv": "user_id,user_active_degree\n1,full_active\n",
        "video_features_basic_pure.csv": "video_id,author_id\n2,7\n",
    }

    def pack(names: list[str]) -> None:
        with tarfile.open(tmp_path / "KuaiRand-Pure.tar.gz", "w:gz") as archive:
            for name in names:
                info = tarfile.TarInfo(f"KuaiRand-Pure/data/{name}")
                info.size = len(members[name])
                archive.addfile(info, io.BytesIO(members[name].encode()))

    pack(list(members)[:2])
    with pytest.raises(ValueError, match="lacks.*user_features"):
        get("kuairand-pure", str(tmp_path))
    pack(list(members))
    source = source_of("kuairand-pure", str(tmp_path))
    assert [row["video_id"] for row in _rows(source.url)] == [3, 2]
    assert source.timestamp_unit == "ms" and source.columns.rating == "is_click"
    assert source.dwell_unit == "ms" and source.columns.dwell == "play_time_ms"
    assert source.columns.duration == "duration_ms"
    assert source.columns.labels["hate"] == "is_hate" and len(source.columns.labels) == 8


def test_a_ready_copy_is_used_as_it_is(tmp_path: Path) -> None:
    table = pa.table({"userId": [1], "movieId": [2], "rating": [3], "timestamp": [4]})
    pq.write_table(table, tmp_path / "ratings.parquet")
    assert get("ml-1m", str(tmp_path)) == (f"{tmp_path}/ratings.parquet",)
    source = source_of("ml-1m", str(tmp_path))
    assert source.item_text is None and source.user_table is None
    assert [path.name for path in tmp_path.iterdir()] == ["ratings.parquet"]


def _copy(path: Path) -> Path:
    """A copy of ml-latest-small in `path`, made from a publisher's file."""
    files: Files = {
        "ml-latest-small/ratings.csv": "userId,movieId,rating,timestamp\n1,2,4.5,964982703\n",
        "ml-latest-small/movies.csv": "movieId,title,genres\n2,Film (1995),Drama\n",
    }
    _zip(path / "ml-latest-small.zip", files)
    get("ml-latest-small", str(path), lambda line: None)
    return path


def test_a_copy_is_checked_against_its_record(tmp_path: Path) -> None:
    lines: list[str] = []
    copy = _copy(tmp_path / "copy")
    assert len(get("ml-latest-small", str(copy), lines.append)) == 2
    assert "is there and whole" in lines[-1]
    ratings = (copy / "ratings.parquet").read_bytes()
    (copy / "ratings.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"ratings.parquet is damaged: it has 4 bytes .*delete"):
        get("ml-latest-small", str(copy))
    (copy / "ratings.parquet").write_bytes(ratings[:20] + b"?" + ratings[21:])
    with pytest.raises(ValueError, match=r"ratings.parquet is damaged: its sha256"):
        source_of("ml-latest-small", str(copy))
    (copy / "ratings.parquet").unlink()  # the mend that the message names
    assert len(get("ml-latest-small", str(copy))) == 2
    (copy / "movies.parquet").unlink()
    with pytest.raises(ValueError, match=r"movies.parquet is gone"):
        get("ml-latest-small", str(copy))


@pytest.mark.parametrize("record", [None, {"set": "ml-latest-small"}])
def test_a_copy_without_a_record_has_footers_that_read(
    tmp_path: Path, record: dict[str, str] | None
) -> None:
    copy = _copy(tmp_path / "copy")
    (copy / "source.json").unlink()
    if record is not None:  # as earlier versions wrote it
        (copy / "source.json").write_text(json.dumps(record))
    assert len(get("ml-latest-small", str(copy))) == 2
    (copy / "movies.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"movies.parquet is no Parquet \(.*; delete"):
        get("ml-latest-small", str(copy))


def test_unreachable_set_says_what_one_can_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        get("ml-1m", str(tmp_path / "copy"), lambda line: None)
    message = str(error.value)
    assert "ml-1m cannot be downloaded (no answer); fetch ml-1m.zip elsewhere" in message
    assert str(tmp_path / "copy") in message and "ratings.parquet" in message


def test_unknown_set_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no public data set 'ml-2m'; known: \['amazon-beauty'"):
        get("ml-2m", "anywhere")


def test_damaged_file_is_said_and_not_kept(tmp_path: Path) -> None:
    (tmp_path / "ml-1m.zip").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"cannot be read .* run the command again"):
        get("ml-1m", str(tmp_path))
    assert not (tmp_path / "cache" / "tandem" / "ml-1m" / "ml-1m.zip").exists()


def test_file_with_a_wrong_checksum_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public, "mismatch", mismatch)
    _zip(tmp_path / "ml-1m.zip", {"ml-1m/ratings.dat": "1::1193::5::978300760\n"})
    with pytest.raises(ValueError, match=r"ml-1m.zip is damaged: its md5 checksum is"):
        get("ml-1m", str(tmp_path))


def test_a_file_without_a_published_checksum_is_trusted_once(tmp_path: Path) -> None:
    line = '{"reviewerID": "u", "asin": "a", "overall": 5.0, "unixReviewTime": 100}'
    reviews, copy = tmp_path / "reviews_Beauty_5.json.gz", tmp_path / "interactions.parquet"
    reviews.write_bytes(gzip.compress(line.encode(), mtime=0))
    (tmp_path / "meta_Beauty.json.gz").write_bytes(gzip.compress(b"{'asin': 'a'}\n"))
    said: list[str] = []
    get("amazon-beauty", str(tmp_path), said.append)
    digest = storage.sha256_file(str(reviews))
    told, _ = [line for line in said if "no published checksum" in line]  # reviews, and metadata
    assert "no published checksum" in told and told.endswith(f"source.json records sha256 {digest}")
    copy.unlink()
    said.clear()
    get("amazon-beauty", str(tmp_path), said.append)  # the same files again: nothing to tell
    assert copy.exists() and not any("no published checksum" in line for line in said)
    copy.unlink()
    reviews.write_bytes(gzip.compress(line.replace("5.0", "1.0").encode(), mtime=0))
    with pytest.raises(ValueError, match=rf"earlier copy in .* was made from {digest}; .*delete"):
        get("amazon-beauty", str(tmp_path))
    (tmp_path / "source.json").unlink()  # the mend that the message names
    get("amazon-beauty", str(tmp_path))
    assert copy.exists()
