"""The training loop: steps, logs, validation, selection, checkpoints. Blind to the algorithm."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from pydantic import TypeAdapter, ValidationError

from configs.training import CheckpointConfig, ValidationConfig
from data_loaders.poison import Unit
from sharding.checkpoint import CheckpointStore
from sharding.loss_module import NonFiniteLossError
from sharding.parallelize import ParallelModel
from sharding.step_result import StepResult
from trainer.guardrails import Alarm, Watch, WatchState, sentence, severest
from trainer.left_out import LeftOut, blame
from trainer.logged_steps import LoggedSteps
from trainer.metrics import Measured
from trainer.monitor.stage_monitor import StageMonitor
from trainer.stop_notice import AbandonedError, StoppedError
from trainer.watchdog import Phase


class Step(Protocol):
    """One global batch as a loader hands it out."""

    @property
    def sample_ids(self) -> Any: ...
    @property
    def global_tokens(self) -> int: ...


class Saver(Protocol):
    """Writes checkpoints, at once or behind training."""

    def save(self, store: CheckpointStore, state: dict[str, Any]) -> str:
        """Save the model and the given state; the checkpoint's name. Collective."""

    def wait(self) -> None:
        """Until all saves are committed. Collective."""

    def close(self) -> None:
        """After a failure: let what is in flight end."""


class Notice(Protocol):
    """What may ask this rank to end."""

    @property
    def given(self) -> bool: ...


class StepLoader(Protocol):
    """An endless, resumable stream of steps."""

    @property
    def unit(self) -> Unit: ...
    def __iter__(self) -> Iterator[Any]: ...
    def leave_out(self, sample_ids: np.ndarray) -> None: ...
    def state(self) -> Any: ...
    def close(self) -> None: ...


@dataclass
class TrainerState:
    """Everything besides the model that a resumed run needs; JSON-able."""

    loader: dict[str, int] | None = None
    start_value: float | None = None
    """Validated before the first step; None if that was not measured."""
    best_value: float | None = None
    """Of the validations after training began, from which alone a checkpoint is selected."""
    best: str | None = None
    """Name of the checkpoint that has it; for the run's own among those that the store has."""
    best_epoch: int = 0
    stale_validations: int = 0
    good: str | None = None
    """Name of the checkpoint that a roll-back returns to."""
    finished: bool = False
    validations: list[dict[str, int | float]] = field(default_factory=list)
    skipped: list[dict[str, int]] = field(default_factory=list)
    """Steps that were left out, and how many samples are to blame for each."""
    watch: WatchState = field(default_factory=WatchState)
    """Of the guardrails."""
    unjudged: list[Alarm] | None = None
    """Alarms of the last step, where its validation was left and is still to be made."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainerState":
        """What `to_dict` gave. Raises ValueError where `values` are something else."""
        try:
            state = TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the top"
            raise ValueError(f"state.json is wrong at {place} ({first['msg']})") from error
        whole = asdict(state)
        odd = whole.keys() ^ values.keys() or whole["watch"].keys() ^ values["watch"].keys()
        if odd:
            raise ValueError(
                f"state.json is no state of this version's trainings ({', '.join(sorted(odd))}): "
                "go on with the version that wrote it, or begin again with --force"
            )
        return state


@dataclass(frozen=True)
class Limits:
    """When training ends."""

    epochs: int
    max_steps: int | None

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        steps = self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclass
class Trainer:
    """Runs a loader through a model until the limits, an early stop, a notice, or a failure.

    `updates` turns a step into updates, mostly one, maybe none; an update is the loss module's
    inputs, one per micro batch. Checkpoints fall between steps, never between the updates of one.
    `validate` returns metrics that are equal on all ranks.
    """

    stage: str
    model: ParallelModel
    loader: StepLoader
    updates: Callable[[Any], Iterable[Sequence[Any]]]
    steps_per_epoch: int
    """Updates that an epoch is, however many steps of the loader bring none."""
    total_steps: int
    state: TrainerState
    newest: CheckpointStore
    best: CheckpointStore
    good: CheckpointStore
    """The last policy that kept the guardrails, where they may want it back."""
    checkpoint: CheckpointConfig
    saver: Saver
    restore: Callable[[CheckpointStore, str], None]
    """Brings back what was saved beside a store's checkpoint of a name. Collective."""
    validation: ValidationConfig | None
    validate: Callable[[], Measured]
    measure_start: bool
    """Validate before the first step; that value is shown and never selected."""
    watch: Watch | None
    """Guardrails."""
    notice: Notice
    sign: Callable[[int, Phase], None]
    """Called at every phase of a step, for the watchdog."""
    left_out: LeftOut
    logged: LoggedSteps
    monitor: StageMonitor | None
    """Rank 0 only."""

    def train(self) -> TrainerState:
        """Train to the end; the state says what was selected. Collective.

        Raises:
            StoppedError: a rank was asked to end; everything is saved at the step it names.
            AbandonedError: so it was before there was a step to save.
        """
        self.model.lr_ratio = self.state.watch.lr_ratio
        self.model.may_skip = self.left_out.skips
        with ExitStack() as closing:  # in reverse
            if self.monitor is not None:
                closing.enter_context(self.monitor)
            closing.callback(self.loader.close)
            closing.callback(self.saver.close)
            if self.measure_start and self.model.step == 0:
                self._begin()
            if self.state.unjudged is not None:
                alarms, self.state.unjudged = self.state.unjudged, None
                self._settle(alarms, judges=True, saves=True, stop=False)
            if not self.total_steps and not self.state.finished:
                self.state.finished = True
                self._settle([], judges=True, saves=True, stop=False)
            if not self.state.finished:
                for batches in self.loader:
                    if self._one_step(batches):
                        break
            self.sign(self.model.step, "saving")
            self.saver.wait()
        return self.state

    def _begin(self) -> None:
        """Measure the policy that training begins with, and keep it. Collective."""
        found = Measured({})
        if self.validation is not None:
            self.sign(0, "validating")
            found, name = self.validate(), self.validation.metric
            self.state.start_value = found.metrics[name]
            if self.monitor is not None:
                told = f"at the start: {name} {found.metrics[name]:.4f}"
                self.monitor.log_validation(0, found.metrics, told)
        if self.watch is not None:
            alarms = self.watch.begin(found.metrics, found.shares)
            if alarms and self.monitor is not None:
                self.monitor.log_alarm(sentence(alarms, "warn"))
            self._keep_good()
        self.sign(0, "loading")

    def _one_step(self, batches: Step) -> bool:
        """Train, validate and save as due; whether training has ended."""
        before, alarms, stop = self.model.step, list[Alarm](), False
        self.sign(before, "updating")
        for inputs in self.updates(batches):
            result = self._update(inputs, batches.sample_ids)
            if result is None:
                continue
            stop = stop or result.stop
            alarms += self._log(result, self.model.step, batches.global_tokens)
        step = self.model.step
        self.state.loader = self.loader.state().to_dict()
        self.state.finished = step >= self.total_steps
        epoch_ends = step > before and step % self.steps_per_epoch == 0
        self._settle(
            alarms,
            judges=self._judges_after(before, step, epoch_ends),
            saves=self._saves_after(before, step, epoch_ends),
            stop=stop,
        )
        return self.state.finished

    def _settle(self, alarms: list[Alarm], *, judges: bool, saves: bool, stop: bool) -> None:
        """After a step that raised `alarms`: validate, save and end as due. Collective."""
        step = self.model.step
        with self.monitor.paused() if self.monitor is not None else nullcontext():
            try:
                self._heed(self._judge(step, alarms) if judges else alarms)
            except AbandonedError:  # by the validation, before which nothing was judged
                self.state.unjudged, stop = alarms, True
            if self.state.finished or stop or saves:
                self._save(self.newest)
        if stop and (self.state.unjudged is not None or not self.state.finished):
            self.saver.wait()
            raise StoppedError(self.stage, step)
        self.sign(step, "loading")

    def _epoch(self, step: int) -> int:
        """Of the update that made it `step`, from 0."""
        return (step - 1) // self.steps_per_epoch

    def _update(self, inputs: Sequence[Any], sample_ids: Sequence[int]) -> StepResult | None:
        """One update; None if it is left out. Collective."""
        try:
            return self.model.train_step(inputs, sample_ids, self.notice.given)
        except NonFiniteLossError as error:
            step = self.model.step + 1
            told = self.left_out.skip(error, self.state.skipped, step, sample_ids)
        except Exception as error:
            blamed = blame(error, sample_ids, self.loader.unit)
            if blamed is error:
                raise
            raise blamed from error
        self.model.skip_step()
        if self.monitor is not None:
            self.monitor.log_alarm(told)
        return None

    def _judges_after(self, before: int, step: int, epoch_ends: bool) -> bool:
        if self.validation is None:
            return self.state.finished or epoch_ends
        by_step = _reached(self.validation.every_steps, before, step)
        by_epoch = epoch_ends and (self._epoch(step) + 1) % self.validation.every_epochs == 0
        return self.state.finished or by_step or by_epoch

    def _saves_after(self, before: int, step: int, epoch_ends: bool) -> bool:
        every_epochs, done = self.checkpoint.every_epochs, self._epoch(step) + 1
        by_step = _reached(self.checkpoint.every_steps, before, step)
        by_epoch = epoch_ends and every_epochs is not None and done % every_epochs == 0
        return by_step or by_epoch

    def _save(self, store: CheckpointStore) -> str:
        self.sign(self.model.step, "saving")
        if self.monitor is not None:
            self.monitor.flush()
        return self.saver.save(store, self.state.to_dict())

    def _log(self, result: StepResult, step: int, tokens: int) -> list[Alarm]:
        """Log an update, if it is one that is logged; what the guardrails say of it. One of empty
        sequences alone measured nothing, which is no row of zeros."""
        if self.monitor is not None:
            self.monitor.add_tokens(tokens)
        if step not in self.logged or result.weight == 0:
            return []
        if self.monitor is not None:
            values = {"lr": result.lr, "sparse_lr": result.sparse_lr}
            values |= {"dense_grad_norm": result.dense_grad_norm} | result.metrics
            self.monitor.log_step(step, self._epoch(step), result.loss, values)
        if self.watch is None:
            return []
        measured = {"loss": result.loss} | result.metrics
        return self.watch.logged(step, measured, result.unmeasured)

    def _judge(self, step: int, alarms: list[Alarm]) -> list[Alarm]:
        """Validate, and keep a policy that breaks no limit and is not suspected to go astray: a
        stop must end with, and a roll-back return to, what lies before all of such a course.

        Returns:
            `alarms`, which its training steps raised, and those of validation. Collective.
        """
        found, validation, watch = Measured({}), self.validation, self.watch
        if validation is not None:
            self.sign(step, "validating")
            found = self.validate()
        if watch is not None:
            alarms = alarms + watch.judged(step, found.metrics, found.shares)
        sound = severest(alarms) in (None, "warn")
        kept = sound and (watch is None or watch.kept(found.metrics, found.shares))
        if validation is not None:
            self._select(step, found.metrics, kept, validation)
        if kept:
            self._keep_good()
        return alarms

    def _select(
        self, step: int, metrics: dict[str, float], kept: bool, validation: ValidationConfig
    ) -> None:
        """Select the best of what is kept; end where nothing has been better for long."""
        value, epoch = metrics[validation.metric], self._epoch(step)
        self.state.validations.append({"step": step, "epoch": epoch, **metrics})
        improved = kept and (self.state.best_value is None or value > self.state.best_value)
        if improved:
            self.state.best_value, self.state.best_epoch = value, epoch
            self.state.stale_validations = 0
            self.state.best = self._save(self.best)
        else:
            self.state.stale_validations += 1
        patience = validation.patience
        stops = patience is not None and self.state.stale_validations >= patience
        self.state.finished = self.state.finished or stops
        if self.monitor is not None:
            within = step % self.steps_per_epoch and not self.state.finished
            place = f"at step {step:,}" if within else f"after epoch {epoch + 1}"
            told = f"validation {place}: {validation.metric} {value:.4f}"
            told += f" ({self._standing(improved)})"
            told += f"; no better for {patience} validations, stopping" if stops else ""
            self.monitor.log_validation(step, metrics, told)

    def _standing(self, improved: bool) -> str:
        """How a validation compares with all before it, that before training included."""
        best, start = self.state.best_value, self.state.start_value
        if best is None:
            return "none is known to keep the guardrails yet"
        if start is not None and start >= best:
            return f"best {start:.4f}, before training"
        return "best so far" if improved else f"best {best:.4f}"

    def _keep_good(self) -> None:
        """Save the policy to go back to, if a guardrail may ask for it."""
        if self.watch is not None and self.watch.acts:
            self.state.good = self._save(self.good)

    def _heed(self, alarms: Sequence[Alarm]) -> None:
        """Say what is broken, and do what the severest alarm asks for. Collective."""
        action = severest(alarms)
        if action is None:
            return
        if self.monitor is not None:
            self.monitor.log_alarm(sentence(alarms, action))
        if action == "stop":
            self.state.finished = True
        if action == "roll_back":
            self._roll_back()

    def _roll_back(self) -> None:
        """Return to the last good policy, and to the reference that it had; data and schedule go
        on, at lower learning rates."""
        self.saver.wait()
        name, step = self.state.good, self.model.step
        assert self.watch is not None and name is not None, "the start was kept"
        good = self.good.at(name)
        if good is None:
            why = "; ".join(self.good.skipped)
            raise ValueError(
                f"the policy to roll back to is damaged ({why}): mend the storage and run the same "
                "command again, which resumes before the alarm"
            )
        self.good.load(self.model, good)
        self.model.step = step
        self.restore(self.good, name)
        self.watch.rolled_back()
        self.model.lr_ratio = self.state.watch.lr_ratio


def _reached(every: int | None, before: int, step: int) -> bool:
    """Whether the updates after `before`, up to `step`, made a multiple of `every` full."""
    return every is not None and step // every > before // every
