"""What a training stage ends with: the checkpoint that later stages start from.

What was selected may be damaged by then. The stage ends with the best of what is whole, and says
so, rather than ask for all of training again.
"""

from collections.abc import Callable, Sequence
from typing import Any

from configs.layout import RunLayout
from sharding.agreement import Agreement
from sharding.checkpoint import CheckpointInfo, CheckpointStore
from sharding.process_group import DistributedContext
from trainer.policy import checkpoint_reference
from trainer.stage_stores import StageStores
from trainer.trainer import TrainerState

Worth = Callable[[int], float | None]
"""What the policy of a step is worth; None where it is none to end with."""


def stage_outcome(
    state: TrainerState,
    stores: StageStores,
    metric: str | None,
    ctx: DistributedContext,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The outputs of a stage that is trained to its end. Collective.

    Args:
        state: of the trainer, which the newest checkpoint has, too.
        stores: of the stage.
        metric: what validation selects by, if there is one.
        ctx: this rank's.
        tell: told what is damaged, and what the stage ends with instead.

    Raises:
        ValueError: the newest checkpoint is damaged, or all that the stage could end with.
    """
    last = stores.newest.newest()
    if last is None or stores.newest.skipped:  # run again, the stage resumes before the damaged one
        raise ValueError(f"{_damage(stores.newest)}; run the same command again")
    selected, selected_on, validated = last, "last step", dict[str, int | float]()
    acted = any(alarm["action"] != "warn" for alarm in state.watch.alarms)
    if state.best is not None:
        assert metric is not None, "it was selected by one"
        by_step = {each["step"]: each for each in state.validations}
        values = {step: each[metric] for step, each in by_step.items()}
        # After a guardrail has acted, `newest` may have another policy than was validated.
        stores_of_it = (stores.best,) if acted else (stores.best, stores.newest)
        selected = _selected(state.best, stores_of_it, values.get, ctx, tell)
        selected_on, validated = "validation", by_step[selected.step]
    elif acted or metric is not None:  # of what was validated, nothing kept the guardrails
        assert state.good is not None, "the start was kept"
        selected_on = "guardrails"
        selected = _selected(state.good, (stores.good,), _later(last.step), ctx, tell)
    return {
        "checkpoint": checkpoint_reference(selected),
        "last_checkpoint": checkpoint_reference(last),
        "selected_on": selected_on,
        "best_value": None if metric is None else validated.get(metric),
        "best_epoch": validated["epoch"] + 1 if validated else None,
        "steps": last.step,
        "alarms": state.watch.alarms,
    }


def _later(last: int) -> Worth:
    """The more a policy learned the better; what a run that was cut off left goes further."""
    return lambda step: step if step <= last else None


def _selected(
    name: str,
    stores: Sequence[CheckpointStore],
    worth: Worth,
    ctx: DistributedContext,
    tell: Callable[[str], None],
) -> CheckpointInfo:
    """The checkpoint `name` of the first store, or else the one of all that is worth most."""
    store = stores[0]
    info = store.at(name)
    if info is not None:
        return info
    damage = _damage(store)
    rated = [(worth(each.step), each) for store in stores for each in _whole(store, ctx)]
    best = max(
        ((value, -each.step, each) for value, each in rated if value is not None),
        key=lambda entry: entry[:2],  # of equals the earliest, as validation selects
        default=None,
    )
    if best is None:
        stage = RunLayout.stage_of(store.root)
        raise ValueError(
            f"{damage}, and nothing else that the stage could end with is whole: restore its "
            f"files, or begin again with `tandem {stage} RECIPE --force`"
        )
    tell(f"{damage}; the stage ends with {best[2].url} instead, the best that is whole")
    return best[2]


def _whole(store: CheckpointStore, ctx: DistributedContext) -> list[CheckpointInfo]:
    """All checkpoints of a store that verify, newest first. Collective."""
    names = Agreement(ctx).on_first_rank(store.names)
    found = [store.at(name) for name in names]
    return [info for info in found if info is not None]


def _damage(store: CheckpointStore) -> str:
    """Of a checkpoint that the stage should end with."""
    why = "; ".join(store.skipped) or "nothing is there"
    return f"the stage's outcome in {store.root} is damaged ({why})"
