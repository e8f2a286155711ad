"""Compiles the programs of a run for simulated CPU devices or for machines that are not there, and describes them.

They are the programs that train.py, eval.py and generate.py run, with abstract arrays: no parameter is allocated.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.counts import Sizes
from bigmac_jax.model.exchange.costs import Sent
from bigmac_jax.model.kernels.flash_attention import attention_implementation
from bigmac_jax.model.mesh import HOST, make_mesh
from bigmac_jax.planning import hlo, hlo_schedule, host_copies
from bigmac_jax.planning.abstract_programs import make_program
from bigmac_jax.planning.cluster import Cluster, cluster
from bigmac_jax.planning.cost import flops_outside_kernels
from bigmac_jax.planning.hardware import Hardware
from bigmac_jax.planning.hardware.torus import Shape
from bigmac_jax.planning.hlo_collectives import Collective, collectives
from bigmac_jax.planning.hlo_flops import matmul_flops
from bigmac_jax.planning.topologies import first_line
from bigmac_jax.runtime import environment


class Target(NamedTuple):
    """The machine that programs are compiled for."""

    devices: Sequence[Any]  # all of the mesh
    hardware: Hardware | None = None  # their figures, if known
    torus: Shape | None = None  # chips along each axis of a TPU slice


class Compiled(NamedTuple):
    """A compiled program, the same for every rank."""

    name: str
    text: str  # HLO, on TPU in the order of the schedule
    seconds: float  # to trace and compile
    memory: dict[str, int]  # bytes of a rank; `host` is beside its device
    beside: int  # bytes of a rank that are alive at the same time, and that the program knows nothing of
    mesh: dict[str, int]


class DoesNotFitError(ConfigError):
    """The compiler found no way to fit the program into memory."""


class DoesNotCompileError(ConfigError):
    """The compiler refused the program for any other reason."""


def compile_program(config: Config, devices: Sequence[Any], name: str = "step") -> Compiled:
    """Compiles one of the programs of `abstract_programs` for `devices`, all of them.

    Raises:
      ConfigError: the mesh does not fit the devices.
      DoesNotFitError: the compiler found no way to fit it into memory.
      DoesNotCompileError: it does not compile; the message names it.
    """
    start, mesh, device = time.perf_counter(), make_mesh(config, devices=devices), devices[0]
    # LLVM's optimisations change neither a CPU program's HLO nor its buffers.
    options = {"xla_backend_optimization_level": 0} if device.platform == "cpu" else None
    with jax.set_mesh(mesh), _one_line(name, device):
        program = make_program(name, config, mesh)
        compiled = program.lower().compile(compiler_options=options)
    stats = compiled.memory_analysis()
    text = compiled.as_text()
    # Of the arguments, what the layout puts into host memory; on GPU some versions count it as the device's.
    arguments_in_host = host_copies.argument_bytes(hlo.parse(text))
    counted = 0 if stats.host_argument_size_in_bytes else arguments_in_host
    arguments, code = stats.argument_size_in_bytes - counted, stats.generated_code_size_in_bytes
    # On TPU temp_size adds up what is never alive together; its peak is what the chip must hold, and arguments in host
    # memory, which it counts. The peak that CPU states leaves out nearly all of it.
    peak = getattr(stats, "peak_memory_in_bytes", 0) if device.platform == "tpu" else 0
    peak -= min(peak, stats.host_argument_size_in_bytes)
    held = peak or arguments + stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
    memory = {"total": held + code, "arguments": arguments, "temporaries": held - arguments, "code": code}
    memory["host"] = arguments_in_host + stats.host_temp_size_in_bytes
    memory["host"] += max(0, stats.host_output_size_in_bytes - stats.host_alias_size_in_bytes)
    seconds = time.perf_counter() - start
    return Compiled(name, text, seconds, memory, _bytes_of_rank(program.beside), dict(mesh.shape))


@contextlib.contextmanager
def _one_line(program: str, device: Any) -> Iterator[None]:
    """Turns the compiler's error into one line that names the program."""
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


def _bytes_of_rank(tree: Any) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != HOST]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def imitate_accelerators(config: Config) -> Config:
    """Settles what `auto` leaves open so that simulated CPU devices run an accelerator's program: attention without the
    blocks that skip what is masked, and layers in a loop. It has the same FLOPs and loop, and compiles sooner."""
    execution = config.execution
    attention = "xla" if execution.attention == "auto" else execution.attention
    execution = dataclasses.replace(execution, attention=attention, unroll_layers=execution.unroll_layers or 1)
    return dataclasses.replace(config, execution=execution)


def describe_programs(config: Config, target: Target, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Compiles programs and describes each for plan.py's JSON: bytes and FLOPs of all ranks in one execution, memory of
    one rank. One that does not compile has "compiler", the reason, and "change", a field that may help."""
    found = {}
    for name in names:
        try:
            found[name] = _describe(compile_program(config, target.devices, name), config, target)
        except (DoesNotFitError, DoesNotCompileError) as error:
            change = _field_to_change(config, target, name) if isinstance(error, DoesNotFitError) else ""
            kind = target.devices[0].device_kind
            found[name] = {"device_kind": kind, "fits": False, "change": change, "compiler": str(error)}
    return found


def _describe(compiled: Compiled, config: Config, target: Target) -> dict[str, Any]:
    ranks, device, hardware = len(target.devices), target.devices[0], target.hardware
    module = hlo.parse(compiled.text)
    found, work = collectives(module, compiled.mesh), matmul_flops(module)
    sent = {role: 0.0 for role in ("payload", "metadata", "other")}
    for collective in found:
        sent[collective.role] += ranks * collective.times * collective.sent_bytes
    buffers = sum(ranks * c.times * c.buffer_bytes for c in found if c.role == "payload")
    layers = {loop.trips for loop in config.model.loops}
    result: dict[str, Any] = {
        "compile_seconds": round(compiled.seconds, 1),
        "device_kind": device.device_kind,
        "flops_per_step": ranks * work.total,
        "kernel_flops_per_step": ranks * work.kernels,
        "loops_of_unknown_length": len(module.dynamic_loops),
        "exchange_sent_bytes": round(sent["payload"]),
        "exchange_buffer_bytes": buffers,  # with what a rank keeps for itself
        "metadata_sent_bytes": round(sent["metadata"]),
        "other_sent_bytes": round(sent["other"]),
        "memory": compiled.memory,
        "memory_beside": compiled.beside,
        "collectives": _summarize(found, layers),
    }
    if compiled.memory["host"]:
        result["host_copies"] = _describe_copies(host_copies.host_copies(module), hardware)
    if not hardware:
        return result
    needed = compiled.memory["total"] + compiled.beside
    result |= {"memory_available": hardware.memory_bytes, "fits": needed <= hardware.memory_bytes}
    if not result["fits"]:
        advice = {"needed": needed, "available": hardware.memory_bytes}
        result["advice"] = advice | _advise(config, target, compiled.name, module)
    scheduled = module.scheduled and device.platform in ("tpu", "gpu")
    if scheduled and config.model.is_moe and compiled.name == "step":
        result["schedule"] = _describe_schedule(module, compiled, cluster(compiled.mesh, hardware, target.torus))
        of_kernels = attention_implementation(config, device.platform) != "xla"
        if config.dropless and of_kernels and not config.tuning.lora_rank:
            result["formula_flops_outside_kernels"] = flops_outside_kernels(config, device.platform)
        options = environment.compiler_options(device)
        if device.platform == "tpu" and not options.get("xla_tpu_enable_async_all_to_all"):
            refusal = f"{device.device_kind} refuses them ('limited ICI')"
            why = "BIGMAC_KEEP_ENV is set" if hardware.overlaps else refusal
            result["schedule"]["note"] = f"compiled without asynchronous all-to-alls: {why}, docs/exchange.md"
    return result


def _describe_copies(found: Sequence[host_copies.HostCopy], hardware: Hardware | None) -> dict[str, Any]:
    """What a rank copies from host memory in one execution, and what runs meanwhile; runs of the copies are counted."""
    copied = sum(copy.times * copy.bytes for copy in found)
    described: dict[str, Any] = {
        "copies": sum(copy.times for copy in found),
        "asynchronous": sum(copy.times for copy in found if copy.asynchronous),
        "beside_products": sum(copy.times for copy in found if copy.products),
        "bytes": copied,
    }
    if hardware and hardware.host_bandwidth:
        described["seconds"] = copied / hardware.host_bandwidth
    return described


def _summarize(found: Sequence[Collective], layers: set[int]) -> list[dict[str, Any]]:
    """Collectives of one rank, added up where they differ in nothing shown, most bytes first.

    Args:
      layers: trips of the loops over layers.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for c in found:
        shown = {
            "kind": c.kind,
            "axes": c.axes,
            "role": c.role,
            "direction": c.direction,
            "in_each_layer": not layers.isdisjoint(c.loops),
            "asynchronous": c.asynchronous,
        }
        row = rows.setdefault(tuple(shown.values()), shown | {"count": 0, "sent_bytes": 0, "buffer_bytes": 0})
        row["count"] += c.times
        row["sent_bytes"] += round(c.times * c.sent_bytes)
        row["buffer_bytes"] += c.times * c.buffer_bytes
    return sorted(rows.values(), key=lambda row: -row["sent_bytes"])


def _rings(axes: Sequence[str], sizes: Sizes) -> list[tuple[int, int]]:
    """(ranks, stride) of the rings of a group over axes of the mesh, the innermost first: axes that are neighbours make
    one ring, and what goes around an outer one has been divided by those inside."""
    rings, stride, joined = list[tuple[int, int]](), 1, False
    for axis, ranks in reversed(sizes.items()):
        if ranks == 1:
            continue
        if axis in axes:
            inner, begin = rings.pop() if joined else (1, stride)
            rings.append((inner * ranks, begin))
        joined = axis in axes
        stride *= ranks
    return rings


def _describe_schedule(module: hlo.Module, compiled: Compiled, here: Cluster) -> dict[str, Any]:
    """What runs while the layer's exchange is on the wire, in the order that the compiler gave the program."""
    node, expert, hardware = here.sizes["node"], here.sizes["expert"], here.hardware

    def seconds(collective: Collective) -> float:
        peers = Sent(expert - 1 if "expert" in collective.axes else 0, node - 1 if "node" in collective.axes else 0)
        flat = len(collective.axes) > 1
        peers = Sent(peers.fast, peers.slow * expert) if flat else peers
        return here.exchange(peers.times(collective.sent_bytes / sum(peers)), 1, hierarchical=not flat)

    def ring_seconds(collective: Collective) -> float:
        rings = _rings(collective.axes, here.sizes) or [(collective.ranks, 1)]
        whole, seconds = collective.sent_bytes * collective.ranks / max(1, collective.ranks - 1), 0.0
        for ranks, stride in rings:
            seconds += here.around(whole * (ranks - 1) / ranks, ranks, stride)
            whole /= ranks
        return seconds

    rates = hlo_schedule.Rates(hardware.clock_hz or math.inf, hardware.peak_flops, hardware.memory_bandwidth)
    found = hlo_schedule.overlap(module, compiled.mesh, seconds, rates)
    of_parameters = hlo_schedule.overlap(module, compiled.mesh, ring_seconds, rates, hlo_schedule.parameter_collective)
    others = hlo_schedule.overlap(module, compiled.mesh, ring_seconds, rates, hlo_schedule.other_collective)
    work = hlo_schedule.work_seconds(module, rates)
    exposed = sum(overlap.exchange_seconds - overlap.busy_seconds for overlap in (found, of_parameters, others))
    return {
        "work_seconds": work,
        "estimated_step_seconds": work + exposed,
        "exchanges_in_a_layer": len(found.exchanges),
        "asynchronous_in_a_layer": sum(e.collective.asynchronous for e in found.exchanges),
        "exchange_seconds": found.exchange_seconds,
        "hidden_seconds": found.hidden_seconds,
        "busy_seconds": found.busy_seconds,
        "hidden_share": found.hidden,
        "ceiling": found.ceiling,
        "reached_of_ceiling": found.reached,
        "parameters": {
            "collectives_in_a_step": sum(e.collective.times for e in of_parameters.exchanges),
            "asynchronous_in_a_step": sum(
                e.collective.times for e in of_parameters.exchanges if e.collective.asynchronous
            ),
            "seconds": of_parameters.exchange_seconds,
            "hidden_seconds": of_parameters.hidden_seconds,
            "busy_seconds": of_parameters.busy_seconds,
        },
    }


def _advise(config: Config, target: Target, name: str, module: hlo.Module) -> dict[str, Any]:
    """The field that makes a program smaller, and its largest arrays."""
    largest = [
        {
            "shape": f"{b.shape.dtype}{list(b.shape.dims)}",
            "bytes": b.bytes,
            "of": b.op_name,
            "instructions": b.instructions,
        }
        for b in hlo.largest_buffers(module, 8)
    ]
    return {"change": _field_to_change(config, target, name), "largest": largest}


def _field_to_change(config: Config, target: Target, name: str) -> str:
    """The flag that makes a program smaller."""
    steps = config.train.accumulate_steps
    part = config.data.batch_size * config.mesh.tensor // (len(target.devices) * steps)  # sequences at a time on a rank
    if name == "step" and config.execution.remat == "none":
        return "--config.execution.remat=layer"
    if name in ("step", "evaluate") and part > 1:
        factor = next(n for n in range(2, part + 1) if part % n == 0)
        return f"--config.train.accumulate_steps={factor * steps}"
    if not config.mesh.fsdp:
        return "--config.mesh.fsdp=True"
    if name in ("step", "evaluate") and not config.execution.offload_optimizer:
        return "--config.execution.offload_optimizer=True"
    return "more ranks in mesh.expert, or a smaller model"
