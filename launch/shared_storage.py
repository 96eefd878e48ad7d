"""Refuse paths of a run that some node of the cluster does not see.

Tasks of `prepare` and workers run on any node, so a local path must be the same storage on all.
"""

import os
import uuid
from collections.abc import Mapping

import ray
from ray.exceptions import NodeDiedError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from configs import storage
from configs.data import Source
from data_loaders.matching import matching_files

PROBED_FILES = 64
"""Files of an input that every node is asked for, however many there are."""


def alive_nodes() -> dict[str, str]:
    """Id → address of the cluster's living nodes."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def check_output(url: str) -> None:
    """Create a run's output directory; refuse one that some node does not see.

    Raises:
        ValueError: names the directory, the node, and the mend.
    """
    storage.make_directory(url)
    _check_directory("output", url)


def check_inputs(source: Source) -> None:
    """Refuse files of the recipe's source that some node does not see.

    Every node is asked for the size of at most `PROBED_FILES` files of each input, evenly spread.

    Raises:
        ValueError: names the key, the node, a file it lacks, and the mend.
    """
    if len(alive_nodes()) < 2:
        return
    for key, url in _input_urls(source).items():
        if not storage.is_local(url):
            continue
        if source.kind == "public" and all(n[0] in "._" for n in storage.list_names(url)):
            storage.make_directory(url)  # the copy will be downloaded to there
            _check_directory(key, url)
            continue
        paths = [path for _, path, _ in matching_files(url, key)]
        spread = paths[:: -(-len(paths) // PROBED_FILES)]
        _refuse_blind(key, url, {path: os.path.getsize(path) for path in spread})


def _input_urls(source: Source) -> dict[str, str]:
    """Recipe key → absolute URL of what `prepare` reads."""
    urls = {} if source.url is None else {"data.source.url": source.url}
    if source.kind != "public":
        if source.item_text is not None:
            urls["data.source.item_text.url"] = source.item_text.url
        if source.user_table is not None:
            urls["data.source.user_table.url"] = source.user_table.url
    return {key: storage.absolute(url) for key, url in urls.items()}


def _check_directory(key: str, url: str) -> None:
    if len(alive_nodes()) < 2 or not storage.is_local(url):
        return
    probe, content = storage.join(url, f".probe-{uuid.uuid4().hex}"), b"tandem"
    storage.write_bytes(probe, content)
    try:
        _refuse_blind(key, url, {probe: len(content)})
    finally:
        storage.remove(probe)


@ray.remote(num_cpus=0)
def _first_unseen(sizes: Mapping[str, int]) -> str | None:
    for path, size in sizes.items():
        try:
            if os.path.getsize(path) != size:
                return path
        except OSError:
            return path
    return None


def _refuse_blind(key: str, url: str, sizes: Mapping[str, int]) -> None:
    """Ask every node for files; `sizes` is path → bytes as this process sees them."""
    nodes, argument = alive_nodes(), ray.put(sizes)
    asked = {
        node: _first_unseen.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(argument)
        for node in nodes
    }
    blind = {}
    for node, answer in asked.items():
        try:
            unseen = ray.get(answer)
        except (NodeDiedError, TaskUnschedulableError):
            continue  # it left the cluster meanwhile, and will run nothing
        if unseen is not None:
            blind[node] = unseen
    if blind:
        node, path = next(iter(blind.items()))
        raise ValueError(
            f"{key}={url!r} is not seen by node {nodes[node]}, where {os.path.basename(path)} is "
            f"absent or another file ({len(blind)} of {len(nodes)} nodes do not see it); put it on "
            "storage that every node mounts, or on an object store (s3://…, gs://…)"
        )
