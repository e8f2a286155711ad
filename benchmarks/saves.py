"""What checksums cost a save, and what a resume reads: python -m benchmarks.saves [--processes=4 --megabytes=256].

Several processes on this machine save a state of incompressible arrays, sharded over them: as Orbax does, with the
checksum of every chunk, and that with the manifest, which is how a run saves. Then they restore it as a run does. A
JSON line a round, and a summary: the least seconds of each, `added` by checksums and manifest to a write, in seconds
and in the processor's (which other work on the machine disturbs less), and the bytes that all processes together have
read to restore, over the bytes of the checkpoint.
"""

import contextlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.ports import free_port
from bigmac_jax.config import Config
from bigmac_jax.runtime import hosts
from bigmac_jax.training import checkpoint_arrays, manifest
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.step import TrainState

_PROCESSES = flags.DEFINE_integer("processes", 4, "Of one device each.", lower_bound=1)
_MEGABYTES = flags.DEFINE_integer("megabytes", 256, "Of the state: a third is parameters, the rest moments.", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Saves of each kind.", lower_bound=1)
_FOLDER = flags.DEFINE_string("folder", "", "Where checkpoints are written; by default where temporary files are.")
_MEMBER = flags.DEFINE_string("member", "", "PORT:I, of a process that this program has started.")

ARRAYS = 8  # in the parameters, and in each of two moments
KINDS = ("plain", "checksums", "whole")


def main(_: Any) -> None:
    if _MEMBER.value:
        _member(*map(int, _MEMBER.value.split(":")))
        return
    port = free_port()
    with tempfile.TemporaryDirectory(dir=_FOLDER.value or None) as folder:
        own = [f"--{name}={flags.FLAGS[name].value}" for name in ("processes", "megabytes", "rounds")]
        command = [sys.executable, "-m", "benchmarks.saves", *own, f"--folder={folder}"]
        processes = [subprocess.Popen([*command, f"--member={port}:{i}"]) for i in range(_PROCESSES.value)]
        codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"a process failed: {codes}")


def _member(port: int, index: int) -> None:
    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    if _PROCESSES.value > 1:
        hosts.connect(f"127.0.0.1:{port}", _PROCESSES.value, index, False, 0)
    workdir = pathlib.Path(_FOLDER.value)
    state = _state()
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    processor: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(_ROUNDS.value):
        for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
            before = time.process_time()
            with _without(kind):
                seconds[kind].append(_save(workdir / kind, state))
            processor[kind].append(sum(map(float, hosts.gather(str(time.process_time() - before)))))
        hosts.say(json.dumps({"round": number + 1} | {f"{k}_s": round(v[-1], 3) for k, v in seconds.items()}))
    checkpoint = workdir / "whole" / "checkpoints" / "1"
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    checkpoints = Checkpoints(workdir / "whole", keep=1)
    hosts.gather("")
    before, start = _read(), time.perf_counter()
    found = checkpoints.restore_newest(jax.tree.map(_abstract, state))
    jax.block_until_ready(found)
    restore_s, after = time.perf_counter() - start, _read()
    assert found is not None and found[0] == 1
    checkpoints.close()
    reads = [int(line) for line in hosts.gather(str(after - before))]
    least = {kind: min(values) for kind, values in seconds.items()}
    summary = {
        "processes": _PROCESSES.value,
        "gigabytes": round(size / 1e9, 3),
        **{f"{kind}_s": round(value, 3) for kind, value in least.items()},
        "added": round(least["whole"] / least["plain"] - 1, 3),
        "added_processor": round(min(processor["whole"]) / min(processor["plain"]) - 1, 3),
        "restore_s": round(restore_s, 3),
        "restore_reads": round(sum(reads) / size, 3),
        "restore_reads_by_process": [round(read / size, 3) for read in reads],
    }
    hosts.say(json.dumps(summary))


def _state() -> TrainState:
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    sharding = NamedSharding(mesh, P("all"))
    rows = max(jax.device_count(), _MEGABYTES.value * 250 // (3 * ARRAYS) // jax.device_count() * jax.device_count())
    draw = np.random.default_rng(jax.process_index())

    def array(_: int) -> jax.Array:
        shard = (rows // jax.device_count(), 1000)
        return jax.make_array_from_callback(
            (rows, 1000), sharding, lambda index: draw.integers(0, 1 << 32, shard, np.uint32).view(np.float32)
        )

    params, mu, nu = ({f"{name}{i}": array(i) for i in range(ARRAYS)} for name in ("w", "mu", "nu"))
    step = jax.device_put(np.int32(1), NamedSharding(mesh, P()))
    return TrainState(step, params, {}, {"mu": mu, "nu": nu})


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _save(workdir: pathlib.Path, state: TrainState) -> float:
    """Seconds from the call of `save` until the checkpoint has its name."""
    if hosts.is_first():
        shutil.rmtree(workdir, ignore_errors=True)
    hosts.gather("")
    checkpoints = Checkpoints(workdir, keep=1)
    hosts.gather("")
    start = time.perf_counter()
    checkpoints.save(state, {"batches": 1}, Config(), 1, None)
    checkpoints.wait()
    hosts.gather("")
    seconds = time.perf_counter() - start
    checkpoints.close()
    return seconds


@contextlib.contextmanager
def _without(kind: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if kind != "whole":
            stack.enter_context(mock.patch.object(manifest, "write"))
        if kind == "plain":
            stack.enter_context(mock.patch.object(checkpoint_arrays, "CHECKSUM", []))
        yield


def _read() -> int:
    """Bytes that this process has asked the system to read."""
    fields = dict(line.split(": ") for line in pathlib.Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


if __name__ == "__main__":
    app.run(main)
