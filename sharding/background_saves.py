"""Checkpoints written behind training: the model's state is copied, and training goes on.

The copy, too, is made behind training: rows and weights change only at a step's end, so that the
next step computes its gradient meanwhile, and waits for the copy before its update.

One save is in flight at a time. It is committed by the same rules as any other, after every rank
has written its part; until then it is debris, and the checkpoints before it stand.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

from sharding import checkpoint_state
from sharding.checkpoint import STATE, CheckpointStore
from sharding.parallelize import ParallelModel
from sharding.process_group import DistributedContext

CLOSING_S = 30.0
"""How long a training that failed waits for its last save: the other ranks may be gone."""


@dataclass
class SaveTimes:
    """What saving cost this rank, in seconds over all saves."""

    saves: int = 0
    stalled: float = 0.0
    """Training waited: for the save before, and for a copy that its next step did not cover."""
    written: float = 0.0
    """Until the commit, most of it behind training."""


class BackgroundSaves:
    """Every method is collective: all ranks call it at the same place, and raise together."""

    def __init__(self, ctx: DistributedContext) -> None:
        self._ctx = ctx.apart()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._copies = _Copies()
        self._copied = threading.Event()
        self.times = SaveTimes()

    def save(
        self,
        store: CheckpointStore,
        model: ParallelModel,
        state: Mapping[str, Any],
        recipe_json: Mapping[str, Any],
        fingerprints: Mapping[str, str],
        name: str | None = None,
    ) -> None:
        """Have what `CheckpointStore.save` would write copied, and written.

        The model may compute meanwhile; what would change it waits by `model.before_change`.

        Raises:
            CheckpointError: the save before could not be written.
        """
        started = time.monotonic()
        self._join()
        tensors = checkpoint_state.training_state(model)
        tensors |= checkpoint_state.random_state(self._ctx)
        documents = {STATE: state, "recipe.json": recipe_json}
        arguments = (store.apart(self._ctx), model.step, tensors, documents, fingerprints, name)
        self._copied.clear()
        model.before_change = self._wait_for_copy
        self._thread = threading.Thread(
            target=self._write, args=(_Mark(self._ctx.device), *arguments), daemon=True
        )
        self._thread.start()
        self.times.saves += 1
        self.times.stalled += time.monotonic() - started

    def wait(self) -> None:
        """Until nothing is in flight.

        Raises:
            CheckpointError: the last save could not be written.
        """
        started = time.monotonic()
        self._join()
        self.times.stalled += time.monotonic() - started

    def in_flight(self) -> bool:
        """Whether a save of this rank is being written."""
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Give what is in flight some time to be committed after training failed; never raises."""
        if self._thread is not None:
            self._thread.join(CLOSING_S)

    def _wait_for_copy(self) -> None:
        if not self._copied.is_set():
            started = time.monotonic()
            self._copied.wait()
            self.times.stalled += time.monotonic() - started

    def _join(self) -> None:
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(
        self,
        mark: "_Mark",
        store: CheckpointStore,
        step: int,
        tensors: dict[str, Tensor],
        documents: Mapping[str, Mapping[str, Any]],
        fingerprints: Mapping[str, str],
        name: str | None,
    ) -> None:
        started = time.monotonic()
        try:
            try:
                with mark.behind():
                    copies = {name: self._copies.of(name, each) for name, each in tensors.items()}
            finally:
                self._copied.set()
            store.write(step, copies, documents, fingerprints, name)
        except BaseException as error:  # noqa: BLE001 - raised where the caller waits
            self._error = error
        self.times.written += time.monotonic() - started


class _Mark:
    """What the device was asked for before a save: the copy waits for that, and nothing later."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._device = device
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    @contextmanager
    def behind(self) -> Iterator[None]:
        """Copies within run beside what the device computes; they are whole afterwards."""
        if self._event is None:
            yield
            return
        stream = torch.cuda.Stream(self._device)
        stream.wait_event(self._event)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


class _Copies:
    """Memory on the CPU that the model's state is copied to, kept from save to save.

    Memory that is touched for the first time takes a copy several times as long as memory that was
    touched before, and training waits for the copy.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def of(self, name: str, value: Tensor) -> Tensor:
        """A copy that training does not touch; of a sharded tensor, of its local shards."""
        if not isinstance(value, ShardedTensor):
            return self._copy(name, value)
        shards = [
            Shard(self._copy(f"{name}#{number}", shard.tensor), shard.metadata)
            for number, shard in enumerate(value.local_shards())
        ]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            shards, sharded_tensor_metadata=value.metadata(), process_group=value._process_group
        )

    def _copy(self, key: str, value: Tensor) -> Tensor:
        kept = self._kept.get(key)
        if kept is None or (kept.size(), kept.dtype) != (value.size(), value.dtype):
            kept = torch.empty(value.size(), dtype=value.dtype, pin_memory=value.is_cuda)
            self._kept[key] = kept
        return kept.copy_(value.detach(), non_blocking=True)
