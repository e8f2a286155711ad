"""Two slices of two hosts each behind slow links: python -m benchmarks.replicas [--rates=10,100 --table].

A step of replicas, which send gradients across once, beside one whose parameters are sharded over both slices, which
gathers them across in every pass: seconds of a step, bytes on the link between the slices, and what the planner
predicts for it. Links are the kernel's (docs/reproduction.md); the hosts are processes of this machine. What has been
measured is read again; a JSON object a case, and with --table the table of docs/parallelism.md.
"""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

from absl import app, flags

from benchmarks.reproduce.base import HOSTS, get_config
from benchmarks.reproduce.lab import Case, Lab, Record
from benchmarks.reproduce.machine import describe_machine
from bigmac_jax.config import Config, with_overrides
from bigmac_jax.model.mesh import axis_sizes
from bigmac_jax.planning.cost import make_job
from bigmac_jax.planning.hardware import Hardware, Link, load_hardware

_RATES = flags.DEFINE_list("rates", ["10", "100"], "Mbit/s of the link between the slices, in each direction.")
_FAST = flags.DEFINE_integer("fast", 1000, "Mbit/s of a host's link inside its slice.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 5, "Of each case, after two that are not counted.", lower_bound=1)
_FOLDER = flags.DEFINE_string("folder", "runs/replicas", "Where measurements stand; those that are there stay.")
_SIZE = flags.DEFINE_string("size", "large", "Of benchmarks/reproduce/base.py.")
_JSON = flags.DEFINE_string("json", "", "Write the rows and what they were measured on to this file.")
_TABLE = flags.DEFINE_bool("table", False, "Print the table, not JSON.")

COMMON = ("mesh.expert=2", "mesh.fsdp=True", "model.structure=bigmac", "data.batch_size=16", "data.sequence_length=384")
ARMS = {
    "sharded over both": ("mesh.data=2",),
    "replicas": ("mesh.data=1", "mesh.replica=2"),
    "replicas, the optimizer's state split": ("mesh.data=1", "mesh.replica=2", "mesh.replica_optimizer=sharded"),
}
PARTS = (1, 4)


class Row(NamedTuple):
    """A case as the table shows it; seconds of a step, megabytes that a slice sends in it."""

    arm: str
    parts: int
    rate: float
    seconds: float
    alone: float
    predicted: float
    sent: float
    counted: float


def main(_: Any) -> None:
    lab = Lab(pathlib.Path(_FOLDER.value), _STEPS.value, repeats=1)
    rows = []
    for rate in map(float, _RATES.value):
        for parts in PARTS:
            for arm, mesh in ARMS.items():
                fields = (*COMMON, *mesh, f"train.accumulate_steps={parts}")
                shaped = lab.case(_SIZE.value, *fields, rate=rate * 1e6, machine=2, fast_rate=_FAST.value * 1e6)
                alone, behind = lab.measure([lab.case(_SIZE.value, *fields), shaped])
                rows.append(_row(arm, parts, rate, alone, behind, shaped))
                if not _TABLE.value:
                    print(json.dumps(rows[-1]._asdict(), allow_nan=False), flush=True)
    if _JSON.value:
        command = f"python -m benchmarks.replicas --steps={_STEPS.value}"
        record = {
            "name": "replicas",
            "command": command,
            "machine": describe_machine(),
            "rows": [row._asdict() for row in rows],
        }
        pathlib.Path(_JSON.value).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    if _TABLE.value:
        print(_table(rows))


def _row(arm: str, parts: int, rate: float, alone: Record, behind: Record, case: Case) -> Row:
    config = with_overrides(get_config(_SIZE.value), case.overrides)
    wire, counted = _on_the_wire(config, rate)
    sent = behind["machine_bytes_a_step"] / 1e6
    return Row(arm, parts, rate, behind["median_s"], alone["median_s"], alone["median_s"] + wire, sent, counted)


def _on_the_wire(config: Config, rate: float) -> tuple[float, float]:
    """The planner's seconds of all that is sent in a step, with nothing beside, and the megabytes that a slice sends to
    the other one for parameters and gradients."""
    sizes = axis_sizes(config, HOSTS)

    def seconds(slow: float) -> dict[str, float]:
        job = make_job(config, sizes, _hosts(slow, _FAST.value * 1e6 / 8))
        return {name: getattr(job, name) for name in ("exchange", "gathers", "gradients", "replicas")}

    here, free = seconds(rate * 1e6 / 8 / 2), seconds(1e30)
    across = sum(here[name] - free[name] for name in ("gathers", "gradients", "replicas"))
    return sum(here.values()), across * rate / 8


def _hosts(slow: float, fast: float) -> Hardware:
    """Machines of two devices each, with links of so many bytes a second; their other figures are not read."""
    return dataclasses.replace(
        load_hardware("h100"), machine_ranks=2, fast=Link(fast, 1e-6), slow=Link(slow, 1e-6), overlaps=False
    )


def _table(rows: list[Row]) -> str:
    lines = [
        "| Mbit/s between slices | parts | | s a step | predicted | free links | MB that a slice sends | counted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.rate:g} | {row.parts} | {row.arm} | {row.seconds:.2f} | {row.predicted:.2f} | {row.alone:.2f} | "
        f"{row.sent:.1f} | {row.counted:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
