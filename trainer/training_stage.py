"""What pretraining and alignment share: stores, resume, monitor, and the outcome of a stage."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from configs.alignment import AlignmentBase
from configs.redaction import redacted
from configs.training import TrainingConfig
from sharding.checkpoint import CheckpointInfo, CheckpointStore
from sharding.parallelize import ParallelModel
from trainer.guardrails import Watch
from trainer.left_out import LeftOut, left_out_samples
from trainer.logged_steps import LoggedSteps
from trainer.metrics import Measured
from trainer.monitor.stage_monitor import StageMonitor
from trainer.objectives.dpo import PreferenceLoss
from trainer.objectives.logged import LoggedLoss
from trainer.objectives.multi_task import MultiTaskLoss
from trainer.objectives.next_code import NextCodeLoss
from trainer.objectives.next_item import NextItemLoss
from trainer.objectives.online import OnlineLoss
from trainer.policy import (
    Worker,
    parallelize_policy,
    provenance,
    refuse_other_meanings,
)
from trainer.stage_outcome import stage_outcome
from trainer.stage_saver import StageSaver
from trainer.stage_stores import StageStores
from trainer.stop_notice import StopNotice, attended
from trainer.trainer import Limits, StepLoader, Trainer, TrainerState
from trainer.watchdog import Watchdog


class Updates(Protocol):
    """Turns a step into updates by means of the policy itself, and may hold state of its own."""

    def attach(self, policy: ParallelModel, logged: LoggedSteps) -> None:
        """Use `policy`, whose weights and step are in place: new or resumed. Collective.

        Args:
            policy: it is trained.
            logged: the steps for which everything that is told of them must be measured.
        """

    def __call__(self, step: Any) -> Iterable[Sequence[Any]]:
        """Inputs of each update. Collective."""

    def save(self, beside: CheckpointStore, name: str) -> None:
        """Save what belongs to the policy's next checkpoint in `beside`. Collective."""

    def restore(self, beside: CheckpointStore, name: str | None) -> None:
        """Come back as saved with a checkpoint of `beside`, or begin (None). Collective."""


class OneUpdate:
    """A step is one update, made of the step alone."""

    def __init__(self, make_inputs: Callable[[Any], Sequence[Any]]) -> None:
        self._make_inputs = make_inputs

    def attach(self, policy: ParallelModel, logged: LoggedSteps) -> None:
        """There is nothing to attach."""

    def __call__(self, step: Any) -> Iterable[Sequence[Any]]:
        """The step's inputs, one per micro batch."""
        return (self._make_inputs(step),)

    def save(self, beside: CheckpointStore, name: str) -> None:
        """There is nothing to save."""

    def restore(self, beside: CheckpointStore, name: str | None) -> None:
        """There is nothing to restore."""


@dataclass(frozen=True)
class TrainingStage:
    """One training stage on this rank; `fit` runs it from where its checkpoints stand."""

    worker: Worker
    name: str
    fingerprint: str
    """Of the stage's settings and inputs; keys its checkpoints and metrics."""
    config: TrainingConfig | AlignmentBase
    limits: Limits
    sparse_lr: float
    loss: NextItemLoss | NextCodeLoss | PreferenceLoss | MultiTaskLoss | OnlineLoss | LoggedLoss
    steps_per_epoch: int
    loader_at: Callable[[TrainerState], StepLoader]
    """The stage's loader at the position of a state."""
    updates: Updates
    validator: Callable[[ParallelModel], Callable[[], Measured]]
    before: Callable[[ParallelModel, bool], None] | None = None
    """Called with the policy, and whether it starts afresh, before a checkpoint is loaded."""
    measure_start: bool = False
    """Validate before the first step, so that the stage's effect can be told."""
    hashes: dict[str, str] = field(default_factory=dict)
    """Further hashes that travel with the checkpoints."""

    @property
    def logged(self) -> LoggedSteps:
        """The steps that are logged, of whoever measures for them as well."""
        config, validation = self.config, self.config.validation
        return LoggedSteps(
            config.log_every_steps,
            self.limits.total_steps(self.steps_per_epoch),
            self.steps_per_epoch,
            guarded=isinstance(config, AlignmentBase) and config.guardrails.watch,
            validated_every=None if validation is None else validation.every_steps,
        )

    def fit(self) -> dict[str, Any]:
        """Train to the end; the outputs name the selected checkpoint. Collective."""
        worker, config, layout = self.worker, self.config, self.worker.layout
        keep = config.checkpoint.keep
        stores = StageStores.below(layout, self.name, self.fingerprint, keep, worker.ctx)
        newest = stores.newest
        total_steps = self.limits.total_steps(self.steps_per_epoch)
        policy = parallelize_policy(
            worker,
            self.loss.model,
            self.loss,
            total_steps=total_steps,
            optimizer=config.optimizer,
            sparse_lr=self.sparse_lr,
        )
        info = newest.newest()
        tell_damage(self.name, newest, info, worker.tell)
        if self.before is not None:
            self.before(policy, info is None)
        state = self._resume(policy, newest, info)
        self.updates.attach(policy, self.logged)
        self.updates.restore(newest, None if info is None else info.name)
        saver = self._saver(policy, (newest, stores.good))
        watchdog = Watchdog(
            worker.recipe.failures.hang,
            layout.failures,
            stage=self.name,
            rank=worker.ctx.rank,
        )
        with attended() as notice, watchdog:
            state = self._trainer(policy, state, stores, saver, notice, watchdog).train()
        told = saver.sentence()
        if told is not None:
            worker.tell(told)
        metric = None if config.validation is None else config.validation.metric
        return stage_outcome(state, stores, metric, worker.ctx, worker.tell)

    def _trainer(
        self,
        policy: ParallelModel,
        state: TrainerState,
        stores: StageStores,
        saver: StageSaver,
        notice: StopNotice,
        watchdog: Watchdog,
    ) -> Trainer:
        config, total_steps = self.config, self.limits.total_steps(self.steps_per_epoch)
        worker = self.worker
        non_finite = worker.recipe.failures.non_finite
        loader = self.loader_at(state)
        loader.leave_out(left_out_samples(worker, loader.unit))
        return Trainer(
            stage=self.name,
            model=policy,
            loader=loader,
            updates=self.updates,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=total_steps,
            state=state,
            newest=stores.newest,
            best=stores.best,
            good=stores.good,
            checkpoint=config.checkpoint,
            saver=saver,
            restore=self.updates.restore,
            validation=config.validation,
            validate=self.validator(policy),
            measure_start=self.measure_start,
            watch=_watch(config, state),
            notice=notice,
            sign=watchdog.sign,
            left_out=LeftOut(non_finite, worker.layout.failures, self.name, worker.ctx),
            logged=self.logged,
            monitor=self._monitor(policy, total_steps, state.unjudged is not None),
        )

    def _resume(
        self, policy: ParallelModel, store: CheckpointStore, info: CheckpointInfo | None
    ) -> TrainerState:
        if info is None:
            return TrainerState()
        refuse_other_meanings(self.worker, info)
        _refuse_other_training(info, self.fingerprint)
        state = TrainerState.from_dict(store.load(policy, info))
        self.worker.tell(f"resuming from step {info.step:,} ({info.url})")
        for note in store.notes:
            self.worker.tell(note)
        return state

    def _saver(self, policy: ParallelModel, returned_to: tuple[CheckpointStore, ...]) -> StageSaver:
        return StageSaver(
            policy,
            redacted(self.worker.recipe.model_dump(mode="json")),
            provenance(self.worker, stage=self.fingerprint, **self.hashes),
            returned_to,
            self.updates.save,
            behind_training=self.config.checkpoint.behind_training,
        )

    def _monitor(
        self, policy: ParallelModel, total_steps: int, unjudged: bool
    ) -> StageMonitor | None:
        worker = self.worker
        if worker.ctx.rank != 0:
            return None
        manifest, recipe = worker.dataset.manifest, worker.recipe
        mean_length = _mean_length(manifest.length_histogram, recipe.data.loader.max_length)
        return StageMonitor(
            self.name,
            total_steps=total_steps,
            start_step=policy.step,
            unjudged=unjudged,
            directory_url=worker.layout.metrics(self.name, self.fingerprint),
            forward_flops_per_token=self.loss.flops_per_token(mean_length),
            world_size=worker.ctx.world_size,
            device=worker.ctx.device,
            dtype=torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32,
            say=worker.say,
        )


def _mean_length(histogram: Mapping[int, int], longest: int) -> float:
    """Length of the sequence that a mean token is in, Σn²/Σn, from users per power-of-two bucket.

    Attention's cost per token grows with this, not with the mean over sequences.
    """
    lengths = [(min(1.5 * bucket, longest), users) for bucket, users in histogram.items()]
    tokens = sum(users * length for length, users in lengths)
    return sum(users * length**2 for length, users in lengths) / max(tokens, 1.0)


def tell_damage(
    stage: str, store: CheckpointStore, info: CheckpointInfo | None, tell: Callable[[str], None]
) -> None:
    """Tell what `store` skipped to find `info`; never start over silently over what is damaged.

    Raises:
        ValueError: there are checkpoints, but none of them verifies.
    """
    if info is None and store.skipped:
        raise ValueError(
            f"every checkpoint of stage {stage!r} is damaged ({'; '.join(store.skipped)}); "
            f"restore one, or begin again with `tandem {stage} RECIPE --force`"
        )
    for sentence in store.skipped:
        tell(sentence)


def _refuse_other_training(info: CheckpointInfo, fingerprint: str) -> None:
    """Refuse a checkpoint that was put here by hand: a resumed run would be neither of the two.

    Raises:
        ValueError: names the checkpoint.
    """
    saved_by = info.fingerprints.get("stage")
    if saved_by != fingerprint:
        raise ValueError(
            f"checkpoint {info.url} was saved by another training ({str(saved_by)[:12]}) than the "
            f"one whose directory it lies in ({fingerprint[:12]}); move it away, or begin with its "
            "weights: training.start.run"
        )


def _watch(config: TrainingConfig | AlignmentBase, state: TrainerState) -> Watch | None:
    """The guardrails of a stage that has some."""
    if not isinstance(config, AlignmentBase):
        return None
    return Watch(config.guardrails, state.watch) if config.guardrails.watch else None
