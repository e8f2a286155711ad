"""Compiles programs in a process of their own (`compiled`), and names their cases."""

import functools
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest

from .compiled import EXPERTS

TESTS = pathlib.Path(__file__).parents[1]


def planned(config: str, topology: str, *overrides: str) -> dict[str, Any]:
    """What `plan.py --compile --json` says of a config file."""
    command = [sys.executable, "plan.py", f"--config={config}", f"--topology={topology}", "--compile", "--json"]
    return run_json([*command, *(f"--config.{override}" for override in overrides)], TESTS.parent)


@functools.cache
def compiled(topology: str, names: str, *overrides: str) -> dict[str, Any]:
    return run_json([sys.executable, "-m", "programs.compiled", topology, names, *overrides], TESTS)


def run_json(command: list[str], folder: pathlib.Path) -> dict[str, Any]:
    """The JSON object of its last line."""
    paths = [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


# Layers wide enough that a copy of one's experts takes longer than what the compilers find beside it.
WIDE = ("model.num_layers=4", "model.hidden_size=2048", "model.num_heads=16", "model.head_dim=128",
        "model.expert_hidden_size=2048")  # fmt: skip


def check_host_copies(topology: str, resident: int) -> None:
    """With so many layers of experts on the device: the experts of all layers are arguments in host memory, and no
    others; each layer's are copied once, while products of a layer run."""
    asked = "mesh.expert=1", *WIDE, f"execution.resident_layers={resident}"
    made, experts = compiled(topology, "decode,prefill", *asked), 4 * 2 * 2 * EXPERTS * 512 * 2048
    for program in (made["decode"], made["prefill"]):
        assert program["memory"]["host"] == experts
        assert sum(size * times for size, times, _, _ in program["host_copies"]) == experts
        assert all(asynchronous and products >= 3 for _, _, asynchronous, products in program["host_copies"])
        assert program["memory"]["arguments"] < experts


def check_no_expert_is_copied(topology: str) -> None:
    """A step of decoding reads each layer's experts where they stand, in a stack that no fast memory holds."""
    assert _largest(topology, "mesh.expert=8", "model.expert_hidden_size=4096") < EXPERTS // 8 * 512 * 4096


def check_no_stack_is_copied(topology: str) -> None:
    """Nor are all layers' at once, where a rank's part of a matrix is such that the compiler turns it over."""
    asked = "mesh.expert=4", "mesh.tensor=2", "mesh.split_experts=True", "model.expert_hidden_size=2432"
    assert _largest(topology, *asked) <= EXPERTS // 4 * 512 * 2432 // 2


def _largest(topology: str, *asked: str) -> int:
    """Elements of the largest array that a step of decoding makes."""
    made = compiled(topology, "decode", "data.batch_size=16", *WIDE, *asked)["decode"]["made"]
    return max(math.prod(dims) for _, dims in made)


def check_expert_copies(topology: str, resident: int) -> None:
    """With so many experts of every layer on the device: the experts of all layers are arguments in host memory. A loop
    of unknown length copies one expert in each trip, of which the program counts one for each layer."""
    asked = "mesh.expert=1", *WIDE, f"execution.resident_experts={resident}"
    program, of_layer = compiled(topology, "decode", *asked)["decode"], 2 * 2 * EXPERTS * 512 * 2048
    assert program["memory"]["host"] == 4 * of_layer
    assert sum(size * times for size, times, _, _ in program["host_copies"]) == 4 * of_layer // EXPERTS
    # No layer's experts are on the device but for those in slots, which a layer may copy out of the stack.
    assert program["memory"]["arguments"] < 4 * of_layer
    assert program["memory"]["temporaries"] < of_layer


def check_replicas(topology: str, *overrides: str) -> None:
    """Gradients cross once a step, in shards of the asked dtype, beside some kilobytes of statistics; tiles are padded.

    Whatever else crosses is nothing of a layer or a part: no loop is around it. With the balance loss of each part its
    loads would be, as a line at the start says (`replicas`).
    """
    fields = "mesh.replica=2", "train.accumulate_steps=2", "data.batch_size=128", "model.balance_scope=step"
    made = compiled(topology, "step", *fields, *overrides)
    # Of two replicas: a rank sends half of a buffer, twice for a sum that all have.
    found = [(kind, size) for kind, axes, size, times, _ in made["step"]["collectives"] if "replica" in axes]
    assert {times for _, axes, _, times, _ in made["step"]["collectives"] if "replica" in axes} == {1}
    sent = sum(size if kind == "all-reduce" else size / 2 for kind, size in found)
    assert made["replica_bytes"] < sent < 1.03 * made["replica_bytes"] + 2**14


def case_name(features: Iterable[str], case: tuple[Any, ...]) -> str:
    topology, *on = case
    return "-".join([topology.partition(":")[0], *(name for name, there in zip(features, on, strict=True) if there)])


def check_host_memory(topology: str, moment_dtype: str) -> None:
    """Moments and what enters layers are in host memory, and no copy of them is left on the device."""
    layers, tokens, D = 4, 512, 2048
    fields = *WIDE, "mesh.fsdp=True", f"optimizer.moment_dtype={moment_dtype}", "optimizer.b2=0.95"
    kept = compiled(topology, "step", *fields, "execution.remat=layer")["step"]["memory"]
    offloaded = "execution.remat=offload", "execution.offload_optimizer=True"
    moved = compiled(topology, "step", *fields, *offloaded)["step"]["memory"]
    moments = kept["arguments"] - moved["arguments"]
    assert kept["host"] == 0 and moments > kept["arguments"] / (2 if moment_dtype == "float32" else 3)
    assert moved["host"] == pytest.approx(moments + 2 * layers * tokens * D, rel=0.02)
    # A layer's moments in bfloat16 are float32 where they are updated.
    assert kept["total"] - moved["total"] > (0.8 if moment_dtype == "float32" else 0.4) * moved["host"], (kept, moved)
