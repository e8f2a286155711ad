"""The pictures of docs/notes/quality.md, of what `pages` has in its tables."""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.quality.grid import SELECTED, STRUCTURES

# Beside fine_grained at its width: each has a colour and a mark of its own.
APART = {
    "bigmac 1/4": "C7--o",
    "bigmac 1/4, skip": "C0-s",
    "bigmac 1/4, gate": "C4-D",
    "bigmac 1/4, skip, selected": "C1-^",
    "bigmac 1/4, gate, selected": "C3-v",
    "bigmac 1/2, skip, selected": "C2-<",
    "bigmac 1/2": "C5-->",
    "bigmac 1/2, skip": "C6-P",
    "fine_grained, norm": "k:X",
}
# What competes at one width and length, and its colour.
FILLS = {
    "": "white",
    ", norm": "0.7",
    ", skip": "black",
    ", gate": "tab:orange",
    ", skip, selected": "tab:blue",
    ", gate, selected": "tab:red",
}
# What keeps loads even, and its line.
BALANCES = {"aux_loss": "k:", "bias": "k--", "quantile": "k-", "none": "k-.", "quantile of the same step": "b-"}


def structure_and_recipe(name: str) -> tuple[str, ...]:
    """Structure and recipe of a condition; () of one that is there to explain another."""
    kind = max((kind for kind in STRUCTURES if name.startswith(kind)), key=len)
    recipe = name.removeprefix(kind)
    return (kind, recipe) if recipe in FILLS else ()


def balances(path: pathlib.Path, series: dict[str, tuple[np.ndarray, np.ndarray, int]]) -> None:
    """How uneven loads are by step, of each kind: steps, the seeds' mean, how many seeds."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for kind, (steps, loads, seeds) in series.items():
        axes.plot(steps, loads, BALANCES[kind], label=f"{kind}, seeds: {seeds}")
    axes.set(xlabel="step", ylabel="loads: standard deviation over mean", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pareto(path: pathlib.Path, points: dict[str, tuple[float, float, float]], best: list[str]) -> None:
    """Of name → (bytes, bits, standard error); `best`: the names of the front."""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    marks = dict(zip(STRUCTURES, "soDv<P*", strict=True))
    for name, (wire, bits, error) in points.items():
        kind, norm = structure_and_recipe(name)
        aside = 2 ** ((list(marks).index(kind) - 3) * 0.025)  # of the same bytes, so that error bars can be told apart
        style: dict[str, Any] = {"color": "black", "markerfacecolor": FILLS[norm], "capsize": 3, "ms": 8}
        axes.errorbar(wire * aside, bits, error, fmt=marks[kind], **style)
    for kind, mark in marks.items():
        axes.plot([], [], mark, color="black", markerfacecolor="white", label=kind)
    for norm, fill in FILLS.items():
        axes.fill_between([], [], color=fill, ec="black", label=norm.removeprefix(", ") or "no norm")
    wires, bits = zip(*(points[name][:2] for name in best), strict=True)
    axes.step(wires, bits, "k:", where="post", lw=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({wire for wire, *_ in points.values()}), minor=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="bytes a token on the wire, forward and backward, 8 ranks", ylabel="validation, bits a byte")
    axes.set_title("less is better on both axes; dotted: what nothing beats")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def widths(path: pathlib.Path, found: dict[str, list[tuple[int, int, float, float]]]) -> None:
    """Of each condition: h, steps, gap and its standard error."""
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for name, of_name in found.items():
        width, steps, gap, error = zip(*of_name, strict=True)
        lengths = "–".join(f"{length:,}" for length in sorted({min(steps), max(steps)}))
        label = f"{name.replace(', skip' + SELECTED, ', as it ships')}, {lengths} steps"
        axes.errorbar(width, gap, error, fmt=APART[name], capsize=3, label=label)
    axes.axhline(0, color="0.5", lw=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="h, the model's width", ylabel="validation loss less fine_grained's, nats a token")
    axes.set_title("What a narrow exchange costs, by width (0: nothing; bars: standard errors)", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=110)
    plt.close(figure)
