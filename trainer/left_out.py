"""Steps that are left out because their loss is not finite, and samples that are to blame."""

import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs import storage
from configs.failures import NonFiniteConfig
from configs.measured import LEFT_OUT
from configs.memory_faults import is_of_memory
from data_loaders.poison import PoisonedSampleError, Unit, read_quarantined, reason_of
from sharding.loss_module import NonFiniteLossError
from sharding.process_group import DistributedContext
from trainer.policy import Worker

_NOT_THE_SAMPLES = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "gloo",
    "NCCL",
    "ProcessGroup",
    "Timed out waiting",
    "CUDA error",
)
"""In errors of a step that another rank or the machine caused."""


class LeftOut:
    """Decides about steps that are not finite, and writes down those that are left out."""

    def __init__(
        self, config: NonFiniteConfig, failures: str, stage: str, ctx: DistributedContext
    ) -> None:
        """`failures` is the URL of the directory for reports."""
        self.config, self._failures, self._stage, self._ctx = config, failures, stage, ctx

    @property
    def skips(self) -> bool:
        """Whether steps may be left out."""
        return self.config.action == "skip"

    def skip(
        self,
        error: NonFiniteLossError,
        skipped: list[dict[str, Any]],
        step: int,
        sample_ids: Sequence[int],
    ) -> str:
        """Add a step to those that were left out; the sentence on it. Collective.

        Raises:
            NonFiniteLossError: the recipe says to stop, or too many were left out already.
        """
        if not self.skips:
            raise error
        limit = self.config.max_skipped
        if len(skipped) >= limit:
            raise NonFiniteLossError(
                f"{error}; {len(skipped)} steps were left out already "
                f"(failures.non_finite.max_skipped={limit})",
                error.mine,
            ) from error
        mine = [int(sample) for sample in sample_ids] if error.mine else []
        by_rank = self._ctx.all_gather_object(mine)
        entry = {
            "stage": self._stage,
            "step": step,
            "reason": "the loss or its gradient is not finite",
            "samples_by_rank": {str(rank): ids for rank, ids in enumerate(by_rank) if ids},
        }
        skipped.append({"step": step, "samples": sum(map(len, by_rank))})
        url = storage.join(self._failures, f"skipped-{self._stage}-step-{step:08d}.json")
        if self._ctx.rank == 0:
            storage.write_sealed(url, entry)
        return (
            f"step {step:,} is left out: its loss or gradient is not finite ({len(skipped)} of "
            f"{limit} that may be; samples in {url})"
        )


def blame(error: Exception, sample_ids: Sequence[int], unit: Unit) -> Exception:
    """What a step raised on this rank, as an error of its samples, if those are to blame.

    A ValueError says already what is wrong, and an assertion that we are.
    """
    text = str(error)
    if isinstance(error, ValueError | AssertionError | OSError) or is_of_memory(error):
        return error
    if any(sign in text for sign in _NOT_THE_SAMPLES):
        return error
    where = "".join(traceback.format_tb(error.__traceback__)[-1:]).strip().splitlines()
    place = f"the update ({where[0].strip()})" if where else "the update"
    ids = [int(sample) for sample in sample_ids]
    return PoisonedSampleError(ids, place, reason_of(error), unit)


def left_out_samples(worker: Worker, unit: Unit = "user") -> np.ndarray:
    """Samples that the worker's stage leaves out, int64: whoever reads its data does."""
    return read_quarantined(worker.layout.quarantined(worker.fingerprint), unit)


def users_left_out(worker: Worker, max_users: int | None) -> dict[str, float]:
    """Beside metrics of the first `max_users` users: how many of those are left out, if any is."""
    users = left_out_samples(worker)
    count = len(users) if max_users is None else int((users < max_users).sum())
    return {LEFT_OUT: float(count)} if count else {}
