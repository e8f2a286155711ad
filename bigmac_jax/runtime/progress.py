"""How far a job is: a bar on a terminal, elsewhere (a file, a batch system's log) a plain line now and then."""

import sys
import time
from types import TracebackType

import tqdm

from bigmac_jax.runtime.clock import clock

_EVERY = 30.0  # seconds between plain lines


class Progress:
    """Inside it, `update` counts, and says that the phase goes on.

    Args:
      total: of units; `scaled` shows 144k for 144,158 in the bar.
      delay: seconds; of a job that takes less nothing is shown.
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
        self._title, self._total, self._unit, self._done, self._delay = title, total, unit, initial, delay
        self._initial = initial
        self._told = -1  # what the last plain line said was done
        self._plain = not silent and not sys.stderr.isatty()
        self._start = self._said = time.monotonic()
        self._bar = tqdm.tqdm(
            desc=title,
            total=total,
            initial=initial,
            unit=unit,
            unit_scale=scaled,
            delay=delay,
            disable=silent or self._plain,
        )

    def update(self, count: int = 1) -> None:
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._plain and kind is None and self._done != self._told and time.monotonic() - self._start >= self._delay:
            self._say()
