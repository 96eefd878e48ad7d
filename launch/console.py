"""One clean stream of lines from workers to the terminal of whoever started the run.

Ray's own log forwarding prefixes and repeats lines; here rank 0 sends whole lines to an actor and
the driver prints them as they are.
"""

import sys
import threading
from collections.abc import Callable
from types import TracebackType

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

POLL_S = 0.3


@ray.remote(num_cpus=0)
class _LineBuffer:
    """Lines sent and not yet printed."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def put(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines


class Console:
    """Context that prints what workers `say` until it closes."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # On the driver's own node, so that the loss of another one does not silence the rest.
        self._buffer: ActorHandle = _LineBuffer.options(  # type: ignore[attr-defined]
            scheduling_strategy=here
        ).remote()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._pump, daemon=True)

    def __enter__(self) -> "Console":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._thread.join()
        ray.kill(self._buffer)

    def writer(self) -> Callable[[str], None]:
        """A picklable function that workers call with a line."""
        return _Writer(self._buffer)

    def _pump(self) -> None:
        while not self._closed.wait(POLL_S):
            if not self._print():
                return
        self._print()

    def _print(self) -> bool:
        try:
            lines = ray.get(self._buffer.take.remote(), timeout=30)
        except (RayError, TimeoutError):  # the cluster goes away; the run itself reports why
            return False
        for line in lines:
            print(line, flush=True)
        sys.stdout.flush()
        return True


class _Writer:
    """Sends lines without waiting; a lost console never stops a worker."""

    def __init__(self, buffer: ActorHandle) -> None:
        self._buffer = buffer

    def __call__(self, line: str) -> None:
        self._buffer.put.remote(line)
