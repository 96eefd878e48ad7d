"""The training loop's own decisions: when it validates, selects, saves and stops."""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import storage
from configs.failures import NonFiniteConfig
from configs.guardrails import Action, DivergenceConfig, GuardrailsConfig, LimitConfig
from configs.layout import RunLayout
from configs.training import CheckpointConfig, ValidationConfig
from data_loaders.loader import LoaderState
from data_loaders.poison import Unit
from models.batch import JaggedBatch
from models.ops.windows import windows_ending_at
from sharding.checkpoint import CheckpointStore
from sharding.loss_module import LossOutput
from sharding.parallelize import ParallelModel
from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.sharding.policies import Settings, make_batch, make_policy
from trainer.guardrails import Alarm, Watch, WatchState
from trainer.left_out import LeftOut
from trainer.logged_steps import LoggedSteps
from trainer.metrics import Measured
from trainer.objectives.next_item import NextItemInputs
from trainer.stage_stores import StageStores
from trainer.stop_notice import AbandonedError, StopNotice, StoppedError
from trainer.trainer import Trainer, TrainerState

STEPS_PER_EPOCH = 2
KEPT = ("checkpoints/train-x/best", "checkpoints/train-x/good")


@dataclass
class Batches:
    """A step of two in every epoch, counted on for ever."""

    at: LoaderState = field(default_factory=lambda: LoaderState(0, 0))
    fail_at: int | None = None
    closed: bool = False
    unit: Unit = "user"

    def __iter__(self) -> Iterator[Any]:
        while True:
            step = self.at.epoch * STEPS_PER_EPOCH + self.at.epoch_step
            if step == self.fail_at:
                raise OSError("the shard is gone")
            self.at = LoaderState(*divmod(step + 1, STEPS_PER_EPOCH))
            yield OneStep(step)

    def state(self) -> LoaderState:
        return self.at

    def close(self) -> None:
        self.closed = True


@dataclass
class OneStep:
    step: int
    sample_ids: tuple[int, ...] = ()
    global_tokens: int = 1


@dataclass
class AtOnce:
    """Saves before it returns."""

    policy: ParallelModel

    def save(self, store: CheckpointStore, state: dict[str, Any]) -> str:
        return store.save(self.policy, self.policy.step, state, {}, {}).name

    def wait(self) -> None:
        """Nothing is in flight."""

    def close(self) -> None:
        """Nothing is in flight."""


class Heard:
    """What the loop has its monitor say of validations and alarms, and the steps it logs."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.alarms: list[str] = []
        self.steps: list[tuple[int, float]] = []

    def __enter__(self) -> "Heard":
        return self

    def __exit__(self, *ended: object) -> None:
        """There is nothing to close."""

    def log_validation(self, step: int, metrics: dict[str, float], sentence: str) -> None:
        self.sentences.append(sentence)

    def log_alarm(self, sentence: str) -> None:
        self.alarms.append(sentence)

    def log_step(self, step: int, epoch: int, loss: float, values: dict[str, float]) -> None:
        self.steps.append((epoch, loss))

    def paused(self) -> Any:
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        return lambda *values: None


def hash_of(policy: ParallelModel) -> str:
    """Of the weights, dense ones and those of the table."""
    table = policy.lookup({"item": torch.arange(1, 20)})["item"]
    dense = [p.detach().float().flatten() for p in policy.model.parameters()]
    return sha256(torch.cat([*dense, table.flatten()]).numpy().tobytes()).hexdigest()


def step_of(name: str | None) -> int | None:
    """Of a checkpoint's name."""
    return None if name is None else int(name.split("-")[1])


def measure_more(policy: ParallelModel, rare: Collection[int]) -> None:
    """Have the loss measure `rare`, which is 1, in these steps alone, counted from 0; and `reward`,
    which is the step."""

    def told(module: Any, inputs: Any, output: LossOutput) -> LossOutput:
        here, one = torch.tensor(float(policy.step in rare)), torch.tensor(1.0)
        metrics = {"rare": here, "reward": one * policy.step}
        terms = {"rare": here, "reward": one}
        return replace(output, metrics=output.metrics | metrics, terms=output.terms | terms)

    assert isinstance(policy._loss, torch.nn.Module)
    policy._loss.register_forward_hook(told)


def run(
    root: str, values: Sequence[float | None], changes: dict[str, Any], *, resume: bool = False
) -> dict[str, Any]:
    """Train a small policy whose n-th validation gives values[n], None where it is left as the rank
    is asked to end; what the loop did."""
    ctx = current_context("cpu")
    policy = make_policy(ctx, Settings())
    stores = StageStores.below(RunLayout(root), "train", "x", 2, ctx)
    state = TrainerState()
    if resume and (found := stores.newest.newest()) is not None:
        state = TrainerState.from_dict(stores.newest.load(policy, found))
    calls: list[int] = []

    def validate() -> Measured:
        calls.append(policy.step)
        weights.append(hash_of(policy))
        value = values[len(calls) - 1]
        if value is None:
            raise AbandonedError
        return Measured({"ndcg@10": value, "other": 1 - value})

    def batch_of(step: int, empty: bool) -> JaggedBatch:
        batch = make_batch(step, ctx)
        return windows_ending_at(batch, batch.offsets[:0], 1) if empty else batch

    weights: list[str] = []
    restored: list[tuple[str, int | None]] = []
    settings: dict[str, Any] = {
        "loader": Batches(
            LoaderState(**(state.loader or {"epoch": 0, "epoch_step": 0})),
            fail_at=changes.pop("fail_at", None),
        ),
        "steps_per_epoch": STEPS_PER_EPOCH,
        "total_steps": 8,
        "checkpoint": CheckpointConfig(every_epochs=None),
        "validation": ValidationConfig(),
        "measure_start": False,
    }
    guardrails, skipped = changes.pop("guardrails", None), changes.pop("skipped", ())
    measure_more(policy, changes.pop("rare", ()))
    inner, empty = changes.pop("inner", 1), changes.pop("empty", ())
    settings["logged"] = LoggedSteps(1, 8, STEPS_PER_EPOCH, guarded=guardrails is not None)
    settings |= changes
    said = Heard()
    trainer = Trainer(
        stage="train",
        notice=StopNotice(),
        sign=lambda step, phase: None,
        left_out=LeftOut(NonFiniteConfig(), f"{root}/failures", "train", ctx),
        model=policy,
        updates=lambda step: [
            [NextItemInputs(batch_of(step.step, step.step in empty), None, None, 0)]
            for _ in range(0 if step.step in skipped else inner)
        ],
        state=state,
        watch=None if guardrails is None else Watch(guardrails, state.watch),
        saver=AtOnce(policy),
        restore=lambda store, name: restored.append((store.root.rsplit("/", 1)[1], step_of(name))),
        validate=validate,
        monitor=said,  # type: ignore[arg-type]  # it hears what a stage's monitor would print
        newest=stores.newest,
        best=stores.best,
        good=stores.good,
        **settings,
    )
    error = ""
    try:
        trainer.train()
    except (OSError, StoppedError, AbandonedError) as raised:
        error = str(raised)
    newest, named = stores.newest.newest(), trainer.state
    for store, name in ((stores.best, named.best), (stores.good, named.good)):
        assert name is None or store.at(name) is not None
    return {
        "validated_at": calls,
        "weights": [*weights, hash_of(policy)],
        "restored": restored,
        "lr_ratio": policy.lr_ratio,
        "steps": policy.step,
        "error": error,
        "closed": settings["loader"].closed,
        "said": said.sentences,
        "alarms": said.alarms,
        "logged": said.steps,
        "state": trainer.state.to_dict(),
        "newest": None if newest is None else newest.step,
        "best": step_of(named.best),
        "good": step_of(named.good),
        "kept": {name: storage.list_names(f"{root}/{name}") for name in KEPT},
    }


def train(tmp_path: Path, values: list[float], **changes: Any) -> dict[str, Any]:
    result: dict[str, Any] = run_ranks(1, run, str(tmp_path), values, changes)[0]
    return result


def test_the_best_validation_is_kept_apart_and_the_last_step_saved(tmp_path: Path) -> None:
    done = train(tmp_path, [0.1, 0.4, 0.3, 0.2])
    assert done["validated_at"] == [2, 4, 6, 8]
    assert (done["best"], done["newest"], done["steps"]) == (4, 8, 8)
    assert (done["state"]["best_value"], done["state"]["best_epoch"]) == (0.4, 1)


def test_epochs_are_counted_by_updates_whatever_steps_bring_none(tmp_path: Path) -> None:
    done = train(tmp_path, [0.1, 0.2], skipped=(0, 1, 3, 4, 5, 7), total_steps=4)
    assert done["validated_at"] == [2, 4] and done["steps"] == 4
    assert [epoch for epoch, _ in done["logged"]] == [0, 0, 1, 1]
    assert [line.split(":")[0] for line in done["said"]] == [
        "validation after epoch 1",
        "validation after epoch 2",
    ]


def test_every_other_epoch_is_validated_and_always_the_last(tmp_path: Path) -> None:
    done = train(tmp_path, [0.1, 0.2], validation=ValidationConfig(every_epochs=2), total_steps=7)
    assert done["validated_at"] == [4, 7]
    assert done["best"] == 7


def test_validation_within_epochs_selects_and_guards(tmp_path: Path) -> None:
    often = ValidationConfig(every_steps=3, every_epochs=2)
    done = train(tmp_path / "often", [0.1, 0.2, 0.4, 0.3], validation=often)
    assert done["validated_at"] == [3, 4, 6, 8] and done["best"] == 6
    assert [line.split(":")[0] for line in done["said"]] == [
        "validation at step 3",
        "validation after epoch 2",
        "validation after epoch 3",
        "validation after epoch 4",
    ]
    two_updates_a_step = train(tmp_path / "two", [0.1, 0.2, 0.4], validation=often, inner=2)
    assert two_updates_a_step["validated_at"] == [4, 6, 8]

    limit = LimitConfig(metric="ndcg@10", max_drop=0.1, action="roll_back")
    guardrails = GuardrailsConfig(limits=(limit,))
    each = ValidationConfig(every_steps=1)
    logged = LoggedSteps(100, 8, STEPS_PER_EPOCH, guarded=True, validated_every=3)
    more = {"measure_start": True, "guardrails": guardrails, "validation": each, "logged": logged}
    done = train(tmp_path / "guarded", [0.5, 0.5, 0.5, 0.3, *[0.5] * 5], **more)
    assert done["restored"] == [
        ("good", 2)
    ]  # of the second step, in the middle of the second epoch
    assert len(done["logged"]) == 6  # 1, 2, 3, 4, 6 and 8


def test_patience_stops_and_saves(tmp_path: Path) -> None:
    done = train(tmp_path, [0.3, 0.2, 0.3, 0.9], validation=ValidationConfig(patience=2))
    assert (done["steps"], done["best"], done["newest"]) == (6, 2, 6)
    assert done["state"]["finished"] and done["state"]["stale_validations"] == 2


def test_the_measure_at_the_start_is_never_selected(tmp_path: Path) -> None:
    done = train(tmp_path, [0.9, 0.1, 0.2, 0.2, 0.1], measure_start=True)
    assert done["validated_at"] == [0, 2, 4, 6, 8]
    assert (done["best"], done["state"]["best_value"]) == (4, 0.2)
    assert len(done["state"]["validations"]) == 4
    assert done["state"]["start_value"] == 0.9


def test_best_so_far_counts_the_value_before_training(tmp_path: Path) -> None:
    said = train(tmp_path, [0.3, 0.2, 0.4, 0.3, 0.5], measure_start=True)["said"]
    assert said == [
        "at the start: ndcg@10 0.3000",
        "validation after epoch 1: ndcg@10 0.2000 (best 0.3000, before training)",
        "validation after epoch 2: ndcg@10 0.4000 (best so far)",
        "validation after epoch 3: ndcg@10 0.3000 (best 0.4000)",
        "validation after epoch 4: ndcg@10 0.5000 (best so far)",
    ]
    said = train(tmp_path / "fresh", [0.2, 0.1, 0.1, 0.1])["said"]
    assert said[0] == "validation after epoch 1: ndcg@10 0.2000 (best so far)"


@pytest.mark.parametrize("every, saved", [(3, 6), (4, 4), (None, None)])
def test_a_loader_that_fails_is_closed_and_what_was_saved_stays(
    tmp_path: Path, every: int | None, saved: int | None
) -> None:
    checkpoint = CheckpointConfig(every_steps=every, every_epochs=None)
    done = train(tmp_path, [0.1] * 9, fail_at=7, checkpoint=checkpoint)
    assert done["error"] == "the shard is gone" and done["closed"]
    assert (done["steps"], done["newest"]) == (7, saved)


def guarded(tmp_path: Path, values: list[float], action: Action, **more: Any) -> dict[str, Any]:
    """A run whose NDCG may lose a tenth of what it was at the start."""
    limit = LimitConfig(metric="ndcg@10", max_drop=0.1, action=action)
    guardrails = GuardrailsConfig(limits=(limit,), **more)
    return train(tmp_path, values, measure_start=True, guardrails=guardrails)


def test_a_warning_changes_nothing_but_what_is_said(tmp_path: Path) -> None:
    values = [0.5, 0.4, 0.6, 0.3, 0.55]
    warned = guarded(tmp_path / "warned", values, "warn")
    free = train(tmp_path / "free", values, measure_start=True)
    assert warned["weights"] == free["weights"] and warned["best"] == free["best"] == 4
    assert warned["good"] is None
    alarms = warned["state"]["watch"]["alarms"]
    assert [(a["step"], a["action"]) for a in alarms] == [(2, "warn"), (6, "warn")]
    assert "fell from 0.5000 to 0.4000, by 20.000%: more than the 10%" in alarms[0]["reason"]


def test_a_stop_keeps_the_best_that_kept_the_limits(tmp_path: Path) -> None:
    done = guarded(tmp_path, [0.5, 0.46, 0.1, 0.9], "stop")
    assert (done["steps"], done["best"], done["good"], done["newest"]) == (4, 2, 2, 4)
    assert done["state"]["finished"] and done["state"]["best_value"] == 0.46
    at_once = guarded(tmp_path / "at once", [0.5, 0.1], "stop")
    assert (at_once["steps"], at_once["best"], at_once["good"]) == (2, None, 0)


def test_a_roll_back_returns_to_the_last_good_policy_and_learns_less(tmp_path: Path) -> None:
    done = guarded(tmp_path, [0.5, 0.5, 0.1, 0.5, 0.5], "roll_back", rollback_lr_ratio=0.25)
    assert done["validated_at"] == [0, 2, 4, 6, 8] and done["lr_ratio"] == 0.25
    assert done["restored"] == [("good", 2)]  # what was saved beside it comes back, too
    watch = done["state"]["watch"]
    assert (watch["rollbacks"], watch["lr_ratio"]) == (1, 0.25)
    assert len(set(done["weights"][:5])) == 5
    # The last step's roll-back is seen alone: after it the weights are those validated before.
    done = guarded(tmp_path / "last", [0.5, 0.5, 0.5, 0.5, 0.1], "roll_back")
    assert done["weights"][-1] == done["weights"][-3] != done["weights"][-2]
    to_start = guarded(tmp_path / "start", [0.5, 0.1, 0.1, 0.1, 0.1], "roll_back")
    assert to_start["state"]["watch"]["rollbacks"] == 2 and to_start["steps"] == 6
    assert to_start["good"] == 0 and to_start["restored"] == [("good", 0), ("good", 0)]
    [*_, last] = to_start["state"]["watch"]["alarms"]
    assert "max_rollbacks=2 allows no more roll-backs" in last["reason"]


@pytest.mark.parametrize("action", ["stop", "roll_back"])
def test_nothing_of_a_hacked_course_is_selected(tmp_path: Path, action: Action) -> None:
    """Its first validation is the best so far, and no alarm yet."""
    guardrails = GuardrailsConfig(divergence=DivergenceConfig(action=action), max_rollbacks=1)
    more = {"measure_start": True, "guardrails": guardrails}
    done = train(tmp_path / "start", [0.5, 0.4, 0.3, 0.4, 0.3], **more)
    assert (done["best"], done["good"], done["state"]["finished"]) == (None, 0, True)
    done = train(tmp_path / "later", [0.5, 0.6, 0.5, 0.4, 0.7], **more)
    assert done["good"] == done["best"] == (2 if action == "stop" else 8)
    assert done["state"]["best_value"] == (0.6 if action == "stop" else 0.7)
    metric = ValidationConfig(metric="other")
    done = train(tmp_path / "other", [0.5, 0.6, 0.5, 0.4, 0.4], validation=metric, **more)
    assert done["best"] == 2  # the smaller NDCG is, the larger is the other metric


def resumed(root: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A calm run that rolls back at step 6; one that does not, and is killed at 9, having kept
    better policies; and the calm one again, from where the killed one was saved: at 5."""
    limit = LimitConfig(metric="ndcg@10", max_drop=0.1, action="roll_back")

    def changes(**more: Any) -> dict[str, Any]:
        checkpoint = CheckpointConfig(every_steps=5, every_epochs=None)
        guardrails = GuardrailsConfig(limits=(limit,))
        common = {"measure_start": True, "guardrails": guardrails, "checkpoint": checkpoint}
        return common | more

    first, then = [0.5, 0.5, 0.51], [0.1, 0.5]
    calm = run(f"{root}/calm", first + then, changes())
    killed = run(f"{root}/killed", [*first, 0.52, 0.53], changes(total_steps=10, fail_at=9))
    again = run(f"{root}/killed", then, changes(), resume=True)
    return calm, killed, again


def test_a_resumed_run_knows_its_own_best_and_good_among_those_of_what_was_cut_off(
    tmp_path: Path,
) -> None:
    calm, killed, again = run_ranks(1, resumed, str(tmp_path))[0]
    assert (killed["best"], killed["good"], killed["newest"], killed["steps"]) == (8, 8, 5, 9)
    for kept in killed["kept"].values():
        assert [step_of(name) for name in sorted(kept)] == [4, 6, 8]  # 4 is named by the newest
    assert again["validated_at"] == [6, 8] and again["restored"] == calm["restored"] == [
        ("good", 4)
    ]
    assert again["weights"][-2:] == calm["weights"][-2:] and again["lr_ratio"] == calm["lr_ratio"]
    assert again["best"] == calm["best"] == 4
    states = [{**done["state"], "best": None, "good": None} for done in (calm, again)]
    assert states[0] == states[1]


def left(root: str) -> tuple[dict[str, Any], ...]:
    """A calm run that rolls back at step 4 for what that step measured; one that leaves each
    validation from there once, with what goes on from it; one that leaves that at the start."""
    limit = LimitConfig(metric="rare", max=0.9, action="roll_back")

    def once(name: str, values: list[float | None], resume: bool = False) -> dict[str, Any]:
        guardrails = GuardrailsConfig(limits=(limit,), window=1)
        more = {"measure_start": True, "guardrails": guardrails, "rare": (3,), "total_steps": 6}
        return run(f"{root}/{name}", values, more, resume=resume)

    return (
        once("calm", [0.5, 0.5, 0.7, 0.6]),
        once("told", [0.5, 0.5, None]),
        once("told", [0.7, None], resume=True),
        once("told", [0.6], resume=True),
        once("at once", [None]),
    )


def test_a_validation_that_was_left_is_made_first_by_the_resumed_run(tmp_path: Path) -> None:
    calm, first, then, last, at_once = run_ranks(1, left, str(tmp_path))[0]
    for done, step in ((first, 4), (then, 6)):
        assert f"is saved at step {step}" in done["error"] and done["newest"] == step
    assert "did not train" in at_once["error"] and at_once["newest"] is None
    assert (then["validated_at"], last["validated_at"]) == ([4, 6], [6])
    assert first["restored"] == [] and then["restored"] == calm["restored"] == [("good", 2)]
    assert first["alarms"] == [] and then["alarms"] == calm["alarms"] != []
    assert first["said"] + then["said"] + last["said"] == calm["said"]
    assert first["logged"] + then["logged"] == calm["logged"]
    assert last["weights"][-1] == calm["weights"][-1] and last["newest"] == calm["newest"] == 6
    assert (last["best"], last["good"]) == (calm["best"], calm["good"])
    states = [{**done["state"], "best": None, "good": None} for done in (calm, last)]
    assert states[0] == states[1]


def changed(**fields: Any) -> dict[str, Any]:
    return TrainerState().to_dict() | fields


@pytest.mark.parametrize(
    "values, told",
    [
        (changed(finished="no"), "wrong at finished"),
        (changed(best_epoch=1.5), "wrong at best_epoch"),
        (changed(best_value="0.5"), "wrong at best_value"),
        (changed(watch=asdict(WatchState()) | {"rollbacks": "2"}), "wrong at watch.rollbacks"),
        (changed(watch={"start": {}}), "no state of this version's trainings"),
        (changed(best_step=4), "no state of this version's trainings \\(best_step\\)"),
        ({}, "no state of this version's trainings"),
    ],
)
def test_a_state_is_taken_as_it_is_or_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TrainerState.from_dict(values)


def test_a_state_comes_back_as_it_went() -> None:
    state = TrainerState(loader={"epoch": 1}, best_value=1.0, best="step-1", finished=True)
    state.validations.append({"step": 3, "ndcg@10": 0.5})
    state.watch.recent["kl"] = [float("inf"), 2.0]
    state.unjudged = [Alarm(3, "warn", "kl is 0.3000, above its limit of 0.2")]
    back = TrainerState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert back == state and isinstance(back.validations[0]["step"], int)


def on_loss(action: Action, **bound: float) -> LimitConfig:
    return LimitConfig(metric="loss", action=action, **(bound or {"max": -1.0}))


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of the steps of a run without guardrails."""
    free = train(tmp_path_factory.mktemp("free"), [], validation=None)
    return [loss for _, loss in free["logged"]]


def mean_of_epoch(losses: list[float], epoch: int) -> float:
    return sum(losses[epoch * STEPS_PER_EPOCH :][:STEPS_PER_EPOCH]) / STEPS_PER_EPOCH


@pytest.mark.parametrize("window", [5, 2])
def test_a_training_metric_is_held_to_its_mean_as_an_epoch_ends(
    tmp_path: Path, losses: list[float], window: int
) -> None:
    """Also where an epoch has fewer steps than a window: no policy is kept that was not judged."""
    first, second = mean_of_epoch(losses, 0), mean_of_epoch(losses, 1)
    assert second < first
    limit = on_loss("roll_back", min=(first + second) / 2)
    done = train(
        tmp_path,
        [0.5, 0.6, 0.9, 0.9, 0.9],
        measure_start=True,
        guardrails=GuardrailsConfig(limits=(limit,), window=window, max_rollbacks=1),
        total_steps=4,
    )
    assert done["restored"] == [("good", 2)] and (done["best"], done["good"]) == (2, 2)
    [alarm] = done["state"]["watch"]["alarms"]
    assert alarm["step"] == 4 and f"loss is {second:.4f}, below its limit" in alarm["reason"]


def test_an_epoch_that_breaks_a_limit_ends_with_no_good_policy(tmp_path: Path) -> None:
    """However seldom steps are logged, and however long a window is: an epoch's end is logged."""
    guardrails = GuardrailsConfig(limits=(on_loss("roll_back"),))
    logged = LoggedSteps(100, 8, STEPS_PER_EPOCH, guarded=True)
    done = train(tmp_path, [0.5] * 9, measure_start=True, guardrails=guardrails, logged=logged)
    assert done["restored"] == [("good", 0), ("good", 0)] and done["steps"] == 6
    assert (done["good"], done["best"]) == (0, None)
    assert len(done["logged"]) == 4  # the first step, and the last of each epoch


def test_a_step_of_empty_sequences_is_no_measure(tmp_path: Path) -> None:
    """Its zeros are below every floor; the epoch that it ends is judged by what was logged."""
    guardrails = GuardrailsConfig(limits=(on_loss("roll_back", min=0.5),), window=1)
    more = {"guardrails": guardrails, "measure_start": True}
    done = train(tmp_path / "last", [0.5] * 5, empty=(3, 7), **more)
    assert done["alarms"] == [] and done["good"] == 8
    assert [epoch for epoch, _ in done["logged"]] == [0, 0, 1, 2, 2, 3]
    assert all(loss > 0.5 for _, loss in done["logged"])
    none = train(tmp_path / "all", [0.5] * 3, empty=range(4), total_steps=4, **more)
    assert none["alarms"] == none["logged"] == [] and (none["good"], none["steps"]) == (4, 4)


def test_a_limit_on_what_the_first_steps_have_none_of_is_no_mistake(tmp_path: Path) -> None:
    """It is watched for where it is measured; nothing of the others is held against it."""
    limit = LimitConfig(metric="rare", max=0.9, action="warn")
    guardrails = GuardrailsConfig(limits=(limit,), window=1)
    done = train(tmp_path, [0.5] * 4, guardrails=guardrails, rare=(2,), total_steps=6)
    [alarm] = done["state"]["watch"]["alarms"]
    assert (alarm["step"], done["steps"]) == (3, 6) and "rare is 1.0000" in alarm["reason"]


@pytest.mark.parametrize("action", ["stop", "roll_back"])
def test_a_policy_that_training_stops_at_is_not_selected(
    tmp_path: Path, losses: list[float], action: Action
) -> None:
    """On the last step of an epoch, where validation finds nothing wrong with it."""
    between = (mean_of_epoch(losses, 0) + mean_of_epoch(losses, 1)) / 2
    limit = on_loss(action, min=between)
    guardrails = GuardrailsConfig(limits=(limit,), window=2, max_rollbacks=0)
    done = train(tmp_path, [0.5, 0.6, 0.9], measure_start=True, guardrails=guardrails)
    assert done["validated_at"] == [0, 2, 4] and done["steps"] == 4
    assert (done["best"], done["good"], done["state"]["best_value"]) == (2, 2, 0.6)


def test_a_stop_is_heeded_whatever_later_updates_of_the_batch_raise(tmp_path: Path) -> None:
    free = train(tmp_path / "free", [], inner=2, total_steps=2, validation=None)
    (_, first), (_, second) = free["logged"]
    between = (first + second) / 2
    assert second < between < first
    limits = (on_loss("stop", max=between), on_loss("warn", min=between))
    guardrails = GuardrailsConfig(limits=limits, window=1)
    more = {"validation": None, "measure_start": True, "inner": 2}
    done = train(tmp_path / "guarded", [], guardrails=guardrails, **more)
    assert (done["steps"], done["good"]) == (2, 0) and done["state"]["finished"]
    [told] = done["alarms"]  # all that is broken, and what follows
    assert "above its limit" in told and "below its limit" in told and told.endswith("; stopping")


def test_limits_on_training_metrics_need_no_validation(tmp_path: Path, losses: list[float]) -> None:
    """What an epoch ends with is good where it broke no limit, and so is the start."""
    between = (mean_of_epoch(losses, 0) + mean_of_epoch(losses, 1)) / 2

    def unvalidated(name: str, limit: LimitConfig, window: int) -> dict[str, Any]:
        guardrails = GuardrailsConfig(limits=(limit,), window=window)
        more = {"validation": None, "measure_start": True}
        return train(tmp_path / name, [], guardrails=guardrails, **more)

    stopped = unvalidated("stop", on_loss("stop", min=between), 3)
    assert (stopped["steps"], stopped["good"], stopped["best"]) == (4, 2, None)
    at_once = unvalidated("at once", on_loss("roll_back"), 1)
    assert at_once["restored"] == [("good", 0), ("good", 0)] and at_once["steps"] == 3


def test_a_limit_on_nothing_is_refused(tmp_path: Path) -> None:
    limit = LimitConfig(metric="klx", max=1.0)
    with pytest.raises(AssertionError, match="watches 'klx', which is not measured; here are loss"):
        train(tmp_path, [0.5] * 9, guardrails=GuardrailsConfig(limits=(limit,)))
