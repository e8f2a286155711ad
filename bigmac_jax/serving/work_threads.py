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
Check = Callable[[], object]  # raises CancelledError if nobody waits for the work any more
T = TypeVar("T")


def forget_frames(error: BaseException | None) -> None:
    """Drops the tracebacks of an exception and its causes. They hold a request's body and all that was made of it,
    which would stay until Python's garbage collector runs."""
    while error is not None:
        error.__traceback__ = None
        error = error.__context__


class WorkThreads:
    """Runs functions in the two threads. Must be made inside the event loop that the work comes from."""

    def __init__(self) -> None:
        self._loop, self._numbers = asyncio.get_running_loop(), itertools.count()
        self._queues: list[queue.PriorityQueue[tuple[int, int, list[Callable[[Check], Any]], asyncio.Future[Any]]]] = []
        self._waiting: set[asyncio.Future[Any]] = set()  # of functions that have not begun
        self._since = [0.0, 0.0]  # when each thread's current function began; 0 = idle
        for lane, name in enumerate(("short requests", "long requests")):
            self._queues.append(queue.PriorityQueue())
            # Daemons: the process doesn't wait for them at its end.
            threading.Thread(target=self._serve, args=(lane,), name=name, daemon=True).start()

    async def run(self, size: int, work: Callable[[Check], T]) -> T:
        """Runs `work` in a thread and returns its result.

        Args:
          size: about how many bytes it reads or writes.
          work: is given a function to call between its parts, which ends it if nobody waits any more.
        """
        future: asyncio.Future[T] = self._loop.create_future()  # is cancelled with whoever waits for it
        # Whoever stops waiting takes the function, and the body that it holds, with it.
        held = [work]
        self._waiting.add(future)
        future.add_done_callback(lambda _: held.clear())
        future.add_done_callback(self._waiting.discard)
        self._queues[size > SHORT].put((size, next(self._numbers), held, future))
        del work
        return await future

    @property
    def waiting(self) -> int:
        """Number of functions that have not begun, and that somebody waits for."""
        return len(self._waiting)

    @property
    def busy_seconds(self) -> float:
        """How long the slower thread has been at one function; 0 if both are idle."""
        return max(time.monotonic() - since if since else 0.0 for since in self._since)

    def _serve(self, lane: int) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            while True:
                self._work(lane, *self._queues[lane].get()[2:])

    def _work(self, lane: int, held: list[Callable[[Check], Any]], future: asyncio.Future[Any]) -> None:
        def check() -> None:
            if future.done():
                raise asyncio.CancelledError

        self._waiting.discard(future)
        try:
            work = held.pop()
        except IndexError:
            return
        self._since[lane] = time.monotonic()
        result, error = None, None
        try:
            check()
            result = work(check)
        except BaseException as raised:
            error = raised
            forget_frames(error)
        self._since[lane] = 0.0
        self._loop.call_soon_threadsafe(_settle, future, result, error)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
