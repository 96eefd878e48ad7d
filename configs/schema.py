"""Questions about the typed schema: which settings exist at a place and what they allow."""

import difflib
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from configs.base import Config

Block = type[Config]


def blocks(annotation: Any) -> tuple[Block, ...]:
    """Groups of settings that may stand where `annotation` does; two or more are a tagged union."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return (annotation,)
    if get_origin(annotation) is Annotated:
        return blocks(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(block for part in get_args(annotation) for block in blocks(part))
    return ()


def kinds(annotation: Any) -> dict[str, Block]:
    """Tag → block of a tagged union; empty for anything else."""
    found = blocks(annotation)
    if len(found) < 2:
        return {}
    return {kind: b for b in found for kind in literals(b.model_fields["kind"].annotation)}


def literals(annotation: Any) -> tuple[Any, ...]:
    """Values that a Literal (or Literal | None) allows; empty for other types."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(value for part in get_args(annotation) for value in literals(part))
    return ()


def inside(annotation: Any, key: str, kind: str | None = None) -> Any:
    """Type of `key` inside a block or mapping; None where nothing of that name is known.

    `kind` chooses the block of a tagged union.
    """
    tagged = kinds(annotation)
    if tagged:
        annotation = tagged.get(kind) if kind is not None else None
    found = blocks(annotation)
    if found:
        field = found[0].model_fields.get(key)
        return None if field is None else field.annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is dict:
        return arguments[1]
    if origin in (tuple, list):
        return arguments[0]
    return None


def locate(root: Block, location: Iterable[int | str]) -> tuple[tuple[str, ...], Any, Block | None]:
    """Translate a validation error's location, which names union branches, into a recipe's path.

    Returns:
        the path, the type that stands there (None if unknown), and the block around it.
    """
    path: list[str] = []
    annotation: Any = root
    around: Block | None = None
    for part in location:
        tagged = kinds(annotation)
        if part in tagged:
            annotation = tagged[str(part)]
        elif blocks(annotation) or get_origin(annotation) in (dict, tuple, list):
            around = next(iter(blocks(annotation)), around)
            annotation = inside(annotation, str(part))
            path.append(str(part))
        elif annotation is None:
            path.append(str(part))
        # else: the branch of a plain union such as `str | float`, which is no part of the path
    return tuple(path), annotation, around


def settings(annotation: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of every setting below a place, over all branches of tagged unions."""
    for block in blocks(annotation):
        for name, field in block.model_fields.items():
            yield (*path, name)
            yield from settings(field.annotation, (*path, name))


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `word` was probably meant to be."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return found[0] if found else None
