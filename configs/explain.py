"""Validation errors as sentences: path, value, origin, what is allowed, nearest spelling."""

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from configs import schema
from configs.base import Config
from configs.yaml_tree import Node, dump_value

_LONGEST_VALUE = 80
_NOT_A_BLOCK = ("model_type", "model_attributes_type", "dict_type", "union_tag_not_found")


def explain(error: ValidationError, tree: Node, root: type[Config]) -> str:
    """One sentence a problem, one problem a line."""
    lines: dict[tuple[str, ...], str] = {}
    located = [(detail, *schema.locate(root, detail["loc"])) for detail in error.errors()]
    around_wrong = {path[:end] for _, path, *_ in located for end in range(len(path))}
    for detail, path, annotation, around in located:
        if detail["type"] == "too_short" and path in around_wrong:
            continue  # its entries that are wrong did not count
        sentence = _sentence(detail, path, annotation, around, tree, root)
        lines.setdefault((*path, sentence if detail["type"] == "value_error" else ""), sentence)
    return "\n".join(lines.values())


def _sentence(
    detail: Any,
    path: tuple[str, ...],
    annotation: Any,
    around: type[Config] | None,
    tree: Node,
    root: type[Config],
) -> str:
    dotted, node = ".".join(path), tree.nearest(path)
    if detail["type"] == "missing":
        return f"{dotted} is required and not set (last looked at {node.origin})"
    if detail["type"] == "value_error":
        if path and not schema.blocks(annotation):
            return f"{_assignment(path, tree)} {detail['ctx']['error']}"
        return f"{dotted}: {detail['ctx']['error']}" if path else str(detail["ctx"]["error"])
    if detail["type"] == "union_tag_invalid":
        return _bad_choice((*path, "kind"), tree, tuple(schema.kinds(annotation)))
    if detail["type"] == "extra_forbidden":
        return _unknown_key(path, tree, around or root, root)
    if detail["type"] in _NOT_A_BLOCK:
        return _not_a_block(path, tree, annotation)
    if detail["type"] == "tuple_type":
        return f"{_assignment(path, tree)} must be a list{_whole_list(path, tree)}"
    if schema.literals(annotation):
        return _bad_choice(path, tree, schema.literals(annotation))
    message = detail["msg"].removeprefix("Input ")
    return f"{_assignment(path, tree)} {message}"


def _unknown_key(
    path: tuple[str, ...], tree: Node, around: type[Config], root: type[Config]
) -> str:
    place = f"below {'.'.join(path[:-1])}" if path[1:] else "at the top of a recipe"
    allowed = list(around.model_fields)
    guess = schema.closest(path[-1], allowed)
    if guess is None:
        elsewhere = [p for p in schema.settings(root) if p[-1] == path[-1]]
        guess = ".".join(elsewhere[0]) if elsewhere else None
        if path in elsewhere:
            kind = ".".join((*path[:-1], "kind"))
            return f"{_assignment(path, tree)} belongs to another {kind}: choose that, or remove it"
    return (
        f"{_assignment(path, tree)} is no setting: {place} there are "
        f"{', '.join(allowed)}{_did_you_mean(guess)}"
    )


def _bad_choice(path: tuple[str, ...], tree: Node, allowed: Iterable[Any]) -> str:
    choices = list(allowed)
    guess = schema.closest(str(tree.nearest(path).plain()), map(str, choices))
    return (
        f"{_assignment(path, tree)} is not allowed: choose one of "
        f"{', '.join(map(str, choices))}{_did_you_mean(guess)}"
    )


def _not_a_block(path: tuple[str, ...], tree: Node, annotation: Any) -> str:
    tagged = schema.kinds(annotation)
    dotted = ".".join(path) or "a recipe"
    if tagged and isinstance(tree.nearest(path).value, dict):
        return f"{dotted}.kind is required and not set: choose one of {', '.join(tagged)}"
    names = [name for block in schema.blocks(annotation)[:1] for name in block.model_fields]
    hint = f"with kind: {' | '.join(tagged)}" if tagged else f"of {', '.join(names) or 'names'}"
    return f"{_assignment(path, tree)} must be a mapping {hint}"


def _whole_list(path: tuple[str, ...], tree: Node) -> str:
    value = tree.nearest(path).plain()
    if not isinstance(value, dict) or not all(str(key).isdigit() for key in value):
        return ""
    return f": its entries cannot be set one by one, so set {'.'.join(path)}=[…] as a whole"


def _assignment(path: tuple[str, ...], tree: Node) -> str:
    node = tree.nearest(path)
    value = _element(node, path)
    text = dump_value(value)
    if len(text) > _LONGEST_VALUE:
        text = text[: _LONGEST_VALUE - 1] + "…"
    return f"{'.'.join(path) or 'the recipe'}={text} ({node.origin})"


def _element(node: Node, path: tuple[str, ...]) -> Any:
    """The value at `path`, which may go on inside a list that the tree holds as one value."""
    value = node.plain()
    if isinstance(value, list) and path and path[-1].isdigit() and int(path[-1]) < len(value):
        return value[int(path[-1])]
    return value


def _did_you_mean(guess: str | None) -> str:
    return f"; did you mean {guess}?" if guess is not None else ""
