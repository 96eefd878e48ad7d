"""`tandem plan`: the sharding plan of a recipe for any number of ranks."""

from collections.abc import Sequence

from configs import storage
from configs.layout import RunLayout
from configs.recipe import Recipe
from data_loaders.manifest import read_manifest
from models.base import CatalogueSizes
from models.build import table_specs
from sharding.embedding_plan import plan_tables


def render_plan(recipe: Recipe, world_size: int | None, rows: Sequence[str]) -> str:
    """Printable plan.

    Args:
        recipe: names the tables, their width, placements and optimizer.
        world_size: ranks to plan for; default: the recipe's workers.
        rows: `table=N` in place of the prepared data set's sizes.

    Raises:
        ValueError: a size is neither given nor known from a prepared data set.
    """
    sizes = _sizes(recipe, _parse_rows(rows, recipe.table_names()))
    specs = table_specs(recipe.model, sizes, recipe.tables)
    ranks = world_size or recipe.cluster.num_workers
    return plan_tables(specs, recipe.sharding, ranks, recipe.cluster.device).render()


def _parse_rows(rows: Sequence[str], tables: Sequence[str]) -> dict[str, int]:
    given = {}
    for text in rows:
        table, _, count = text.partition("=")
        digits = count.replace("_", "")
        if table not in tables or not digits.isdecimal() or int(digits) < 2:
            raise ValueError(
                f"--rows {text!r} must read TABLE=N with N of 2 or more and a table of this "
                f"recipe: {', '.join(tables)}"
            )
        given[table] = int(digits)
    return given


def _sizes(recipe: Recipe, rows: dict[str, int]) -> CatalogueSizes:
    url = RunLayout(storage.absolute(recipe.output)).data
    missing = [table for table in recipe.table_names() if table not in rows]
    if missing and not storage.exists(storage.join(url, "manifest.json")):
        raise ValueError(
            f"the rows of {', '.join(missing)} are not known, because {url} holds no prepared data "
            f"set: run `tandem prepare` on this recipe or give --rows {missing[0]}=N"
        )
    known = _prepared_sizes(url) if missing else CatalogueSizes(0, 0, {}, {})
    return CatalogueSizes(
        num_items=rows["item"] - 1 if "item" in rows else known.num_items,
        num_users=known.num_users,
        user_features=known.user_features | _features(rows, "user_"),
        side_features=known.side_features | _features(rows, "side_"),
    )


def _prepared_sizes(url: str) -> CatalogueSizes:
    manifest = read_manifest(url)
    return CatalogueSizes(
        manifest.num_items, manifest.num_users, manifest.user_features, manifest.side_features
    )


def _features(rows: dict[str, int], prefix: str) -> dict[str, int]:
    """Categories (rows less the unknown 0) of the tables whose names begin with `prefix`."""
    return {
        table.removeprefix(prefix): count - 1
        for table, count in rows.items()
        if table.startswith(prefix)
    }
