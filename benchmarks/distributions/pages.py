"""The pictures of docs/distributions.md and the tables of its notes, from docs/results/distributions.json alone."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.distributions.grid import ALL, STRUCTURES, STUDIES, Condition
from benchmarks.markers import put
from benchmarks.quality.pages import mean

PAGE, NOTES, IMAGES = "distributions.md", "notes/distributions.md", "images/distributions"
Run = dict[str, Any]


def write(docs: pathlib.Path, runs: list[Run]) -> None:
    """Replaces what stands between the markers of the page and its notes, which are made if they are not there."""
    (docs / IMAGES).mkdir(parents=True, exist_ok=True)
    put(docs / PAGE, [picture(docs / IMAGES, runs) for picture in (curves, layers, bars)])
    tables = [table(runs) for table in (loads_by_domain, shift, balance, transfer)]
    put(docs / NOTES, tables, "# Notes on distributions\n\n")


def of(condition: Condition, runs: list[Run]) -> list[Run]:
    """All seeds that were run."""
    return [run for run in runs if run["name"] == condition.name]


def within(values: list[float], digits: int = 3) -> str:
    value, error = mean(values)
    return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines) + "\n"


def _found(runs: list[Run], part: Callable[[Condition], bool]) -> list[tuple[Condition, list[Run]]]:
    """What was run of the conditions of which `part` holds, in the order of the structures."""
    found = [c for c in dict.fromkeys(c for study in STUDIES.values() for c in study) if part(c)]
    found.sort(key=lambda c: (len(c.trained), ALL.index(c.trained[0]), list(STRUCTURES).index(c.structure)))
    return [(condition, seeds) for condition in found if (seeds := of(condition, runs))]


def told(run: Run) -> float:
    """What an expert tells of the domain, mean over layers, of what there is to know."""
    return float(np.mean(run["specialisation"])) / math.log(len(run["read"]))


def busiest(run: Run, domain: str) -> float:
    """The busiest expert over the mean, of the fullest layer."""
    return float(max(run["read"][domain]["max_load_by_layer"]))


def alone(condition: Condition) -> bool:
    """Whether it is of the comparison of what is trained on."""
    return not condition.then and condition.balance == "aux_loss"


def shift(runs: list[Run]) -> str:
    """Around the middle of a run, where the domain changes."""
    rows = []
    for condition, seeds in _found(runs, lambda c: bool(c.then)):
        before, behind, end = zip(*(drops(run) for run in seeds), strict=True)
        lost = [_after(run, run["trained"][0]) for run in seeds]
        won = [run["read"][run["then"][0]]["loss"] for run in seeds]
        back = [steps_back(run, 2 * was) for run, was in zip(seeds, before, strict=True)]
        most = [max(run["series"]["max_load"][_middle(run) :]) for run in seeds]
        columns = [within(list(values), 1) for values in (before, behind, end, most)]
        columns[2:2] = [within(back, 0)]
        rows.append([condition.name, str(len(seeds)), *columns, within(lost), within(won)])
    head = ["", "seeds", "drops before, %", "at most after", "steps until twice before", "at the end",
            "busiest expert, at most after", "nats lost on the old", "loss on the new"]  # fmt: skip
    return "\n## A shift in the middle of a run\n\n" + _table(head, rows) if rows else ""


def _middle(run: Run) -> int:
    """Which of the run's records is the first with the new domain."""
    return next(i for i, step in enumerate(run["step"]) if step > run["steps"] // 2)


def steps_back(run: Run, rate: float) -> float:
    """Steps after the shift until at most so many per cent are dropped; NaN if that never comes."""
    middle = _middle(run)
    rates = [100 * share for share in run["series"]["drop_rate"][middle:]]
    return next((run["step"][middle + i] - run["steps"] // 2 for i, r in enumerate(rates) if r <= rate), math.nan)


def drops(run: Run) -> tuple[float, float, float]:
    """Per cent: the mean of the tenth of the run before the shift, the largest of the tenth after it, and the mean of
    the last tenth."""
    rate = 100 * np.asarray(run["series"]["drop_rate"])
    middle, tenth = _middle(run), len(rate) // 10
    return (
        float(rate[middle - tenth : middle].mean()),
        float(rate[middle : middle + tenth].max()),
        float(rate[-tenth:].mean()),
    )


def _after(run: Run, domain: str) -> float:
    """How much is lost of what was trained first, nats a token."""
    losses = {step: loss[domain] for step, loss in run["evaluations"]}
    middle = max(step for step in losses if step <= run["steps"] // 2)
    return losses[max(losses)] - losses[middle]


def balance(runs: list[Run]) -> str:
    rows = [
        [
            condition.balance, str(len(seeds)),
            within([float(np.mean([r["read"][name]["bits_per_byte"] for name in ALL])) for r in seeds]),
            within([100 * r["drop_rate"] for r in seeds], 2),
            within([float(np.mean([busiest(r, name) for name in ALL])) for r in seeds], 2),
            within([float(np.mean(r["series"]["router_entropy"][-10:])) for r in seeds], 2),
            within([100 * told(r) for r in seeds], 1),
        ]
        for condition, seeds in _found(runs, lambda c: c.structure == "recipe" and c.trained == ALL)
    ]  # fmt: skip
    head = ["balance", "seeds", "bits a byte", "drops in training, %", "busiest expert", "router entropy, nats",
            "told of the domain, %"]  # fmt: skip
    return "\n## All domains, by what keeps the loads even\n\n" + _table(head, rows) if rows else ""


def transfer(runs: list[Run]) -> str:
    """Table of bits a byte by what was trained on and what is read."""
    head = ["trained on", "seeds", *(f"read in {name}" for name in ALL)]
    rows = [
        [c.name, str(len(seeds)), *(within([r["read"][name]["bits_per_byte"] for r in seeds]) for name in ALL)]
        for c, seeds in _found(runs, alone)
    ]
    return "\n## One domain, read in another\n\nBits a byte of held-out text.\n\n" + _table(head, rows) if rows else ""


def loads_by_domain(runs: list[Run]) -> str:
    """Table of the busiest expert by what was trained on and what is read, and of what an expert tells."""
    rows = []
    for condition, seeds in _found(runs, alone):
        most = [within([busiest(r, name) for r in seeds], 2) for name in ALL]
        rows.append([condition.name, str(len(seeds)), *most, within([100 * told(r) for r in seeds], 1)])
    about = "The busiest expert of the fullest layer, times the mean, and what an expert tells of the domain.\n\n"
    head = ["trained on", "seeds", *(f"read in {name}" for name in ALL), "told of the domain, %"]
    return about + _table(head, rows) if rows else ""


def curves(images: pathlib.Path, runs: list[Run]) -> str:
    """Over the steps of shifting runs: drops and load by what keeps loads even, means of seeds; losses by structure, a
    line a seed."""
    found = _found(runs, lambda c: c.then == ("code",))
    if not found:
        return ""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for condition, seeds in found:
        steps = seeds[0]["step"]
        if condition.structure == "recipe":
            for axis, name, factor in ((axes[0], "drop_rate", 100), (axes[1], "max_load", 1)):
                mean_n = np.mean([run["series"][name] for run in seeds], axis=0)
                axis.plot(steps, factor * mean_n, lw=1, label=condition.balance)
        if condition.balance == "aux_loss":
            colour = f"C{list(STRUCTURES).index(condition.structure)}"
            for run in seeds:
                at = [step for step, _ in run["evaluations"]]
                for domain, style in ((condition.trained[0], "-"), (condition.then[0], "--")):
                    label = f"{condition.structure}, read in {domain}" if run is seeds[0] else None
                    losses = [loss[domain] for _, loss in run["evaluations"]]
                    axes[2].plot(at, losses, style, color=colour, lw=0.8, label=label)
    for axis, name in zip(axes, ("dropped choices, %", "busiest expert, times the mean", "loss, nats"), strict=True):
        axis.set(xlabel="step; dotted: the text changes", ylabel=name)
        axis.axvline(found[0][1][0]["steps"] // 2, color="grey", lw=0.8, ls=":")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_yscale("log")
    return _saved(figure, images, "shift", "Dropped choices, the busiest expert and losses around a shift")


def layers(images: pathlib.Path, runs: list[Run]) -> str:
    """What an expert tells of the domain, layer by layer, of runs on all domains."""
    found = _found(runs, lambda c: c.trained == ALL)
    if not found:
        return ""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for number, (condition, seeds) in enumerate(found):
        told_sl = 100 * np.asarray([run["specialisation"] for run in seeds]) / math.log(len(ALL))
        error = told_sl.std(0, ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else None
        at = np.arange(1, told_sl.shape[1] + 1) + 0.03 * number
        axis.errorbar(at, told_sl.mean(0), error, marker="o", ms=4, lw=1, capsize=2,
                      label=f"{condition.structure}, {condition.balance}")  # fmt: skip
    axis.set(xlabel="layer", ylabel="told of the domain, %", xticks=range(1, told_sl.shape[1] + 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return _saved(figure, images, "layers", "What an expert tells of the domain, layer by layer")


def bars(images: pathlib.Path, runs: list[Run]) -> str:
    """Bits a byte by what was trained on and read in, a bar a structure."""
    found = {(c.trained, c.structure): seeds for c, seeds in _found(runs, alone)}
    if not found:
        return ""
    groups = list(dict.fromkeys(trained for trained, _ in found))
    figure, axes = plt.subplots(1, len(ALL), figsize=(15, 3.6), layout="constrained")
    structures = [s for s in STRUCTURES if any(s == name for _, name in found)]
    width = 0.8 / len(structures)
    for axis, domain in zip(axes, ALL, strict=True):
        for number, structure in enumerate(structures):
            at = [i for i, trained in enumerate(groups) if (trained, structure) in found]
            values = [mean([r["read"][domain]["bits_per_byte"] for r in found[groups[i], structure]]) for i in at]
            left = (number - (len(structures) - 1) / 2) * width
            axis.bar([i + left for i in at], [v for v, _ in values], 0.9 * width, capsize=2,
                     yerr=[0 if math.isnan(e) else e for _, e in values], label=structure)  # fmt: skip
        axis.set(title=f"read in {domain}", xticks=range(len(groups)), ylabel="bits a byte")
        axis.set_xticklabels(["all" if trained == ALL else trained[0] for trained in groups], fontsize=8)
        axis.set_xlabel("trained on")
        axis.grid(alpha=0.3, axis="y")
    axes[0].legend(fontsize=8)
    return _saved(figure, images, "transfer", "Bits a byte by what was trained on and what is read")


def _saved(figure: plt.Figure, images: pathlib.Path, name: str, what: str) -> str:
    figure.savefig(images / f"{name}.png", dpi=110)
    plt.close(figure)
    return f"\n![{what}]({IMAGES}/{name}.png)\n"
