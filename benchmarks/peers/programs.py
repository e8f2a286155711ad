"""A training step of this project beside MaxText's, both compiled for a TPU slice that is not there, and read in the
same way: python -m benchmarks.peers.programs [ROW…].

    python3.12 -m benchmarks.peers --setup      first: makes MaxText's environment; and pip install -e '.[tpu]' for ours
    python -m benchmarks.peers.programs qwen3_30b.v6e.fsdp
    python -m benchmarks.peers.programs qwen3_30b.v6e.dropping --field=execution.overlap_chunks=8      ours so, too
    python -m benchmarks.peers.programs --table --picture=peers.png      of the programs that are in --folder

A row is a model, a slice and a way to split it. Programs stay in --folder as text: what is there is not compiled again.
A program's local work is the compiler's estimate of its instructions; a kernel, which has none, counts as the longer of
its FLOPs at half the peak and its bytes over the bandwidth. Collectives take what the hardware file says; "exposed" is
what nothing runs beside. MaxText runs with settings of its own recipes, each tried; the fastest of a row stands. Ours
sums gradients over ranks in float32, which is its default, and in bfloat16, which is what MaxText does.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bigmac_jax.config import load_config
from bigmac_jax.model.exchange.costs import Sent
from bigmac_jax.planning import compiled_programs, hlo, hlo_schedule
from bigmac_jax.planning.cluster import cluster
from bigmac_jax.planning.hardware import load_hardware
from bigmac_jax.planning.hlo_collectives import Collective
from bigmac_jax.planning.hlo_flops import matmul_flops
from bigmac_jax.planning.topologies import absent_devices, parse_topology

ROOT = pathlib.Path(__file__).parents[2]
SLICES = {"v6e": ("v6e:4x8", "v6e-32"), "v5p": ("v5p:4x4x4", "v5p-128")}  # ours, MaxText's, which counts cores of v5p
MIXTRAL = (
    "model.num_layers=32", "model.hidden_size=4096", "model.num_kv_heads=8", "model.vocab_size=32000",
    "model.num_experts=8", "model.top_k=2", "model.expert_hidden_size=14336", "model.qk_norm=False",
)  # fmt: skip
MODELS = {
    "qwen3_30b": ((), "qwen3-30b-a3b", 32),
    "mixtral_8x7b": (MIXTRAL, "mixtral-8x7b", 8),
}  # the last: expert ranks
OURS: dict[str, Sequence[str]] = {"ours": (), "ours, bfloat16 sums": ("execution.reduce_dtype=bfloat16",)}
SPARSE = ("sparse_matmul=true", "megablox=true")
BUFFER = "ragged_buffer_factor=1.25"  # rows that find no room in it are dropped
RING = ("use_ring_of_experts=true", "use_ragged_sort=true", BUFFER)
# MaxText's settings by name. `fsdp` and `expert` are what is left for parameters and for experts.
PEERS: dict[str, dict[str, tuple[str, ...]]] = {
    "fsdp": {"megablox": SPARSE},  # tokamax' kernels refuse to be compiled on a CPU machine
    "dropping": {
        "ragged": (*SPARSE, BUFFER),
        "ring": (*SPARSE, *RING),
        "ring, 4 chunks": (*SPARSE, *RING, "num_moe_token_chunks=4"),
        "capacity": ("sparse_matmul=false", "megablox=false", "capacity_factor=1.25"),
    },
    "dropless": {"ragged": SPARSE},
}


@dataclass(frozen=True)
class Row:
    """A model on a slice, split in one way.

    Attributes:
      fields: of our config.
      peers: MaxText's settings by name.
    """

    name: str
    topology: str
    fields: tuple[str, ...]
    peers: dict[str, tuple[str, ...]]


def rows() -> Iterator[Row]:
    """All rows: 4,096 tokens a chip, every layer recomputed, bfloat16 with float32 parameters."""
    for model, (shape, peer, experts) in MODELS.items():
        for kind, (topology, peer_slice) in SLICES.items():
            chips = math.prod(parse_topology(topology).shape)
            ours = (*shape, f"data.batch_size={chips}", "train.accumulate_steps=1", "model.balance_coefficient=0.001")
            theirs = (f"model_name={peer}", f"compile_topology={peer_slice}", "per_device_batch_size=1")
            theirs += ("max_target_length=4096", "remat_policy=full")
            dropless, split = "model.capacity_factor=inf", (f"mesh.expert={experts}", "execution.overlap_chunks=4")
            ways = {
                "fsdp": ((dropless, "mesh.expert=1"), 1),
                "dropping": ((*split, "model.capacity_factor=1.25", "execution.exchange=all_to_all"), experts),
                "dropless": (
                    (*split, dropless, "execution.exchange=all_to_all", "execution.buffer_factor=1.25"),
                    experts,
                ),
            }
            for way, (fields, ranks) in ways.items():
                mesh = (f"ici_expert_parallelism={ranks}", f"ici_fsdp_parallelism={chips // ranks}")
                peers = {name: (*theirs, *mesh, *settings) for name, settings in PEERS[way].items()}
                yield Row(f"{model}.{kind}.{way}", topology, (*ours, *fields), peers)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.programs")
    parser.add_argument("rows", nargs="*", help="Rows, or beginnings of their names; all without any.")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs" / "peers")
    parser.add_argument("--maxtext_python", default=".venv-peers-maxtext/bin/python", help="Python with MaxText.")
    parser.add_argument("--table", action="store_true", help="Compile nothing; print docs/peers.md's table.")
    parser.add_argument("--picture", type=pathlib.Path, help="A file for the bars of what is in --folder.")
    parser.add_argument("--field", action="append", default=[], metavar="NAME=VALUE", help="Of one more case of ours.")
    parser.add_argument("--ours", type=pathlib.Path, help=argparse.SUPPRESS)  # compiles one row of ours into this file
    given = parser.parse_args()
    chosen = [row for row in rows() if not given.rows or row.name.startswith(tuple(given.rows))]
    if given.ours:
        (row,) = chosen
        return compile_ours(row, given.field, given.ours)
    given.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in chosen:
        for case, command in commands(row, given.field, given.folder, given.maxtext_python).items():
            file = program_file(given.folder, row, case)
            if not file.with_suffix(".json").exists():
                if given.table or given.picture:
                    continue
                print(f"compiling {row.name}, {case}", file=sys.stderr, flush=True)
                done = subprocess.run(
                    command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                )
                if done.returncode:
                    print(json.dumps({"row": row.name, "case": case, "error": reason(done.stderr)}, allow_nan=False))
                    continue
            measured = measure(file, row.topology)
            found.setdefault(row.name, {})[case] = measured
            if not given.table:
                print(json.dumps({"row": row.name, "case": case} | measured, allow_nan=False), flush=True)
    if given.table:
        print(table(found))
    if given.picture:
        draw(found, given.picture)


def program_file(folder: pathlib.Path, row: Row, case: str) -> pathlib.Path:
    return folder / f"{row.name}.{case.replace(', ', '_').replace(' ', '_')}.txt"


def commands(row: Row, fields: Sequence[str], folder: pathlib.Path, maxtext_python: str) -> dict[str, list[str]]:
    """What compiles each case: ours, also with these fields, and MaxText's by settings."""
    found = {}
    for case, own in (OURS | ({f"ours, {', '.join(fields)}": fields} if fields else {})).items():
        found[case] = [sys.executable, "-m", "benchmarks.peers.programs", row.name, *(f"--field={f}" for f in own)]
        found[case] += ["--ours", str(program_file(folder, row, case))]
    for name, settings in row.peers.items():
        file = str(program_file(folder, row, name).resolve())
        found[name] = [maxtext_python, "-m", "benchmarks.peers.maxtext_program", file, *settings]
    return found


def environment() -> dict[str, str]:
    """Without what this process' jax has said of its own libtpu, which another environment's jax would load."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}


def reason(stderr: str) -> str:
    """The line of a traceback that names the error."""
    lines = stderr.strip().splitlines() or ["no message"]
    return next((line for line in reversed(lines) if "Error" in line and not line.startswith(" ")), lines[-1])[:300]


def compile_ours(row: Row, fields: Sequence[str], file: pathlib.Path) -> None:
    """Compiles our step, as `bigmac plan --compile` does, into a file."""
    import importlib.metadata

    config = load_config("qwen3_30b", (*row.fields, *fields))
    compiled = compiled_programs.compile_program(config, absent_devices(parse_topology(row.topology)))
    file.write_text(compiled.text)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    about = {"memory": compiled.memory["total"], "seconds": round(compiled.seconds, 1), "versions": versions}
    file.with_suffix(".json").write_text(json.dumps(about, allow_nan=False))


def measure(file: pathlib.Path, topology: str) -> dict[str, Any]:
    """What a program's schedule says of one chip: seconds of local work and of collectives, FLOPs, memory."""
    wanted, about = parse_topology(topology), json.loads(file.with_suffix(".json").read_text())
    hardware, chips = load_hardware(wanted.kind), math.prod(wanted.shape)
    module, mesh = hlo.parse(file.read_text()), {"chip": chips}
    rates = hlo_schedule.Rates(hardware.clock_hz or math.inf, hardware.peak_flops, hardware.memory_bandwidth)

    def seconds(collective: Collective) -> float:
        """As if the ranks of a group stood next to each other, for both."""
        ranks = collective.ranks
        sizes = {"data": chips // ranks, "node": 1, "expert": ranks, "tensor": 1}
        here = cluster(sizes, hardware, wanted.torus)
        if collective.kind.endswith("all-to-all"):
            return here.exchange(Sent(collective.sent_bytes, 0), 1)
        return here.around(collective.sent_bytes, ranks)

    overlap = hlo_schedule.overlap(module, mesh, seconds, rates, lambda collective: True, hlo_schedule.KERNEL_SHARE)
    return {
        "work_s": round(hlo_schedule.work_seconds(module, rates), 4),
        "collectives_s": round(overlap.exchange_seconds, 4),
        "exposed_s": round(overlap.exchange_seconds - overlap.busy_seconds, 4),
        "flops": matmul_flops(module).total,
        "memory_gib": round(about["memory"] / 2**30, 2),
        "compile_s": about["seconds"],
        "versions": about["versions"],
    }


def _step(measured: dict[str, Any]) -> float:
    return measured["work_s"] + measured["exposed_s"]


def is_ours(case: str) -> bool:
    return case.startswith("ours")


def fastest(cases: dict[str, dict[str, Any]]) -> str:
    """The peer's settings with the least local work and exposed collectives; "" where none compiled."""
    peers = {name: _step(measured) for name, measured in cases.items() if not is_ours(name)}
    return min(peers, key=peers.__getitem__) if peers else ""


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: each row's local work, exposed seconds and memory, ours and the peer's fastest."""
    of: dict[str, Callable[[dict[str, Any]], str]] = {
        "local work": lambda m: f"{m['work_s']:.3f} s",
        "exposed": lambda m: f"{m['exposed_s']:.3f} of {m['collectives_s']:.3f} s",
        "memory": lambda m: f"{m['memory_gib']:.1f} GiB",
    }
    lines = [f"| row | | {' | '.join(of)} | both |", "|---" * (len(of) + 3) + "|"]
    for name, cases in found.items():
        peer = fastest(cases)
        for case in (case for case in cases if is_ours(case) or case == peer):
            label = case.replace("ours", "this project") if is_ours(case) else f"MaxText, {case}"
            cells = " | ".join(show(cases[case]) for show in of.values())
            lines.append(f"| {name if case == 'ours' else ''} | {label} | {cells} | {_step(cases[case]):.3f} s |")
    return "\n".join(lines)


def draw(found: dict[str, dict[str, dict[str, Any]]], file: pathlib.Path) -> None:
    """Bars of local work and, on top, exposed collectives: ours beside the peer's fastest."""
    from matplotlib.figure import Figure

    bars = zip((*OURS, ""), ("tab:blue", "tab:green", "tab:orange"), strict=True)
    names = [name for name, cases in found.items() if cases.keys() >= set(OURS) and fastest(cases)]
    figure = Figure(figsize=(8, 1 + 0.8 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for bar, (case, color) in enumerate(bars):
        label = case.replace("ours", "this project") or "MaxText, its fastest settings"
        places = [i + 0.27 * (bar - 1) for i in range(len(names))]
        of = [found[name][case or fastest(found[name])] for name in names]
        work, exposed = ([cell[key] for cell in of] for key in ("work_s", "exposed_s"))
        axes.barh(places, work, 0.24, color=color, label=f"{label}: local work")
        axes.barh(places, exposed, 0.24, left=work, color=color, alpha=0.4, label=f"{label}: exposed collectives")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step, by the compiler's estimates and the hardware file")
    axes.set_title("A training step, 4,096 tokens a chip, compiled")
    axes.legend(fontsize="small")
    figure.savefig(os.fspath(file), dpi=120)


if __name__ == "__main__":
    main()
