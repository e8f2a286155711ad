"""Shows how far a job is: a bar on a terminal, a plain line now and then in a file or a batch system's log."""

import sys
import time
from typing import Any

import tqdm

from bigmac_jax.runtime.clock import clock

_EVERY = 30.0  # seconds between plain lines


class Progress:
    """A context that shows how many units of a job are done.

    Args:
      title: stands before the bar.
      total: number of units; 0 = unknown.
      unit: what is counted, in the singular.
      initial: units that were done before.
      scaled: show 144k for 144,158 in the bar.
      delay: seconds; a job that takes less shows nothing.
      silent: show nothing at all.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        initial: int = 0,
        scaled: bool = False,
        delay: float = 0,
        silent: bool = False,
    ):
        self._title, self._total, self._unit, self._delay = title, total, unit, delay
        self._done = self._initial = initial
        self._told = -1  # what the last plain line said was done
        self._plain = not silent and not sys.stderr.isatty()
        self._start = self._said = time.monotonic()
        shown = {"desc": title, "total": total, "initial": initial, "unit": unit, "unit_scale": scaled}
        self._bar = tqdm.tqdm(**shown, delay=delay, disable=silent or self._plain)

    def update(self, count: int = 1) -> None:
        """Counts units that are done, and ticks the clock."""
        self._done += count
        clock.tick()
        self._bar.update(count)
        if self._plain and time.monotonic() - self._said > _EVERY:
            self._say()

    def _say(self) -> None:
        self._said, self._told = time.monotonic(), self._done
        share = f"{self._done / self._total:.0%} of {self._total:,}" if self._total else f"{self._done:,}"
        seconds, more = self._said - self._start, ""
        if (rate := (self._done - self._initial) / max(seconds, 1e-9)) and seconds > 1:
            more = f", {rate:,.0f} a second"
            more += f", {(self._total - self._done) / rate:,.0f} s left" if self._done < self._total else ""
        print(f"{self._title}: {share} {self._unit}s, {seconds:.0f} s{more}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._bar.close()
        if self._plain and kind is None and self._done != self._told and time.monotonic() - self._start >= self._delay:
            self._say()
