"""Recipes: extends, overrides, errors a user can act on, origins, and the round trip of a dump."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.load import LoadedRecipe, RecipeError, load_recipe, shipped_recipes
from configs.models import HSTUConfig, SASRecConfig
from configs.yaml_tree import YamlError, dump_value, parse, parse_value

BASE = """\
name: base
output: out
data:
  source: {kind: public, name: ml-100k}
  loader:
    global_batch: 64
model:
  kind: hstu
  num_heads: 2
  qk_width: 25
training:
  epochs: 3
  optimizer: {lr: 1e-3}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problem(path: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def child(folder: Path, text: str, extends: str = "base.yaml") -> LoadedRecipe:
    (folder / "child.yaml").write_text(f"extends: {extends}\n{text}")
    return load_recipe("child.yaml")


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_parses_and_its_dump_gives_it_back(name: str, tmp_path: Path) -> None:
    loaded = load_recipe(name)
    (tmp_path / "resolved.yaml").write_text(loaded.dump())
    again = load_recipe(tmp_path / "resolved.yaml")
    assert again.recipe == loaded.recipe
    assert set(again.origins) == set(loaded.origins)
    assert all("resolved.yaml:" in origin for origin in again.origins.values())


def test_shipped_recipes_keep_apart_what_they_write() -> None:
    outputs = [load_recipe(name).recipe.output for name in shipped_recipes()]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.num_layers=true", "model.num_layers=true (override) must be no truth value"),
        ("seed=false", "seed=false (override) must be no truth value"),
        ("training.optimizer.lr=.inf", "training.optimizer.lr=.inf (override) "),
        ("evaluation.ks=[]", "evaluation.ks=[] (override) "),
        ("output=''", "output='' (override) "),
        ("output='  '", "output="),
        ("seed=99999999999999999999", "seed=99999999999999999999 (override) "),
        ("evaluation.ks=[10, 10]", "evaluation.ks=[10, 10] (override) must name each cut-off once"),
        ("data.source={kind: csv, url: ''}", "data.source.url=''"),
        ("evaluation.catalogue_chunk=100000000", "evaluation.catalogue_chunk=100000000 (override)"),
        ("data.source.columns={user: x}", "belongs to another data.source.kind"),
    ],
)
def test_values_that_would_fail_later_are_refused_now(override: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", [override])
    assert sentence in str(caught.value)


def test_there_are_shipped_recipes() -> None:
    assert {"quickstart", "debug/tiny"} <= set(shipped_recipes())


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["alignment={kind: grpo, rewards: [{kind: function, path: a.b}]}"],
            "alignment.rewards.0.path=[{kind: function, path: a.b}] (override) 'a.b' names no f",
        ),
        (
            ["alignment={kind: grpo, rewards: []}"],
            "alignment.rewards=[] (override) Tuple should have at least 1 item",
        ),
        (
            ["alignment.kind=grpo", "alignment.rewards.0.path=a:b"],
            "must be a list: its entries cannot be set one by one, so set alignment.rewards=[…]",
        ),
        (["evaluation.ks=10"], "evaluation.ks=10 (override) must be a list"),
    ],
)
def test_lists_and_their_entries_are_told_apart(overrides: list[str], sentence: str) -> None:
    """One sentence: what is wrong with an entry is not said of the list as well."""
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", overrides)
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_origins_name_file_and_line_override_or_default(folder: Path) -> None:
    origins = load_recipe("base.yaml", ["model.num_layers=4", "sharding.placement={item: auto}"])
    assert origins.origins["data.loader.global_batch"] == "base.yaml:6"
    assert origins.origins["training.optimizer.lr"] == "base.yaml:13"
    assert origins.origins["model.num_layers"] == "override"
    assert origins.origins["sharding.placement.item"] == "override"
    assert origins.origins["seed"] == "default"
    assert "global_batch: 64" in origins.dump() and "# base.yaml:6" in origins.dump()


def test_extends_merges_deeply_over_a_chain(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "middle.yaml").write_text("extends: ../base.yaml\nmodel: {width: 32}\n")
    loaded = child(folder, "model: {num_layers: 7}\n", extends="deep/middle.yaml")
    assert loaded.recipe.model == HSTUConfig(width=32, num_layers=7, num_heads=2, qk_width=25)
    assert loaded.recipe.training.epochs == 3
    assert loaded.origins["model.width"] == "deep/middle.yaml:2"


def test_extends_a_shipped_name(folder: Path) -> None:
    loaded = child(folder, "name: mine\n", extends="quickstart")
    assert loaded.recipe.name == "mine"
    assert loaded.recipe.model == load_recipe("quickstart").recipe.model


def test_a_circle_of_extends_is_named(folder: Path) -> None:
    (folder / "a.yaml").write_text("extends: b.yaml\n")
    (folder / "b.yaml").write_text("extends: a.yaml\n")
    assert "circle: a.yaml → b.yaml → a.yaml" in problem("a.yaml")


def test_a_tagged_union_whose_kind_changes_is_replaced(folder: Path) -> None:
    # qk_width is no setting of SASRec: merging would be an error.
    assert child(folder, "model: {kind: sasrec}\n").recipe.model == SASRecConfig()
    by_override = load_recipe("base.yaml", ["model.width=20", "model.kind=sasrec"])
    assert by_override.recipe.model == SASRecConfig(width=20)


def test_a_kind_that_stays_or_is_no_union_merges(folder: Path) -> None:
    same = child(folder, "model: {kind: hstu, width: 20}\n").recipe.model
    assert same == HSTUConfig(width=20, num_heads=2, qk_width=25)
    text = "sharding: {optimizer: {lr: 0.5}}\n"
    (folder / "lr.yaml").write_text("extends: base.yaml\n" + text)
    other = load_recipe("lr.yaml", ["sharding.optimizer.kind=sgd"]).recipe.sharding.optimizer
    assert (other.kind, other.lr) == ("sgd", 0.5)


def test_overrides_take_any_yaml_value(folder: Path) -> None:
    recipe = load_recipe(
        "base.yaml",
        [
            "evaluation.ks=[10, 20]",
            "training.validation=null",
            "objective={kind: full_softmax, temperature: 5e-2}",
            "data.split={kind: global_time, validation_from: 2015-01-01, test_from: 1.5e9}",
            "data.source.url=memory://bucket/x=y",
            "sharding.placement.item=column_wise",
            "alignment={kind: dpo}",
            "alignment.validation.metric=mrr",
        ],
    ).recipe
    assert recipe.evaluation.ks == (10, 20)
    assert recipe.training.validation is None
    assert recipe.objective.kind == "full_softmax" and recipe.objective.temperature == 0.05
    assert recipe.data.split.kind == "global_time"
    assert recipe.data.split.validation_from == "2015-01-01"
    assert recipe.data.split.test_from == 1.5e9
    assert recipe.data.source.url == "memory://bucket/x=y"
    assert recipe.sharding.placement == {"item": "column_wise"}
    assert recipe.alignment is not None and recipe.alignment.validation is not None
    assert recipe.alignment.validation.metric == "mrr"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.num_layer=4", ["model.num_layer=4 (override)", "did you mean num_layers?"]),
        ("global_batch=4", ["at the top of a recipe", "did you mean data.loader.global_batch?"]),
        ("model.num_layers=0", ["model.num_layers=0 (override)", "greater than 0"]),
        ("model.kind=sasrek", ["model.kind=sasrek", "hstu, sasrec", "did you mean sasrec?"]),
        ("model=hstu", ["model=hstu (override)", "must be a mapping with kind: hstu | sasrec"]),
        ("training.precision=bf_16", ["fp32, bf16", "did you mean bf16?"]),
        ("training.zero_stage=5", ["training.zero_stage=5 (override)", "0, 1, 2, 3"]),
        ("training.optimizer=3", ["must be a mapping of lr, betas"]),
        ("evaluation.ks=[10, 0]", ["evaluation.ks.1=0 (override)", "greater than 0"]),
        ("data.source.kind=csv", ["data.source.url is required"]),
        ("sharding.placement={item: row}", ["sharding.placement.item=row", "row_wise"]),
        (
            "sharding.placement.itm=row_wise",
            [
                "sharding.placement.itm=row_wise names no table of this model",
                "choose one of item; did you mean item?",
            ],
        ),
        ("recommend.users=[7]", ["recommend.users.0=7", "string"]),
        ("data.loader.global_batch=63", ["multiple of cluster.num_workers=2"]),
        ("data.split={kind: global_time, validation_from: [], test_from: 1}", ["validation_from"]),
    ],
)
def test_errors_name_path_value_allowed_and_nearest(
    folder: Path, override: str, parts: list[str]
) -> None:
    message = problem("base.yaml", override)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_an_error_in_a_file_names_its_line_and_every_problem_is_told(folder: Path) -> None:
    (folder / "bad.yaml").write_text("extends: base.yaml\nmodel:\n  widht: 3\nsede: 1\n")
    lines = problem("bad.yaml").splitlines()
    assert len(lines) == 2
    assert any("model.widht=3 (bad.yaml:3)" in x and "did you mean width?" in x for x in lines)
    assert any("sede=1 (bad.yaml:4)" in x and "did you mean seed?" in x for x in lines)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: a\nname: b\n", "bad.yaml:2: key 'name' stands twice (first at bad.yaml:1)"),
        ("name: [1\n", "bad.yaml:2 is not valid YAML"),
        ("name: !!python/object/apply:os.system [echo]\n", "bad.yaml:1 is not valid YAML"),
        ("!!python/object/new:os.system {seed: 1}\n", "object/new:os.system' is no plain data"),
        ("model: !!set {width}\n", "bad.yaml:1: tag 'tag:yaml.org,2002:set' is no plain data"),
        ("- name\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("1: a\n", "key 1 must be text"),
        ("a: &a {b: *a}\n", "alias contains itself"),
        ("extends: [base.yaml]\n", "must be one path or name"),
        ("extends: bas.yaml\n", "bad.yaml:1: extends: recipe 'bas.yaml' is not a file"),
        ("extends: quickstrt\n", "did you mean quickstart?"),
    ],
)
def test_files_that_are_no_recipe(folder: Path, text: str, part: str) -> None:
    (folder / "bad.yaml").write_text(text)
    assert part in problem("bad.yaml")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["seed"], "key.subkey=value"),
        (["seed="], "key.subkey=value"),
        (["..=1"], "key.subkey=value"),
        (["seed=1", "seed=2"], "a second time"),
        (["alignment=null", "alignment.beta=1"], "contradicts alignment=null"),
        (["evaluation.ks=[1"], "not valid YAML"),
    ],
)
def test_overrides_that_make_no_sense(folder: Path, overrides: list[str], part: str) -> None:
    assert part in problem("base.yaml", *overrides)


def test_unknown_names_and_paths(folder: Path) -> None:
    assert "did you mean quickstart?" in problem("quickstrat")
    assert "no recipe is called '../base'" in problem("../base")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml cannot be read as text" in problem("binary.yaml")


def test_plain_scalars_are_read_as_yaml_1_2() -> None:
    read = parse("{a: 1e-3, b: no, c: 2020-01-01, d: 1:30, e: 010, f: .5, g: 1_000, h: -3}", "x")
    expected = {"a": 1e-3, "b": "no", "c": "2020-01-01", "d": "1:30", "e": "010", "f": 0.5}
    assert read.plain() == {**expected, "g": 1000, "h": -3}


def test_anchors_and_merge_keys_work_and_keep_origins() -> None:
    tree = parse("a: &a\n  x: 1\n  y: 2\nb:\n  <<: *a\n  y: 3\n", "f")
    assert tree.plain()["b"] == {"x": 1, "y": 3}
    assert tree.nearest(("b", "y")).origin == "f:6"


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


@given(values)
def test_a_dumped_value_is_one_line_and_reads_back_equal(value: object) -> None:
    text = dump_value(value)
    assert "\n" not in text
    assert parse_value(text, "x").plain() == value


@given(st.text(alphabet="0123456789.eE+-_:~ntrufalsyo#<>=!&*{}[], ", max_size=12))
def test_texts_that_look_like_other_things_stay_texts(text: str) -> None:
    assert parse_value(dump_value(text), "x").plain() == text


@given(st.text(max_size=40))
def test_any_text_is_a_tree_or_a_yaml_error(text: str) -> None:
    try:
        parse(text, "x")
    except YamlError as error:
        assert "x" in str(error)


def test_reading_recipes_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from configs.load import load_recipe; load_recipe('quickstart');"
        "import configs.layout, configs.storage;"
        "print([m for m in ('torch', 'ray', 'numpy', 'pyarrow', 'models') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("rule", "columns", "part"),
    [
        ("{kind: rating}", "{}", "map data.source.columns.rating"),
        ("{kind: rating}", "{rating: r}", None),
        ("{kind: watch_time}", "{dwell: d}", "map data.source.columns.dwell and data.source"),
        ("{kind: watch_time, negative: [x]}", "{dwell: d, duration: e}", "the labels ['x']"),
        ("{kind: labels, liked: [a]}", "{}", "nothing is disliked"),
        ("{kind: labels, liked: [a], disliked: [b]}", "{labels: {a: x}}", "the labels ['b']"),
        ("{kind: labels, liked: [a], disliked: [b]}", "{labels: {a: x, b: y}}", None),
        ("{liked_from: 4}", "{rating: r}", "alignment.rule.kind is required"),
    ],
)
def test_what_a_rule_reads_is_mapped(
    folder: Path, rule: str, columns: str, part: str | None
) -> None:
    overrides = [
        f"data.source={{kind: csv, url: x, columns: {columns}}}",
        f"alignment={{kind: dpo, rule: {rule}}}",
    ]
    if part is None:
        assert load_recipe("base.yaml", overrides).recipe.alignment is not None
    else:
        assert part in problem("base.yaml", *overrides)


@pytest.mark.parametrize(
    ("columns", "unit", "part"),
    [
        (
            "{action: a}",
            "s",
            "model.dwell_times reads it, but the events have not a dwell time: map data.",
        ),
        (
            "{dwell: t}",
            "ms",
            "model.actions reads it, but the events have not an action: map data.source",
        ),
        ("{action: a}", "ms", "dwell_unit='ms' is the unit of columns.dwell and columns.dura"),
        ("{duration: t, action: a}", "ms", "model.dwell_times reads it, but the events have not"),
        ("{dwell: t, action: a}", "ms", None),
    ],
)
def test_what_decoders_read_of_events_is_mapped(
    folder: Path, columns: str, unit: str, part: str | None
) -> None:
    overrides = [
        f"data.source={{kind: csv, url: x, columns: {columns}, dwell_unit: {unit}}}",
        "model={kind: tiger, actions: true, dwell_times: true}",
        "tokenizer={embeddings: [{kind: text}]}",
        "objective={kind: next_code}",
        "generation.beams=200",
    ]
    if part is None:
        recipe = load_recipe("base.yaml", overrides).recipe
        assert recipe.data.source.columns.dwell == "t"  # type: ignore[union-attr]
    else:
        assert part in problem("base.yaml", *overrides)


RANKING = "model={kind: hstu_ranking}"
TASKS = "objective={kind: multi_task, tasks: [{kind: label, label: a}]"


@pytest.mark.parametrize(
    ("columns", "overrides", "part"),
    [
        ("{labels: {a: x}}", [RANKING, TASKS + "}"], None),
        ("{labels: {a: x}}", [RANKING], "do not go together"),
        ("{labels: {a: x}}", [TASKS + "}"], "do not go together"),
        ("{labels: {b: x}}", [RANKING, TASKS + "}"], "objective names the labels ['a']"),
        (
            "{labels: {a: x}}",
            [RANKING, TASKS + ", p_score: {weights: {c: 1}}}"],
            "objective names the labels ['c']",
        ),
        (
            "{labels: {a: x}}",
            [RANKING, "objective={kind: multi_task, tasks: [{kind: dwell}]}"],
            "map data.source.columns.dwell",
        ),
        (
            "{labels: {a: x}, rating: r}",
            [RANKING, TASKS + "}", "alignment={kind: dpo}"],
            "recommends nothing that could be aligned",
        ),
    ],
)
def test_a_reward_model_learns_labels_that_are_mapped(
    folder: Path, columns: str, overrides: list[str], part: str | None
) -> None:
    overrides = [
        f"data.source={{kind: csv, url: x, columns: {columns}}}",
        "training.validation.metric=auc/a",
        *overrides,
    ]
    if part is None:
        recipe = load_recipe("base.yaml", overrides).recipe
        assert recipe.stages() == ("prepare", "train", "evaluate", "report")
        overrides.remove("training.validation.metric=auc/a")
        told = problem("base.yaml", *overrides)
        assert "ndcg@10' is not measured; allowed: ['auc', 'auc/a']" in told
    else:
        assert part in problem("base.yaml", *overrides)
