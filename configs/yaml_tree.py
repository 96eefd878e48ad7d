"""YAML as a tree that remembers where each value was written."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.inf|\.nan)$"
)
_RESOLVERS = (
    ("tag:yaml.org,2002:bool", _BOOL, "tTfF"),
    ("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", _INT, "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+0123456789."),
    ("tag:yaml.org,2002:merge", re.compile(r"^<<$"), "<"),
)
_MAPPING = "tag:yaml.org,2002:map"
LONGEST_TEXT = 1 << 20
MOST_VALUES = 20_000
"""Of one text, each as often as aliases repeat it: a few lines could stand for billions."""
DEEPEST = 50


class YamlError(ValueError):
    """Text that is not YAML of the allowed kind; the message names file and line."""


class _Loader(yaml.SafeLoader):
    """Plain scalars as YAML 1.2 reads them: `1e-3` is a number, `no` and `2020-01-01` are text."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - a table of the base class

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As the base class, which would go as deep as its stack allows."""
        self._levels += 1
        if self._levels > DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"it is nested too deep, {DEEPEST} levels are allowed",
                problem_mark=self.peek_event().start_mark,
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        self._levels -= 1
        return node

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        text = str(self.construct_scalar(node)).replace("_", "").lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader of YAML 1.1 or 1.2 would take for something else."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    on_one_line = text.isprintable()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if on_one_line else '"')


_Dumper.add_representer(str, _represent_text)
for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


@dataclass(frozen=True)
class Node:
    """A value and where it was written; the value of a mapping is a dict of nodes."""

    value: Any
    origin: str

    def plain(self) -> Any:
        """The value without origins."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        return self.value

    def nearest(self, path: tuple[str, ...]) -> "Node":
        """The node at `path`, or the deepest one above it that exists."""
        node = self
        for key in path:
            if not isinstance(node.value, dict) or key not in node.value:
                return node
            node = node.value[key]
        return node

    def leaves(self, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], "Node"]]:
        """Paths and nodes of everything that is not a (non-empty) mapping."""
        if isinstance(self.value, dict) and self.value:
            for key, child in self.value.items():
                yield from child.leaves((*path, key))
        else:
            yield path, self


def parse(text: str, name: str) -> Node:
    """Read YAML text; `name` stands in origins as `name:line`.

    Raises:
        YamlError: the text is not YAML, repeats a key, or uses tags beyond plain data.
    """
    return _read(text, lambda mark: f"{name}:{mark.line + 1}", name)


def parse_value(text: str, name: str) -> Node:
    """Read one YAML value, such as the right side of an override; its origin is `name`."""
    return _read(text, lambda mark: name, name)


def dump_value(value: Any) -> str:
    """A value on one line that `parse_value` reads back equal."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=2**30
    )
    return text.removesuffix("\n").removesuffix("...").rstrip("\n")


def _read(text: str, origin: Any, name: str) -> Node:
    if len(text) > LONGEST_TEXT:
        raise YamlError(
            f"{name} has {len(text):,} characters, and a recipe {LONGEST_TEXT:,} at most"
        )
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is not None:
            _refuse_bombs(root, origin)
        return Node(None, name) if root is None else _convert(loader, root, origin)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = origin(mark) if mark else name
        raise YamlError(f"{place} is not valid YAML: {error.problem or error.context}") from error
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise YamlError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error


def _refuse_bombs(root: yaml.Node, origin: Any) -> None:
    """Refuse what is too large or too deep once its aliases are written out.

    Raises:
        YamlError: names the limit and the place.
    """
    values, levels = _extent(root, origin, {}, ())
    if values > MOST_VALUES or levels > 2 * DEEPEST:
        raise YamlError(
            f"{origin(root.start_mark)}: written out, its aliases included, it has {values:,} "
            f"values on {levels} levels; {MOST_VALUES:,} on {2 * DEEPEST} are allowed"
        )


def _extent(
    node: yaml.Node,
    origin: Any,
    known: dict[yaml.Node, tuple[int, int]],
    parents: tuple[yaml.Node, ...],
) -> tuple[int, int]:
    """Values of a node and levels below it; each node is visited once."""
    if node in known:
        return known[node]
    if node in parents:
        raise YamlError(f"{origin(node.start_mark)}: an alias contains itself")
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        below = [each for pair in node.value for each in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    found = [_extent(each, origin, known, (*parents, node)) for each in below]
    values = 1 + sum(values for values, _ in found)
    known[node] = values, 1 + max((levels for _, levels in found), default=0)
    return known[node]


def _convert(loader: _Loader, node: yaml.Node, origin: Any) -> Node:
    if not isinstance(node, yaml.MappingNode):
        return Node(loader.construct_object(node, deep=True), origin(node.start_mark))
    if node.tag != _MAPPING:
        raise YamlError(f"{origin(node.start_mark)}: tag {node.tag!r} is no plain data; remove it")
    _refuse_duplicates(node, origin)
    loader.flatten_mapping(node)
    children: dict[str, Node] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise YamlError(f"{origin(key_node.start_mark)}: key {key!r} must be text; quote it")
        child = _convert(loader, value_node, origin)
        children[key] = Node(child.value, origin(key_node.start_mark))
    return Node(children, origin(node.start_mark))


def _refuse_duplicates(node: yaml.MappingNode, origin: Any) -> None:
    seen: dict[str, str] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or key_node.value == "<<":
            continue
        place = origin(key_node.start_mark)
        if key_node.value in seen:
            first = seen[key_node.value]
            raise YamlError(
                f"{place}: key {key_node.value!r} stands twice (first at {first}); keep one"
            )
        seen[key_node.value] = place
