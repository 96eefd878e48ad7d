"""What driver and workers tell each other: lines for the terminal, and the wish to end.

Ray's own log forwarding prefixes and repeats lines; here rank 0 sends whole lines to an actor and
the driver prints them as they are.
"""

import asyncio
import threading
from types import TracebackType

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from configs.terminal import say

POLL_S = 0.3
LAST_WORDS_S = 5.0
"""How long the end of a run that was asked to end, or fails, waits for its lines to be read."""


@ray.remote(num_cpus=0)
class _Exchange:
    """Lines sent and not yet printed; where the group runs; whether it shall end."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._placed: tuple[dict[str, int], int] = ({}, 0)
        self._stop = asyncio.Event()

    async def put(self, line: str) -> None:
        self._lines.append(line)

    async def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines

    async def place(self, nodes: dict[str, int], ranks: int) -> None:
        self._placed = (nodes, ranks)

    async def placed(self) -> tuple[dict[str, int], int]:
        return self._placed

    async def stop(self) -> None:
        self._stop.set()

    async def stopped(self) -> None:
        await self._stop.wait()


class Console:
    """The driver's end: a context that prints what workers `say` until it closes."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # On the driver's own node, so that the loss of another one does not silence the rest.
        self._exchange: ActorHandle = _Exchange.options(  # type: ignore[attr-defined]
            scheduling_strategy=here
        ).remote()
        self._stop = threading.Event()
        self._closed = threading.Event()
        self._printing = threading.Thread(target=self._pump, daemon=True)
        # Of its own: a reader that has stopped reading holds up the one that prints.
        self._conveying = threading.Thread(target=self._convey, daemon=True)

    def __enter__(self) -> "Console":
        self._printing.start()
        self._conveying.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._conveying.join()
        patient = error is None and not self._stop.is_set()
        self._printing.join(None if patient else LAST_WORDS_S)
        ray.kill(self._exchange)

    def line(self) -> "Line":
        """The workers' end."""
        return Line(self._exchange)

    def ask_to_stop(self) -> None:
        """Have the group save and end; a handler of signals may call this."""
        self._stop.set()

    def placed(self) -> tuple[dict[str, int], int]:
        """What rank 0 told of its group: its nodes and its size; nothing if it came not so far."""
        try:
            nodes, ranks = ray.get(self._exchange.placed.remote(), timeout=30)
        except (RayError, TimeoutError):
            return {}, 0
        return nodes, ranks

    def _pump(self) -> None:
        while not self._closed.wait(POLL_S):
            if not self._print():
                return
        self._print()

    def _convey(self) -> None:
        while not self._closed.wait(POLL_S):
            if self._stop.is_set():
                self._exchange.stop.remote()
                return

    def _print(self) -> bool:
        try:
            lines = ray.get(self._exchange.take.remote(), timeout=30)
        except (RayError, TimeoutError):  # the cluster goes away; the run itself reports why
            return False
        for line in lines:
            say(line)
        return True


class Line:
    """The workers' end of a console; calling it has the driver print a line.

    Nothing waits for the driver: a lost console never stops a worker.
    """

    def __init__(self, exchange: ActorHandle) -> None:
        self._exchange = exchange

    def __call__(self, line: str) -> None:
        self._exchange.put.remote(line)

    def place(self, nodes: dict[str, int], ranks: int) -> None:
        """Tell where the group of so many ranks runs: processes killed for memory so far, by node
        id."""
        self._exchange.place.remote(nodes, ranks)

    def stop_asked(self) -> ObjectRef:
        """Is ready once the driver asks the group to end."""
        return self._exchange.stopped.remote()
