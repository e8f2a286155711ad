"""Timing several cases fairly in one process."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def alternate(cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each case reports, round by round; every other round runs in reverse order, so that a machine that
    slows down or speeds up favours none."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            seconds[name].append(cases[name]())
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over rounds of the two cases' ratio in the same round."""
    return float(np.median(np.divide(numerator, denominator)))


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median and spread of a case, for its JSON line."""
    return {"seconds": round(statistics.median(seconds), 5), "rounds": [round(s, 5) for s in seconds]}
