"""What the compiler makes of the programs: for simulated CPU devices, or for a TPU pod that is not there.

They are those that train.py, eval.py and generate.py run, compiled for abstract arrays: no parameter is allocated.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.exchange.costs import Sent
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.planning import hlo, hlo_schedule
from bigmac_jax.planning.abstract_programs import NAMES, make_program
from bigmac_jax.planning.cluster import Cluster, cluster
from bigmac_jax.planning.hardware import Hardware
from bigmac_jax.planning.topologies import first_line
from bigmac_jax.runtime import environment


class Compiled(NamedTuple):
    """A program, the same for every rank."""

    name: str
    text: str  # HLO, on TPU in the order of the schedule
    seconds: float  # to trace and compile
    memory: dict[str, int]  # bytes of a rank
    beside: int  # bytes of a rank that are alive at the same time, and that the program knows nothing of
    mesh: dict[str, int]


class DoesNotFitError(ConfigError):
    """The compiler gave up: memory."""


class DoesNotCompileError(ConfigError):
    """The compiler gave up: anything else."""


def compile_program(config: Config, devices: Sequence[Any], name: str = "step") -> Compiled:
    """Compiles one of the programs that train.py, eval.py and generate.py run, for `devices`, all of them.

    Raises:
      ConfigError: the mesh does not fit the devices.
      DoesNotFitError: the compiler found no way to fit it into memory.
      DoesNotCompileError: it does not compile, and is named.
    """
    start, mesh, device = time.perf_counter(), make_mesh(config, devices=devices), devices[0]
    # LLVM's optimisations change neither a CPU program's HLO nor its buffers.
    options = {"xla_backend_optimization_level": 0} if device.platform == "cpu" else None
    with jax.set_mesh(mesh), _named(name, device):
        program = make_program(name, config, mesh)
        compiled = program.lower().compile(compiler_options=options)
    stats = compiled.memory_analysis()
    arguments, code = stats.argument_size_in_bytes, stats.generated_code_size_in_bytes
    # On TPU temp_size adds up what is never alive together; its peak is what the chip must hold. The peak that
    # CPU states leaves out nearly all of it.
    peak = getattr(stats, "peak_memory_in_bytes", 0) if device.platform == "tpu" else 0
    held = peak or arguments + stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
    memory = {"total": held + code, "arguments": arguments, "temporaries": held - arguments, "code": code}
    seconds = time.perf_counter() - start
    return Compiled(name, compiled.as_text(), seconds, memory, _bytes(program.beside), dict(mesh.shape))


@contextlib.contextmanager
def _named(program: str, device: Any) -> Iterator[None]:
    """Says which program did not compile, in one line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise DoesNotFitError(f"{program}: {first_line(error)}") from None
        raise DoesNotCompileError(
            f"the program {program!r} does not compile for {device.device_kind}: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error


def _bytes(tree: Any) -> int:
    """Of one rank."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


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
    """Compiles the training step and reads it; bytes and FLOPs of all ranks in a step, memory of one."""
    return describe_programs(config, devices, hardware, topology, ("step",))["step"]


def describe_programs(
    config: Config,
    devices: Sequence[Any],
    hardware: Hardware | None = None,
    topology: tuple[int, ...] | None = None,
    names: Sequence[str] = NAMES,
) -> dict[str, dict[str, Any]]:
    """As `describe`, of every program, by name."""
    found = {}
    for name in names:
        try:
            compiled = compile_program(config, devices, name)
        except DoesNotFitError as error:
            change = _what_to_change(config, len(devices), name)
            kind = devices[0].device_kind
            found[name] = {"device_kind": kind, "fits": False, "change": change, "compiler": str(error)}
        except DoesNotCompileError as error:
            found[name] = {"device_kind": devices[0].device_kind, "fits": False, "change": "", "compiler": str(error)}
        else:
            found[name] = _described(compiled, config, devices, hardware, topology)
    return found


def _described(
    compiled: Compiled,
    config: Config,
    devices: Sequence[Any],
    hardware: Hardware | None,
    topology: tuple[int, ...] | None,
) -> dict[str, Any]:
    ranks, module = len(devices), hlo.parse(compiled.text)
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
        "memory_beside": compiled.beside,
        "collectives": _summary(
            found, {config.model.moe_layers or config.model.num_layers, config.model.first_dense_layers} - {0}
        ),
    }
    if hardware:
        needed = compiled.memory["total"] + compiled.beside
        result["memory_available"] = hardware.memory_bytes
        result["fits"] = needed <= hardware.memory_bytes
        if not result["fits"]:
            result["advice"] = _advice(config, ranks, compiled.name, module, needed, hardware.memory_bytes)
    scheduled = hardware and module.scheduled and devices[0].platform in ("tpu", "gpu")
    if hardware and scheduled and config.model.is_moe and compiled.name == "step":
        result["schedule"] = _schedule(module, compiled, cluster(compiled.mesh, hardware, topology))
        options = environment.compiler_options(devices[0])
        if devices[0].platform == "tpu" and not options.get("xla_tpu_enable_async_all_to_all"):
            kind = devices[0].device_kind
            why = "BIGMAC_KEEP_ENV is set" if hardware.overlaps else f"{kind} refuses them ('limited ICI')"
            result["schedule"]["note"] = f"compiled without asynchronous all-to-alls: {why}, docs/exchange.md"
    return result


def _summary(found: Sequence[hlo.Collective], layers: set[int]) -> list[dict[str, Any]]:
    """Collectives of one rank, those that differ in nothing shown added up, most bytes first.

    Args:
      layers: trips of the loops over layers.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for c in found:
        in_layers = any(loop.trips in layers for loop in c.loops)
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
    """What runs while the layer's exchange is on the wire, in the order that the compiler gave the program. Of a GPU's
    program nothing is known but FLOPs."""
    node, expert, hardware = here.sizes["node"], here.sizes["expert"], here.hardware

    def seconds(collective: hlo.Collective) -> float:
        peers = Sent(expert - 1 if "expert" in collective.axes else 0, node - 1 if "node" in collective.axes else 0)
        flat = len(collective.axes) > 1
        peers = Sent(peers.fast, peers.slow * expert) if flat else peers
        return here.exchange(peers.times(collective.sent_bytes / sum(peers)), 1, hierarchical=not flat)

    rates = hardware.clock_hz or math.inf, hardware.peak_flops, hardware.memory_bandwidth
    found = hlo_schedule.overlap(module, compiled.mesh, seconds, *rates)
    work = hlo_schedule.work_seconds(module, *rates)
    return {
        "work_seconds": work,
        "estimated_step_seconds": work + found.exchange_seconds - found.busy_seconds,
        "exchanges_in_a_layer": len(found.exchanges),
        "asynchronous_in_a_layer": sum(e.collective.asynchronous for e in found.exchanges),
        "exchange_seconds": found.exchange_seconds,
        "hidden_seconds": found.hidden_seconds,
        "busy_seconds": found.busy_seconds,
        "hidden_share": found.hidden,
        "ceiling": found.ceiling,
        "reached_of_ceiling": found.reached,
    }


def _advice(
    config: Config, ranks: int, name: str, module: hlo.Module, needed: float, available: float
) -> dict[str, Any]:
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
    change = _what_to_change(config, ranks, name)
    return {"needed": needed, "available": available, "change": change, "largest": largest}


def _what_to_change(config: Config, ranks: int, name: str = "step") -> str:
    """The field that makes a program smaller."""
    steps = config.train.accumulate_steps
    part = config.data.batch_size * config.mesh.tensor // (ranks * steps)  # sequences of a rank at a time
    if name == "step" and config.execution.remat == "none":
        return "--config.execution.remat=layer"
    if name in ("step", "evaluate") and part > 1:
        factor = next(n for n in range(2, part + 1) if part % n == 0)
        return f"--config.train.accumulate_steps={factor * steps}"
    if not config.mesh.fsdp:
        return "--config.mesh.fsdp=True"
    return "more ranks in mesh.expert, or a smaller model"
