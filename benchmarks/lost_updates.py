"""What do checkpoints of some of the experts cost, and what do they save? python -m benchmarks.lost_updates [--jobs=2]

Trains configs/tiny.py on the embedded text: without a fault, and with one every --every steps, after which the run goes
on from whole checkpoints or from those of K experts a layer (train.experts_per_checkpoint). Each run is written down
when it ends; started again, it goes on where it stopped.

    python -m benchmarks.lost_updates --table              the table of what there is, and no run
    python -m benchmarks.lost_updates --picture=FILE.png   loss over lost updates, of what there is, and no run
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
from absl import app, flags

from benchmarks import faulty_train
from benchmarks.quality.runs import CONFIG, ROOT, read_file, train_missing, within
from bigmac_jax.runtime.storage import list_files
from bigmac_jax.training import manifest
from bigmac_jax.training.partial_checkpoint import read_turn

_STEPS = flags.DEFINE_integer("steps", 1000, "Of a run.", lower_bound=20)
_EVERY = flags.DEFINE_integer("every", 200, "Steps between two faults.", lower_bound=10)
_SAVES = flags.DEFINE_integer("checkpoint_every", 5, "Steps between two saves.", lower_bound=1)
_SEEDS = flags.DEFINE_list("seeds", ["1", "2", "3"], "Of train.seed.")
_JOBS = flags.DEFINE_integer("jobs", len(os.sched_getaffinity(0)), "Runs at a time.", lower_bound=1)
_FOLDER = flags.DEFINE_string("folder", "runs/lost_updates", "Of the runs.")
_OUTPUT = flags.DEFINE_string("output", "docs/results/lost_updates.json", "Where the figures go.")
_TABLE = flags.DEFINE_bool("table", False, "Run nothing, print the table.")
_PICTURE = flags.DEFINE_string("picture", "", "Run nothing, draw this file.")

Run = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """What is compared: whether there are faults, and how many experts of a layer a checkpoint holds (0 = all)."""

    experts: int
    every: int  # 0: no fault
    doubles: bool  # whether a restart that has lost too much doubles K
    saves: int
    steps: int

    @property
    def name(self) -> str:
        doubles = ", doubled above 3.75 % lost" if self.doubles else ""
        return f"K = {self.experts}{doubles}" if self.experts else "whole checkpoints" if self.every else "no fault"

    @property
    def faults(self) -> list[int]:
        """Steps that are not reached: the last before a save that would have been."""
        return [step + self.saves - 1 for step in range(self.every, self.steps, self.every)] if self.every else []

    def key(self, seed: int) -> str:
        """Of its workdir."""
        name = f"{self.experts}{'-doubles' if self.doubles else ''}"
        return f"{name}-every{self.every}-saves{self.saves}-{self.steps}-seed{seed}"


def arms(steps: int, every: int, saves: int) -> list[Arm]:
    """The run without a fault first, which the others are compared with."""
    faulty = ((0, False), (4, False), (2, False), (1, False), (1, True))
    return [
        Arm(0, 0, False, saves, steps),
        *(Arm(experts, every, doubles, saves, steps) for experts, doubles in faulty),
    ]


def main(_: list[str]) -> None:
    output, steps = pathlib.Path(_OUTPUT.value), _STEPS.value
    compared = arms(steps, _EVERY.value, _SAVES.value)
    if not (_TABLE.value or _PICTURE.value):
        runs = [(arm, int(seed)) for seed in _SEEDS.value for arm in compared]
        train_missing("lost_updates", runs, output, pathlib.Path(_FOLDER.value), _JOBS.value, train, _say)
    known = read_file(output)
    pairs = [(arm, [known[key] for seed in _SEEDS.value if (key := arm.key(int(seed))) in known]) for arm in compared]
    if _PICTURE.value:
        picture(pairs, pathlib.Path(_PICTURE.value))
    else:
        print(table(pairs))


def _say(run: Run) -> str:
    return f"held-out loss {run['loss']:.4f}, {run['lost']:.2%} of the updates lost"


def train(arm: Arm, seed: int, folder: pathlib.Path, cores: list[int]) -> Run:
    """Runs train.py, which ends at each fault and goes on; raises RuntimeError with its last line."""
    workdir, start = folder / arm.key(seed), time.monotonic()
    fields = [f"train.steps={arm.steps}", f"train.seed={seed}", "train.log_every=10", f"train.eval_every={arm.steps}",
              f"train.checkpoint_every={arm.saves}", f"train.experts_per_checkpoint={arm.experts}",
              f"train.most_lost_updates={0.0375 if arm.doubles else 1}"]  # fmt: skip
    saved: list[int] = []
    folder.mkdir(parents=True, exist_ok=True)
    for fault in [*arm.faults, 0]:
        if fault and _reached(workdir) >= fault - 1:
            continue  # an earlier start of this program met it
        code = _start(workdir, cores, fault, fields)
        if code != (faulty_train.CODE if fault else 0):
            log = workdir.with_suffix(".log")
            raise RuntimeError(f"{arm.key(seed)} ended with {code}: {(log.read_text().splitlines() or ['?'])[-1]}")
        last = workdir / "checkpoints" / str(max(manifest.list_steps(workdir)))
        saved += [_size(last)] if read_turn(last).count else []
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lost = [record for record in records if "checkpoint/lost_updates" in record]
    run = {
        "key": arm.key(seed),
        "seed": seed,
        "loss": [record["eval/loss"] for record in records if "eval/loss" in record][-1],
        "lost": lost[-1]["checkpoint/lost_updates"] if lost else 0.0,
        "lost_by_restart": [[record["step"], round(record["checkpoint/lost_updates"], 5)] for record in lost],
        "experts": lost[-1]["checkpoint/experts"] if lost else arm.experts,
        "save_bytes": min(saved, default=0),
        "whole_bytes": _size(workdir / "checkpoints" / str(arm.steps)),
        "save_s": records[-1]["goodput/save_s"],
        "seconds": round(time.monotonic() - start),
    }
    shutil.rmtree(workdir / "checkpoints")
    return run


def _start(workdir: pathlib.Path, cores: list[int], fault: int, fields: list[str]) -> int:
    command = [sys.executable, "benchmarks/faulty_train.py", f"--fault_at={fault}", f"--config={CONFIG}",
               f"--workdir={workdir}", "--cpu_devices=1", *(f"--config.{field}" for field in fields)]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with workdir.with_suffix(".log").open("w") as log:
        return subprocess.run(
            command, cwd=ROOT, stdout=log, stderr=log, env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        ).returncode  # fmt: skip


def _reached(workdir: pathlib.Path) -> int:
    """The last step that a workdir has written down."""
    try:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines), default=0)


def _size(checkpoint: pathlib.Path) -> int:
    return sum(list_files(checkpoint).values())


def table(pairs: list[tuple[Arm, list[Run]]]) -> str:
    """Means over seeds ± standard error; the loss also over that of no fault and the same seed, in thousandths."""
    head = ["", "seeds", "bytes of a save", "updates lost, %", "K at the end", "held-out loss", "over no fault, 10⁻³"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    base = {run["seed"]: run["loss"] for run in pairs[0][1]}
    for arm, runs in pairs:
        if not runs:
            continue
        size = runs[0]["save_bytes"] / runs[0]["whole_bytes"] if arm.experts else 1.0
        over = [1000 * (run["loss"] - base[run["seed"]]) for run in runs if run["seed"] in base]
        lines.append(
            f"| {arm.name} | {len(runs)} | {size:.1%} | {within([100 * run['lost'] for run in runs], 2)} | "
            f"{', '.join(str(k) for k in sorted({run['experts'] for run in runs})) if arm.experts else 'all'} | "
            f"{within([run['loss'] for run in runs], 4)} | {within(over, 1)} |"
        )
    return "\n".join(lines)


def picture(pairs: list[tuple[Arm, list[Run]]], path: pathlib.Path) -> None:
    """The loss over that of no fault, by the share of updates lost."""
    base = {run["seed"]: run["loss"] for run in pairs[0][1]}
    figure, axes = plt.subplots(figsize=(6, 4))
    for arm, runs in pairs[1:]:
        runs = [run for run in runs if run["seed"] in base]
        axes.scatter(
            [100 * run["lost"] for run in runs], [run["loss"] - base[run["seed"]] for run in runs], label=arm.name
        )
    axes.axhline(0, color="0.7", linewidth=1)
    axes.set_xlabel("updates of the experts that faults have lost, %")
    axes.set_ylabel("held-out loss over that of no fault")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    app.run(main)
