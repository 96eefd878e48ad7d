"""Reading recipes: files that extend each other, overrides, checks, and each value's origin."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs import schema
from configs.explain import explain
from configs.recipe import Recipe
from configs.yaml_tree import Node, YamlError, dump_value, parse, parse_value

SHIPPED = Path(__file__).parent / "recipes"
_SHIPPED_NAME = re.compile(r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$")
_OVERRIDE_KEY = re.compile(r"^[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*$")
OVERRIDE = "override"
DEFAULT = "default"


class RecipeError(ValueError):
    """What is wrong with a recipe, a sentence a problem: path, value, allowed, nearest spelling."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe and, for each dotted key, `file:line`, `override` or `default`."""

    recipe: Recipe
    origins: dict[str, str]

    def dump(self) -> str:
        """The resolved recipe as YAML; a comment on each line gives the value's origin.

        `load_recipe` on a file of this text gives an equal recipe.
        """
        lines: list[tuple[str, str]] = list(
            _dump_lines(self.recipe.model_dump(mode="json"), self.origins, ())
        )
        column = min(60, max(len(text) for text, _ in lines))
        return "".join(
            f"{text:<{column}}{note and f'  # {note}'}".rstrip() + "\n" for text, note in lines
        )


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe by path or shipped name, apply `a.b=value` overrides, and check it.

    Raises:
        RecipeError: a sentence for each problem.
    """
    try:
        tree = _read_chain(_find(os.fspath(path), Path.cwd()), ())
        if overrides:
            tree = _merge(tree, _override_tree(overrides), Recipe)
    except YamlError as error:
        raise RecipeError(str(error)) from error
    try:
        recipe = Recipe.model_validate(tree.plain())
    except ValidationError as error:
        raise RecipeError(explain(error, tree, Recipe)) from error
    return LoadedRecipe(recipe, _origins(recipe, tree))


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(
        p.relative_to(SHIPPED).with_suffix("").as_posix() for p in SHIPPED.rglob("*.yaml")
    )


def _find(name: str, folder: Path) -> Path:
    """A file below `folder` where the name ends like one, a shipped recipe otherwise."""
    if name.endswith((".yaml", ".yml")):
        path = folder / name
        if not path.is_file():
            raise RecipeError(f"recipe {name!r} is not a file (looked for {path})")
        return path
    path = SHIPPED / f"{name}.yaml"
    if not _SHIPPED_NAME.match(name) or not path.is_file():
        names = shipped_recipes()
        guess = schema.closest(name, names)
        raise RecipeError(
            f"no recipe is called {name!r}: give the path of a .yaml file or one of "
            f"{', '.join(names)}{f'; did you mean {guess}?' if guess else ''}"
        )
    return path


def _read_chain(path: Path, children: tuple[Path, ...]) -> Node:
    """The tree of a file merged over the one it extends."""
    path = path.resolve()
    if path in children:
        circle = " → ".join(_display(p) for p in (*children[children.index(path) :], path))
        raise RecipeError(f"recipes extend each other in a circle: {circle}")
    name = _display(path)
    try:
        tree = parse(path.read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{name} cannot be read as text: {error}") from error
    if not isinstance(tree.value, dict):
        raise RecipeError(f"{name} must be a mapping of settings, such as `name: my_run`")
    own = dict(tree.value)
    base = own.pop("extends", None)
    if base is None:
        return Node(own, tree.origin)
    if not isinstance(base.value, str):
        raise RecipeError(f"{base.origin}: extends={base.plain()!r} must be one path or name")
    try:
        base_path = _find(base.value, path.parent)
    except RecipeError as error:
        raise RecipeError(f"{base.origin}: extends: {error}") from error
    return _merge(_read_chain(base_path, (*children, path)), Node(own, tree.origin), Recipe)


def _merge(base: Node, over: Node, annotation: Any) -> Node:
    """`over` on top of `base`, key by key; a tagged union whose kind changes is replaced."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    kind = over.value.get("kind", base.value.get("kind"))
    if (
        schema.kinds(annotation)
        and kind is not None
        and "kind" in base.value
        and base.value["kind"].plain() != kind.plain()
    ):
        return over
    tag = kind.plain() if kind is not None and isinstance(kind.value, str) else None
    merged = dict(base.value)
    for key, node in over.value.items():
        known = schema.inside(annotation, key, tag)
        merged[key] = _merge(merged[key], node, known) if key in merged else node
    return Node(merged, over.origin)


def _override_tree(overrides: Sequence[str]) -> Node:
    """All overrides as one tree, so that their order does not matter."""
    root: dict[str, Node] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not _OVERRIDE_KEY.match(key) or not text.strip():
            raise RecipeError(
                f"override {override!r} must read key.subkey=value "
                "(an empty text is key='', nothing is key=null)"
            )
        try:
            value = parse_value(text, OVERRIDE)
        except YamlError as error:
            raise RecipeError(f"override {override!r}: {error}") from error
        _insert(root, tuple(key.split(".")), value, override)
    return Node(root, OVERRIDE)


def _insert(root: dict[str, Node], path: tuple[str, ...], value: Node, override: str) -> None:
    level = root
    for depth, key in enumerate(path[:-1]):
        child = level.setdefault(key, Node({}, OVERRIDE))
        if not isinstance(child.value, dict):
            taken = ".".join(path[: depth + 1])
            raise RecipeError(
                f"override {override!r} contradicts {taken}={dump_value(child.value)}: keep one"
            )
        level = child.value
    if path[-1] in level:
        raise RecipeError(f"override {override!r} sets {'.'.join(path)} a second time: keep one")
    level[path[-1]] = value


def _origins(recipe: Recipe, tree: Node) -> dict[str, str]:
    resolved = _as_node(recipe.model_dump(mode="json"))
    origins = {}
    for path, _ in resolved.leaves():
        node: Node | None = tree
        for key in path:
            node = node.value.get(key) if node and isinstance(node.value, dict) else None
        origins[".".join(path)] = node.origin if node is not None else DEFAULT
    return origins


def _as_node(value: Any) -> Node:
    if isinstance(value, dict):
        return Node({key: _as_node(child) for key, child in value.items()}, DEFAULT)
    return Node(value, DEFAULT)


def _dump_lines(
    value: dict[str, Any], origins: dict[str, str], path: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    indent = "  " * len(path)
    for key, child in value.items():
        if isinstance(child, dict) and child:
            yield f"{indent}{dump_value(key)}:", ""
            yield from _dump_lines(child, origins, (*path, key))
        else:
            yield f"{indent}{dump_value(key)}: {dump_value(child)}", origins[".".join((*path, key))]


def _display(path: Path) -> str:
    """A path as a reader would write it: relative where it lies below the current folder."""
    for folder, prefix in ((SHIPPED, "recipes"), (Path.cwd(), "")):
        if path.is_relative_to(folder):
            return (Path(prefix) / path.relative_to(folder)).as_posix()
    return str(path)
