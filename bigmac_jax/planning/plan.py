"""From a configuration to what it costs: the object that plan.py prints."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from bigmac_jax.config import STRUCTURES, Config, ConfigError
from bigmac_jax.mesh import ExpertGroup, axis_sizes
from bigmac_jax.model.exchange import STRATEGIES
from bigmac_jax.model.moe import strategy
from bigmac_jax.planning import paper, program, search
from bigmac_jax.planning.cost import physical_group, step_time
from bigmac_jax.planning.counts import Sizes, exchange_traffic, flops, memory, parameters, tokens_at_a_time
from bigmac_jax.planning.hardware import Hardware, load_hardware


class Request(NamedTuple):
    """What is asked beside the counts; as the flags of plan.py."""

    devices: int = 0
    topology: str = ""
    hardware: str = ""
    compile: bool = False
    paper: bool = False
    sweep: tuple[str, ...] = ()
    search: bool = False


class Place(NamedTuple):
    """What a plan is for."""

    devices: int
    topology: program.Topology | None
    hardware: Hardware | None
    simulated: bool  # the program of CPU devices is looked at, and their exchanges are what is counted


def make_plan(config: Config, request: Request) -> dict[str, Any]:
    """Everything that was asked, ready for JSON; bytes, seconds, FLOPs of a training step over all ranks unless a key
    says otherwise.

    Raises:
      ConfigError: one line, for whatever cannot be planned.
    """
    place = _place(config, request)
    sizes = _sizes(config, place)
    result = {
        "devices": place.devices,
        "topology": request.topology,
        "hardware": place.hardware.name if place.hardware else "",
        "mesh": sizes,
        "structure": config.model.structure,
        "description": config.model.describe(),
        "tokens_per_step": config.data.batch_size * config.data.sequence_length,
        **_costs(config, sizes, place),
        "baselines": _baselines(config, place),
    }
    if request.paper:
        result["paper"] = paper.table3(config, place.devices)
    if request.compile:
        result["program"] = _program(config, sizes, place)
    if request.sweep:
        result["sweep"] = [
            {"fields": fields, **_costs(swept, _sizes(swept, place), place)}
            for fields, swept in search.sweep(config, request.sweep)
        ]
    if request.search:
        if place.hardware is None:
            raise ConfigError("--search needs a time for every candidate; add --hardware=NAME, as in --hardware=h100")
        result["search"] = [c.to_json() for c in search.search(config, place.devices, place.hardware)]
    return result


def _place(config: Config, request: Request) -> Place:
    topology = program.parse_topology(request.topology) if request.topology else None
    name = request.hardware or (topology.kind if topology else "")
    hardware = load_hardware(name) if name else None
    devices = request.devices or max(1, config.mesh.data) * config.mesh.expert_ranks
    if topology:
        devices = math.prod(topology.shape)
        if request.devices not in (0, devices):
            raise ConfigError(f"--devices={request.devices} must be the {devices} of --topology={topology.name}")
    return Place(devices, topology, hardware, request.compile and topology is None)


def _sizes(config: Config, place: Place) -> Sizes:
    sizes = axis_sizes(config, place.devices)
    if (ranks := math.prod(sizes.values())) != place.devices:
        raise ConfigError(
            f"mesh.data × mesh.node × mesh.expert = {' × '.join(map(str, sizes.values()))} = {ranks} must be the "
            f"{place.devices} devices that are planned for; use mesh.data=0 for all, or --devices={ranks}"
        )
    return sizes


def _group(sizes: Sizes, place: Place) -> ExpertGroup:
    if place.simulated:
        return ExpertGroup((sizes["node"], sizes["expert"]), "cpu", "cpu")
    if place.hardware:
        return physical_group(sizes, place.hardware)
    return ExpertGroup((sizes["node"], sizes["expert"]), "gpu", "")


def _costs(config: Config, sizes: Sizes, place: Place) -> dict[str, Any]:
    """Counts, and where the hardware is known times."""
    m, group, ranks = config.model, _group(sizes, place), place.devices
    count, work = parameters(config, sizes), flops(config)
    parts = memory(config, ranks, group, count)
    result: dict[str, Any] = {
        "parameters_total": count.total,
        "parameters_active": count.active,
        "parameters": count.parts,
        "parameters_per_rank": count.of_a_rank,
        "flops_per_step": sum(work.values()),
        "flops": work,
        "all_to_all_bytes_per_step": round(sum(exchange_traffic(config, ranks, group).padded)),
        "memory": parts | {"total": sum(parts.values())},
    }
    if m.is_moe:
        tokens = tokens_at_a_time(config, ranks)
        chosen = strategy(m, m.capacity_factor, tokens, group)
        result["exchange"] = next(name for name, kind in STRATEGIES.items() if type(chosen) is kind)
        result["exchanges"] = {name: _traffic(config, ranks, group, name) for name in STRATEGIES}
    if place.hardware:
        topology = place.topology.shape if place.topology else None
        result["time"] = dataclasses.asdict(step_time(config, sizes, place.hardware, topology))
    return result


def _traffic(config: Config, ranks: int, group: ExpertGroup, name: str) -> dict[str, int]:
    traffic = exchange_traffic(config, ranks, group, name)
    return {
        "payload": round(sum(traffic.payload)),
        "padded_fast": round(traffic.padded.fast),
        "padded_slow": round(traffic.padded.slow),
        "metadata_fast": round(traffic.metadata.fast),
        "metadata_slow": round(traffic.metadata.slow),
    }


def _baselines(config: Config, place: Place) -> dict[str, Any]:
    """The other structures with the same fields; for one that cannot be, why."""
    found: dict[str, Any] = {}
    for structure in STRUCTURES:
        if structure != config.model.structure:
            try:
                latent = config.model.latent_norm if structure == "bigmac" else "none"
                model = dataclasses.replace(config.model, structure=structure, latent_norm=latent)
                other = dataclasses.replace(config, model=model)
                found[structure] = _costs(other, _sizes(other, place), place)
            except ConfigError as error:
                found[structure] = {"error": str(error)}
    return found


def _program(config: Config, sizes: Sizes, place: Place) -> dict[str, Any]:
    if place.topology:
        return program.describe(config, program.tpu_devices(place.topology), place.hardware)
    jax.config.update("jax_num_cpu_devices", place.devices)
    return program.describe(program.as_on_accelerators(config), jax.devices("cpu"), place.hardware)
