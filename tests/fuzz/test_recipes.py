"""Whatever stands in a recipe, it is read or refused in sentences, and nothing hangs."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.load import SHIPPED, RecipeError, load_recipe, shipped_recipes
from configs.yaml_tree import YamlError, parse

SHIPPED_TEXTS = [(SHIPPED / f"{name}.yaml").read_text() for name in shipped_recipes()]
SECONDS = 5.0
"""No text takes longer; most take milliseconds."""

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
trees = st.recursive(
    scalars,
    lambda inside: (
        st.lists(inside, max_size=4)
        | st.dictionaries(st.sampled_from(["name", "kind", "data", "model", "x"]) | scalars, inside)
    ),
    max_leaves=20,
)


def read(path: Path, overrides: tuple[str, ...] = ()) -> bool:
    """Whether a recipe is one; what is wrong with it must be said in sentences."""
    started = time.monotonic()
    try:
        load_recipe(path, overrides)
    except RecipeError as error:
        assert str(error).strip(), "nothing is said"
        return False
    finally:
        assert time.monotonic() - started < SECONDS
    return True


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "fuzzed.yaml"


@settings(max_examples=150)
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes(data: bytes, place: Path) -> None:
    place.write_bytes(data)
    assert not read(place)


@settings(max_examples=150)
@given(tree=trees, extends=st.sampled_from(["quickstart", None]))
def test_any_tree(tree: Any, extends: str | None, place: Path) -> None:
    if extends is not None and isinstance(tree, dict):
        tree = {**tree, "extends": extends}
    place.write_text(yaml.safe_dump(tree, allow_unicode=True))
    read(place)


@settings(max_examples=150)
@given(data=st.data())
def test_mutated_shipped_recipes(data: st.DataObject, place: Path) -> None:
    text = bytearray(data.draw(st.sampled_from(SHIPPED_TEXTS)).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at, kind = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 2))
        new = data.draw(st.sampled_from(["&a ", "*a", "<<: ", "- ", "{", "]", "!!python/x", "\t"]))
        if kind == 0:
            text[at:at] = new.encode()
        elif kind == 1:
            del text[at : at + data.draw(st.integers(1, 30))]
        else:
            text[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
    place.write_bytes(text)
    read(place)


@settings(max_examples=150)
@given(
    key=st.sampled_from(["seed", "data.source", "model", "model.width", "x", "a.b.c", ""]),
    value=st.text(max_size=30) | trees.map(repr),
)
def test_any_override(key: str, value: str, place: Path) -> None:
    place.write_text("extends: quickstart\n")
    read(place, (f"{key}={value}",))


def laughs(levels: int, open_: str, close: str, entry: str) -> str:
    """Each level names the one before it ten times."""
    lines = [f"a0: &a0 {open_}{entry}{close}"]
    for level in range(1, levels):
        inside = ", ".join(
            (f"k{n}: " if open_ == "{" else "") + f"*a{level - 1}" for n in range(10)
        )
        lines.append(f"a{level}: &a{level} {open_}{inside}{close}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (laughs(12, "[", "]", "1"), "aliases"),
        (laughs(12, "{", "}", "k: 1"), "aliases"),
        ("a: " + "[" * 40_000, "too deep"),
        ("a: " + "[" * 60 + "]" * 60, "too deep"),
        ("\n".join(" " * n + "a:" for n in range(300)), "too deep"),
        ("a: &a [*a]", "contains itself"),
        ("a: &a {b: *a}", "contains itself"),
        ("a: &a\n  <<: *a", "contains itself"),
        ("a: " + "9" * 10_000, "digits"),
        ("a: " + "x" * (2 << 20), "characters"),
        ("? [a, b]\n: 1", "text"),
        ("? {a: b}\n: 1", "text|hashable"),
        ("a: !!python/object/apply:os.system [true]", "tag"),
        ("a: !!binary x", "base64|binary|padding"),
        ("a: !!timestamp x", "not valid YAML"),
    ],
    ids=lambda text: text[:18].replace("\n", " "),
)
def test_bombs_are_refused_at_once(text: str, said: str) -> None:
    started = time.monotonic()
    with pytest.raises(YamlError, match=said):
        parse(text, "bomb.yaml")
    assert time.monotonic() - started < SECONDS
