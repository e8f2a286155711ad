"""The runs that benchmarks.overflow compares: what is trained, read, told and drawn."""

import json
import pathlib
import shutil
import time
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.quality.runs import CONFIG, command, within

Run = dict[str, Any]
FACTORS = ("1.0", "1.25")
_LOG_EVERY = 5


@dataclass(frozen=True)
class Arm:
    """What is compared: a capacity factor, and what becomes of a choice that finds its expert full."""

    factor: str
    overflow: str
    steps: int

    @property
    def name(self) -> str:
        return "dropless" if self.factor == "inf" else f"factor {self.factor}, {self.overflow}"

    def key(self, seed: int) -> str:
        """Of its workdir."""
        return f"{self.factor}-{self.overflow}-{self.steps}-seed{seed}"


def arms(steps: int) -> list[Arm]:
    """Dropless first, which the others are compared with."""
    return [Arm("inf", "drop", steps), *(Arm(f, overflow, steps) for f in FACTORS for overflow in ("drop", "next"))]


def train(arm: Arm, seed: int, folder: pathlib.Path, cores: list[int]) -> Run:
    """Runs train.py, which goes on where it was stopped; raises RuntimeError with its last line."""
    workdir, start = folder / arm.key(seed), time.monotonic()
    fields = [f"model.capacity_factor={arm.factor}", f"model.overflow={arm.overflow}", f"train.steps={arm.steps}",
              f"train.seed={seed}", f"train.log_every={_LOG_EVERY}", f"train.eval_every={arm.steps}"]  # fmt: skip
    command(workdir, cores, "train.py", f"--config={CONFIG}", *(f"--config.{field}" for field in fields))
    run = {"key": arm.key(seed), "factor": arm.factor, "overflow": arm.overflow, "steps": arm.steps, "seed": seed}
    run |= read(workdir) | {"seconds": round(time.monotonic() - start)}
    shutil.rmtree(workdir / "checkpoints")
    return run


def read(workdir: pathlib.Path) -> Run:
    """The last held-out loss; shares of choices dropped and moved over the steps, and their means; tokens a second."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "moe/drop_rate" in record]
    dropped, moved = ([round(r.get(f"moe/{name}", 0.0), 5) for r in steps] for name in ("drop_rate", "moved_rate"))
    return {
        "loss": [record["eval/loss"] for record in records if "eval/loss" in record][-1],
        "dropped": round(float(np.mean(dropped)), 5),
        "moved": round(float(np.mean(moved)), 5),
        "max_load": round(float(np.mean([record["moe/max_load"] for record in steps])), 4),
        "tokens_per_s": round(float(np.median([record["tokens_per_s"] for record in steps]))),
        "series": {"step": [record["step"] for record in steps], "dropped": dropped, "moved": moved},
    }


def table(runs: list[Run]) -> str:
    """Means over seeds ± standard error; the loss also over the dropless run of the same seed, in thousandths."""
    head = ["", "seeds", "dropped, %", "in the last tenth", "moved, %", "in the last tenth", "held-out loss",
            "over dropless, 10⁻³"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    dropless = {run["seed"]: run["loss"] for run in runs if run["factor"] == "inf"}
    for arm, found in _by_arm(runs):
        cells = [arm.name, str(len(found))]
        for name in ("dropped", "moved"):
            cells += [
                within([100 * run[name] for run in found], 2),
                within([100 * _last(run, name) for run in found], 2),
            ]
        over = [1000 * (run["loss"] - dropless[run["seed"]]) for run in found if run["seed"] in dropless]
        cells += [within([run["loss"] for run in found], 4), "" if arm.factor == "inf" else within(over, 1, "+")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(runs: list[Run], path: pathlib.Path) -> None:
    """Drops over the steps, means of seeds; what is moved dashed; held-out losses, a dot a seed."""
    figure, (rates, losses) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for number, (arm, found) in enumerate(_by_arm(runs)):
        losses.plot([number] * len(found), [run["loss"] for run in found], "o", color=f"C{number}")
        if arm.factor == "inf":
            continue
        for name, style in (("dropped", "-"), ("moved", "--")):
            mean_n = 100 * np.mean([run["series"][name] for run in found], axis=0)
            if mean_n.any():
                label = f"{arm.name}: {name}"
                rates.plot(found[0]["series"]["step"], mean_n, style, color=f"C{number}", lw=1, label=label)
    rates.set(xlabel="step", ylabel="choices, %", ylim=(0.01, None), yscale="log")
    rates.legend(fontsize=8)
    names = [arm.name for arm, _ in _by_arm(runs)]
    losses.set(ylabel="held-out loss, nats a token", xticks=range(len(names)))
    losses.set_xticklabels([name.replace(", ", "\n") for name in names])
    for axis in (rates, losses):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    print(path)


def _by_arm(runs: list[Run]) -> list[tuple[Arm, list[Run]]]:
    """In the order of `arms`, those that have runs."""
    found: dict[Arm, list[Run]] = {arm: [] for arm in arms(runs[0]["steps"])} if runs else {}
    for run in runs:
        found[Arm(run["factor"], run["overflow"], run["steps"])].append(run)
    return [(arm, of_arm) for arm, of_arm in found.items() if of_arm]


def _last(run: Run, name: str) -> float:
    values = run["series"][name]
    return float(np.mean(values[-max(1, len(values) // 10) :]))
