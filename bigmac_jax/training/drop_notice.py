"""Says in a line that a run's experts drop many choices because their capacity is full."""

import statistics
from collections import deque

import jax

from bigmac_jax.config import Config
from bigmac_jax.training.step import StepMetrics

MOST = 0.02  # share of all choices; with balanced loads a factor of 1.25 drops 1 to 5 % (docs/distributions.md)
_STEPS, _EVERY = 100, 10  # what is read is little, of a step that is done; so train.log_every does not matter


class DropNotice:
    """Watches the drop rate; after a hundred steps in which more than `MOST` of the choices were dropped, it has a line
    that says so, and again only after twice as many."""

    def __init__(self, config: Config):
        self._factor = config.model.capacity_factor
        self._rates: deque[float] | None = None
        if not config.dropless:
            self._rates = deque(maxlen=_STEPS // _EVERY)
        self._steps, self._next = 0, _STEPS

    def line(self, step: int, metrics: StepMetrics) -> str:
        """The line to print after `step`; "" if there is none."""
        if self._rates is None or step % _EVERY:
            return ""
        self._rates.append(float(jax.device_get(metrics.parts.aux.drop_rate).mean()))
        self._steps += _EVERY
        mean = statistics.fmean(self._rates)
        if self._steps < self._next or mean <= MOST:
            return ""
        self._next = 2 * self._steps
        return (
            f"step {step}: of the last {_STEPS} steps' choices {mean:.1%} were dropped, because their experts were "
            f"full (model.capacity_factor={self._factor:g}); a new run with model.capacity_factor=inf drops none, and "
            f"execution.buffer_factor=auto bounds its memory"
        )
