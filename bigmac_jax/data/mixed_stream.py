"""The order of a mixture's sources: a pure function of a sample's number and of the weights so far.

Sample i of a mixture is window n of one of its sources, n counting up in each. Of the first i samples since the
weights last changed, each source has its share of i, within one.
"""

import functools
import heapq
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from bigmac_jax.config import ConfigError, DataConfig
from bigmac_jax.config.mixture import Part, Weights, parse_curriculum, parse_mixture, whole_numbers


class _Order:
    """A sequence of sources that is repeated. Weights that add up to N, as whole numbers, make N samples. The k-th of a
    source of weight w comes at k·N/w at the earliest and before (k + 1)·N/w, rounded outwards, the most urgent one
    first (proportionate fairness: Baruah et al. 1996), so that no source is one sample above or below its share.
    """

    def __init__(self, weights: Weights):
        self._weight_P = whole_numbers(weights)
        self._part_N = np.array(list(_sequence(self._weight_P)), np.int32)
        self._rank_N = np.zeros_like(self._part_N)
        for part in range(len(weights)):
            here = self._part_N == part
            self._rank_N[here] = np.arange(here.sum())

    def locate(self, i: int) -> tuple[int, int]:
        """(source, number of its sample) for sample i."""
        again, at = divmod(i, len(self._part_N))
        part = int(self._part_N[at])
        return part, again * self._weight_P[part] + int(self._rank_N[at])

    def counts(self, i: int) -> list[int]:
        """Number of samples of each source among the first i."""
        again, at = divmod(i, len(self._part_N))
        rest_P = np.bincount(self._part_N[:at], minlength=len(self._weight_P))
        return [again * weight + int(rest) for weight, rest in zip(self._weight_P, rest_P, strict=True)]


def _sequence(weight_P: Sequence[int]) -> Iterator[int]:
    total = sum(weight_P)
    later = [(0, part, 0) for part, weight in enumerate(weight_P) if weight]  # (earliest, source, k)
    urgent: list[tuple[int, int, int]] = []  # (before when, source, k)
    for now in range(total):
        while later and later[0][0] <= now:
            _, part, k = heapq.heappop(later)
            heapq.heappush(urgent, (-(-(k + 1) * total // weight_P[part]), part, k))
        _, part, k = heapq.heappop(urgent)
        yield part
        heapq.heappush(later, ((k + 1) * total // weight_P[part], part, k + 1))


_order = functools.lru_cache(64)(_Order)


class _Stage(NamedTuple):
    """The weights from a batch on."""

    batch: int
    weights: Weights
    order: _Order
    before: tuple[int, ...]  # samples of each source until then


class Mixture:
    """The sources of a run and when each is read: by a curriculum, [(step, weights)] from step 0 on; or if rewinding
    has left out batches, by stages, [(batch, weights)] from batch 0 on."""

    def __init__(
        self,
        parts: Sequence[Part],
        curriculum: Sequence[tuple[int, Weights]],
        batch_size: int,
        stages: Sequence[tuple[int, Weights]] = (),
    ):
        self.parts, self._curriculum, self._batch_size = tuple(parts), tuple(curriculum), batch_size
        self._stages: list[_Stage] = []
        for batch, weights in stages or curriculum:
            if self._stages and weights == self._stages[-1].weights:
                continue  # as a resumed run, which knows no border between them
            before = self.counts(batch) if self._stages else (0,) * len(parts)
            self._stages.append(_Stage(batch, weights, _order(weights), before))

    @classmethod
    def from_config(cls, data: DataConfig) -> "Mixture | None":
        """The mixture of a config; None without one."""
        parts = parse_mixture(data.mixture)
        return cls(parts, parse_curriculum(data.curriculum, parts), data.batch_size) if parts else None

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, number of its window) for a sample."""
        stage = self._stage(sample // self._batch_size)
        part, n = stage.order.locate(sample - stage.batch * self._batch_size)
        return part, stage.before[part] + n

    def counts(self, batches: int) -> tuple[int, ...]:
        """Number of windows of each source in the first batches."""
        stage = self._stage(batches)
        since = stage.order.counts((batches - stage.batch) * self._batch_size)
        return tuple(before + count for before, count in zip(stage.before, since, strict=True))

    def _stage(self, batch: int) -> _Stage:
        return next(stage for stage in reversed(self._stages) if stage.batch <= batch)

    def state(self, batches: int) -> list[list[Any]]:
        """The weights of the first batches, [[batch, {name: weight}]], for a checkpoint."""
        return [
            [stage.batch, {part.name: str(weight) for part, weight in zip(self.parts, stage.weights, strict=True)}]
            for stage in self._stages
            if stage.batch < batches
        ]

    def resume(self, saved: Sequence[Sequence[Any]], batches: int, step: int) -> "Mixture":
        """The mixture of a run that goes on from a checkpoint: the weights until there are the saved ones, from there
        on these; each source goes on where it was.

        Args:
          saved: as from `state`; raises ConfigError if it has other sources.
          batches, step: how many batches the run has read, and how many steps it has made, without those left out.
        """
        names = [part.name for part in self.parts]
        stages: list[tuple[int, Weights]] = []
        for batch, weights in saved:
            if sorted(weights) != sorted(names):
                raise ConfigError(
                    f"data.mixture has the sources {', '.join(names)}, and this workdir was started with "
                    f"{', '.join(weights)}; keep those, their weights may change, or use a new --workdir"
                )
            stages.append((int(batch), tuple(Fraction(weights[name]) for name in names)))
        stages.append((batches, next(weights for at, weights in reversed(self._curriculum) if at <= step)))
        stages += [(at + batches - step, weights) for at, weights in self._curriculum if at > step]
        return Mixture(self.parts, self._curriculum, self._batch_size, stages)

    def check_epochs(self, windows: Mapping[str, int], steps: int, left_out: int) -> list[str]:
        """Says in a line for each source how often a run of so many steps reads it; raises ConfigError if that is more
        often than it may be.

        Args:
          windows: name → windows in an epoch of that source.
          left_out: batches that no step counts.
        """
        lines, counts = [], self.counts(steps + left_out)
        total = max(1, sum(counts))
        for part, count in zip(self.parts, counts, strict=True):
            epochs = count / windows[part.name]
            if count > part.epochs * windows[part.name]:
                raise ConfigError(
                    f"data.mixture: {part.source} would be read {epochs:.2f} times by step {steps}, and at most "
                    f"{part.epochs:g} times; give it less weight or more text, raise the {part.epochs:g}, or take "
                    f"fewer steps"
                )
            lines.append(f"{part.name} {count / total:.1%} of the windows, {epochs:.2f} epochs by step {steps}")
        return lines
