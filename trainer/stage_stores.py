"""The stores of a training stage, and which of their checkpoints a run may still ask for."""

from dataclasses import dataclass
from typing import Literal

from configs.layout import RunLayout
from sharding.checkpoint import CheckpointStore
from sharding.process_group import DistributedContext


@dataclass(frozen=True)
class StageStores:
    """Runs resume from `newest` alone. What is best and what is good of the policies before, the
    state says that is saved there: by name, as a run that was cut off may have gone further and
    left others. Whatever such a state names stays as long as the state does."""

    newest: CheckpointStore
    best: CheckpointStore
    """What validation selected."""
    good: CheckpointStore
    """Policies that kept the guardrails, where they may want one back."""

    @classmethod
    def below(
        cls, layout: RunLayout, stage: str, fingerprint: str, keep: int, ctx: DistributedContext
    ) -> "StageStores":
        """Of a stage; `keep` of the newest."""
        newest = CheckpointStore(layout.checkpoints(stage, fingerprint), keep, ctx)

        def named(kind: Literal["best", "good"], url: str) -> CheckpointStore:
            def needed() -> set[str]:
                return {str(state[kind]) for state in newest.states() if state.get(kind)}

            return CheckpointStore(url, 2, ctx, needed)

        best = named("best", layout.best(stage, fingerprint))
        return cls(newest, best, named("good", layout.good(stage, fingerprint)))
