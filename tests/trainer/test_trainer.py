"""The training loop's own decisions: when it validates, selects, saves and stops."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from configs.training import CheckpointConfig, ValidationConfig
from data_loaders.loader import LoaderState
from sharding.checkpoint import CheckpointStore
from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.sharding.policies import Settings, make_batch, make_policy
from trainer.objectives.next_item import NextItemInputs
from trainer.trainer import Trainer, TrainerState

STEPS_PER_EPOCH = 2


@dataclass
class Batches:
    """A step of two in every epoch, counted on for ever."""

    at: LoaderState = field(default_factory=lambda: LoaderState(0, 0))
    fail_at: int | None = None
    closed: bool = False

    def __iter__(self) -> Iterator[Any]:
        while True:
            step = self.at.epoch * STEPS_PER_EPOCH + self.at.epoch_step
            if step == self.fail_at:
                raise OSError("the shard is gone")
            last = self.at.epoch_step == STEPS_PER_EPOCH - 1
            epoch = self.at.epoch
            self.at = (
                LoaderState(epoch + 1, 0) if last else LoaderState(epoch, self.at.epoch_step + 1)
            )
            yield OneStep(step, epoch, last)

    def state(self) -> LoaderState:
        return self.at

    def close(self) -> None:
        self.closed = True


@dataclass
class OneStep:
    step: int
    epoch: int
    last_of_epoch: bool
    sample_ids: tuple[int, ...] = ()
    global_tokens: int = 1


class Heard:
    """What the loop has its monitor say of validations."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def log_validation(self, step: int, metrics: dict[str, float], sentence: str) -> None:
        self.sentences.append(sentence)

    def paused(self) -> Any:
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        return lambda *values: None


def run(root: str, values: list[float], changes: dict[str, Any]) -> dict[str, Any]:
    """Train a small policy whose n-th validation gives values[n]; what the loop did."""
    ctx = current_context("cpu")
    policy = make_policy(ctx, Settings())
    calls: list[int] = []

    def validate() -> dict[str, float]:
        calls.append(policy.step)
        return {"ndcg@10": values[len(calls) - 1]}

    settings: dict[str, Any] = {
        "loader": Batches(fail_at=changes.pop("fail_at", None)),
        "total_steps": 8,
        "checkpoint": CheckpointConfig(every_epochs=None),
        "validation": ValidationConfig(),
        "measure_start": False,
    }
    settings |= changes
    said = Heard()
    stores = {name: CheckpointStore(f"{root}/{name}", 2, ctx) for name in ("newest", "best")}
    trainer = Trainer(
        model=policy,
        make_inputs=lambda step: [NextItemInputs(make_batch(step.step, ctx), None, None, 0)],
        state=TrainerState(),
        save=lambda store, state: store.save(policy, policy.step, state, {}, {}),
        validate=validate,
        log_every=1,
        monitor=said,  # type: ignore[arg-type]  # it hears what a stage's monitor would print
        **stores,
        **settings,
    )
    error = ""
    try:
        trainer.train()
    except OSError as raised:
        error = str(raised)
    found = {name: store.newest() for name, store in stores.items()}
    return {
        "validated_at": calls,
        "steps": policy.step,
        "error": error,
        "closed": settings["loader"].closed,
        "said": said.sentences,
        "state": trainer.state.to_dict(),
        **{name: None if info is None else info.step for name, info in found.items()},
    }


def train(tmp_path: Path, values: list[float], **changes: Any) -> dict[str, Any]:
    result: dict[str, Any] = run_ranks(1, run, str(tmp_path), values, changes)[0]
    return result


def test_the_best_validation_is_kept_apart_and_the_last_step_saved(tmp_path: Path) -> None:
    done = train(tmp_path, [0.1, 0.4, 0.3, 0.2])
    assert done["validated_at"] == [2, 4, 6, 8]
    assert (done["best"], done["newest"], done["steps"]) == (4, 8, 8)
    assert (done["state"]["best_value"], done["state"]["best_epoch"]) == (0.4, 1)


def test_every_other_epoch_is_validated_and_always_the_last(tmp_path: Path) -> None:
    done = train(tmp_path, [0.1, 0.2], validation=ValidationConfig(every_epochs=2), total_steps=7)
    assert done["validated_at"] == [4, 7]
    assert done["best"] == 7


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
