"""Why a worker group failed, and what the recipe's `failures` block has to say to that."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, assert_never

from ray.train.v2.api.exceptions import PreemptionError

from configs.failures import FailuresConfig
from configs.layout import RunLayout
from configs.memory_faults import is_of_device_memory, is_of_memory
from data_loaders.poison import PoisonedSampleError, quarantine, read_quarantined
from launch.user_errors import USER_ERRORS, GaveUpError
from sharding.checkpoint_directory import CheckpointDirectory
from trainer.stop_notice import AbandonedError, StoppedError
from trainer.watchdog import diagnose_hang

Kind = Literal["worker", "node", "preemption", "hang", "out_of_memory", "poisoned_sample"]
NAMES: dict[Kind, str] = {
    "worker": "worker group failed",
    "node": "a node was lost",
    "preemption": "the worker group ended",
    "hang": "a rank hung",
    "out_of_memory": "out of memory",
    "poisoned_sample": "a sample raised",
}
_OF_A_PEER = ("closed by peer", "reset by peer", "Broken pipe", "gloo/transport")


@dataclass(frozen=True)
class Failure:
    """What happened to a worker group."""

    kind: Kind
    sentence: str
    error: BaseException
    """The cause that says most."""


@dataclass(frozen=True)
class Losses:
    """What a group's nodes have lost since it began."""

    node: str | None = None
    """One that is no longer there."""
    memory: bool = False
    """Whether the kernel killed a process of one for memory."""


@dataclass(frozen=True)
class Place:
    """Where a stage's worker group leaves its traces; all URLs."""

    failures: str
    """Reports of hangs, and of what was left out."""
    quarantined: str
    newest: str
    """The checkpoints that are resumed."""

    @classmethod
    def of(cls, layout: RunLayout, stage: str, fingerprint: str) -> "Place":
        """That of a stage."""
        newest = layout.checkpoints(stage, fingerprint)
        return cls(layout.failures, layout.quarantined(fingerprint), newest)

    def progress(self) -> str:
        """Changes whenever a checkpoint is committed, also before the step of a damaged one."""
        return next(iter(CheckpointDirectory(self.newest).committed()), "")


def diagnose(
    causes: list[BaseException],
    place: Place,
    since: float,
    ranks: int,
    *,
    losses: Callable[[], Losses],
) -> Failure:
    """What these causes and traces mean.

    Args:
        causes: what ranks raised or died of, with the causes of that.
        place: where reports of hangs lie.
        since: seconds since the epoch when the group was started; older reports are not its own.
        ranks: size of the group.
        losses: asks the group's nodes, where the causes themselves do not say enough.

    Raises:
        ValueError: the user's mistake, in the worker's own sentence.
    """
    for cause in causes:
        if isinstance(cause, StoppedError | AbandonedError | PreemptionError):
            return Failure("preemption", str(cause), cause)
        if isinstance(cause, PoisonedSampleError):
            return Failure("poisoned_sample", str(cause), cause)
    hang = diagnose_hang(place.failures, since, ranks)
    if hang is not None:
        return Failure("hang", hang, causes[-1])
    memory = _memory(causes)
    if memory is not None:
        return Failure("out_of_memory", memory, causes[-1])
    for cause in causes:
        if isinstance(cause, USER_ERRORS):
            raise ValueError(str(cause)) from None
    lost = losses()
    if lost.node is not None:
        return Failure("node", f"{lost.node}: {summary(causes)}", causes[-1])
    if lost.memory:
        sentence = f"the kernel killed a process of a worker's node for memory; {_HOST_MEND}"
        return Failure("out_of_memory", sentence, causes[-1])
    return Failure("worker", summary(causes), causes[-1])


def _memory(causes: list[BaseException]) -> str | None:
    for cause in causes:
        first = _first_line(str(cause))
        if is_of_device_memory(cause):
            return (
                f"{first}; lower data.loader.tokens_per_micro_batch or "
                "data.loader.max_length, or raise training.zero_stage"
            )
        if is_of_memory(cause):
            return f"the host had no memory left ({first}); {_HOST_MEND}"
    return None


_HOST_MEND = (
    "lower data.loader.cached_row_groups (not below data.loader.shuffle_window) or "
    "data.loader.prefetch, set training.checkpoint.behind_training=false (when aligning "
    "alignment.checkpoint.behind_training=false), or spread the ranks over more nodes"
)


def summary(causes: list[BaseException]) -> str:
    """The last cause that is not merely the loss of another rank, in one line."""
    own = [cause for cause in causes if not any(sign in str(cause) for sign in _OF_A_PEER)]
    last = (own or causes)[-1]
    lines = [line for line in str(last).splitlines() if line]
    if not lines:
        return type(last).__name__
    return textwrap.shorten(lines[-1].split(". ")[0], 200, placeholder=" …")


def _first_line(text: str) -> str:
    return textwrap.shorten((text.splitlines() or [""])[0], 200, placeholder=" …")


def processes_killed_for_memory() -> int:
    """How many the kernel has killed so far: in this process's cgroup, else on this machine."""
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            for counter in _COUNTERS.get(controllers, ()):
                place = Path(counter.format(group=group.strip("/")))
                if place.exists():
                    return _count(place)
        return _count(Path("/proc/vmstat"))
    except (OSError, ValueError):  # no Linux, or hidden by a sandbox
        return 0


_COUNTERS = {
    "": ("/sys/fs/cgroup/{group}/memory.events",),
    "memory": ("/sys/fs/cgroup/memory/{group}/memory.oom_control",),
}
"""Of the second and the first version of cgroups."""


def _count(place: Path) -> int:
    counts = dict(line.split() for line in place.read_text().splitlines())
    return int(counts.get("oom_kill", 0))


@dataclass
class Restarts:
    """Decides whether a group is started again; counts restarts without progress."""

    config: FailuresConfig
    place: Place
    say: Callable[[str], None]
    _counts: dict[Kind, int] = field(default_factory=dict)
    _progress: str = ""

    def __post_init__(self) -> None:
        self._progress = self.place.progress()

    def decide(self, failure: Failure) -> None:
        """Return if the group shall be started again from the newest checkpoint.

        Raises:
            ValueError: the recipe says to stop, or leaves nothing more out; how to mend it.
            GaveUpError: the group failed more often in a row than allowed.
        """
        if failure.kind == "poisoned_sample":
            self._leave_out(failure)
            return
        progress = self.place.progress()
        if progress != self._progress:
            self._counts, self._progress = {}, progress
        done, allowed = self._counts.get(failure.kind, 0), self._allowed(failure)
        if done >= allowed:
            often = f" {done + 1} times in a row without a new checkpoint" if done else ""
            raise GaveUpError(
                f"{NAMES[failure.kind]}{often} "
                f"(failures.{failure.kind}.max_restarts={allowed}): {failure.sentence}; the same "
                f"command goes on from the newest checkpoint; last error:\n{failure.error}"
            ) from failure.error
        self._counts[failure.kind] = done + 1
        self.say(
            f"{NAMES[failure.kind]} ({failure.sentence}); restarting from the newest checkpoint, "
            f"attempt {done + 2} of {allowed + 1}"
        )

    def _allowed(self, failure: Failure) -> int:
        config = self.config
        match failure.kind:
            case "worker":
                return config.worker.max_restarts
            case "node":
                return config.node.max_restarts
            case "preemption":
                return config.preemption.max_restarts
            case "hang":
                self._stop_if(config.hang.action == "stop", failure)
                return config.hang.max_restarts
            case "out_of_memory":
                self._stop_if(config.out_of_memory.action == "stop", failure)
                return config.out_of_memory.max_restarts
            case "poisoned_sample":
                raise AssertionError("decided before")
        assert_never(failure.kind)

    def _stop_if(self, stops: bool, failure: Failure) -> None:
        if stops:
            raise ValueError(
                f"{NAMES[failure.kind]}: {failure.sentence}; what is committed stands, and the "
                f"same command goes on from there (failures.{failure.kind}.action=restart would)"
            )

    def _leave_out(self, failure: Failure) -> None:
        """Have the next group leave out the samples at fault."""
        config, error = self.config.poisoned_sample, failure.error
        assert isinstance(error, PoisonedSampleError), "that is what this kind is told by"
        if config.action == "stop":
            raise ValueError(
                f"{failure.sentence}; mend or remove it, or leave it out by "
                "failures.poisoned_sample.action=skip"
            ) from error
        already = read_quarantined(self.place.quarantined, error.unit).tolist()
        if set(error.sample_ids) <= set(already):
            raise ValueError(
                f"{failure.sentence}; this stage reads it although it was to be left out: mend or "
                "remove it"
            ) from error
        if len(already) + len(error.sample_ids) > config.max_samples:
            raise ValueError(
                f"{failure.sentence}; {len(already)} samples are left out already, and "
                f"failures.poisoned_sample.max_samples={config.max_samples}: see "
                f"{self.place.quarantined}"
            ) from error
        total = quarantine(self.place.quarantined, error)
        self.say(
            f"{failure.sentence}; starting again without it ({total} of "
            f"{config.max_samples} that may be left out: {self.place.quarantined})"
        )
