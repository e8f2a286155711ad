"""What takes time of a request beside the event loop: its JSON, its prompt, its answer as JSON.

There are two threads, one for short work and one for long, each the shortest first: so that nobody who asks for little
waits for those who send much.
"""

import asyncio
import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

SHORT = 1 << 16  # bytes; what is longer is long work
Check = Callable[[], object]
T = TypeVar("T")


class LeftError(Exception):
    """Nobody waits for the work any more."""


def forget_frames(error: BaseException | None) -> None:
    """Frees what was on the way of an exception: a request's body, and all that was made of it, would stay until
    Python's collector comes round."""
    while error is not None:
        error.__traceback__ = None
        error = error.__context__


class Readers:
    """The two threads. To be made inside the event loop that the work comes from."""

    def __init__(self) -> None:
        self._lanes = _Lane("short requests"), _Lane("long requests")

    async def do(self, size: int, work: Callable[[Check], T]) -> T:
        """The result of `work`, which is given what to call between its parts: it raises where nobody waits any more.

        Args:
          size: about how many bytes it reads or writes.
        """
        result: T = await self._lanes[size > SHORT].do(size, work)
        return result

    @property
    def waiting(self) -> int:
        """Pieces of work that have not begun."""
        return sum(lane.waiting for lane in self._lanes)

    @property
    def silence(self) -> float:
        """Seconds that a thread has been at one piece of work, at most."""
        return max(lane.silence for lane in self._lanes)


class _Work:
    def __init__(self, do: Callable[[Check], Any], future: asyncio.Future[Any]):
        self.do, self.future, self.left = do, future, False

    def check(self) -> None:
        if self.left:
            raise LeftError

    def end(self, result: Any, error: BaseException | None) -> None:
        """In the event loop."""
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


class _Lane:
    """A thread. The process doesn't wait for it at its end."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: queue.PriorityQueue[tuple[int, int, _Work]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._since = 0.0  # when it began with what it does; 0 = it does nothing
        threading.Thread(target=self._run, name=name, daemon=True).start()

    async def do(self, size: int, work: Callable[[Check], Any]) -> Any:
        waiting = _Work(work, self._loop.create_future())
        self._queue.put((size, next(self._numbers), waiting))
        try:
            return await waiting.future
        finally:
            waiting.left = True

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    @property
    def silence(self) -> float:
        since = self._since
        return time.monotonic() - since if since else 0.0

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            while True:
                self._do(self._queue.get()[-1])

    def _do(self, work: _Work) -> None:
        if work.left:
            return
        self._since = time.monotonic()
        result, error = None, None
        try:
            result = work.do(work.check)
        except BaseException as raised:
            error = raised
            forget_frames(error)
        self._since = 0.0
        self._loop.call_soon_threadsafe(work.end, result, error)
