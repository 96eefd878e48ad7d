"""The training loop: steps, logs, validation, selection, checkpoints. Blind to the algorithm."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from pydantic import TypeAdapter, ValidationError

from configs.storage_faults import first_line
from configs.training import CheckpointConfig, ValidationConfig
from sharding.checkpoint import CheckpointStore
from sharding.loss_module import NonFiniteLossError
from sharding.parallelize import ParallelModel, StepResult
from trainer.guardrails import Alarm, Watch, WatchState
from trainer.left_out import LeftOut, blame
from trainer.monitor.stage_monitor import StageMonitor
from trainer.stop_notice import StoppedError
from trainer.watchdog import Phase


class Step(Protocol):
    """One global batch as a loader hands it out."""

    @property
    def step(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def last_of_epoch(self) -> bool: ...


class Saver(Protocol):
    """Writes checkpoints, at once or behind training."""

    def save(self, store: CheckpointStore, state: dict[str, Any]) -> None:
        """Save the model and the given state. Collective."""

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
    best_step: int = 0
    best_epoch: int = 0
    stale_validations: int = 0
    finished: bool = False
    validations: list[dict[str, float]] = field(default_factory=list)
    skipped: list[dict[str, int]] = field(default_factory=list)
    """Steps that were left out, and how many samples are to blame for each."""
    watch: WatchState = field(default_factory=WatchState)
    """Of the guardrails."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainerState":
        """What `to_dict` gave. Raises ValueError where `values` are something else."""
        try:
            TypeAdapter(cls).validate_python(values)
            return cls(**(values | {"watch": WatchState(**values["watch"])}))
        except (ValidationError, TypeError, KeyError) as error:
            reason = first_line(error)
            raise ValueError(f"state.json is no state of a training ({reason})") from error


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
    total_steps: int
    state: TrainerState
    newest: CheckpointStore
    best: CheckpointStore
    good: CheckpointStore
    """The last policy that kept the guardrails, where they may want it back."""
    checkpoint: CheckpointConfig
    saver: Saver
    restore: Callable[[CheckpointStore, int], None]
    """Brings back what was saved beside a store's checkpoint of a step. Collective."""
    validation: ValidationConfig | None
    validate: Callable[[], dict[str, float]]
    measure_start: bool
    """Validate before the first step; that value is shown and never selected."""
    watch: Watch | None
    """Guardrails."""
    notice: Notice
    sign: Callable[[int, Phase], None]
    """Called at every phase of a step, for the watchdog."""
    left_out: LeftOut
    log_every: int
    monitor: StageMonitor | None
    """Rank 0 only."""

    def train(self) -> TrainerState:
        """Train to the end; the state says what was selected. Collective.

        Raises:
            StoppedError: a rank was asked to end; everything is saved at the step it names.
        """
        self.model.lr_ratio = self.state.watch.lr_ratio
        self.model.may_skip = self.left_out.skips
        try:
            if self.measure_start and self.model.step == 0:
                self._measure_start()
            if not self.state.finished:
                for batches in self.loader:
                    if self._one_step(batches):
                        break
            self.sign(self.model.step, "saving")
            self.saver.wait()
        finally:
            self.saver.close()
            self.loader.close()
            if self.monitor is not None:
                self.monitor.close()
        return self.state

    def _measure_start(self) -> None:
        if self.validation is None:
            return
        self.sign(0, "validating")
        metrics, name = self.validate(), self.validation.metric
        self.sign(0, "loading")
        self.state.start_value = metrics[name]
        if self.watch is not None:
            self.watch.begin(metrics)
            self._keep_good()
        if self.monitor is not None:
            self.monitor.log_validation(0, metrics, f"at the start: {name} {metrics[name]:.4f}")

    def _one_step(self, batches: Any) -> bool:
        """Train, validate and save as due; whether training has ended."""
        before, epoch = self.model.step, batches.epoch
        alarm: Alarm | None = None
        stop = False
        self.sign(before, "updating")
        for inputs in self.updates(batches):
            result = self._update(inputs, batches.sample_ids)
            if result is None:
                continue
            stop = stop or result.stop
            alarm = self._log(result, self.model.step, epoch, batches.global_tokens) or alarm
        step = self.model.step
        self.state.loader = self.loader.state().to_dict()
        last = step >= self.total_steps
        self.state.finished = last
        self._heed(alarm)
        with self.monitor.paused() if self.monitor is not None else nullcontext():
            if last or (batches.last_of_epoch and self._validates_after(step, epoch)):
                self._validate(step, epoch)
            due = self._saves_after(before, step, epoch, batches.last_of_epoch)
            if self.state.finished or stop or due:
                self._save(self.newest)
        if stop and not self.state.finished:
            self.saver.wait()
            raise StoppedError(self.stage, step)
        self.sign(step, "loading")
        return self.state.finished

    def _update(self, inputs: Sequence[Any], sample_ids: Sequence[int]) -> StepResult | None:
        """One update; None if it is left out. Collective."""
        try:
            return self.model.train_step(inputs, sample_ids, self.notice.given)
        except NonFiniteLossError as error:
            step = self.model.step + 1
            sentence = self.left_out.skip(error, self.state.skipped, step, sample_ids)
        except Exception as error:
            blamed = blame(error, sample_ids)
            if blamed is error:
                raise
            raise blamed from error
        self.model.skip_step()
        if self.monitor is not None:
            self.monitor.log_alarm(sentence)
        return None

    def _validates_after(self, step: int, epoch: int) -> bool:
        """Whether an epoch is validated that ended at `step`, which brought no update maybe."""
        if self.validation is None or (epoch + 1) % self.validation.every_epochs:
            return False
        return step != (self.state.validations[-1]["step"] if self.state.validations else 0)

    def _saves_after(self, before: int, step: int, epoch: int, epoch_ends: bool) -> bool:
        every_steps, every_epochs = self.checkpoint.every_steps, self.checkpoint.every_epochs
        by_step = every_steps is not None and step // every_steps > before // every_steps
        by_epoch = epoch_ends and every_epochs is not None and (epoch + 1) % every_epochs == 0
        return by_step or by_epoch

    def _save(self, store: CheckpointStore) -> None:
        self.sign(self.model.step, "saving")
        if self.monitor is not None:
            self.monitor.flush()
        self.saver.save(store, self.state.to_dict())

    def _log(self, result: StepResult, step: int, epoch: int, tokens: int) -> Alarm | None:
        """Log an update, if it is one that is logged; what the guardrails say of it."""
        if self.monitor is not None:
            self.monitor.add_tokens(tokens)
        if step % self.log_every and step not in (1, self.total_steps):
            return None
        if self.monitor is not None:
            values = {"lr": result.lr, "sparse_lr": result.sparse_lr}
            values |= {"dense_grad_norm": result.dense_grad_norm} | result.metrics
            self.monitor.log_step(step, epoch, result.loss, values)
        if self.watch is None:
            return None
        return self.watch.logged(step, {"loss": result.loss} | result.metrics)

    def _validate(self, step: int, epoch: int) -> None:
        if self.validation is None:
            return
        self.sign(step, "validating")
        metrics = self.validate()
        alarm = self.watch.validated(step, metrics) if self.watch is not None else None
        value = metrics[self.validation.metric]
        self.state.validations.append({"step": step, "epoch": epoch, **metrics})
        sound = alarm is None or alarm.action == "warn"
        improved = sound and (self.state.best_value is None or value > self.state.best_value)
        if improved:
            self.state.best_value, self.state.best_step = value, step
            self.state.best_epoch, self.state.stale_validations = epoch, 0
            self._save(self.best)
        else:
            self.state.stale_validations += 1
        if sound:
            self._keep_good()
        patience = self.validation.patience
        stops = patience is not None and self.state.stale_validations >= patience
        self.state.finished = self.state.finished or stops
        if self.monitor is not None:
            sentence = f"validation after epoch {epoch + 1}: {self.validation.metric} {value:.4f}"
            sentence += f" ({self._standing(improved)})"
            sentence += f"; no better for {patience} validations, stopping" if stops else ""
            self.monitor.log_validation(step, metrics, sentence)
        self._heed(alarm)

    def _standing(self, improved: bool) -> str:
        """How a validation compares with all before it, that before training included."""
        best, start = self.state.best_value, self.state.start_value
        if best is None:
            return "none kept the guardrails yet"
        if start is not None and start >= best:
            return f"best {start:.4f}, before training"
        return "best so far" if improved else f"best {best:.4f}"

    def _keep_good(self) -> None:
        """Save the policy to go back to, if a guardrail may ask for it."""
        if self.watch is not None and self.watch.acts:
            self._save(self.good)

    def _heed(self, alarm: Alarm | None) -> None:
        """Say what is broken, and do what the guardrail asks for. Collective."""
        if alarm is None:
            return
        if self.monitor is not None:
            self.monitor.log_alarm(alarm.sentence())
        if alarm.action == "stop":
            self.state.finished = True
        if alarm.action == "roll_back":
            self._roll_back()

    def _roll_back(self) -> None:
        """Return to the last good policy, and to the reference that it had; data and schedule go
        on, at lower learning rates."""
        self.saver.wait()
        good, step = self.good.newest(), self.model.step
        assert self.watch is not None, "only guardrails roll back"
        if good is None or self.good.skipped:
            raise ValueError(
                f"the policy to roll back to is damaged ({'; '.join(self.good.skipped)}): mend "
                "the storage and run the same command again, which resumes before the alarm"
            )
        self.good.load(self.model, good)
        self.model.step = step
        self.restore(self.good, good.step)
        self.watch.rolled_back()
        self.model.lr_ratio = self.state.watch.lr_ratio
