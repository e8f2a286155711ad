"""Trains what a study compares, one process a run, and reads what it reached."""

import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import numpy as np

from benchmarks.quality.grid import Condition
from bigmac_jax.config import load_config
from bigmac_jax.model.counts import flops, parameters
from bigmac_jax.runtime.storage import write_atomically

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "configs/tiny.py"
_RANKS = 8  # of the expert group that wire bytes are counted for
Run = tuple[Condition, int]


class Machine(NamedTuple):
    """What runs are trained on, and when they must end."""

    device: str = "cpu"
    end: float = math.inf  # of time.monotonic


CPU = Machine()


class StoppedError(RuntimeError):
    """A run's time is over; it goes on where it is when it is called again."""


def measure(
    runs: list[Any], known: dict[str, dict[str, Any]], folder: pathlib.Path, jobs: int, train: Any
) -> Iterator[Any]:
    """The record of each run that is not in `known`, as it ends: `jobs` at a time, each on its share of the cores. What
    one raises is raised when those that run beside it have ended; none begins behind it.

    Args:
      train: what is called for each.
    """
    waiting = [run for run in dict.fromkeys(runs) if run[0].key(run[1]) not in known]
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[number % len(cores) :: jobs] for number in range(jobs)]  # of more jobs than cores, some share one

    failed: list[Exception] = []

    def one(run: Any) -> dict[str, Any] | None:
        if failed:
            return None
        share = shares.pop()
        try:
            return dict(train(*run, folder, share))
        except Exception as error:
            failed.append(error)
            return None
        finally:
            shares.append(share)

    with ThreadPoolExecutor(jobs) as pool:
        for ended in as_completed([pool.submit(one, run) for run in waiting]):
            if record := ended.result():
                yield record
    if failed:
        raise failed[0]


def train_missing(
    name: str, runs: list[Any], output: pathlib.Path, folder: pathlib.Path, jobs: int, train: Any, say: Any
) -> list[dict[str, Any]]:
    """Trains the runs of a study that its file lacks, and writes each down when it ends → all that the file has.

    Args:
      train, jobs: as of `measure`.
      say: describes what a run has reached.
    """
    known = read_file(output)
    missing, start = {run[0].key(run[1]) for run in runs} - known.keys(), time.monotonic()
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are there", flush=True)
    for ended, record in enumerate(measure(runs, known, folder, jobs, train), 1):
        known[record["key"]] = record
        write(output, name, list(known.values()))
        left = (len(missing) - ended) * (time.monotonic() - start) / ended / 60
        print(f"{ended} of {len(missing)}: {record['key']}: {say(record)}; {left:.0f} min left", flush=True)
    return list(known.values())


def read_file(output: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The runs of a study's file by key; none without one."""
    return {run["key"]: run for run in json.loads(output.read_text())["runs"]} if output.exists() else {}


def within(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean ± standard error."""
    if not values:
        return ""
    mean = f"{np.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}"


def train_on_sotu(
    condition: Condition, seed: int, folder: pathlib.Path, cores: list[int], machine: Machine = CPU
) -> dict[str, Any]:
    """Runs train.py, which goes on where it was stopped; raises as `command` does."""
    workdir, start = folder / condition.key(seed), time.monotonic()
    flags = (f"--config={CONFIG}", *(f"--config.{field}" for field in condition.overrides(seed)))
    command(workdir, cores, "train.py", *flags, machine=machine)
    record = describe(condition, seed) | read(workdir) | {"seconds": round(time.monotonic() - start)}
    shutil.rmtree(workdir / "checkpoints")
    return record


def command(workdir: pathlib.Path, cores: list[int], script: str, *flags: str, machine: Machine = CPU) -> str:
    """Runs a script of the repository on some cores → its standard output; what else it says goes to a log beside the
    workdir, whose last line a RuntimeError has. When its time is over it gets a SIGTERM, at which train.py saves, and
    StoppedError is raised."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    log = workdir.parent / f"{workdir.name}.log"
    if time.monotonic() >= machine.end:
        raise StoppedError(workdir.name)
    devices, platform = (("--cpu_devices=1",), "cpu") if machine.device == "cpu" else ((), "cuda")
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, script, f"--workdir={workdir}", *devices, *flags],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | {"JAX_PLATFORMS": platform},
        )  # fmt: skip
        try:
            os.sched_setaffinity(process.pid, cores)
            output, _ = process.communicate(timeout=None if math.isinf(machine.end) else machine.end - time.monotonic())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.communicate()
            raise StoppedError(workdir.name) from None
        except BaseException:
            process.kill()
            process.communicate()
            raise
    if process.returncode:
        raise RuntimeError(f"{script} of {workdir.name}: {(log.read_text().strip().splitlines() or ['?'])[-1]} ({log})")
    return output


def describe(condition: Condition, seed: int) -> dict[str, Any]:
    """What can be said before it runs; bytes and FLOPs are of a token, forward and backward."""
    overrides = condition.overrides(seed)
    config = load_config(ROOT / CONFIG, overrides)
    m, tokens = config.model, config.data.batch_size * config.data.sequence_length
    count = parameters(config, {})
    # The paper's: two bytes a number, there and back, forward and backward, of all choices that leave a rank of 8.
    wire = m.num_layers * 8 * m.choices * m.wire_size * (_RANKS - 1) / _RANKS
    return {
        "key": condition.key(seed), "name": condition.name, "width": condition.width, "steps": condition.steps,
        "seed": seed, "structure": m.structure, "down_ratio": m.down_ratio, "norm": "+".join(m.latent_norms) or "none",
        "moe_parameters": count.parts["experts"] + count.parts.get("projections", 0), "parameters": count.total,
        "wire_bytes": wire, "flops": sum(flops(config).values()) / tokens, "tokens": condition.steps * tokens,
        "overrides": overrides,
    }  # fmt: skip


def read(workdir: pathlib.Path) -> dict[str, Any]:
    """Losses at the evaluations, how uneven loads were at each logged step, what the router did in the last hundred."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if "eval/loss" in record]
    steps = [record for record in records if "moe/load_cv" in record]
    last = [record for record in steps if record["step"] > steps[-1]["step"] - 100]
    return {
        "loss": evaluations[-1]["eval/loss"],
        "bits_per_byte": evaluations[-1]["eval/bits_per_byte"],
        "evaluations": [[record["step"], record["eval/loss"]] for record in evaluations],
        "load_cv": round(float(np.mean([record["moe/load_cv"] for record in last])), 4),
        "max_load": round(float(np.mean([record["moe/max_load"] for record in last])), 4),
        "loads": [[record["step"], round(record["moe/load_cv"], 3)] for record in steps],
        "drop_rate": max(record["moe/drop_rate"] for record in steps),
    }


def write(path: pathlib.Path, name: str, runs: Sequence[dict[str, Any]]) -> None:
    """Appears whole: what is there already is hours of work."""
    lines = ",\n".join(" " + json.dumps(run) for run in runs)
    write_atomically(path, f'{{"name": "{name}", "runs": [\n{lines}\n]}}\n'.encode())
