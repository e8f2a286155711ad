"""Kills processes at random moments, and compares: python -m benchmarks.soak [--rounds=50 --processes=2 --store=gs].

A run of several processes is left alone. Another one, of the same config, is started, one of its processes is killed
(while it starts, between steps or while a checkpoint is written), the others must end by themselves, all are started
again, and so on. A JSON line a round; in the summary `bit_equal` says whether both ended in the same state. The exit
code is 1 if they did not, or a round hung. With --store=gs the disturbed run and its cache are on a server of Google
Cloud Storage that is started here, the other one on a disk.

With --experts=K the disturbed run saves K experts at a time (train.experts_per_checkpoint). Then each start is compared
with a run that begins with the state that the rule names (`benchmarks.twin`): what both have saved next is bit-equal.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks import stores
from benchmarks.ports import free_port
from benchmarks.twin import Twin
from bigmac_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.runtime.storage import locate
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.step import make_trainer

_ROUNDS = flags.DEFINE_integer("rounds", 50, "Kills.", lower_bound=1)
_PROCESSES = flags.DEFINE_integer("processes", 2, "Of two simulated devices each.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of what is killed, and when.")
_STORE = flags.DEFINE_enum("store", "", ["", "gs"], "Where the disturbed run lies; by default on a disk.")
_REPLICAS = flags.DEFINE_bool("replicas", False, "Each process is a replica (mesh.replica), and not a part of one.")
_EXPERTS = flags.DEFINE_integer("experts", 0, "K of 8 in a save; 0 = all.", 0, 7)
_PEER_TIMEOUT = flags.DEFINE_integer("peer_timeout", 20, "As of train.py.", lower_bound=1)

ROOT = pathlib.Path(__file__).parents[1]
STEPS_A_ROUND = 16
MOMENTS = ("steps", "saving", "steps", "saving", "start")
ENVIRONMENT = os.environ | {
    "BIGMAC_KEEP_ENV": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # of LLVM: they take longer than the run
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def main(_: Any) -> int:
    logging.set_verbosity(logging.WARNING)
    draw, processes = random.Random(_SEED.value), _PROCESSES.value
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place, disk = str(folder), folder
        if _STORE.value:
            server = stack.enter_context(stores.gcs(folder / "gs"))
            ENVIRONMENT.update(server.environment | {"XDG_CACHE_HOME": str(folder / "local")})
            os.environ.update(server.environment)
            place, disk = f"gs://{stores.BUCKET}", folder / "gs" / stores.BUCKET
        config = _config(folder, _ROUNDS.value * STEPS_A_ROUND, processes)
        if _EXPERTS.value:
            return _compare_starts(config, folder, place, disk, draw)
        start = time.monotonic()
        alone = _Job(folder, "alone", str(folder))
        alone.end(limit=60 * _ROUNDS.value + 300)
        if any(alone.codes):
            raise RuntimeError(f"the undisturbed run failed:\n{alone.output}")
        print(json.dumps({"name": "undisturbed", "seconds": round(time.monotonic() - start, 1)}), flush=True)

        hung = killed = 0
        for number in range(1, _ROUNDS.value + 1):
            record = _round(folder, place, disk, draw)
            killed, hung = killed + record["killed"], hung + record["hung"]
            print(json.dumps({"name": "round", "round": number, **record}), flush=True)
        last = _Job(folder, "disturbed", place)
        last.end(limit=60 * _ROUNDS.value + 300)
        if any(last.codes):
            raise RuntimeError(f"the last run failed:\n{last.output}")
        equal = _equal(config, folder / "alone", locate(f"{place}/disturbed", "--store"))
    summary = {"rounds": _ROUNDS.value, "killed": killed, "hung": hung, "bit_equal": equal, "seed": _SEED.value}
    print(json.dumps({"name": "summary", **summary, "seconds": round(time.monotonic() - start, 1)}))
    return 0 if equal and not hung else 1


def _compare_starts(config: Config, folder: pathlib.Path, place: str, disk: pathlib.Path, draw: random.Random) -> int:
    """Kills a run that saves some experts, and compares what each start goes on to save with its twin."""
    twin, start = Twin(config, locate(f"{place}/disturbed", "--store"), folder / "twin"), time.monotonic()
    total = {"killed": 0, "hung": 0, "compared": 0, "unequal": 0}
    for number in range(1, _ROUNDS.value + 1):
        record = _round(folder, place, disk, draw)

        def run(steps: int) -> None:
            job = _Job(
                folder, "twin", str(folder), f"--config.train.steps={steps}", "--config.train.experts_per_checkpoint=0"
            )
            if not job.end(limit=600) or any(job.codes):
                raise RuntimeError(f"the twin failed:\n{job.output}")

        record |= twin.compare(run)
        for name in total:
            total[name] += record[name]
        print(json.dumps({"name": "round", "round": number, **record}), flush=True)
    summary = {"rounds": _ROUNDS.value, **total, "seed": _SEED.value, "store": _STORE.value, "experts": _EXPERTS.value}
    print(json.dumps({"name": "summary", **summary, "seconds": round(time.monotonic() - start, 1)}))
    return 1 if total["hung"] or total["unequal"] or not total["compared"] else 0


def _round(folder: pathlib.Path, place: str, disk: pathlib.Path, draw: random.Random) -> dict[str, Any]:
    """Starts, kills one process, and waits for the others. What lies at `place` is on this `disk`."""
    workdir = disk / "disturbed"
    moment, victim = draw.choice(MOMENTS), draw.randrange(_PROCESSES.value)
    step, delay = _last_step(workdir) + draw.randint(1, STEPS_A_ROUND - 4), draw.uniform(0, 0.1)
    if moment == "start":
        step, delay = 0, draw.uniform(0, 8)

    def due() -> bool:
        return moment == "start" or (_last_step(workdir) >= step and (moment == "steps" or _is_saving(workdir)))

    job = _Job(folder, "disturbed", place)
    killed = job.kill_when(victim, due, delay)
    start = time.monotonic()
    hung = not job.end(limit=2 * _PEER_TIMEOUT.value + 30)  # jax's own bound, before the watch runs
    lines = [line for line in job.output.splitlines() if line.startswith("error: ")]
    return {
        "moment": moment,
        "victim": victim,
        "killed": killed,  # not if it had finished
        "step": _last_step(workdir),
        "hung": hung,
        "codes": job.codes,
        "seconds_to_end": round(time.monotonic() - start, 2),
        "line": lines[-1] if lines else "",
    }


class _Job:
    """train.py as several processes, in a workdir `name` at `place`."""

    def __init__(self, folder: pathlib.Path, name: str, place: str, *more: str):
        coordinator = f"127.0.0.1:{free_port()}"
        self._logs = [folder / f"{name}.{i}.log" for i in range(_PROCESSES.value)]
        self._processes = []
        for i, path in enumerate(self._logs):
            command = [sys.executable, "train.py", f"--config={folder / 'config.json'}", f"--workdir={place}/{name}"]
            command += [f"--config.cache_dir={place}/cache"]
            if len(self._logs) > 1:
                command += [f"--coordinator={coordinator}", f"--num_processes={len(self._logs)}", f"--process_id={i}"]
            command += ["--cpu_devices=2", f"--peer_timeout={_PEER_TIMEOUT.value}", *more]
            with path.open("w") as log:
                self._processes.append(subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log))

    def kill_when(self, victim: int, due: Callable[[], bool], delay: float) -> bool:
        """Kills a process `delay` seconds after `due()`; False if it ended before."""
        process, due_since = self._processes[victim], None
        while process.poll() is None:
            if due_since is None and due():
                due_since = time.monotonic()
            if due_since is not None and time.monotonic() >= due_since + delay:
                process.send_signal(signal.SIGKILL)
                return process.wait() == -signal.SIGKILL
            time.sleep(0.002)
        return False

    def end(self, limit: float) -> bool:
        """Whether all end within so many seconds; those that do not are killed."""
        end, hung = time.monotonic() + limit, False
        for process in self._processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                hung = True
                process.kill()
                process.wait()
        return not hung

    @property
    def codes(self) -> list[int]:
        return [process.returncode for process in self._processes]

    @property
    def output(self) -> str:
        return "\n".join(log.read_text() for log in self._logs)


def _config(folder: pathlib.Path, steps: int, processes: int) -> Config:
    """A small model with all that is saved: dropout, the router's bias, Adam's moments, the data's position."""
    words = ["the", "of", "and", "state", "union", "people", "congress", "government", "year", "nation", "peace", "law"]
    draw = random.Random(0)
    (folder / "text.txt").write_text("\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(60)))
    config = Config(
        model=ModelConfig(
            num_layers=2 if _EXPERTS.value else 1,
            hidden_size=16,
            num_heads=2,
            vocab_size=257,
            num_experts=8,
            top_k=2,
            dropout=0.1,
            balance="bias",
        ),
        mesh=MeshConfig(1, 1, 2, fsdp=True, replica=processes, replica_optimizer="sharded")
        if _REPLICAS.value
        else MeshConfig(data=processes, expert=2),
        data=DataConfig(
            source=str(folder / "text.txt"), tokenizer="bytes", sequence_length=16, batch_size=4 * processes
        ),
        optimizer=OptimizerConfig(decay_steps=1000),  # wherever a twin ends
        train=TrainConfig(
            steps=steps,
            log_every=1,
            eval_every=0,
            checkpoint_every=4,
            experts_per_checkpoint=_EXPERTS.value,
            most_lost_updates=1.0,  # or all were saved soon
        ),
        cache_dir=str(folder / "cache"),
    )
    (folder / "config.json").write_text(config.to_json())
    return config


def _last_step(workdir: pathlib.Path) -> int:
    try:
        return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def _is_saving(workdir: pathlib.Path) -> bool:
    folder = workdir / "checkpoints"
    if _STORE.value:
        begun = folder.glob("*/_CHECKPOINT_METADATA")
        return any(not path.with_name("commit_success.txt").exists() for path in begun)
    return folder.exists() and any("tmp" in path.name for path in folder.iterdir())


def _equal(config: Config, *workdirs: pathlib.Path) -> bool:
    """Whether the last checkpoints hold the same bits."""
    one = dataclasses.replace(config, mesh=MeshConfig(data=1))
    states = []
    with jax.set_mesh(make_mesh(one, devices=jax.devices()[:1])):
        trainer = make_trainer(one, jax.sharding.get_mesh())
        for workdir in workdirs:
            checkpoints = Checkpoints(workdir)
            state, position = checkpoints.restore(config.train.steps, trainer.abstract_state)
            checkpoints.close()
            states.append([*(np.asarray(leaf) for leaf in jax.tree.leaves(state)), np.asarray(position["batches"])])
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(*states, strict=True))


if __name__ == "__main__":
    app.run(main)
