"""Execute a recipe's stage graph: skip what is current, resume what was interrupted."""

import time
from contextlib import ExitStack
from typing import Any

from configs import storage
from configs.layout import RunLayout, read_record
from configs.load import LoadedRecipe
from configs.recipe import Recipe, StageName
from configs.redaction import refuse_credentials
from configs.terminal import say
from data_loaders.matching import NoSuchFileError
from launch.going_on import Done, forget, meant, note, prepared_before, pretrained, unfinished
from launch.other_trainings import other_trainings
from launch.output_lock import OutputLock
from launch.reward_checks import check_functions, check_models
from launch.stages import GRAPH, Outputs, Stage, StageContext
from launch.supervisor import Begun
from launch.termination import Termination

RECORD_FORMAT = 1


def run(
    loaded: LoadedRecipe,
    until: StageName | None = None,
    from_: StageName | None = None,
    only: StageName | None = None,
    force: bool = False,
) -> None:
    """Run the recipe's stages in order.

    Args:
        until: last stage to run.
        from_: this stage and those after it run anew if they had finished; an interrupted one is
            resumed.
        only: run this one stage; the stages it needs must be current.
        force: run the selected stages again from nothing, discarding their checkpoints; with
            `from_`, that stage and those after it.

    Raises:
        ValueError: the user's mistake, in one sentence that names the mend; also that another
            run is at work on the same output.
    """
    recipe = loaded.recipe
    refuse_credentials("output", recipe.output)
    storage.refuse_memory("output", recipe.output)
    check_functions(recipe)
    names = recipe.stages()
    for wanted in (until, from_, only):
        if wanted is not None and wanted not in names:
            raise ValueError(
                f"recipe {recipe.name!r} has no stage {wanted!r}: its stages are {list(names)}"
            )
    if until is not None and from_ is not None and names.index(until) < names.index(from_):
        raise ValueError(
            f"--from {from_} comes after --until {until}, so that nothing would run; swap them"
        )
    last = until or only
    if "align" in names[: len(names) if last is None else names.index(last) + 1]:
        check_models(recipe)
    _Run(recipe, from_, only, force).execute(names, last)


class _Run:
    def __init__(
        self, recipe: Recipe, from_: StageName | None, only: StageName | None, force: bool
    ) -> None:
        self._recipe = recipe
        self._layout = RunLayout(storage.absolute(recipe.output))
        self._from, self._only, self._force = from_, only, force
        self._done: dict[str, Outputs] = {}
        self._cluster = ExitStack()
        self._connected = False
        self._termination = Termination()
        self._lock = OutputLock(self._layout.root, lost=self._termination.give_up)
        self._begun = Begun()

    def execute(self, names: tuple[StageName, ...], last: StageName | None) -> None:
        started = time.monotonic()
        with self._termination:
            try:
                with self._lock:
                    with self._cluster:
                        self._stages(names, last)
                    self._show()
            except BaseException:
                self._lock.check()  # says more than what else went wrong
                raise
        say(f"done in {_clock(time.monotonic() - started)}: {self._layout.root}")

    def _stages(self, names: tuple[StageName, ...], last: StageName | None) -> None:
        needed = set(names) if self._only is None else {self._only, *GRAPH[self._only].needs}
        again = False
        for number, name in enumerate(names, 1):
            again = again or name == self._from
            if name in needed:
                self._lock.check()
                self._stage(GRAPH[name], f"[{number}/{len(names)}] {name}", again)
                self._termination.check()
            if name == last:
                break

    def _show(self) -> None:
        """Print what the run has to show, also when every stage was skipped."""
        from trainer.monitor.results import read_recommendations, read_results
        from trainer.monitor.terminal import render_recommendations, render_table

        if "evaluate" in self._done:
            say("\n" + render_table(read_results(self._layout.results)))
        if "recommend" in self._done:
            shown = read_recommendations(self._layout.recommendations)
            say("\n" + render_recommendations(shown))
        if "report" in self._done:
            say(f"report: {self._done['report']['report']}")

    def _stage(self, stage: Stage, label: str, again: bool) -> None:
        selected = self._only in (None, stage.name)
        begun = f"begun {stage.name}" in self._begun
        forced = self._force and (again or self._from is None) and not begun
        anew = selected and (again or forced) and not begun
        if stage.name == "prepare" and not anew and self._goes_on_with_data(stage, label):
            return
        fingerprint = _fingerprint(stage, self._recipe, self._done)
        record = self._current_record(stage, fingerprint)
        if record is not None and not anew:
            say(f"{label}: unchanged, skipped")
            self._finished(stage, record["outputs"])
            return
        if stage.name == "train" and not anew and self._goes_on_with_training(label, fingerprint):
            return
        if not selected:
            raise ValueError(
                f"stage {self._only!r} needs {stage.name!r}, which has not run with these "
                f"settings: run `tandem run RECIPE --until {stage.name}` first"
            )
        discards = f"discards {stage.name}"
        cut_short = discards in self._begun and not begun
        discarded = forced or record is not None or cut_short
        if discarded:  # otherwise an interrupted stage is resumed
            self._begun.note(discards)
            self._discard(stage.name, fingerprint)
        if anew:
            self._begun.note(f"begun {stage.name}")
        self._execute(stage, label, fingerprint, resumes=not discarded)

    def _goes_on_with_data(self, stage: Stage, label: str) -> bool:
        """Whether the data are those prepared before, as the source has changed under a training,
        or is gone."""
        record = prepared_before(self._layout, self._recipe)
        if record is None:
            return False
        gone = None
        try:
            if record["fingerprint"] == _fingerprint(stage, self._recipe, self._done):
                return False
        except NoSuchFileError as error:
            gone = str(error)
        prepared = record["outputs"]
        whole = self._current_record(stage, record["fingerprint"]) is not None
        if not whole or not (gone or self._interrupted(prepared)):
            return False
        say(
            f"{label}: {gone or 'data.source has changed'}; goes on with the data that were "
            "prepared from it before (--from prepare takes it as it is now)"
        )
        self._finished(stage, prepared)
        return True

    def _goes_on_with_training(self, label: str, fingerprint: str) -> bool:
        """Whether the training is one placed otherwise, as its alignment was interrupted."""

        found = self._pretrained(self._done)
        if found is None:
            return False
        say(f"{label}: {found[1]}")
        note(self._layout, "train", fingerprint, found[0]["fingerprint"])
        self._finished(GRAPH["train"], found[0]["outputs"])
        return True

    def _pretrained(self, done: Done) -> tuple[dict[str, Any], str] | None:
        def fingerprint_of(name: StageName, recipe: Recipe, more: Done) -> str:
            return _fingerprint(GRAPH[name], recipe, done | more)

        if self._recipe.alignment is None:
            return None
        found = pretrained(self._layout, self._recipe, fingerprint_of)
        if found is None or self._current_record(GRAPH["train"], found[0]["fingerprint"]) is None:
            return None
        return found

    def _interrupted(self, prepared: Outputs) -> bool:
        """Whether this command, or an interrupted training of this recipe, has begun with them."""
        if f"finished prepare {prepared['data']}" in self._begun:
            return True
        done: dict[str, Outputs] = {"prepare": prepared}
        for name in self._recipe.stages():
            if name in ("tokenize", "train", "align"):
                fingerprint = _fingerprint(GRAPH[name], self._recipe, done)
                record = self._current_record(GRAPH[name], fingerprint)
                if record is None and name == "train":
                    record, _ = self._pretrained(done) or (None, "")
                if record is None:
                    return self._begun_before(GRAPH[name], fingerprint, done)
                done[name] = record["outputs"]
        return False

    def _begun_before(self, stage: Stage, fingerprint: str, done: dict[str, Outputs]) -> bool:
        """Whether a training of this output, maybe placed otherwise, is what the stage goes on
        with."""
        own = meant(self._layout, stage.name, fingerprint)
        if storage.list_names(self._layout.checkpoints(stage.name, own)):
            return True
        return stage.name != "tokenize" and self._placed_otherwise(stage, done) is not None

    def _placed_otherwise(self, stage: Stage, done: dict[str, Outputs]) -> tuple[str, str] | None:
        return unfinished(
            self._layout, stage.name, self._recipe, lambda recipe: _fingerprint(stage, recipe, done)
        )

    def _finished(self, stage: Stage, outputs: Outputs) -> None:
        self._done[stage.name] = outputs
        if stage.name == "prepare":
            self._begun.note(f"finished prepare {outputs['data']}")

    def _execute(self, stage: Stage, label: str, fingerprint: str, resumes: bool) -> None:
        say(f"{label}: {_purpose(stage.name, self._recipe)}")
        training = self._training(stage, fingerprint, resumes)
        started = time.monotonic()
        if stage.needs_ray:
            self._connect()
        if not stage.replaces_at_end:
            storage.remove(self._layout.stage_record(stage.name))
        context = StageContext(stage.name, self._recipe, self._layout, training, dict(self._done))
        outputs = stage.run(context)
        self._lock.check()
        seconds = time.monotonic() - started
        record = {
            "format": RECORD_FORMAT,
            "stage": stage.name,
            "root": self._layout.root,
            "fingerprint": fingerprint,
            "outputs": outputs,
            "seconds": round(seconds, 3),
        }
        storage.write_sealed(self._layout.stage_record(stage.name), record)
        self._finished(stage, outputs)
        say(f"{label}: done in {_clock(seconds)}")

    def _training(self, stage: Stage, fingerprint: str, resumes: bool) -> str:
        """Fingerprint of the training: the stage's, or that of the one that it goes on with."""
        if stage.name not in ("train", "align"):
            return fingerprint
        if resumes:
            training = meant(self._layout, stage.name, fingerprint)
            if training != fingerprint:
                return training
            found = self._placed_otherwise(stage, self._done)
            if found is not None:
                say(found[1])
                note(self._layout, stage.name, fingerprint, found[0])
                return found[0]
        for line in other_trainings(self._layout, stage.name, fingerprint, self._recipe):
            say(line)
        return fingerprint

    def _current_record(self, stage: Stage, fingerprint: str) -> dict[str, Any] | None:
        url = self._layout.stage_record(stage.name)
        if not storage.exists(url):
            return None
        record = read_record(url)
        known = (fingerprint, meant(self._layout, stage.name, fingerprint))
        if record.get("format") != RECORD_FORMAT or record.get("fingerprint") not in known:
            return None
        try:
            _check_outputs(stage, record["outputs"])
        except ValueError as error:
            say(f"what {stage.name} left is not what it was: {error}")
            return None
        return record

    def _discard(self, name: StageName, fingerprint: str) -> None:
        if forget(self._layout, name, fingerprint):
            say(f"{name}: what had gone on with it under another placement is discarded with it")
        for url in (
            self._layout.stage_record(name),
            self._layout.checkpoints(name, fingerprint),
            self._layout.best(name, fingerprint),
            self._layout.good(name, fingerprint),
            self._layout.metrics(name, fingerprint),
            self._layout.semantic_ids(fingerprint),  # of the stage tokenize
            self._layout.quarantined(fingerprint),
        ):
            storage.remove(url)

    def _connect(self) -> None:
        if self._connected:
            return
        from launch.cluster import connect
        from launch.shared_storage import check_output

        self._cluster.enter_context(connect(self._recipe.cluster))
        self._connected = True
        check_output(self._layout.root)


def _fingerprint(stage: Stage, recipe: Recipe, done: dict[str, Outputs]) -> str:
    return storage.fingerprint(
        {"format": RECORD_FORMAT, "stage": stage.name} | stage.inputs(recipe, done)
    )


def _check_outputs(stage: Stage, outputs: Outputs) -> None:
    """Raises ValueError where what a finished stage left is not there as it was."""
    for file in stage.files(outputs):
        if not storage.exists(file):
            raise ValueError(f"{file} is missing")
    if stage.check is not None:
        stage.check(outputs)


def _purpose(name: StageName, recipe: Recipe) -> str:
    if recipe.ranks_candidates and name in _OF_REWARD_MODELS:
        return _OF_REWARD_MODELS[name]
    return {
        "prepare": "logs → typed events → user sequences → Parquet shards",
        "tokenize": "item content → semantic ids",
        "train": "pretraining on user sequences",
        "align": "preference optimisation from the pretrained checkpoint",
        "evaluate": "full-catalogue metrics of every policy and of popularity",
        "recommend": "recommendations for a few users",
        "report": "tables, plots and the HTML report",
    }[name]


_OF_REWARD_MODELS: dict[StageName, str] = {
    "train": "a reward model from what users did",
    "evaluate": "order and calibration of what it foretells on held-out events",
}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)} min {rest:.0f} s" if minutes else f"{rest:.1f} s"
