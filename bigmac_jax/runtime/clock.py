"""What this process is doing: every second belongs to one phase, so that the parts add up to the whole.

The watch (`watchdog.Watch`) reads which phase it is and since when nothing has moved; metrics.jsonl gets the seconds.
Phases are entered by the main thread alone.
"""

import contextlib
import os
import pathlib
import threading
import time
from collections.abc import Iterator

# Of a run that steps, these are bound by the length of a step. Others may take as long as they go on.
STEPPING = ("steps", "data wait")


class Phases:
    """A clock with a hand for each phase.

    Attributes:
      name: of the phase that runs; "" before `begin`.
      moved: when something last went on, by `time.monotonic`.
      step: that was started last.
      started: steps, those that a rewind has undone included: it only grows.
    """

    def __init__(self) -> None:
        self.name, self.step, self.started = "", 0, 0
        self.moved = self._since = time.monotonic()
        self._seconds: dict[str, float] = {}

    def begin(self, name: str, since: float | None = None) -> None:
        """Starts the clock, by `time.monotonic` at `since`; one that runs goes on."""
        if not self.name:
            self.name, self._since = name, time.monotonic() if since is None else since
            self.moved = time.monotonic()

    @contextlib.contextmanager
    def doing(self, name: str) -> Iterator[None]:
        """Time inside belongs to `name`, but for phases inside it; in another thread than the main one, nothing is
        changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        outer = self.turn(name)
        try:
            yield
        finally:
            self.turn(outer)

    def turn(self, name: str) -> str:
        """Ends the phase that runs and begins another → the one that ran."""
        before, now = self.name, time.monotonic()
        if before:
            self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
        self.name, self._since, self.moved = name, now, now
        return before

    def go_on(self) -> None:
        """A long piece of work goes on."""
        self.moved = time.monotonic()

    def start_step(self, step: int) -> None:
        """A step is started, and the one before the last has ended."""
        self.step, self.started, self.moved = step, self.started + 1, time.monotonic()

    def seconds(self) -> dict[str, float]:
        """By phase, in the order in which they first ended, up to now; their sum is the time since `begin`."""
        running = {self.name: time.monotonic() - self._since} if self.name else {}
        return {name: self._seconds.get(name, 0) + running.get(name, 0) for name in self._seconds | running}

    def end(self) -> None:
        """Stops the clock and forgets."""
        self.__init__()  # type: ignore[misc]


# One, as there is one main thread.
NOW = Phases()


def process_start() -> float:
    """When this process was started, by `time.monotonic`; now, where the system does not tell."""
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(pathlib.Path("/proc/uptime").read_text().split()[0])
        return time.monotonic() - (up - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.monotonic()
