"""What is compared on text that no run reads twice (benchmarks.quality.corpus), and what the arms reach.

The arms are those of `grid`, with as many parameters; of the experts' as many are active. `r = 1/4, twice` and `four
times` have more and smaller experts, of which a token takes as many more: they send half of the bytes of
`fine_grained`, and as many.
docs/notes/unrepeated.md has the predictions and the rules that decide, written before the runs.
"""

import json
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure

from benchmarks.quality.grid import RATE, RATES, SEEDS, SELECTS, Condition, Fields, bigmac, fine_grained
from benchmarks.quality.pages import Cost, break_even, cost, mean
from benchmarks.quality.runs import CONFIG, CPU, Machine, command, describe, read, within

CORPUS = pathlib.Path("runs/corpus")
TEXT: Fields = {f"data.{name}": f"{CORPUS}/{split}.jsonl" for name, split in
                (("source", "train"), ("validation_source", "validation"), ("test_source", "test"))}  # fmt: skip
# Steps of 2,048 tokens; the last are all of the text but 0.1 %.
LENGTHS = (1000, 2500, 5000, 6690)
FINE, CONTROL, SHIPPED, HALF, TWICE, FOUR = (
    "fine_grained", "control", "r = 1/4", "r = 1/2", "r = 1/4, twice", "r = 1/4, four times"
)  # fmt: skip


def fields(name: str, width: int, norm: str | None = None) -> Fields:
    """The fields of an arm; `norm` is another than it ships with."""
    if name in (FINE, CONTROL):
        return fine_grained(width, norm or ("post_combine" if name == CONTROL else "none"))
    parts, more = {SHIPPED: (4, 1), HALF: (2, 1), TWICE: (4, 2), FOUR: (4, 4)}[name]
    return bigmac(parts, width, norm or "skip", more) | SELECTS


def arm(name: str, width: int = 128, steps: int = LENGTHS[-1], seeds: tuple[int, ...] = SEEDS) -> Condition:
    return Condition(name, fields(name, width) | TEXT, width, steps, seeds)


def _without_norm(name: str, steps: int) -> Condition:
    return Condition(f"{name}, no norm", fields(name, 128, "none") | TEXT, 128, steps)


def _at_rate(name: str, factor: float, width: int, steps: int) -> Condition:
    rate = {"optimizer.learning_rate": RATES[width] * factor}
    return Condition(f"{name}{RATE}{factor:g}", fields(name, width) | TEXT | rate, width, steps, SEEDS[:1])


# What balances the loads of a batch in parts without a forward pass that counts them first. The loss of the step takes
# that pass, and then sums what it would without parts: its runs are those of the whole batch.
IN_PARTS: dict[str, Fields] = {
    "loss of a part": {"model.balance_scope": "part"},
    "bias": {"model.balance": "bias"},
    "quantile": {"model.balance": "quantile"},
}
PARTS = 4  # of two rows


def in_parts(name: str, steps: int = LENGTHS[0]) -> Condition:
    """r = 1/4 as it ships, its batch in parts, balanced as `IN_PARTS` says."""
    own = IN_PARTS[name] | {"train.accumulate_steps": PARTS}
    return Condition(f"{SHIPPED}, in parts, {name}", fields(SHIPPED, 128) | TEXT | own, 128, steps)


# Study → conditions, in the order in which they answer most for their time: every arm at 5 M tokens before any at more.
STUDIES: dict[str, list[Condition]] = {
    "length": [arm(name, steps=steps) for steps in LENGTHS[:2] for name in (FINE, SHIPPED)],
    "control": [arm(CONTROL, steps=steps) for steps in LENGTHS[:2]],
    "bytes": [arm(name, steps=2500) for name in (TWICE, HALF, FOUR)],
    "parts": [in_parts(name) for name in IN_PARTS],
    "no norm": [_without_norm(SHIPPED, 2500)],
    "all text": [arm(name) for name in (FINE, SHIPPED, CONTROL)],
    "bytes of all text": [arm(name) for name in (TWICE, HALF)],
    "ten million": [arm(name, steps=LENGTHS[2]) for name in (FINE, SHIPPED, CONTROL)],
    "rates": [_at_rate(name, factor, 128, 2500) for factor in (0.5, 2.0) for name in (FINE, CONTROL, SHIPPED, TWICE)],
    "width 64": [arm(name, 64, 2500) for name in (FINE, CONTROL, SHIPPED, HALF, TWICE)],
}
# A GPU takes wider models, the answers that decide most first.
GPU_STUDIES: dict[str, list[Condition]] = {
    f"width {width}": [arm(name, width) for name in (FINE, CONTROL, SHIPPED, TWICE, FOUR, HALF)]
    for width in (256, 512, 128)
}


def train(
    condition: Condition, seed: int, folder: pathlib.Path, cores: list[int], machine: Machine = CPU
) -> dict[str, Any]:
    """Trains an arm, and reads how well it predicts text of the kind that it learnt from, and of another.

    Raises:
      RuntimeError: a script ended with an error, whose last line this is.
      StoppedError: its time was over; it goes on when it is called again.
    """
    workdir, start = folder / condition.key(seed), time.monotonic()
    flags = (f"--config={CONFIG}", *(f"--config.{field}" for field in condition.overrides(seed)))
    command(workdir, cores, "train.py", *flags, machine=machine)
    score = command(workdir, cores, "eval.py", f"--text_file={CORPUS / 'outside.jsonl'}", "--json", machine=machine)
    record = describe(condition, seed) | read(workdir) | outside(score)  # checkpoints stay, for what stands out
    return record | {"device": machine.device, "seconds": round(time.monotonic() - start)}


def outside(score: str) -> dict[str, float]:
    """What eval.py printed of text of a kind that is not trained on."""
    read = json.loads(score.splitlines()[-1])
    return {f"outside_{name}": read[name] for name in ("loss", "bits_per_byte")}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Means over seeds ± standard error; differences are of equal seeds, and of the best rate that was tried with one.

    Args:
      runs: records of `train`.
    """
    lines = [
        "| h | steps | arm | seeds | bytes a token | loss | over fine_grained | over the control "
        "| bits a byte | of another kind |",
        "|---" * 10 + "|",
    ]
    arms: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: (run["width"], run["steps"])):
        arms.setdefault((run["width"], run["steps"], run["name"]), []).append(run)
    for (width, steps, name), own in arms.items():
        cells = [f"{width}", f"{steps:,}", name, f"{len(own)}", f"{own[0]['wire_bytes']:,.0f}"]
        cells.append(within([run["loss"] for run in own], 3))
        cells += [within(over(own, arms.get((width, steps, base), [])), 3, "+") for base in (FINE, CONTROL)]
        cells += [within([run[key] for run in own], 3) for key in ("bits_per_byte", "outside_bits_per_byte")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def by_length(runs: Sequence[dict[str, Any]]) -> str:
    """A table of h = 128: how what ships does against fine_grained and the control at each length, and twice the
    experts against the control."""
    losses, pairs = (FINE, CONTROL, SHIPPED), ((SHIPPED, FINE), (SHIPPED, CONTROL), (TWICE, CONTROL))
    columns = ["tokens", *losses, *(f"{name} minus {base}" for name, base in pairs)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for steps in LENGTHS:
        own = {name: _of(runs, name, steps) for name in (*losses, TWICE)}
        if own[FINE] and own[SHIPPED]:
            cells = [counted([run["loss"] for run in own[name]]) for name in losses]
            cells += [counted(over(own[name], own[base]), "+") for name, base in pairs]
            lines.append(f"| {own[FINE][0]['tokens'] / 1e6:.1f} M | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_arm(runs: Sequence[dict[str, Any]], steps: int, slope: float) -> str:
    """A table of h = 128 at one length: what each arm sends and computes, loses over the control, and loses on text of
    another kind.

    Args:
      slope: nats that e times the tokens take off a loss. By it "tokens more" make up for what an arm loses, and it
        "pays above" the share of the control's step that its exchange must take for the arm to be there first.
    """
    columns = ["arm", "bytes", "FLOPs", "loss", "minus the control", "tokens more", "pays above", "another kind",
               "that, minus the control"]  # fmt: skip
    lines, base = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"], _of(runs, CONTROL, steps)
    for name in (FINE, CONTROL, SHIPPED, TWICE, HALF, FOUR):
        if not (own := _of(runs, name, steps)):
            continue
        price = cost(own[0], base[0])
        cells = [name, f"{price.wire:g}", f"{price.flops:.3f}", counted([run["loss"] for run in own])]
        cells += ["", "", ""] if name == CONTROL else _worth(over(own, base), price, slope)
        cells.append(counted([run["outside_bits_per_byte"] for run in own]))
        cells.append("" if name == CONTROL else counted(over(own, base, "outside_bits_per_byte"), "+"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def by_balance(runs: Sequence[dict[str, Any]]) -> str:
    """A table of what balances a batch in parts: loss, and how uneven loads are in the last hundred steps, as standard
    deviation and largest over the mean."""
    columns = ["balanced by", "loss", "minus the loss of the step", "deviation of loads", "largest load",
               "another kind"]  # fmt: skip
    lines, base = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"], _of(runs, SHIPPED, LENGTHS[0])
    ways = {"loss of the step": base} | {name: _of(runs, in_parts(name).name, LENGTHS[0]) for name in IN_PARTS}
    for name, own in ways.items():
        if own:
            cells = [name, counted([run["loss"] for run in own]), counted(over(own, base), "+")]
            cells += [within([run[key] for run in own], 2) for key in ("load_cv", "max_load")]
            cells.append(counted([run["outside_bits_per_byte"] for run in own]))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _of(runs: Sequence[dict[str, Any]], name: str, steps: int) -> list[dict[str, Any]]:
    """The seeds of an arm of h = 128."""
    return [run for run in runs if (run["name"], run["width"], run["steps"]) == (name, 128, steps)]


def _worth(apart: list[float], price: Cost, slope: float) -> list[str]:
    more, share = break_even(float(np.mean(apart)) / slope, price)
    pays = "" if price.wire >= 1 else "always" if share <= 0 else f"{share:.0%}" if share < 1 else "never"
    return [counted(apart, "+"), f"{more:+.1%}", pays]


def counted(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard error, and how many seeds there are if not three."""
    return within(values, 3, sign) + (f" ({len(values)})" if 0 < len(values) != len(SEEDS) else "")


def number(axis: Axes, at: tuple[float, float], seeds: int) -> None:
    """Writes beside a point of a picture how many seeds it has, if not three."""
    if seeds != len(SEEDS):
        axis.annotate(f"({seeds})", at, xytext=(3, 3), textcoords="offset points", fontsize=7)


def over(own: Iterable[dict[str, Any]], base: Iterable[dict[str, Any]], of: str = "loss") -> list[float]:
    """Losses less those of another arm, seed by seed; none of an arm over itself.

    Args:
      of: another field of a run.
    """
    theirs = {run["seed"]: run for run in base}
    pairs = [(run, theirs[run["seed"]]) for run in own if run["seed"] in theirs]
    return [run[of] - other[of] for run, other in pairs if run is not other]


def draw(runs: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """What each arm of h = 128 loses against fine_grained, over the tokens; a bar is a standard error, and a number
    that of seeds, where they are not three."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, color in zip((SHIPPED, CONTROL, TWICE, HALF, FOUR), TABLEAU_COLORS, strict=False):
        points = []
        for steps in LENGTHS:
            own, base = ([run for run in runs if (run["name"], run["width"], run["steps"]) == (of, 128, steps)]
                         for of in (name, FINE))  # fmt: skip
            if apart := over(own, base):
                points.append((own[0]["tokens"] / 1e6, *mean(apart)))
                number(axis, points[-1][:2], len(apart))
        if points:
            axis.errorbar(*np.transpose(points), label=name, color=color, marker="o", capsize=3)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="tokens, millions, each read once", ylabel="loss − fine_grained's, nats a token")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
