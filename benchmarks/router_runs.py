"""The runs of `benchmarks.routers`: what they are, how one is trained and scored, and their table and picture."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.quality.runs import CONFIG, ROOT, command
from bigmac_jax import tuning
from bigmac_jax.config import TrainConfig, with_mesh
from bigmac_jax.evaluation.perplexity import evaluate
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.training.programs import evaluation_rows
from bigmac_jax.training.run_data import open_run_stream
from bigmac_jax.training.workdir import load_run_tokenizer, read_config
from bigmac_jax.tuning.conversion.rebuild import rebuild_model, with_model

EXPERTS, CHOICES, FIRST = 64, 8, 4
FACTOR = 1.25  # of the capacity whose drops are told
LAST = 100  # steps at the end, over which loads are told
ROUTERS = {"linear": "tab:blue", "hyper": "tab:orange", "frozen": "tab:green"}


class Condition(NamedTuple):
    """A router, and whether choices grow."""

    router: str
    grows: bool
    steps: int

    @property
    def name(self) -> str:
        return f"{self.router}, {FIRST} to {CHOICES} choices" if self.grows else f"{self.router}, {CHOICES} choices"

    def key(self, seed: int) -> str:
        return f"{self.router}{'-growing' if self.grows else ''}-{self.steps}-{seed}"

    def overrides(self, seed: int) -> list[str]:
        fields = [
            f"model.router={self.router}", f"model.num_experts={EXPERTS}", f"model.top_k={CHOICES}",
            f"train.seed={seed}", f"train.steps={self.steps}", "train.log_every=10",
            "train.eval_every=0", f"train.checkpoint_every={max(1, self.steps // 4)}",
        ]  # fmt: skip
        return fields + [f"train.choices_from={FIRST}", f"train.choices_steps={self.steps}"] * self.grows


def conditions(steps: int) -> list[Condition]:
    return [Condition(router, grows, steps) for grows in (False, True) for router in ROUTERS]


def train(condition: Condition, seed: int, folder: pathlib.Path, cores: list[int]) -> dict[str, Any]:
    """Runs train.py, which goes on where it was stopped, and scores what it left."""
    workdir, start = folder / condition.key(seed), time.monotonic()
    command(workdir, cores, "train.py", f"--config={CONFIG}", *(f"--config.{f}" for f in condition.overrides(seed)))
    trained = round(time.monotonic() - start)
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.routers", f"--score={workdir.absolute()}"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    shutil.rmtree(workdir / "checkpoints")
    return {
        "key": condition.key(seed), "name": condition.name, "router": condition.router, "grows": condition.grows,
        "steps": condition.steps, "seed": seed, **json.loads(run.stdout.splitlines()[-1]), **read(workdir),
        "seconds": trained, "overrides": condition.overrides(seed),
    }  # fmt: skip


def score(workdir: pathlib.Path) -> dict[str, Any]:
    """Scores the validation split with all choices and with half of them: loss (nats a token), entropy of the router's
    scores (nats), and the busiest expert's load over the mean, means over layers."""
    config = with_mesh(read_config(workdir), ["mesh.data=1"])
    stream = open_run_stream(workdir, config, "validation", load_run_tokenizer(workdir, config))
    found: dict[str, Any] = {}
    with jax.set_mesh(make_mesh(config, fit_batch=False)):
        _, model = tuning.restore(workdir, "latest", config)
        config = dataclasses.replace(config, train=TrainConfig())  # whose choices may begin with those of half
        for end, choices in (("", CHOICES), ("_of_half", CHOICES // 2)):
            scored = rebuild_model(with_model(config, {}, top_k=choices), model, {})
            told = evaluate(scored, stream, config.data.sequence_length, evaluation_rows(config))
            loads = told.load_YE * EXPERTS
            found |= {f"loss{end}": round(told.score.loss, 5), f"max_load{end}": round(float(loads.max(1).mean()), 4)}
        found["entropy"] = round(float(told.entropy_Y.mean()), 4)  # of all scores, however many are chosen
    return found


def read(workdir: pathlib.Path) -> dict[str, Any]:
    """Loads of the last steps in training, what a capacity would have dropped of them, and curves."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "moe/load" in record]
    last = [record for record in steps if record["step"] > steps[-1]["step"] - LAST]
    loads = np.array([record["moe/load"] for record in last])  # of steps, layers and experts, over the mean
    return {
        "max_load_in_training": round(float(loads.max(-1).mean()), 4),
        "would_drop": round(float(np.maximum(loads - FACTOR, 0).mean()), 4),
        "losses": [[record["step"], round(record["loss"], 4)] for record in steps],
        "entropies": [[record["step"], round(record["moe/router_entropy"], 4)] for record in steps],
        "loads": [[record["step"], round(record["moe/max_load"], 3)] for record in steps],
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, NaN of one value."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(error)


def table(runs: list[dict[str, Any]]) -> str:
    """Means over seeds with standard errors; differences are of equal seeds."""
    names = list(dict.fromkeys(condition.name for condition in conditions(1)))
    base = {run["seed"]: run for run in runs if run["name"] == names[0]}
    lines = [
        f"| router | seeds | loss | over the first row's | loss with {CHOICES // 2} choices | entropy, nats "
        f"| busiest expert | dropped at {FACTOR:g} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        own = [run for run in runs if run["name"] == name]
        if not own:
            continue

        def cell(field: str, digits: int, runs: list[dict[str, Any]] = own) -> str:
            mean, error = mean_and_error([run[field] for run in runs])
            return f"{mean:.{digits}f} ± {error:.{digits}f}"

        paired = [run["loss"] - base[run["seed"]]["loss"] for run in own if run["seed"] in base]
        apart = "" if name == names[0] or not paired else "{:+.4f} ± {:.4f}".format(*mean_and_error(paired))
        dropped = 100 * mean_and_error([run["would_drop"] for run in own])[0]
        lines.append(
            f"| {name} | {len(own)} | {cell('loss', 4)} | {apart} | {cell('loss_of_half', 4)} | {cell('entropy', 2)} | "
            f"{cell('max_load', 2)} | {dropped:.1f} % |"
        )
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], path: pathlib.Path) -> None:
    """The router's entropy and the busiest expert over the steps, in training, means over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    even = {"entropies": float(np.log(EXPERTS)), "loads": 1.0}  # of a router without a preference
    labels = {"entropies": "router entropy, nats", "loads": "busiest expert over the mean"}
    for axis, (field, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for condition in conditions(1):
            own = [np.array(run[field]) for run in runs if run["name"] == condition.name]
            if own:
                steps, values = own[0][:, 0], np.mean([curve[:, 1] for curve in own], axis=0)
                style = {"color": ROUTERS[condition.router], "ls": "--" if condition.grows else "-"}
                axis.plot(steps, values, label=condition.name, **style)
        axis.set(xlabel="step", ylabel=label, ylim=(0, 1.05 * max(axis.get_ylim()[1], even[field])))
        axis.grid(alpha=0.3)
    figure.axes[0].axhline(even["entropies"], color="gray", ls=":", lw=1)
    figure.axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=110)
