"""Where this process spends its time: every second belongs to one phase, and the phases add up to the whole.

`watchdog.Watchdog` reads the current phase and when it last made progress; metrics.jsonl gets the seconds per phase.
"""

import contextlib
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

# Phases of a training loop that last as long as a step. The others may take as long as they make progress.
STEPPING = ("steps", "data wait")


class Clock:
    """Counts the seconds spent in each phase; only the main thread changes the phase.

    Attributes:
      phase: the current phase; "" before `begin`.
      last_tick: when work last made progress, by `time.monotonic`.
      step: the training step started last.
      started: number of steps started, including those that a rewind repeats.
      trained: whether a step was started, also if the clock was reset since.
    """

    def __init__(self) -> None:
        self.trained = False
        self.reset()

    def reset(self) -> None:
        """Stops the clock and forgets all phases."""
        self.phase, self.step, self.started = "", 0, 0
        self.last_tick = self._since = time.monotonic()
        self._seconds: dict[str, float] = {}

    def begin(self, phase: str, since: float | None = None) -> None:
        """Starts the clock in `phase`, as of `since` (`time.monotonic`; None = now); a running clock just goes on."""
        if not self.phase:
            self.phase, self._since = phase, time.monotonic() if since is None else since
            self.last_tick = time.monotonic()

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Counts the time inside as `phase`, except for phases nested in it. Does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        outer = self.switch(phase)
        try:
            yield
        finally:
            self.switch(outer)

    def switch(self, phase: str) -> str:
        """Ends the current phase, begins another, and returns the one that ended."""
        before, now = self.phase, time.monotonic()
        if before:
            self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
        self.phase, self._since, self.last_tick = phase, now, now
        return before

    def tick(self) -> None:
        """Notes that a long piece of work makes progress."""
        self.last_tick = time.monotonic()

    @contextlib.contextmanager
    def watching(self, look: Callable[[], object], every: float = 60.0) -> Iterator[None]:
        """A context for waiting: whenever what `look` returns has changed, others have made progress. It is called in a
        thread, and may raise."""
        over = threading.Event()

        def watch() -> None:
            before: object = None
            while not over.wait(every):
                with contextlib.suppress(Exception):
                    now = look()
                    if before not in (None, now):
                        self.tick()
                    before = now

        threading.Thread(target=watch, name="watching", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def start_step(self, step: int) -> None:
        """Notes that training step `step` was started."""
        self.step, self.started, self.last_tick = step, self.started + 1, time.monotonic()
        self.trained = True

    def seconds(self) -> dict[str, float]:
        """Seconds per phase so far, in the order in which phases first ended; they sum to the time since `begin`."""
        running = {self.phase: time.monotonic() - self._since} if self.phase else {}
        return {phase: self._seconds.get(phase, 0) + running.get(phase, 0) for phase in self._seconds | running}


# One clock, as there is one main thread.
clock = Clock()


def process_start() -> float:
    """When this process was started, by `time.monotonic`; now, where the system does not tell."""
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(pathlib.Path("/proc/uptime").read_text().split()[0])
        age = up - ticks / os.sysconf("SC_CLK_TCK")
        return time.monotonic() - max(age, 0)  # a container's uptime may be its own, and stat's ticks the host's
    except (OSError, ValueError, IndexError):
        return time.monotonic()
