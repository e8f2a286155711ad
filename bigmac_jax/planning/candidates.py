"""Lists the valid ways to run a config on a machine and the memory that each takes; a search chooses from them."""

import functools
import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from bigmac_jax.config import Config, ConfigError, MeshConfig, check_batch
from bigmac_jax.config.execution import Remat
from bigmac_jax.model import counts
from bigmac_jax.model.choose_exchange import available_exchanges
from bigmac_jax.model.counts import Parameters, Sizes
from bigmac_jax.model.memory import rank_memory, state_memory
from bigmac_jax.model.mesh import BATCH, axis_sizes, check_links
from bigmac_jax.planning.cluster import cluster, mesh_group
from bigmac_jax.planning.hardware import Hardware
from bigmac_jax.planning.hardware.torus import Shape
from bigmac_jax.planning.load import EVEN, Load

OVERLAP_CHUNKS = (1, 2, 4, 8)
REPLICAS = 4  # numbers of replicas that are tried for a mesh
REMAT: tuple[Remat, ...] = ("none", "exchange", "layer", "offload")  # the more memory the sooner
# The estimate of memory is off by -13 to +22 % (docs/planning.md).
HEADROOM = 0.15
# A section with other fields, checked once however many candidates have it.
_with_fields = functools.lru_cache(maxsize=4096)(replace)


@dataclass(frozen=True)
class Machine:
    """The machine that a search is for."""

    devices: int
    hardware: Hardware
    topology: Shape | None = None  # chips along each axis of a TPU slice
    load: Load = EVEN
    headroom: float = HEADROOM  # the share of a device's memory that has to stay free


@dataclass(frozen=True)
class Variant:
    """A valid way to run a config on a machine, and the memory that it takes."""

    config: Config
    sizes: Sizes  # ranks along each axis of the mesh
    memory: dict[str, int]  # bytes of one rank by part (`rank_memory`)
    headroom: float  # the share of a device's memory that is left
    fits: bool  # at least `Machine.headroom` is left


Axes = tuple[int, int, int, int, int]  # ranks along replica, data, node, expert and tensor


def variants(
    config: Config, machine: Machine, lean: bool = False, fitting: bool = False, among: Collection[Axes] | None = None
) -> Iterator[Variant]:
    """Yields one way for every mesh, exchange, number of chunks and remat: the one whose batch goes in the fewest parts
    that fit, or if none fits, the smallest. Moments go to host memory on meshes alone where nothing fits without.

    Args:
      lean: leave out what only adds memory: several chunks, and no fsdp where fsdp is possible.
      fitting: only what fits and may be the fastest: no mesh whose parameters and optimizer alone don't fit is looked
        at any further, and nothing is recomputed where the whole batch fits without.
      among: the meshes to look at; None is all.
    """
    hardware = machine.hardware
    remats = [r for r in REMAT if config.model.is_moe or r != "exchange"]  # nothing is exchanged in a dense layer
    if not hardware.host_bandwidth:
        remats.remove("offload")
    offloads = (False, True) if hardware.host_bandwidth else (False,)
    chunks = (1,) if lean or not hardware.overlaps else OVERLAP_CHUNKS
    for mesh, sizes in _meshes(config, machine, lean, among):
        for offloads_optimizer in offloads:
            execution = _with_fields(config.execution, offload_optimizer=offloads_optimizer)
            placed, fits = replace(config, mesh=mesh, execution=execution), False
            count = counts.parameters(placed, sizes)
            state = sum(state_memory(placed, count, 1, hardware.platform).values())
            if fitting and 1 - state / hardware.memory_bytes < machine.headroom:
                continue
            for found in _ways(placed, sizes, count, machine, remats, chunks, fitting):
                fits |= found.fits
                yield found
            if fits:
                break


def _ways(
    config: Config,
    sizes: Sizes,
    count: Parameters,
    machine: Machine,
    remats: Collection[Remat],
    chunks: tuple[int, ...],
    fitting: bool,
) -> Iterator[Variant]:
    """The variants of a config on its mesh; arguments as in `variants`."""
    for name, n in _exchanges(config, config.mesh, machine, chunks):
        for remat in remats:
            fields: dict[str, Any] = {"exchange": name, "overlap_chunks": n, "remat": remat}
            try:
                executed = replace(config, execution=_with_fields(config.execution, **fields))
            except ConfigError:  # an exchange that takes no rounds, as execution.buffer_factor asks
                continue
            if found := _fewest_parts(executed, sizes, count, machine, fitting):
                yield found
                if fitting and found.config.train.accumulate_steps == 1:
                    break


def _meshes(
    config: Config, machine: Machine, lean: bool, among: Collection[Axes] | None
) -> Iterator[tuple[MeshConfig, Sizes]]:
    """Meshes of all devices that are valid for any batch, and their sizes."""
    moe, devices = config.model.is_moe, machine.devices
    for tensor in _divisors(devices):
        for group in _divisors(devices // tensor) if moe else [1]:
            for node, split in itertools.product(_divisors(group), (False, True) if moe and tensor > 1 else (False,)):
                left = devices // tensor // group
                for replicas in _replicas(machine, left):
                    if among is not None and (replicas, left // replicas, node, group // node, tensor) not in among:
                        continue
                    # 0 stays: all devices that are left are what it means.
                    data = left // replicas if config.mesh.data else 0
                    try:
                        mesh = MeshConfig(data, node, group // node, tensor, split_experts=split, replica=replicas)
                        sizes = axis_sizes(replace(config, mesh=mesh), devices, fit_batch=False)
                        near = cluster(sizes, machine.hardware, machine.topology).machine
                        if near < devices:
                            check_links(sizes, near, machine.hardware.platform)
                    except ConfigError:
                        continue
                    if near % tensor == 0:  # what its ranks send in every layer is not for links between machines
                        yield from ((m, sizes) for m in _sharded(config, mesh, sizes, lean))


def _replicas(machine: Machine, ranks: int) -> list[int]:
    """Numbers of replicas to try where so many ranks share no experts: 1, and those that are as many whole machines, or
    slices, each. Of more than `REPLICAS` the largest are left out, which are of few ranks each."""
    near = machine.hardware.ranks_together(machine.devices)
    if machine.topology:
        near = math.prod(machine.topology) * machine.hardware.cores
    return [n for n in _divisors(max(1, machine.devices // near)) if ranks % n == 0][:REPLICAS]


def _sharded(config: Config, mesh: MeshConfig, sizes: Sizes, lean: bool) -> Iterator[MeshConfig]:
    """The mesh without fsdp and with it. A field that makes no difference stays as the config has it."""
    if mesh.tensor == 1 or not config.model.is_moe:
        mesh = replace(mesh, split_experts=config.mesh.split_experts)
    whole, sharded = (replace(mesh, fsdp=fsdp) for fsdp in (False, True))
    if mesh.replica > 1:  # whose state may be split over them, too
        split = replace(sharded, replica_optimizer="sharded")
        yield from [split] if lean else (whole, sharded, split)
        return
    of_a_rank = {counts.parameters(replace(config, mesh=option), sizes).of_a_rank for option in (whole, sharded)}
    if len(of_a_rank) == 1:
        yield replace(mesh, fsdp=config.mesh.fsdp)
    else:
        yield from [sharded] if lean else (whole, sharded)


def _exchanges(
    config: Config, mesh: MeshConfig, machine: Machine, chunks: tuple[int, ...]
) -> Iterator[tuple[str, int]]:
    """(strategy, chunks) that differ on this mesh; the config's own first, which stays if no other is better."""
    own = config.execution.exchange
    if not config.model.is_moe:
        yield own, 1
        return
    # On one level a hierarchical exchange is `dedup`; the others don't look at levels. A rank that has all experts
    # sends nothing, but an exchange with a capacity has its experts multiply the room, too.
    two_levels = mesh.node > 1 and mesh.expert > 1
    for name in sorted(available_exchanges(machine.hardware.device_kind), key=lambda name: name != own):
        if (name == "hierarchical") == two_levels and (two_levels or mesh.node == 1):
            yield from ((name, n) for n in (chunks if mesh.expert_ranks > 1 else (1,)))


def _fewest_parts(config: Config, sizes: Sizes, count: Parameters, machine: Machine, fitting: bool) -> Variant | None:
    """The batch in the fewest parts that fit; if none do, with the least memory, or None if only what fits is wanted;
    None if ranks don't divide it."""
    sequences, left = divmod(config.data.batch_size, math.prod(sizes[axis] for axis in BATCH))
    if left:
        return None
    group = mesh_group(sizes, machine.hardware)

    def variant(parts: int) -> Variant | None:
        try:
            divided = replace(config, train=_with_fields(config.train, accumulate_steps=parts))
            check_batch(divided, sizes["data"])
        except ConfigError:  # more chunks than tokens
            return None
        memory = rank_memory(divided, machine.devices, group, count)
        headroom = 1 - sum(memory.values()) / machine.hardware.memory_bytes
        return Variant(divided, sizes, memory, headroom, headroom >= machine.headroom)

    numbers, smallest = _divisors(sequences), None
    if fitting:  # more parts take less memory, but for the gradients that several parts add to
        most = next(filter(None, map(variant, reversed(numbers))), None)
        if most and not most.fits:
            numbers = numbers[:1]
    for found in filter(None, map(variant, numbers)):
        if found.fits:
            return found
        if smallest is None or found.headroom > smallest.headroom:
            smallest = found
    return None if fitting else smallest


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
