"""Threads for a request's slow work beside the event loop: parsing its JSON, encoding its prompt, writing its answer.

There are two, one for short and one for long work, and each takes the shortest first: so small requests do not wait for
those of clients that send much.
"""

import asyncio
import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

SHORT = 1 << 16  # bytes; more is long work
Check = Callable[[], object]  # raises LeftError if nobody waits for the work any more
T = TypeVar("T")


class LeftError(Exception):
    """Nobody waits for the work any more."""


def forget_frames(error: BaseException | None) -> None:
    """Drops the tracebacks of an exception and its causes. They hold a request's body and all that was made of it,
    which would stay until Python's garbage collector runs."""
    while error is not None:
        error.__traceback__ = None
        error = error.__context__


class WorkThreads:
    """Runs functions in the two threads. Must be made inside the event loop that the work comes from."""

    def __init__(self) -> None:
        self._lanes = _Lane("short requests"), _Lane("long requests")

    async def run(self, size: int, work: Callable[[Check], T]) -> T:
        """Runs `work` in a thread and returns its result.

        Args:
          size: about how many bytes it reads or writes.
          work: is given a function to call between its parts, which raises if nobody waits any more.
        """
        result: T = await self._lanes[size > SHORT].run(size, work)
        return result

    @property
    def waiting(self) -> int:
        """Number of functions that have not begun."""
        return sum(lane.queue.qsize() for lane in self._lanes)

    @property
    def busy_seconds(self) -> float:
        """How long the slower thread has been at one function; 0 if both are idle."""
        return max(lane.busy_seconds for lane in self._lanes)


class _Lane:
    """One thread, a daemon: the process doesn't wait for it at its end."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self.queue: queue.PriorityQueue[tuple[int, int, Callable[[Check], Any], asyncio.Future[Any]]]
        self.queue = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._since = 0.0  # when the current function began; 0 = idle
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    async def run(self, size: int, work: Callable[[Check], Any]) -> Any:
        future = self._loop.create_future()  # is cancelled with whoever waits for it
        self.queue.put((size, next(self._numbers), work, future))
        return await future

    @property
    def busy_seconds(self) -> float:
        since = self._since
        return time.monotonic() - since if since else 0.0

    def _serve(self) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            while True:
                self._work(*self.queue.get()[2:])

    def _work(self, work: Callable[[Check], Any], future: asyncio.Future[Any]) -> None:
        def check() -> None:
            if future.done():
                raise LeftError

        if future.done():
            return
        self._since = time.monotonic()
        result, error = None, None
        try:
            result = work(check)
        except BaseException as raised:
            error = raised
            forget_frames(error)
        self._since = 0.0
        self._loop.call_soon_threadsafe(_settle, future, result, error)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if not future.done():
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
