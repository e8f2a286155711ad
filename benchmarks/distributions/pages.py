"""The tables and pictures of docs/distributions.md, from docs/results/distributions.json and nothing else."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.distributions.grid import ALL, STRUCTURES, STUDIES, Condition
from benchmarks.quality.pages import BEGIN, END, mean

PAGE, IMAGES = "distributions.md", "images/distributions"
Run = dict[str, Any]


def write(docs: pathlib.Path, runs: list[Run]) -> None:
    """Replaces what stands between the markers of the page, which is made if it is not there."""
    (docs / IMAGES).mkdir(parents=True, exist_ok=True)
    page = docs / PAGE
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    parts = [transfer(runs), balance(runs), shift(runs), curves(docs / IMAGES, runs)]
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{''.join(parts)}\n{END}{after}")


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


def transfer(runs: list[Run]) -> str:
    found = _found(runs, lambda c: not c.then and c.balance == "aux_loss")
    if not found:
        return ""
    head = ["trained on", "seeds", *(f"read in {name}" for name in ALL)]
    bits, loads = [], []
    for condition, seeds in found:
        first = [condition.name, str(len(seeds))]
        bits.append(first + [within([r["read"][name]["bits_per_byte"] for r in seeds]) for name in ALL])
        busiest = [within([max(r["read"][name]["max_load_by_layer"]) for r in seeds], 2) for name in ALL]
        loads.append([*first, *busiest, f"{mean([told(r) for r in seeds])[0]:.1%}"])
    return (
        "\n## One domain, read in another\n\nBits a byte of held-out text.\n\n"
        + _table(head, bits)
        + "\nThe busiest expert of the fullest layer, times the mean, and what an expert tells of the domain.\n\n"
        + _table([*head, "told of the domain"], loads)
    )


def balance(runs: list[Run]) -> str:
    found = _found(runs, lambda c: c in STUDIES["balance"])
    if not found:
        return ""
    rows = [
        [
            condition.balance, str(len(seeds)),
            within([float(np.mean([r["read"][name]["bits_per_byte"] for name in ALL])) for r in seeds]),
            within([100 * r["drop_rate"] for r in seeds], 2),
            within([float(np.mean([max(r["read"][n]["max_load_by_layer"]) for n in ALL])) for r in seeds], 2),
            within([100 * told(r) for r in seeds], 1),
        ]
        for condition, seeds in found
    ]  # fmt: skip
    head = ["balance", "seeds", "bits a byte", "drops in training, %", "busiest expert", "told of the domain, %"]
    return "\n## All domains, by what keeps the loads even\n\n" + _table(head, rows)


def shift(runs: list[Run]) -> str:
    """Around the middle of a run, where the domain changes."""
    found = _found(runs, lambda c: bool(c.then))
    if not found:
        return ""
    rows = []
    for condition, seeds in found:
        before, behind, end = zip(*(_drops(run) for run in seeds), strict=True)
        lost = [_after(run, run["trained"][0]) for run in seeds]
        won = [run["read"][run["then"][0]]["loss"] for run in seeds]
        rows.append([condition.name, str(len(seeds)), within(list(before), 2), within(list(behind), 2),
                     within(list(end), 2), within(lost), within(won)])  # fmt: skip
    head = ["", "seeds", "drops before, %", "at most after", "at the end", "nats lost on the old", "loss on the new"]
    return "\n## A shift in the middle of a run\n\n" + _table(head, rows)


def _drops(run: Run) -> tuple[float, float, float]:
    """Per cent: the mean of the tenth of the run before the shift, the largest of the tenth after it, and the mean of
    the last tenth."""
    step, rate = np.asarray(run["step"]), 100 * np.asarray(run["series"]["drop_rate"])
    middle, tenth = run["steps"] // 2, max(1, run["steps"] // 10)
    parts = [rate[(step > a) & (step <= a + tenth)] for a in (middle - tenth, middle, run["steps"] - tenth)]
    return tuple(
        float(f(part)) if part.size else math.nan for f, part in zip((np.mean, np.max, np.mean), parts, strict=True)
    )  # type: ignore[return-value]


def _after(run: Run, domain: str) -> float:
    """How much is lost of what was trained first, nats a token."""
    losses = {step: loss[domain] for step, loss in run["evaluations"]}
    middle = max(step for step in losses if step <= run["steps"] // 2)
    return losses[max(losses)] - losses[middle]


def curves(images: pathlib.Path, runs: list[Run]) -> str:
    """Drops, load and losses over the steps of shifting runs, the mean of their seeds."""
    found = _found(runs, lambda c: bool(c.then) and c.structure == "recipe")
    if not found:
        return ""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for condition, seeds in found:
        label = f"{condition.then[0]}, {condition.balance}"
        steps = seeds[0]["step"]
        for axis, name, factor in ((axes[0], "drop_rate", 100), (axes[1], "max_load", 1)):
            mean_n = np.mean([run["series"][name] for run in seeds if run["step"] == steps], axis=0)
            axis.plot(steps, factor * mean_n, lw=1, label=label)
        for domain, style in ((condition.trained[0], "-"), (condition.then[0], "--")):
            at = [step for step, _ in seeds[0]["evaluations"]]
            loss = np.mean([[losses[domain] for _, losses in run["evaluations"]] for run in seeds], axis=0)
            axes[2].plot(at, loss, style, lw=1, label=f"{label}: read in {domain}")
    for axis, name in zip(axes, ("dropped choices, %", "busiest expert, times the mean", "loss, nats"), strict=True):
        axis.set(xlabel="step", ylabel=name)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    axes[2].legend(fontsize=6)
    figure.savefig(images / "shift.png", dpi=110)
    plt.close(figure)
    return f"\n![Dropped choices, the busiest expert and losses around a shift]({IMAGES}/shift.png)\n"
