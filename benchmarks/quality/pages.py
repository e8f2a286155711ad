"""The tables of docs/quality.md and docs/notes/quality.md, made from docs/results/quality.json alone.

The page has the tables that decide between structures, the notes have every study; `pictures` draws them.
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from benchmarks.markers import put
from benchmarks.quality import pictures
from benchmarks.quality.grid import RATE, SELECTED, STRUCTURES, STUDIES, Condition, normed
from benchmarks.quality.pictures import APART, FILLS

PAGE, NOTES, IMAGES = "quality.md", "notes/quality.md", "images/quality"
ABOUT = {
    "norms": "h = 128, latent 32, 1,000 steps of 2,048 tokens: which norm on the latent, and the control.",
    "projections": "h = 128, 1,000 steps: what W↓ and W↑ start as, and their rate over that of all else. `selected`: "
    "a selection and an eighth.",
    "rates": "Half and twice the learning rate that all other runs have.",
    "balance": "`configs/tiny.py` from a random start, 1,000 steps: what keeps the loads even.",
    "longer": "h = 128, 2,400 steps: what is compared, and with fewer seeds the parts of the recipe and other rates.",
    "muon": "h = 128, 2,400 steps, with Muon instead of AdamW.",
    "width 64": "h = 64, 1,000 steps.",
    "width 64, longer": "h = 64, 2,400 steps.",
    "ratios": "h = 128, 1,000 steps: ratios of the latent, LatentMoE's two ways to spend it, and norms.",
    "optimizers": "`configs/tiny.py`: AdamW's 2,400 steps, and Muon in three quarters. `selected`: as it ships.",
    "rates 256": "h = 256, 2,500 steps: half and twice the learning rate that all other runs have.",
    "width 256": "h = 256, 2,500 steps (5.1 M tokens).",
}
OF_WIDTHS = ("width 64", "width 64, longer", "norms", "projections", "longer", "width 256")  # studies that have these
FAR = 2048  # h that the gap is extrapolated to
# What bigmac ships with, at two ratios, and what fine_grained could have of it.
SHIPPED = {ratio: f"bigmac {ratio}, skip{SELECTED}" for ratio in ("1/4", "1/2")}
CONTROL = "fine_grained, norm"
# One after another added to the paper's bigmac, or instead of it; over fine_grained.
PARTS = {
    "bigmac 1/4": "bigmac as the paper has it",
    "bigmac 1/4, norm": "with a norm behind the combine",
    "bigmac 1/4, skip": "and the skip in front of it",
    SHIPPED["1/4"]: "and W↓ and W↑ from a selection, at an eighth of the rate: **as it ships**",
    "bigmac 1/4, gate": "norm, skip and a gate on the outputs, from a random start",
    "bigmac 1/4, gate" + SELECTED: "all of them",
    CONTROL: "the control",
}
# Whose gaps are told in tokens, and between which lengths fine_grained says what tokens are worth.
WORTH = {name + recipe for name in STRUCTURES if name != "fine_grained" for recipe in FILLS if recipe != ", norm"}
LENGTHS = (1000, 2400)
Run = dict[str, Any]
Gap = tuple[int, int, float, float]  # h, steps, loss over fine_grained's, its standard error


def write(docs: pathlib.Path, runs: list[Run]) -> None:
    """Replaces what stands between the markers of the page and of its notes, and draws what there are runs for."""
    (docs / IMAGES).mkdir(parents=True, exist_ok=True)
    drawn = [draw(docs / IMAGES, runs) for draw in (balances, pareto, widths)]
    parts = [section(name, runs) for name in STUDIES] + [picture for picture in drawn if picture]
    if every := worth(runs):
        parts.append(f"\n## What the gap is worth\n\n{every}\n")
    put(docs / NOTES, parts)
    put(docs / PAGE, [shipped(runs)], name="shipped")
    put(docs / PAGE, [recipe(runs)], name="recipe")


def of(condition: Condition, runs: list[Run]) -> list[Run]:
    """All seeds that were run."""
    same = (condition.name, condition.width, condition.steps)
    return [run for run in runs if (run["name"], run["width"], run["steps"]) == same]


def tuned(condition: Condition, runs: list[Run]) -> list[Run]:
    """The seeds of the learning rate that is best of those with at least as many seeds as its width's own."""
    own = of(condition, runs)
    enough = [seeds for seeds in _by_rate(condition, runs).values() if len(seeds) >= len(own) > 0]
    return min(enough, key=lambda seeds: mean([run["loss"] for run in seeds])[0], default=[])


def _by_rate(condition: Condition, runs: list[Run]) -> dict[str, list[Run]]:
    """Its seeds at each learning rate, by the names that those have."""
    found: dict[str, list[Run]] = {}
    same = (condition.name, condition.width, condition.steps)
    for run in runs:
        if (run["name"].partition(RATE)[0], run["width"], run["steps"]) == same:
            found.setdefault(run["name"], []).append(run)
    return found


def compared(condition: Condition, base: Condition, runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """The seeds of both: each at its best learning rate, or at their width's own where one was tried at no other.

    What was tried at one rate alone would seem worse than it is beside the best of several.
    """
    choose = tuned if min(len(_by_rate(one, runs)) for one in (condition, base)) > 1 else of
    return choose(condition, runs), choose(base, runs)


def mean(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN of one."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(error)


def over(ours: list[Run], theirs: list[Run]) -> tuple[float, float]:
    """The difference of two conditions' losses and its standard error.

    Where one has a single seed, the difference is of that seed, and the error NaN.
    """
    if min(len(ours), len(theirs)) == 1:
        shared = {run["seed"] for run in ours} & {run["seed"] for run in theirs}
        ours, theirs = ([run for run in seeds if run["seed"] in shared] for seeds in (ours, theirs))
    (loss, error), (other, of_other) = (mean([run["loss"] for run in seeds]) for seeds in (ours, theirs))
    return loss - other, float(np.hypot(error, of_other))


def shipped(runs: list[Run]) -> str:
    """By width and length: what bigmac ships with over fine_grained, and over the control."""
    bases = {"fine_grained": "fine_grained", "the control": CONTROL}
    columns = ["h", "steps", *(f"r = {ratio}, over {base}" for ratio in SHIPPED for base in bases)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for width, steps in sorted({(c.width, c.steps) for study in OF_WIDTHS for c in STUDIES[study]}):
        cells = [_apart(name, base, width, steps, runs) for name in SHIPPED.values() for base in bases.values()]
        if any(cells):
            lines.append(f"| {width} | {steps:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def recipe(runs: list[Run]) -> str:
    """Part by part, at h = 128 and two lengths, over fine_grained."""
    lines = [f"| | {' | '.join(f'after {steps:,}' for steps in LENGTHS)} |", "|---" * (1 + len(LENGTHS)) + "|"]
    for name, said in PARTS.items():
        cells = [_apart(name, "fine_grained", 128, steps, runs) for steps in LENGTHS]
        if any(cells):
            lines.append(f"| {said} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _apart(name: str, base: str, width: int, steps: int, runs: list[Run]) -> str:
    """One's loss over the other's, or "" of what was not run."""
    ours, theirs = compared(*(Condition(kind, {}, width, steps) for kind in (name, base)), runs)
    return _within(*over(ours, theirs), "+") if ours and theirs else ""


def section(study: str, runs: list[Run]) -> str:
    """A study's table. Differences are to its first condition."""
    found = [(condition, of(condition, runs)) for condition in STUDIES[study]]
    found = [(condition, seeds) for condition, seeds in found if seeds]
    if not found:
        return ""
    columns = ["", "seeds", "loss", "less than the first", "bits a byte", "wire bytes a token", "MFLOPs a token",
               "MoE parameters", "load"]  # fmt: skip
    head = f"| {' | '.join(columns)} |"
    lines = ["", f"## {study.capitalize()}", "", ABOUT[study], "", head, "|---" * len(columns) + "|"]
    for condition, seeds in found:
        loss, error = mean([run["loss"] for run in seeds])
        apart = "" if seeds is found[0][1] else _within(*over(found[0][1], seeds), "+")
        one = seeds[0]
        bits, load = (mean([run[name] for run in seeds])[0] for name in ("bits_per_byte", "load_cv"))
        cells = [condition.name, len(seeds), _within(loss, error), apart, f"{bits:.4f}", f"{one['wire_bytes']:,.0f}"]
        cells += [f"{one['flops'] / 1e6:.2f}", f"{one['moe_parameters']:,}", f"{load:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _within(value: float, error: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + ("" if np.isnan(error) else f" ± {error:.3f}")


def balances(images: pathlib.Path, runs: list[Run]) -> str:
    """How uneven the loads are from step to step, by what keeps them even: the seeds' mean."""
    found = [(condition, of(condition, runs)) for condition in STUDIES["balance"]]
    if not any(seeds for _, seeds in found):
        return ""
    windows = [(1, 100), (101, 200), (901, 1000)]
    head = ["", "seeds", *(f"steps {first} to {last}" for first, last in windows), "loss"]
    lines = [
        "",
        "## Loads by step",
        "",
        "Standard deviation of the experts' loads over their mean, of `balance`'s runs.",
        "",
    ]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    series = {}
    for condition, seeds in found:
        if seeds:
            kind = condition.name.removeprefix("tiny, balance ")
            steps = np.array([step for step, _ in seeds[0]["loads"]])
            loads = np.array([[cv for _, cv in run["loads"]] for run in seeds])
            series[kind] = (steps, loads.mean(0), len(seeds))
            within = [list(loads[:, (first <= steps) & (steps <= last)].mean(1)) for first, last in windows]
            cells = [_within(*mean(values)) for values in (*within, [run["loss"] for run in seeds])]
            lines.append(f"| {kind} | {len(seeds)} | {' | '.join(cells)} |")
    pictures.balances(images / "balance.png", series)
    return "\n".join([*lines, "", f"![how uneven the loads of each step are](../{IMAGES}/balance.png)", ""])


def pareto(images: pathlib.Path, runs: list[Run]) -> str:
    """Bits a byte against wire bytes a token, of the ratios and of the norms that compete, and what nothing beats."""
    competing = {c.name: c for study in ("norms", "projections", "ratios") for c in STUDIES[study]}
    found = [
        (name, seeds)
        for name, c in competing.items()
        if pictures.structure_and_recipe(name) and len(seeds := of(c, runs)) > 1
    ]
    if len(found) < 2:
        return ""
    points = {name: (seeds[0]["wire_bytes"], *mean([run["bits_per_byte"] for run in seeds])) for name, seeds in found}
    best = front({name: (wire, bits) for name, (wire, bits, _) in points.items()})
    about = f"{len(points)} conditions of at least two seeds. No other has as few bytes and is better: "
    told = (f"{name} ({points[name][0]:,.0f} bytes, {points[name][1]:.4f} bits)" for name in best)
    lines = ["", "## Bits a byte against wire bytes", "", about + ", ".join(told) + "."]
    pictures.pareto(images / "pareto.png", points, best)
    return "\n".join([*lines, "", f"![bits a byte against wire bytes](../{IMAGES}/pareto.png)", ""])


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Of name → (cost, loss): the names that each lower the loss of all that cost as much or less, cheapest first."""
    best: list[str] = []
    for name in sorted(points, key=points.__getitem__):
        if not best or points[name][1] < points[best[-1]][1]:
            best.append(name)
    return best


def gaps(runs: list[Run]) -> dict[str, list[Gap]]:
    """By condition, of at least two seeds each."""
    found: dict[str, list[Gap]] = {name: [] for name in APART}
    for study in OF_WIDTHS:
        fine = next(c for c in STUDIES[study] if c.name == "fine_grained")
        for condition in STUDIES[study]:
            name, (ours, base) = condition.name, compared(condition, fine, runs)
            if name in found and len(ours) > 1 and len(base) > 1:
                gap = (condition.width, condition.steps, *over(ours, base))
                if gap not in found[name]:  # a condition may be of two studies
                    found[name].append(gap)
    return found


def longest(of_name: list[Gap]) -> list[Gap]:
    """By width, of runs nearly as long as the longest of any: a gap grows with the length."""
    least = 0.9 * max(steps for _, steps, *_ in of_name)
    return sorted(gap for gap in of_name if gap[1] >= least)


def widths(images: pathlib.Path, runs: list[Run]) -> str:
    """How far bigmac is behind fine_grained, by width, with the recipe and without; and the control."""
    found = {name: of_name for name, of_name in gaps(runs).items() if of_name}
    if not found:
        return ""
    about = "Loss over that of fine_grained without a norm, of the same width and length; below 0 is better than it. "
    about += "Each at its best\nlearning rate, of those tried with as many seeds; "
    about += "both at that of their width where the first was tried at no other."
    columns = ["h", "steps", *found]
    lines = ["", "## Gap against width", "", about, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    cells = {(h, steps, name): _within(*gap, "+") for name in found for h, steps, *gap in found[name]}
    for h, steps in sorted({key[:2] for key in cells}):
        lines.append(f"| {h} | {steps:,} | {' | '.join(cells.get((h, steps, name), '') for name in found)} |")
    drawn = {name: longest(of_name) for name, of_name in found.items()}
    lines += [line for name, ends in drawn.items() if len(ends) > 2 for line in ("", extrapolated(name, ends))]
    pictures.widths(images / "widths.png", drawn)
    return "\n".join([*lines, "", f"![the gap against the width](../{IMAGES}/widths.png)", ""])


def extrapolated(name: str, of_name: list[Gap]) -> str:
    """A straight line in log h through the longest runs, weighted by their errors, at h = 2,048."""
    width, _, gap, error = np.array(longest(of_name)).T
    weighted = np.stack([np.ones(len(gap)), np.log2(width) - np.log2(FAR)], 1) / error[:, None]
    line = np.linalg.lstsq(weighted, gap / error)[0]
    at, slope = (float(np.sqrt(v)) for v in np.diag(np.linalg.inv(weighted.T @ weighted)))
    return (
        f"Extrapolated, not measured: {name} at h = {FAR:,} is {line[0]:+.3f} ± {at:.3f} from fine_grained, by the "
        f"line through the longest runs, which changes {line[1]:+.3f} ± {slope:.3f} a doubling of h."
    )


def worth(runs: list[Run]) -> str:
    """Table of what a narrow exchange costs in tokens, and how much of a step the exchange must be for it to pay."""
    short, long = (of(normed("fine_grained", "none", steps=steps), runs) for steps in LENGTHS)
    if not (short and long):
        return ""
    less = mean([run["loss"] for run in short])[0] - mean([run["loss"] for run in long])[0]
    times = LENGTHS[1] / LENGTHS[0]
    columns = ["", "instead of", "h", "steps", "behind", "tokens more", "pays above"]
    lines = [
        f'{times:g} times the steps take {less:.3f} off fine_grained\'s loss at h = 128. By that, "tokens more" make '
        'up for the gap, at any width.\n"Pays above" is the share of fine_grained\'s step that its exchange must take, '
        "where nothing hides it, for the first to\nreach a loss before the second. The rest of a step goes with its "
        "FLOPs.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    all_ = {c: None for study in (*OF_WIDTHS, "ratios") for c in STUDIES[study] if c.name in WORTH}
    for condition in sorted(all_, key=lambda c: (c.width, c.steps)):
        same = (condition.width, condition.steps)
        bases = [normed("fine_grained", norm, *same) for norm in ("none", "post_combine")]
        bases += [normed("bigmac 1/2", "skip", *same, selects=True)] * condition.name.endswith(SELECTED)
        for base in bases:
            found = [*compared(condition, base, runs), of(bases[0], runs)]
            if min(map(len, found)) < 2:
                continue
            gap, error = over(*found[:2])
            one, other = (cost(seeds[0], found[2][0]) for seeds in found[:2])
            if one.wire >= other.wire:
                continue
            more, share = break_even(gap / less * np.log(times), one, other)
            pays = "always" if share <= 0 else f"{100 * share:.0f} %" if share < 1 else "never"
            cells = [condition.name, base.name, condition.width, f"{condition.steps:,}", _within(gap, error, "+")]
            lines.append(f"| {' | '.join(map(str, cells))} | {100 * more:+.0f} % | {pays} |")
    return "\n".join(lines)


class Cost(NamedTuple):
    """What a token costs, over fine_grained's."""

    wire: float = 1.0  # bytes of the exchange
    flops: float = 1.0

    def seconds(self, share: float) -> float:
        """A step, over fine_grained's, of which the exchange takes this share."""
        return (1 - share) * self.flops + share * self.wire


WHOLE = Cost()


def cost(run: Run, base: Run) -> Cost:
    return Cost(run["wire_bytes"] / base["wire_bytes"], run["flops"] / base["flops"])


def break_even(e_folds: float, own: Cost, base: Cost = WHOLE) -> tuple[float, float]:
    """Of e^e_folds times the tokens: how many more those are, as a share, and the share x of the exchange in
    fine_grained's step at which a run of them takes no longer, (1 + more) · own.seconds(x) = base.seconds(x).

    Args:
      own, base: a token of this run, and of what it is compared with.
    """
    times = float(np.exp(e_folds))
    longer = times * own.seconds(0) - base.seconds(0)  # where an exchange takes no time
    saved = times * (own.flops - own.wire) - (base.flops - base.wire)
    return times - 1, longer / saved if saved > 0 else 0.0  # fewer bytes, and far fewer tokens
