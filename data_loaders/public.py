"""Named public data sets: where they come from, their terms, and which column is what.

A copy is a directory of Parquet files. `get` makes one from the publisher's files; a directory that
already holds the files is used as it is.
"""

import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from configs import storage, terminal
from configs.data import (
    ColumnMap,
    DwellUnit,
    ItemText,
    ParquetSource,
    PublicName,
    TimestampUnit,
    UserTable,
)
from data_loaders import public_formats
from data_loaders.copy_record import RECORD, check_copy, column_names, trust
from data_loaders.download import (
    RemoteFile,
    Say,
    UnavailableError,
    Wheel,
    cache_directory,
    fetch,
    fetch_wheel,
    mismatch,
)
from data_loaders.shards import write_table

_DAMAGE = (
    KeyError,
    EOFError,
    OSError,
    zlib.error,
    zipfile.BadZipFile,
    tarfile.TarError,
    ValueError,
)
"""What converters raise at a file that is not what its publisher offers."""
Converter = Callable[[Mapping[str, Path]], public_formats.Tables]
_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
_AMAZON = "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles"


@dataclass(frozen=True)
class PublicSet:
    """A public data set as its publisher offers it, and the meaning of its columns."""

    name: PublicName
    about: str
    terms: str
    events: int
    """Events of the published set."""
    originals: tuple[RemoteFile, ...]
    convert: Converter
    events_file: str
    columns: ColumnMap
    unit: TimestampUnit = "s"
    dwell_unit: DwellUnit = "s"
    titles: tuple[str, str, str] | None = None
    """File, item column, title column."""
    users: tuple[str, str, tuple[str, ...]] | None = None
    """File, user column, feature columns."""
    optional_rating: str | None = None
    """A rating column that some copies have."""
    optional_order: str | None = None
    """A column that orders events of equal time, which some copies have."""
    mirror: Wheel | None = None
    convert_mirror: Converter | None = None


def list_sets() -> tuple[PublicSet, ...]:
    """All named sets, by name."""
    return tuple(_SETS[name] for name in sorted(_SETS))


def get(name: str, url: str, say: Say = terminal.say) -> tuple[str, ...]:
    """URLs of the files of the set's copy in directory `url`, made if it is not there yet.

    A copy that is there is checked: against what was recorded when it was made, or, where nothing
    was, by reading the footers of its files.

    Raises:
        ValueError: unknown name, no address gives the files, or the copy is damaged; says what one
            can do.
    """
    entry = _find(name)
    events = storage.join(url, entry.events_file)
    made = not storage.exists(events)
    if made:
        _make_copy(entry, url, say)
    names = [entry.events_file, *(t[0] for t in (entry.titles, entry.users) if t is not None)]
    urls = [storage.join(url, file) for file in names]
    found = tuple(file for file in urls if storage.exists(file))
    if not made:
        check_copy(url, found, _mend(entry, url))
        say(f"{entry.name}: the copy in {url} is there and whole")
    return found


def source_of(name: str, url: str, say: Say = terminal.say) -> ParquetSource:
    """The set's copy in `url` as a source with all columns mapped; made if it is not there yet."""
    entry = _find(name)
    files = get(name, url, say)
    columns = entry.columns
    optional = {"rating": entry.optional_rating, "order": entry.optional_order}
    has = column_names(files[0]) if any(optional.values()) else []
    columns = columns.model_copy(update={k: c for k, c in optional.items() if c in has})
    item_text = user_table = None
    if entry.titles is not None and storage.join(url, entry.titles[0]) in files:
        file, item, title = entry.titles
        item_text = ItemText(url=storage.join(url, file), item=item, title=title)
    if entry.users is not None and storage.join(url, entry.users[0]) in files:
        file, user, features = entry.users
        user_table = UserTable(url=storage.join(url, file), user=user, features=features)
    return ParquetSource(
        url=files[0],
        columns=columns,
        timestamp_unit=entry.unit,
        dwell_unit=entry.dwell_unit,
        item_text=item_text,
        user_table=user_table,
    )


def _find(name: str) -> PublicSet:
    if name not in _SETS:
        raise ValueError(f"there is no public data set {name!r}; known: {sorted(_SETS)}")
    return _SETS[name]


def _mend(entry: PublicSet, url: str) -> str:
    return f"delete {storage.join(url, entry.events_file)} to have the copy made again"


def _make_copy(entry: PublicSet, url: str, say: Say) -> None:
    say(f"{entry.name}: {entry.about}; {entry.terms}")
    cache = cache_directory(entry.name)
    paths, convert, origin = _obtain(entry, url, cache, say)
    try:
        tables = convert(paths)
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a disk or a right of this machine, which says nothing of the file
        for path in paths.values():
            path.unlink()
        raise ValueError(
            f"{entry.name}: {sorted(paths)} from {origin} cannot be read ({error}); it was removed "
            f"from {cache}: run the command again, or put a good copy into {url}"
        ) from error
    storage.make_directory(url)
    digests = {name: storage.sha256_file(str(path)) for name, path in paths.items()}
    trust(entry.originals, url, digests, cache, _mend(entry, url), say)
    storage.remove(storage.join(url, RECORD))
    # The events file comes last: where it is, the copy is whole.
    order = sorted(tables, key=lambda file: file == entry.events_file)
    written = {file: write_table(url, file, tables[file]) for file in order}
    record = {
        "set": entry.name,
        "from": origin,
        "sha256": digests,
        "files": {f: {"bytes": e.bytes, "sha256": e.sha256} for f, e in written.items()},
    }
    storage.write_json(storage.join(url, RECORD), record)
    say(f"  {tables[entry.events_file].num_rows:,} events in {url}, from {origin}")


def _obtain(
    entry: PublicSet, url: str, cache: Path, say: Say
) -> tuple[dict[str, Path], Converter, str]:
    """Local paths of the publisher's files, what reads them, and where they are from."""
    try:
        paths = {r.file: _given(r, url, cache) or fetch(r, cache, say) for r in entry.originals}
        return paths, entry.convert, entry.originals[0].addresses[0]
    except UnavailableError as error:
        problem = str(error)
    if entry.mirror is not None and entry.convert_mirror is not None:
        try:
            path = fetch_wheel(entry.mirror, cache, say)
            say(f"  the publisher does not give it ({problem}); used {entry.mirror.requirement}")
            return {path.name: path}, entry.convert_mirror, entry.mirror.requirement
        except UnavailableError as error:
            problem += f"; {error}"
    files = " and ".join(remote.file for remote in entry.originals)
    raise ValueError(
        f"{entry.name} cannot be downloaded ({problem}); fetch {files} elsewhere and put it into "
        f"{url}, or point data.source.url at a directory that has {entry.events_file}"
    )


def _given(remote: RemoteFile, url: str, cache: Path) -> Path | None:
    """A copy of the publisher's file that the user put into the set's directory."""
    source = storage.join(url, remote.file)
    if not storage.exists(source):
        return None
    cache.mkdir(parents=True, exist_ok=True)
    fs, path = storage.filesystem(source)
    fs.get_file(path, str(cache / remote.file))
    wrong = mismatch(cache / remote.file, remote.checksum)
    if wrong is not None:
        raise ValueError(f"{source} is damaged: {wrong}; replace or delete it")
    return cache / remote.file


def _grouplens(file: str, checksum: str | None) -> tuple[RemoteFile]:
    return (RemoteFile(file, (f"{_GROUPLENS}/{file}",), checksum),)


def _amazon(name: PublicName, category: str, about: str, events: int) -> PublicSet:
    files = (f"reviews_{category}_5.json.gz", f"meta_{category}.json.gz")
    return PublicSet(
        name=name,
        about=about,
        terms="no explicit licence, used for research",
        events=events,
        originals=tuple(RemoteFile(file, (f"{_AMAZON}/{file}",)) for file in files),
        convert=public_formats.amazon_2014(category),
        events_file="interactions.parquet",
        columns=ColumnMap(),
        optional_rating="rating",
        optional_order="pos",
        titles=("items.parquet", "item", "title"),
    )


_MOVIELENS = ColumnMap(user="userId", item="movieId", timestamp="timestamp", rating="rating")
_MOVIES = ("movies.parquet", "movieId", "title")
_MOVIELENS_USERS = ("users.parquet", "userId", ("gender", "age", "occupation"))
_KUAIRAND_LABELS = {
    "click": "is_click",
    "like": "is_like",
    "follow": "is_follow",
    "comment": "is_comment",
    "forward": "is_forward",
    "hate": "is_hate",
    "long_view": "long_view",
    "profile": "is_profile_enter",
}
_SETS: dict[str, PublicSet] = {
    entry.name: entry
    for entry in (
        PublicSet(
            name="ml-100k",
            about="MovieLens-100K, 943 users and 1,682 films",
            terms="research use, no redistribution without permission (GroupLens)",
            events=100_000,
            originals=_grouplens("ml-100k.zip", "md5:0e33842e24a9c977be4e0107933c0723"),
            convert=public_formats.movielens_100k,
            events_file="ratings.parquet",
            columns=_MOVIELENS,
            titles=_MOVIES,
            users=_MOVIELENS_USERS,
            mirror=Wheel(
                requirement="recbole==1.2.1",
                file="recbole-1.2.1-py3-none-any.whl",
                sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            ),
            convert_mirror=public_formats.movielens_100k_wheel,
        ),
        PublicSet(
            name="ml-1m",
            about="MovieLens-1M, 6,040 users and 3,706 films",
            terms="research use, no redistribution (GroupLens)",
            events=1_000_209,
            originals=_grouplens("ml-1m.zip", "md5:c4d9eecfca2ab87c1945afe126590906"),
            convert=public_formats.movielens_1m,
            events_file="ratings.parquet",
            columns=_MOVIELENS,
            titles=_MOVIES,
            users=_MOVIELENS_USERS,
        ),
        PublicSet(
            name="ml-latest-small",
            about="MovieLens latest-small, 610 users and 9,724 films",
            terms="non-commercial use (GroupLens)",
            events=100_836,
            originals=_grouplens(
                "ml-latest-small.zip",
                "sha256:696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436",
            ),
            convert=public_formats.movielens_latest_small,
            events_file="ratings.parquet",
            columns=_MOVIELENS,
            titles=_MOVIES,
        ),
        _amazon("amazon-beauty", "Beauty", "Amazon 2014 Beauty, 5-core", 198_502),
        _amazon("amazon-sports", "Sports_and_Outdoors", "Amazon 2014 Sports, 5-core", 296_337),
        _amazon("amazon-toys", "Toys_and_Games", "Amazon 2014 Toys, 5-core", 167_597),
        PublicSet(
            name="kuairand-pure",
            about="KuaiRand-Pure short videos, the two standard logs; a click rates 1",
            terms="CC BY-SA 4.0",
            events=1_436_609,
            originals=(
                RemoteFile(
                    "KuaiRand-Pure.tar.gz",
                    ("https://zenodo.org/records/10439422/files/KuaiRand-Pure.tar.gz",),
                ),
            ),
            convert=public_formats.kuairand_pure,
            events_file="events.parquet",
            columns=ColumnMap(
                user="user_id",
                item="video_id",
                timestamp="time_ms",
                rating="is_click",
                dwell="play_time_ms",
                duration="duration_ms",
                side_features=("tab",),
                labels=_KUAIRAND_LABELS,
            ),
            unit="ms",
            dwell_unit="ms",
            users=(
                "user_features.parquet",
                "user_id",
                (
                    "user_active_degree",
                    "follow_user_num_range",
                    "fans_user_num_range",
                    "register_days_range",
                ),
            ),
        ),
    )
}
