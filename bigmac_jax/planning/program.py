"""What the compiler makes of a training step: for simulated CPU devices, or for a TPU pod that is not there.

The program is the one that train.py runs, compiled for abstract arrays: no parameter is allocated.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from bigmac_jax import environment
from bigmac_jax.config import Config, ConfigError
from bigmac_jax.mesh import batch_spec, make_mesh
from bigmac_jax.model.exchange.strategies import Sent
from bigmac_jax.planning import hlo, schedule
from bigmac_jax.planning.cost import Cluster, cluster
from bigmac_jax.planning.hardware import Hardware
from bigmac_jax.training.step import make_trainer

# Of the TPUs that are planned for: name of a topology → hardware file.
TPUS = ("v5e", "v5p", "v6e")


class Topology(NamedTuple):
    """A slice of TPU chips, such as v5e:4x8."""

    name: str
    kind: str
    shape: tuple[int, ...]


def parse_topology(name: str) -> Topology:
    """Raises ConfigError for a kind that is not known or a shape that is none."""
    kind, _, shape = name.partition(":")
    if kind not in TPUS:
        raise ConfigError(f"--topology={name} must begin with one of {', '.join(TPUS)}, as in --topology=v5e:4x8")
    dimensions = 3 if kind == "v5p" else 2
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{dimensions - 1}}}", shape):
        example = "v5p:2x4x4" if dimensions == 3 else f"{kind}:4x8"
        raise ConfigError(f"--topology={name} must have {dimensions} sizes, as in --topology={example}")
    return Topology(name, kind, tuple(int(size) for size in shape.split("x")))


def tpu_devices(topology: Topology) -> list[Any]:
    """The devices of a slice that is not there; needs libtpu, which is the compiler, and no TPU."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={topology.name} with --compile needs the TPU compiler, libtpu; "
            f"pip install -e '.[tpu]' brings the one of this jax (any x86 Linux machine, no TPU)"
        )
    # libtpu reads these when it is loaded: there is no TPU to be found or to be locked, and nothing to warn of.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": f"{topology.kind}-{math.prod(topology.shape)}",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)
    except Exception as error:
        raise ConfigError(f"--topology={topology.name} is not one that libtpu knows: {_first_line(error)}") from None


class Compiled(NamedTuple):
    """A training step's program, the same for every rank."""

    text: str  # HLO, on TPU in the order of the schedule
    seconds: float  # to trace and compile
    memory: dict[str, int]  # bytes of a rank
    mesh: dict[str, int]


class DoesNotFitError(ConfigError):
    """The compiler gave up: memory."""


def compile_step(config: Config, devices: Sequence[Any]) -> Compiled:
    """Compiles train.py's step for `devices`, all of them.

    Raises:
      ConfigError: the mesh does not fit the devices.
      DoesNotFitError: the compiler found no way to fit the program into memory.
    """
    start = time.perf_counter()
    mesh = make_mesh(config, devices=devices)
    shape = config.data.batch_size, config.data.sequence_length + 1
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, mesh)
        tokens_BL = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, batch_spec(2)))
        lowered = trainer.step.lower(trainer.abstract_state, tokens_BL)
        # LLVM's optimisations change neither a CPU program's HLO nor its buffers.
        options = {"xla_backend_optimization_level": 0} if devices[0].platform == "cpu" else None
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise DoesNotFitError(_first_line(error)) from None
    stats = compiled.memory_analysis()
    arguments, code = stats.argument_size_in_bytes, stats.generated_code_size_in_bytes
    # On TPU temp_size adds up what is never alive together; its peak is what the chip must hold. The peak that
    # CPU states leaves out nearly all of it.
    peak = getattr(stats, "peak_memory_in_bytes", 0) if devices[0].platform == "tpu" else 0
    held = peak or arguments + stats.temp_size_in_bytes
    memory = {"total": held + code, "arguments": arguments, "temporaries": held - arguments, "code": code}
    return Compiled(compiled.as_text(), time.perf_counter() - start, memory, dict(mesh.shape))


def as_on_accelerators(config: Config) -> Config:
    """For simulated CPU devices, as far as `auto` leaves it open: attention without the blocks that skip what is
    masked, and layers in a loop. So the program has the FLOPs and the loop of an accelerator's, and compiles sooner."""
    execution = config.execution
    attention = "xla" if execution.attention == "auto" else execution.attention
    execution = dataclasses.replace(execution, attention=attention, unroll_layers=execution.unroll_layers or 1)
    return dataclasses.replace(config, execution=execution)


def describe(
    config: Config, devices: Sequence[Any], hardware: Hardware | None = None, topology: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """Compiles and reads the program; bytes and FLOPs of all ranks in a step, memory of one."""
    ranks = len(devices)
    try:
        compiled = compile_step(config, devices)
    except DoesNotFitError as error:
        change = _what_to_change(config, ranks)
        return {"device_kind": devices[0].device_kind, "fits": False, "change": change, "compiler": str(error)}
    module = hlo.parse(compiled.text)
    found = hlo.collectives(module, compiled.mesh)
    work = hlo.matmul_flops(module)
    sent = {role: 0.0 for role in ("payload", "metadata", "other")}
    buffers = dict(sent)
    for collective in found:
        sent[collective.role] += ranks * collective.times * collective.sent_bytes
        buffers[collective.role] += ranks * collective.times * collective.buffer_bytes
    result: dict[str, Any] = {
        "compile_seconds": round(compiled.seconds, 1),
        "device_kind": devices[0].device_kind,
        "flops_per_step": ranks * work.total,
        "kernel_flops_per_step": ranks * work.kernels,
        "loops_of_unknown_length": len(module.dynamic_loops),
        "exchange_sent_bytes": round(sent["payload"]),
        "exchange_buffer_bytes": round(buffers["payload"]),  # with what a rank keeps for itself
        "metadata_sent_bytes": round(sent["metadata"]),
        "other_sent_bytes": round(sent["other"]),
        "memory": compiled.memory,
        "collectives": _summary(found, config.model.num_layers),
    }
    if hardware:
        result["memory_available"] = hardware.memory_bytes
        result["fits"] = compiled.memory["total"] <= hardware.memory_bytes
        if not result["fits"]:
            result["advice"] = _advice(config, ranks, module, compiled.memory["total"], hardware.memory_bytes)
    if hardware and module.scheduled and devices[0].platform == "tpu" and config.model.is_moe:
        result["schedule"] = _schedule(module, compiled, cluster(compiled.mesh, hardware, topology))
        if not environment.compiler_options(devices[0]).get("xla_tpu_enable_async_all_to_all"):
            kind = devices[0].device_kind
            why = "BIGMAC_KEEP_ENV is set" if hardware.overlaps else f"{kind} refuses them ('limited ICI')"
            result["schedule"]["note"] = f"compiled without asynchronous all-to-alls: {why}, docs/exchange.md"
    return result


def _summary(found: Sequence[hlo.Collective], layers: int) -> list[dict[str, Any]]:
    """Collectives of one rank, those that differ in nothing shown added up, most bytes first."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for c in found:
        in_layers = any(loop.trips == layers for loop in c.loops)
        key = (c.kind, c.axes, c.role, c.direction, in_layers, c.asynchronous)
        names = ("kind", "axes", "role", "direction", "in_each_layer", "asynchronous")
        row = rows.setdefault(
            key, dict(zip(names, key, strict=True)) | {"count": 0, "sent_bytes": 0, "buffer_bytes": 0}
        )
        row["count"] += c.times
        row["sent_bytes"] += round(c.times * c.sent_bytes)
        row["buffer_bytes"] += c.times * c.buffer_bytes
    return sorted(rows.values(), key=lambda row: -row["sent_bytes"])


def _schedule(module: hlo.Module, compiled: Compiled, here: Cluster) -> dict[str, Any]:
    """What runs while the layer's exchange is on the wire, in the order that the compiler gave the program."""
    node, expert, hardware = here.sizes["node"], here.sizes["expert"], here.hardware
    assert hardware.clock_hz  # every TPU has it

    def seconds(collective: hlo.Collective) -> float:
        peers = Sent(expert - 1 if "expert" in collective.axes else 0, node - 1 if "node" in collective.axes else 0)
        flat = len(collective.axes) > 1
        peers = Sent(peers.fast, peers.slow * expert) if flat else peers
        return here.exchange(peers.times(collective.sent_bytes / sum(peers)), 1, hierarchical=not flat)

    found = schedule.overlap(module, compiled.mesh, seconds, hardware.clock_hz, hardware.peak_flops)
    return {
        "exchanges_in_a_layer": len(found.exchanges),
        "asynchronous_in_a_layer": sum(e.collective.asynchronous for e in found.exchanges),
        "exchange_seconds": found.exchange_seconds,
        "hidden_seconds": found.hidden_seconds,
        "busy_seconds": found.busy_seconds,
        "hidden_share": found.hidden,
        "ceiling": found.ceiling,
        "reached_of_ceiling": found.reached,
    }


def _advice(config: Config, ranks: int, module: hlo.Module, needed: float, available: float) -> dict[str, Any]:
    """What is large, and which field makes it smaller."""
    largest = [
        {
            "shape": f"{b.shape.dtype}{list(b.shape.dims)}",
            "bytes": b.bytes,
            "of": b.op_name,
            "instructions": b.instructions,
        }
        for b in hlo.largest_buffers(module, 8)
    ]
    change = _what_to_change(config, ranks)
    return {"needed": needed, "available": available, "change": change, "largest": largest}


def _what_to_change(config: Config, ranks: int) -> str:
    steps = config.train.accumulate_steps
    part = config.data.batch_size * config.mesh.tensor // (ranks * steps)  # sequences of a rank at a time
    if config.execution.remat == "none":
        return "--config.execution.remat=layer"
    if part > 1:
        factor = next(n for n in range(2, part + 1) if part % n == 0)
        return f"--config.train.accumulate_steps={factor * steps}"
    if not config.mesh.fsdp:
        return "--config.mesh.fsdp=True"
    return "more ranks in mesh.expert, or a smaller model"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
