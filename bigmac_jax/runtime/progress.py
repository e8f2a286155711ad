"""Shows how far a job is: a bar on a terminal, a plain line now and then in a file or a batch system's log."""

import contextlib
import sys
import threading
import time
from typing import Any

import tqdm

from bigmac_jax.runtime.clock import clock
from bigmac_jax.runtime.signals import tolerate_lost_output

_EVERY = 30.0  # seconds between plain lines
_PATIENCE = 5.0  # seconds of waiting before the first one


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
            more = f", {rate:,.0f} a second" if rate >= 10 else f", {rate:.2g} a second"
            more = more if rate >= 1 else f", {1 / rate:,.1f} s each"
            more += f", {(self._total - self._done) / rate:,.0f} s left" if self._done < self._total else ""
        with tolerate_lost_output(sys.stderr):
            print(f"{self._title}: {share} {self._unit}s, {seconds:.0f} s{more}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._bar.close()
        if self._plain and kind is None and self._done != self._told and time.monotonic() - self._start >= self._delay:
            self._say()


class Waiting:
    """A context that says what is waited for, and for how long, where nobody can say how long it will take.

    Args:
      what: as in "compiling the step".
      silent: say nothing at all.
      bar: one that is on the terminal already, which then shows it.
    """

    def __init__(self, what: str, silent: bool = False, bar: tqdm.tqdm | None = None):
        self._what, self._silent, self._given = what, silent, bar
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._say, name="waiting", daemon=True)

    def __enter__(self) -> "Waiting":
        if not self._silent:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.end()

    def end(self) -> None:
        """Takes the line off the terminal; nothing more is said."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _say(self) -> None:
        start, after = time.monotonic(), _PATIENCE
        if not sys.stderr.isatty():
            while not self._over.wait(after):
                with contextlib.suppress(OSError):  # whose reader has left; the main thread notices, too
                    print(f"{self._what}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
                after = _EVERY
            return
        bar = self._given or tqdm.tqdm(bar_format="{desc}{postfix}", leave=False)
        while True:
            bar.set_postfix_str(f"{self._what}, {time.monotonic() - start:.0f} s")
            if self._over.wait(1):
                break
        if self._given:
            bar.set_postfix_str("")
            bar.unpause()  # its rate is of what comes now
        else:
            bar.close()
