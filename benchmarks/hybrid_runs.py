"""The runs that benchmarks.hybrid compares: what is trained and read, its table and picture, and both models' speed."""

import json
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks.quality.runs import command, within
from benchmarks.stepper import Stepper
from benchmarks.timing import alternate, median_ratio
from bigmac_jax.config import Config, load_config
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.inference import Generator
from bigmac_jax.model.counts import flops, parameters
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.model.transformer import init_model

Run = dict[str, Any]
TOKENS = 2048  # of a step, whatever the length
LENGTHS = (256, 2048)
# The same model but for what mixes tokens. Shared experts of 392 instead of 256 make up for the 98 thousand parameters
# that two Mamba layers have more than two of attention: 2,370,915 beside 2,370,963.
CONFIGS = {
    "hybrid": ("configs/hybrid.py", ()),
    "attention": ("configs/tiny.py", ("model.shared_expert_hidden_size=392",)),
}


@dataclass(frozen=True)
class Arm:
    """A model that is trained on sequences of one length."""

    mixers: str
    length: int
    steps: int

    def key(self, seed: int) -> str:
        return f"{self.mixers}-{self.length}-{self.steps}-{seed}"

    @property
    def fields(self) -> tuple[str, ...]:
        """What differs from the config file."""
        lengths = (f"data.sequence_length={self.length}", f"data.batch_size={TOKENS // self.length}")
        return (*CONFIGS[self.mixers][1], *lengths)

    def config(self) -> Config:
        return load_config(CONFIGS[self.mixers][0], ("mesh.data=1", *self.fields))


def arms(steps: int) -> list[Arm]:
    return [Arm(mixers, length, steps) for length in LENGTHS for mixers in ("attention", "hybrid")]


def train(arm: Arm, seed: int, folder: pathlib.Path, cores: list[int]) -> Run:
    """Runs train.py, which goes on where it was stopped; raises RuntimeError with its last line."""
    workdir, start, quarter = folder / arm.key(seed), time.monotonic(), max(1, arm.steps // 4)
    fields = (*arm.fields, f"train.seed={seed}", f"train.steps={arm.steps}", "train.log_every=10",
              f"train.eval_every={quarter}", f"train.checkpoint_every={quarter}")  # fmt: skip
    flags = (f"--config={CONFIGS[arm.mixers][0]}", *(f"--config.{field}" for field in fields))
    command(workdir, cores, "train.py", *flags)
    config = arm.config()
    run = {"key": arm.key(seed), "mixers": arm.mixers, "length": arm.length, "steps": arm.steps, "seed": seed,
           "parameters": parameters(config, {}).total, "flops": sum(flops(config).values()) / TOKENS}  # fmt: skip
    run |= _read(workdir) | {"seconds": round(time.monotonic() - start), "overrides": list(fields)}
    shutil.rmtree(workdir / "checkpoints")
    return run


def _read(workdir: pathlib.Path) -> Run:
    """Losses of the validation split at the evaluations, and those of training."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluations = [[record["step"], record["eval/loss"]] for record in records if "eval/loss" in record]
    losses = [[record["step"], round(record["loss"], 4)] for record in records if "loss" in record]
    return {"loss": evaluations[-1][1], "evaluations": evaluations, "losses": losses}


def table(runs: list[Run]) -> str:
    """Means over seeds ± standard error; differences are of equal seeds."""
    lines = [
        "| sequences | mixers | seeds | parameters | FLOPs a token, 10⁶ | held-out loss | hybrid − attention |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, own in _by_arm(runs):
        base = {run["seed"]: run["loss"] for run in runs if (run["mixers"], run["length"]) == ("attention", arm.length)}
        apart = [run["loss"] - base[run["seed"]] for run in own if run["seed"] in base and arm.mixers == "hybrid"]
        lines.append(
            f"| {arm.length:,} | {arm.mixers} | {len(own)} | {own[0]['parameters']:,} | {own[0]['flops'] / 1e6:.1f} | "
            f"{within([run['loss'] for run in own], 4)} | {within(apart, 4, '+')} |"
        )
    return "\n".join(lines)


def draw(runs: list[Run], path: pathlib.Path) -> None:
    """Held-out losses over the tokens, means of seeds, a panel a length."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = dict(zip(LENGTHS, figure.subplots(1, len(LENGTHS), sharey=True), strict=True))
    for arm, own in _by_arm(runs):
        curves = np.array([run["evaluations"] for run in own])
        loss, error = curves[..., 1].mean(0), curves[..., 1].std(0, ddof=min(1, len(own) - 1)) / len(own) ** 0.5
        color = {"hybrid": "tab:orange", "attention": "tab:blue"}[arm.mixers]
        panels[arm.length].errorbar(curves[0, :, 0] * TOKENS / 1e6, loss, error, label=arm.mixers, color=color)
    for length, axis in panels.items():
        axis.set(title=f"sequences of {length:,}", xlabel="tokens, millions")
        axis.grid(alpha=0.3)
        axis.legend()
    panels[LENGTHS[0]].set_ylabel("held-out loss, nats a token")
    figure.savefig(path, dpi=110)


def _by_arm(runs: list[Run]) -> list[tuple[Arm, list[Run]]]:
    """In the order of `arms`, those that have runs."""
    found = [
        (arm, [run for run in runs if (run["mixers"], run["length"]) == (arm.mixers, arm.length)])
        for arm in arms(runs[0]["steps"] if runs else 1)
    ]
    return [(arm, own) for arm, own in found if own]


def training_speed(length: int, rounds: int) -> list[Run]:
    """Tokens a second of training at a length; rounds alternate between the models, in one process."""
    steppers: dict[str, Callable[[], float]] = {}
    for mixers in CONFIGS:
        config = Arm(mixers, length, 1).config()
        mesh = make_mesh(config)
        jax.set_mesh(mesh)
        steppers[mixers] = Stepper(config, mesh, 5)
    return _rates("training", length, TOKENS, alternate(steppers, rounds))


def decoding_speed(length: int, rounds: int, batch: int, new: int = 512) -> list[Run]:
    """Tokens a second of `batch` requests whose last tokens of `length` are generated; prompts' time is taken off."""
    steps: dict[str, Callable[[], float]] = {}
    for mixers in CONFIGS:
        config = Arm(mixers, length, 1).config()
        jax.set_mesh(make_mesh(config, fit_batch=False))
        model = init_model(config, jax.random.key(0))
        generator = Generator(config, model, max_length=length, batch_size=batch, tokenizer=ByteTokenizer())
        draw = np.random.default_rng(0)
        prompts = [tuple(row) for row in draw.integers(config.model.vocab_size, size=(batch, length - new)).tolist()]

        def seconds(generator: Generator = generator, prompts: list[tuple[int, ...]] = prompts) -> float:
            def spent(tokens: int) -> float:
                start = time.perf_counter()
                generator.generate(prompts, max_tokens=tokens, ignore_eos=True)
                return time.perf_counter() - start

            return (spent(new) - spent(1)) / (new - 1)

        seconds()  # compiles
        steps[mixers] = seconds
    return _rates(f"decoding, {batch} request" + "s" * (batch > 1), length, batch, alternate(steps, rounds))


def _rates(what: str, length: int, tokens: int, seconds: dict[str, list[float]]) -> list[Run]:
    return [
        {"key": f"{what} {length} {mixers}", "what": what, "length": length, "mixers": mixers,
         "tokens_per_s": round(tokens / statistics.median(own)), "seconds": [round(value, 5) for value in own],
         "time_over_attention": round(median_ratio(own, seconds["attention"]), 3)}
        for mixers, own in seconds.items()
    ]  # fmt: skip


def speed_table(rates: list[Run]) -> str:
    """Tokens a second of both models."""
    lines = [
        "| | sequences | attention, tokens/s | hybrid, tokens/s | hybrid's time over attention's |",
        "|---" * 5 + "|",
    ]
    pairs: dict[tuple[str, int], dict[str, Run]] = {}
    for rate in rates:
        pairs.setdefault((rate["what"], rate["length"]), {})[rate["mixers"]] = rate
    for (what, length), pair in pairs.items():
        attention, hybrid = pair["attention"], pair["hybrid"]
        lines.append(
            f"| {what} | {length:,} | {attention['tokens_per_s']:,} | {hybrid['tokens_per_s']:,} | "
            f"{hybrid['time_over_attention']:.2f} |"
        )
    return "\n".join(lines)
