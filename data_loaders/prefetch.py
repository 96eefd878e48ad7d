"""An iterator that is run ahead of its reader, by a thread."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Runs an iterator `depth` items ahead in a thread (depth 0: in the caller's)."""

    def __init__(self, source: Iterator[T], depth: int) -> None:
        self._source = source
        self._ready: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        self._slots = threading.Semaphore(depth)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if depth:
            self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
            self._thread.start()

    def __next__(self) -> T:
        if self._thread is None:
            return next(self._source)
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        self._slots.release()
        return item

    def close(self) -> None:
        """End the thread; blocks until the item in work is done."""
        self._stopped.set()
        self._slots.release()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                self._slots.acquire()
                if self._stopped.is_set():
                    return
                self._ready.put(next(self._source))
        except BaseException as error:  # noqa: BLE001 - handed to the caller, who raises it
            self._ready.put(error)
