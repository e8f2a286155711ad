"""What arms lose at equal tokens, at equal bytes of the exchange, and at equal predicted time on three machines.

Losses are those of benchmarks.quality.unrepeated at h = 128. Bytes are the paper's: a row for each choice. Times are
predicted for a model of Qwen3-30B-A3B's size with the structure of the arm, by the fastest exchange, which may send a
row once for several choices (benchmarks.pays): steps of h = 128 would be nothing but latencies. A ratio of predicted
times is known within `pays.ERROR`.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure

from benchmarks import pays
from benchmarks.quality.pages import mean
from benchmarks.quality.unrepeated import CONTROL, FINE, FOUR, HALF, SHIPPED, TWICE, counted, number

WIDTH = 128
# An arm's latent is 1/parts of h wide, and it has `more` times as many experts and choices.
ARMS = {FINE: (1, 1), CONTROL: (1, 1), SHIPPED: (4, 1), TWICE: (4, 2), HALF: (2, 1), FOUR: (4, 4)}
MACHINES = {  # as in pays.places()
    "NVLink rack": "one NVLink rack: 64 GB200",
    "100 Gb/s hosts": "8 hosts on Ethernet: H100, 100 Gb/s a host",
    "the paper's cluster": "the paper's cluster: A40, twice as many",
}
MEASURES = ("tokens", "bytes", *MACHINES)
Curve = tuple[Sequence[float], Sequence[float]]  # ln tokens, ascending, and losses


def price(arm: str, measure: str) -> float:
    """What a token costs over one of fine_grained: 1, bytes, or predicted seconds."""
    if measure == "tokens":
        return 1.0
    parts, more = ARMS[arm]
    if measure == "bytes":
        return more / parts
    return seconds(measure, parts, more) / seconds(measure, *ARMS[FINE])


@functools.cache
def seconds(machine: str, parts: int, more: int) -> float:
    """Of a step, predicted."""
    (place,) = (place for place in pays.places() if place.name == MACHINES[machine])
    return pays.predicted(parts, place, more).total


def curves(runs: Sequence[dict[str, Any]], arm: str) -> dict[int, Curve]:
    """An arm's losses over ln tokens, by seed."""
    found: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        if run["name"] == arm and run["width"] == WIDTH:
            found.setdefault(run["seed"], []).append((float(np.log(run["tokens"])), run["loss"]))
    return {seed: tuple(zip(*sorted(points), strict=True)) for seed, points in sorted(found.items())}


def read_loss(curve: Curve, tokens: float) -> float | None:
    """The loss after so many tokens, on lines through ln tokens; None outside of what was measured."""
    at, (known, losses) = float(np.log(tokens)), curve
    inside = known[0] - 1e-9 <= at <= known[-1] + 1e-9
    return float(np.interp(at, known, losses)) if inside else None


def losses_at(runs: Sequence[dict[str, Any]], arm: str, measure: str, budget: float) -> list[float]:
    """Losses of an arm's seeds for what `budget` tokens of fine_grained cost."""
    found = (read_loss(curve, budget / price(arm, measure)) for curve in curves(runs, arm).values())
    return [loss for loss in found if loss is not None]


def cell(runs: Sequence[dict[str, Any]], arm: str, measure: str, budget: float) -> str:
    """The mean over seeds ± standard error; ~ before it where it lies between two lengths, which makes it a little too
    high, and in brackets how many seeds it has if they are not three."""
    losses, tokens = losses_at(runs, arm, measure, budget), budget / price(arm, measure)
    if not losses:
        return ""
    exact = any(run["name"] == arm and abs(run["tokens"] / tokens - 1) < 1e-3 for run in runs)
    return ("" if exact else "~") + counted(losses)


def table(runs: Sequence[dict[str, Any]], budgets: Sequence[float]) -> str:
    """Losses as `cell` writes them. A cell is empty where an arm has no run that long, or that short; there is no line
    where fine_grained and the control stand alone.

    Args:
      budgets: tokens of fine_grained, whose price each arm has to spend.
    """
    lines = [f"| the price of | equal | {' | '.join(ARMS)} |", "|---" * (len(ARMS) + 2) + "|"]
    for budget in budgets:
        for measure in MEASURES:
            cells = [cell(runs, arm, measure, budget) for arm in ARMS]
            if not any(cells[2:]):  # nothing beside what costs as much
                continue
            lines.append(f"| {budget / 1e6:.1f} M tokens | {measure} | {' | '.join(cells)} |")
    prices = ["| a token's price over fine_grained's | |" + " |" * len(ARMS)]
    prices += [
        f"| | {measure} | {' | '.join(f'{price(arm, measure):.2f}' for arm in ARMS)} |" for measure in MEASURES[1:]
    ]
    return "\n".join(
        [*lines, *prices, "", f"Errors are those of seeds; prices in time are known within {pays.ERROR:.0%}."]
    )


def draw(runs: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Each arm's loss over what it costs, in tokens of fine_grained; a bar is a standard error, of one seed none, and a
    number in brackets that of seeds, where they are not three."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    for axis, measure in zip(axes, MEASURES, strict=True):
        for arm, color in zip(ARMS, TABLEAU_COLORS, strict=False):
            own = [run for run in runs if run["name"] == arm and run["width"] == WIDTH]
            points = []
            for tokens in sorted({run["tokens"] for run in own}):
                losses = [run["loss"] for run in own if run["tokens"] == tokens]
                points.append((tokens * price(arm, measure) / 1e6, *mean(losses)))
                number(axis, points[-1][:2], len(losses))
            if points:
                axis.errorbar(*np.transpose(points), label=arm, color=color, marker="o", markersize=3, capsize=2)
        axis.set(xscale="log", title=measure if measure in ("tokens", "bytes") else f"time: {measure}")
        axis.set_xticks([0.5, 1, 2, 5, 10], labels=["0.5", "1", "2", "5", "10"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="loss, nats a token")
    figure.supxlabel("what a run costs, in millions of fine_grained's tokens", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
