"""Rollouts outside the training workers: Ray actors with snapshots of the policy.

Training writes the policy's weights to shared storage, each rank its own shards; an actor, a world
of one, reads the newest of them before it generates. So no weights pass through the driver or from
worker to actor. A rank asks for the groups of its own prompts, which are those of the loader; what
is lost with a process is asked for again, and a resumed stage asks anew.

Shape legend: N prompts, G candidates of a prompt.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from configs import storage
from configs.alignment import OnlineAlignment
from configs.policy_gradient import ReferenceConfig, RolloutActorsConfig
from data_loaders.exchange import users_error
from data_loaders.loader import LoaderState, StepBatches
from data_loaders.poison import Unit
from data_loaders.prompts import PromptLoader, PromptSequences
from sharding.checkpoint import CheckpointInfo, CheckpointStore
from sharding.checkpoint_state import weights
from sharding.parallelize import ParallelModel
from trainer.objectives.online import OnlineLoss
from trainer.policy import Worker, start_worker
from trainer.prompts import Prompts
from trainer.reference_policy import ReferencePolicy
from trainer.rollout import Rollout, RolloutEngine
from trainer.scoring import build_scorer

KEPT = 3
"""Snapshots: the newest, and those that an actor may be reading."""
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""What an actor may inherit from who started Ray; it is a world of its own."""
LINE = "line"
"""Of a snapshot's policy, among the snapshot's fingerprints."""
ATTEMPTS = 3
"""To read a snapshot; one may be replaced by newer ones meanwhile."""


@dataclass(frozen=True)
class Trajectories:
    """Groups of a rank's prompts in one batch, on the CPU."""

    version: int
    """Optimizer step of the policy that generated them."""
    line: int
    """Of the snapshot, as `publish` was given it."""
    rollouts: list[Rollout]
    """One per micro batch."""


class _RolloutActor:
    """A policy in a process of its own."""

    def __init__(self, settings: dict[str, Any], snapshots_url: str) -> None:
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
        worker = start_worker(settings, _unheard)
        config = worker.recipe.alignment
        assert isinstance(config, OnlineAlignment), "only online alignment asks for rollouts"
        loss = OnlineLoss(build_scorer(worker, normalised=True), config)
        # Weights alone, as a reference policy has them.
        self._policy = ReferencePolicy(worker, ReferenceConfig(), loss, settings["start"]).policy
        self._engine = RolloutEngine(worker, self._policy, config.generation)
        self._store = CheckpointStore(snapshots_url, KEPT, worker.ctx)
        self._now: CheckpointInfo | None = None

    def process(self) -> int:
        """Its id on its node; answers once the actor stands."""
        return os.getpid()

    def roll(self, prompts: Sequence[Prompts], step: int) -> Trajectories:
        """A group for each prompt by the newest snapshot."""
        self._refresh()
        assert self._now is not None
        rollouts = [self._engine(each, step).to("cpu") for each in prompts]
        return Trajectories(self._now.step, int(self._now.fingerprints[LINE]), rollouts)

    def _refresh(self) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            newest = self._store.newest()
            if newest is None:
                raise ValueError(
                    f"there is no snapshot of the policy in {self._store.root}: nodes of rollout "
                    "actors must see the storage of `output`"
                )
            if self._now is not None and newest.url == self._now.url:
                return
            try:
                self._store.load_weights(self._policy, newest)
            except ValueError:
                if attempt == ATTEMPTS:
                    raise
                continue
            self._now = newest
            self._engine.refresh()
            return


class RolloutActors:
    """A rank's view of the actors, which all ranks share."""

    def __init__(
        self, worker: Worker, config: RolloutActorsConfig, settings: dict[str, Any], url: str
    ) -> None:
        """`url` is where snapshots go; `start` begins."""
        self._worker, self._config, self._settings = worker, config, settings
        self._url = url
        self._store = CheckpointStore(url, KEPT, worker.ctx)
        self._actors: list[ActorHandle] = []

    def start(self) -> None:
        """Forget the snapshots of an earlier attempt, and start the actors. Collective.

        `publish` comes before the first `ask`.

        Raises:
            ValueError: the cluster has no room for them.
        """
        ctx = self._worker.ctx
        failure = None
        if ctx.rank == 0:
            storage.remove(self._url)
            self._actors = [self._new_actor() for _ in range(self._config.count)]
            failure = self._why_not_started()
        failure = ctx.broadcast_object(failure)
        if failure is not None:
            raise ValueError(failure)
        handles = ctx.broadcast_object([ray.cloudpickle.dumps(actor) for actor in self._actors])
        if ctx.rank > 0:  # rank 0 keeps its own, with which the actors live
            self._actors = [ray.cloudpickle.loads(each) for each in handles]

    def _new_actor(self) -> ActorHandle:
        cluster = self._worker.recipe.cluster
        return (
            ray.remote(_RolloutActor)
            .options(
                num_cpus=cluster.cpus_per_worker,
                num_gpus=1 if cluster.device == "cuda" else 0,
                max_restarts=self._config.max_restarts,
                max_task_retries=self._config.max_restarts,
            )
            .remote(self._settings, self._url)
        )

    def _why_not_started(self) -> str | None:
        """Wait for the actors; a sentence if they cannot be had."""
        cluster = self._worker.recipe.cluster
        try:
            answers = [actor.process.remote() for actor in self._actors]
            ray.get(answers, timeout=cluster.start_timeout_s)
        except GetTimeoutError:
            return (
                f"{self._config.count} rollout actors did not start within "
                f"cluster.start_timeout_s={cluster.start_timeout_s}: the cluster is slow, or has "
                f"no room for them beside cluster.num_workers={cluster.num_workers}; see "
                "`ray status`, or lower alignment.rollout_actors.count"
            )
        except (RayTaskError, RayActorError) as error:
            return f"a rollout actor did not start: {users_error(error)}"
        return None

    def publish(self, policy: ParallelModel, line: int) -> None:
        """Leave a snapshot of the policy's weights. Collective.

        Args:
            policy: as it is.
            line: one for all policies between two returns to an earlier one; optimizer steps go on
                then, and do not tell the policies apart.
        """
        self._store.write(policy.step, weights(policy), {}, {LINE: str(line)})

    def ask(self, prompts: Sequence[Prompts], step: int) -> ray.ObjectRef:
        """Have groups generated for this rank's prompts of a step."""
        ctx = self._worker.ctx
        actor = self._actors[(step * ctx.world_size + ctx.rank) % len(self._actors)]
        asked: ray.ObjectRef = actor.roll.remote(list(prompts), step)
        return asked

    def answer(self, asked: ray.ObjectRef) -> Trajectories:
        """Wait for what was asked.

        Raises:
            RuntimeError: the actor's process died more often than it may be started anew.
            ValueError: the actor's own sentence.
        """
        try:
            found: Trajectories = ray.get(asked)
            return found
        except RayActorError as error:
            raise RuntimeError(
                "a rollout actor died, and was started anew as often as "
                f"alignment.rollout_actors.max_restarts={self._config.max_restarts} allows: look "
                f"at its node's memory and at the logs of Ray ({str(error).splitlines()[0]})"
            ) from error
        except RayTaskError as error:
            raise users_error(error) from error

    def stop(self) -> None:
        """End the actors, and remove the snapshots."""
        if self._worker.ctx.rank == 0:
            for actor in self._actors:
                ray.kill(actor)
            storage.remove(self._url)
        self._actors = []


@dataclass(frozen=True)
class AskedStep:
    """A step of the loader whose groups are being generated."""

    sequences: StepBatches[PromptSequences]
    prompts: list[Prompts]
    asked: ray.ObjectRef

    @property
    def step(self) -> int:
        return self.sequences.step

    @property
    def sample_ids(self) -> Any:
        return self.sequences.sample_ids

    @property
    def global_tokens(self) -> int:
        return self.sequences.global_tokens


class AskingLoader:
    """A prompt loader whose steps' groups are asked for `ahead` of their turn."""

    def __init__(
        self,
        loader: PromptLoader,
        ask: Callable[[StepBatches[PromptSequences]], AskedStep],
        ahead: int,
        stop: Callable[[], None],
    ) -> None:
        self._loader, self._ask, self._ahead, self._stop = loader, ask, ahead, stop
        self._state = loader.state()

    def __iter__(self) -> Iterator[AskedStep]:
        waiting: deque[tuple[AskedStep, LoaderState]] = deque()
        while True:
            while len(waiting) <= self._ahead:
                asked = self._ask(next(self._loader))
                waiting.append((asked, self._loader.state()))
            step, self._state = waiting.popleft()
            yield step

    @property
    def unit(self) -> Unit:
        """What a sample is."""
        return self._loader.unit

    def leave_out(self, sample_ids: np.ndarray) -> None:
        """As of the loader; before the first step."""
        self._loader.leave_out(sample_ids)

    def state(self) -> LoaderState:
        """Position after the step handed out last; what was asked ahead does not count."""
        return self._state

    def close(self) -> None:
        """End the loader and the actors."""
        self._loader.close()
        self._stop()


def snapshots_url(checkpoints_url: str) -> str:
    """Where the snapshots of a stage go, beside its checkpoints."""
    return storage.join(checkpoints_url, "snapshots")


def _unheard(line: str) -> None:
    """What the training workers have told already."""
