"""Plans a configuration: makes the object that plan.py prints, with everything that the configuration costs."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from bigmac_jax.config import STRUCTURES, Config, ConfigError, MeshConfig, ModelConfig
from bigmac_jax.config.compiler_options import parse_options
from bigmac_jax.config.execution import Remat
from bigmac_jax.model.choose_exchange import choose_exchange
from bigmac_jax.model.counts import Sizes, flops, parameters
from bigmac_jax.model.exchange import STRATEGIES
from bigmac_jax.model.memory import checkpoint_bytes, describe_copies, host_memory, rank_memory, state_memory
from bigmac_jax.model.mesh import EXPERT_GROUP, ExpertGroup
from bigmac_jax.model.resident import is_resident
from bigmac_jax.model.traffic import exchange_traffic, exchanged_bytes, sends_ragged, tokens_at_a_time
from bigmac_jax.planning import comparison, compiled_programs, paper, residency, scaling, search, topologies
from bigmac_jax.planning.abstract_programs import NAMES, SERVING
from bigmac_jax.planning.candidates import REMAT, Machine
from bigmac_jax.planning.cost import step_time
from bigmac_jax.planning.drops import measured_drops
from bigmac_jax.planning.job import HIDDEN, TERMS
from bigmac_jax.planning.place import (
    Place,
    Request,
    expert_groups,
    find_place,
    machine_of,
    mesh_sizes,
    require_hardware,
)
from bigmac_jax.planning.structures import alternatives, name_of, of_equal_size
from bigmac_jax.planning.sweep import check_axes, parse_axes, sweep
from bigmac_jax.planning.training_time import parse_tokens, training_time
from bigmac_jax.runtime import environment


def make_plan(config: Config, request: Request) -> dict[str, Any]:
    """Plans everything that was asked, ready for JSON: bytes, seconds and FLOPs of a training step over all ranks,
    unless a key says otherwise.

    Raises:
      ConfigError: one line, for whatever cannot be planned.
    """
    if config.tuning.teacher:
        raise ConfigError(
            f"tuning.teacher={config.tuning.teacher} is a second model, which is not planned; drop it, and leave room "
            f"for its parameters and for a second forward pass"
        )
    place = find_place(config, request)
    tokens, axes = _parse_tokens(request, place), parse_axes(request.sweep)
    asked = scaling.parse_scale(request.scale) if request.scale else None
    _check(config, request, place, axes, asked)
    own = config
    searched: dict[str, Any] = {}
    if request.search:
        config, searched = _search(config, place, request.headroom)  # the rest of the plan is of the best
    swept = [(fields, other, mesh_sizes(other, place)) for fields, other in sweep(config, axes)] if axes else []
    sizes = mesh_sizes(config, place)
    result = {
        **searched,
        "devices": place.devices,
        "topology": request.topology,
        "slices": request.slices,
        "hardware": request.hardware or (place.topology.kind if place.topology else ""),
        "mesh": sizes,
        "structure": config.model.structure,
        "description": config.describe(),
        "imbalance": place.load.over(math.prod(sizes[axis] for axis in EXPERT_GROUP)) if config.dropless else 1.0,
        "tokens_per_step": config.data.batch_size * config.data.sequence_length,
        **_costs(config, sizes, place),
        "baselines": _baselines(config, place),
    }
    if tokens:
        for column in (result, *result["baselines"].values()):
            if "time" in column:
                seconds = column["time"]["total"]
                column["training"] = training_time(tokens, result["tokens_per_step"], seconds, place.devices)
    if place.hardware:
        result["memory_available"] = place.hardware.memory_bytes
        result["fits"] = result["headroom"] >= 0
    if copies := describe_copies(config, sizes):
        result["copies"] = copies
    if dropped := measured_drops(config):
        result["drops"] = dropped
    if place.hardware and config.model.is_moe:
        names = [name for name in REMAT if name != "offload" or place.hardware.host_bandwidth]
        result["recomputation"] = [_recomputation(config, name, sizes, place) for name in names]
    if request.options:
        result["compiler_options"] = _options(config, place, sizes)
    if is_resident(config):
        result["resident"] = residency.describe(config, sizes, place.hardware)
    if axes:
        result["sweep"] = [{"fields": fields, **_costs(other, of, place)} for fields, other, of in swept]
    if request.terms:
        result["terms"] = _terms(result)
    if request.paper:
        result["paper"] = _paper(config)
        if request.hardware == "paper":
            result["paper_comparison"] = [row._asdict() for row in paper.comparison(place.hardware)]
    if request.compile:
        programs = result["programs"] = _programs(config, place)
        if "step" in programs:
            result["program"] = programs["step"]
        result["restore"] = _restore(
            _bytes_read(config, sizes, expert_groups(sizes, place)[0].platform), programs, place
        )
        if place.hardware:
            result["fits"] = all(part["fits"] for part in (*programs.values(), result["restore"]))
    if request.compare:
        steps = _steps(config, place, request)
        if request.search and not searched["best"]["fits"]:
            steps[name_of(config.model)] = f"does not fit on {place.devices} devices"
        result["compare"] = comparison.compare(config, steps, tokens or config.train.steps * result["tokens_per_step"])
    if asked:
        result["scale"] = scaling.scale(own, asked, lambda devices: machine_of(request, place, devices))
    return result


def _check(
    config: Config, request: Request, place: Place, axes: Mapping[str, Sequence[str]], asked: scaling.Scale | None
) -> None:
    """Raises ConfigError for what cannot be planned whatever a search finds: before it, or a compilation, takes its
    minutes."""
    for flag, given in {
        "--compare": request.compare,
        f"--scale={request.scale}": asked,
        "--options": request.options,
        "--terms": request.terms,
    }.items():
        if given:
            require_hardware(place, flag)
    if request.compare:
        comparison.check(config.model)
    if asked:
        scaling.batches(config, asked)
    if request.paper:
        paper.paper_model(config)
    check_axes(config, axes)
    if request.search and is_resident(config):
        residency.describe(config, {"data": place.devices}, place.hardware)
    if request.search and request.compile and place.topology:
        topologies.absent_devices(place.topology)


def _parse_tokens(request: Request, place: Place) -> int:
    """The tokens that were asked for; 0 if none were."""
    if request.tokens == "":
        return 0
    tokens = parse_tokens(str(request.tokens))
    require_hardware(place, f"--tokens={request.tokens}")
    return tokens


def _costs(config: Config, sizes: Sizes, place: Place) -> dict[str, Any]:
    """Counts, and with hardware also times."""
    m, ranks, (group, physical) = config.model, place.devices, expert_groups(sizes, place)
    count, work = parameters(config, sizes), flops(config)
    parts, beside = rank_memory(config, ranks, group, count), host_memory(config, ranks, count, group.platform)
    result: dict[str, Any] = {
        "expert_width": m.expert_width,
        "parameters_total": count.total,
        "parameters_active": count.active,
        "parameters": count.parts,
        "parameters_per_rank": count.of_a_rank,
        "flops_per_step": sum(work.values()),
        "flops": work,
        "all_to_all_bytes_per_step": round(sum(exchange_traffic(config, ranks, group).padded)),
        "memory": parts | {"total": sum(parts.values())},
        "host_memory": beside | {"total": sum(beside.values())},
    }
    if not config.tuning.lora_rank:
        result["checkpoint"] = _checkpoint(config)
    if place.hardware:
        result["headroom"] = 1 - sum(parts.values()) / place.hardware.memory_bytes
    if m.is_moe:
        chosen = choose_exchange(config, m.capacity_factor, tokens_at_a_time(config, ranks), group)
        result["most_rounds"] = chosen.most_rounds(tokens_at_a_time(config, ranks), m.choices)
        two_levels = min(group.sizes) > 1
        result["exchange"] = next(name for name, kind in STRATEGIES.items() if type(chosen) is kind)
        # Which bytes take slow links is the machines' matter, but the hops of a hierarchical exchange are the mesh's,
        # and what a simulated program sends is the program's.
        of_the_program = {"hierarchical", result["exchange"]} if place.simulated else {"hierarchical"}
        result["exchanges"] = {
            name: _traffic(config, ranks, group if name in of_the_program else physical, name)
            for name in STRATEGIES
            if name != "hierarchical" or two_levels
        }
        if result["exchange"] not in result["exchanges"]:
            result["exchanges"]["hierarchical"] = result["exchanges"]["dedup"]  # which it is on one level
    if place.hardware:
        result["time"] = step_time(config, sizes, place.hardware, place.torus, place.load).as_dict()
    return result


def _recomputation(config: Config, remat: Remat, sizes: Sizes, place: Place) -> dict[str, Any]:
    """What a rank keeps for the backward pass with this execution.remat, and the seconds that follow."""
    config = replace(config, execution=replace(config.execution, remat=remat))
    costs, (group, _) = _costs(config, sizes, place), expert_groups(sizes, place)
    return {
        "remat": remat,
        "activations": costs["memory"]["activations"],
        "host": costs["host_memory"]["activations"],
        "exchanged": round(config.step_model.count_trained("E") * exchanged_bytes(config, place.devices, group)),
        "exchange": costs["time"]["exchange"],
        "total": costs["time"]["total"],
    }


def _traffic(config: Config, ranks: int, group: ExpertGroup, name: str) -> dict[str, int]:
    traffic = exchange_traffic(config, ranks, group, name)
    return {
        "payload": round(sum(traffic.payload)),
        "padded_fast": round(traffic.padded.fast),
        "padded_slow": round(traffic.padded.slow),
        "metadata_fast": round(traffic.metadata.fast),
        "metadata_slow": round(traffic.metadata.slow),
    }


def _options(config: Config, place: Place, sizes: Sizes) -> list[dict[str, Any]]:
    """The options that the training step is compiled with there; `why` of one that the config gives is ""."""
    execution, hardware = config.execution, require_hardware(place, "--options")
    defaults = environment.default_options(
        hardware,
        overlap=execution.overlap_chunks > 1,
        ragged=sends_ragged(config, place.devices, expert_groups(sizes, place)[0]),
        offload=execution.offload_optimizer,
    )
    options = defaults | {name: (value, "") for name, value in parse_options(execution.compiler_options).items()}
    return [{"name": name, "value": value, "why": why} for name, (value, why) in options.items()]


def _terms(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each term of the predicted step, and what it is; those that are hidden in others are negative."""
    seconds = {term: (-1 if term in HIDDEN else 1) * result["time"][term] for term in TERMS}
    total = result["time"]["total"]
    return [
        {"term": term, "what": what, "seconds": seconds[term], "share": seconds[term] / total}
        for term, what in TERMS.items()
    ]


def _paper(config: Config) -> dict[str, Any]:
    model = paper.paper_model(config)
    return {
        "parameters": paper.paper_parameters(model),
        "flops_per_step": paper.paper_flops(model),
        "all_to_all_bytes_per_step": paper.paper_all_to_all_bytes(model),
        "left_out": paper.left_out(config),
    }


def _search(config: Config, place: Place, headroom: float) -> tuple[Config, dict[str, Any]]:
    """(the best config, or where nothing fits the nearest; what the plan says of the search)."""
    if place.hardware is None:
        raise ConfigError("--search needs a time for every candidate; add --hardware=NAME, as in --hardware=h100")
    best, described = search.describe(config, Machine(place.devices, place.hardware, place.torus, place.load, headroom))
    if place.topology:
        would_fit = described["best"]["would_fit"]
        described["best"]["would_fit"] = [
            topologies.respell_devices(place.topology, flag, place.hardware) for flag in would_fit
        ]
    return best, described


def _steps(config: Config, place: Place, request: Request) -> dict[str, tuple[ModelConfig, float] | str]:
    """By structure, its model and the seconds of its step: on the plan's mesh, or after a search on the best of its
    own; or why there is none."""
    machine = Machine(place.devices, require_hardware(place, "--compare"), place.torus, place.load, request.headroom)
    found: dict[str, tuple[ModelConfig, float] | str] = {}
    wanted = replace(config, mesh=MeshConfig()) if request.search else config
    for name, other in alternatives(wanted, studied=True).items():
        try:
            if isinstance(other, ConfigError):
                raise other
            if not request.search or other.model == config.model:
                sizes = mesh_sizes(config, place)
                seconds = step_time(
                    replace(other, mesh=config.mesh), sizes, machine.hardware, place.torus, place.load
                ).total
                found[name] = other.model, seconds
            elif best := search.fastest(other, machine):
                found[name] = other.model, best[0].times.total
            else:
                found[name] = f"does not fit on {place.devices} devices"
        except ConfigError as error:
            found[name] = str(error)
    return found


def _baselines(config: Config, place: Place) -> dict[str, Any]:
    """Costs of the other structures with the same fields, as large as the configured one; or why one cannot be."""
    found: dict[str, Any] = {}
    for structure in reversed(STRUCTURES):
        if structure != config.model.structure:
            try:
                latent = config.model.latent_norm if structure == "bigmac" else "none"
                other = of_equal_size(config, structure, latent)
                found[structure] = _costs(other, mesh_sizes(other, place), place)
            except ConfigError as error:
                found[structure] = {"error": str(error)}
    return found


def _programs(config: Config, place: Place) -> dict[str, dict[str, Any]]:
    if place.topology:
        devices = topologies.absent_devices(place.topology)
    else:
        devices, config = _cpu_devices(place.devices), compiled_programs.imitate_accelerators(config)
    target = compiled_programs.Target(devices, place.hardware, place.torus)
    return compiled_programs.describe_programs(config, target, SERVING if is_resident(config) else NAMES)


def _cpu_devices(count: int) -> list[jax.Device]:
    """Simulated devices; raises ConfigError where jax runs already, with fewer."""
    with contextlib.suppress(RuntimeError):  # jax has begun
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(
            f"{count} devices can't be compiled for: jax runs here with {len(devices)} already; use topology=, which "
            f"needs none, or the command `bigmac plan --compile`"
        )
    return devices[:count]


def _checkpoint(config: Config) -> dict[str, int]:
    """Bytes of a checkpoint; with train.experts_per_checkpoint also of one with so many experts, and of all that are
    kept."""
    whole, count, experts = checkpoint_bytes(config), config.train.experts_per_checkpoint, config.model.expert_count
    if not (count and config.model.is_moe):
        return {"bytes": whole}
    partial = checkpoint_bytes(config, count)
    # So many more saves that each that is kept finds every expert; of them the experts alone, if both parts are split.
    older, rest = -(-experts // count) - 1, (experts * partial - count * whole) // (experts - count)
    wholes = 1 + bool(config.train.eval_every)  # the last one, and the best
    kept = partial - rest if config.train.partial_checkpoint == "both" else partial
    return {
        "bytes": whole,
        "partial_bytes": partial,
        "kept_bytes": config.train.keep_checkpoints * partial + older * kept + wholes * whole,
    }


def _bytes_read(config: Config, sizes: Sizes, platform: str) -> dict[str, int]:
    """Counts the bytes of a checkpoint that train.py and generate.py read onto a rank's device; moments and experts
    that are to stand in host memory are read into that."""
    count = parameters(config, sizes)
    if is_resident(config):
        return {"generate": 4 * (count.of_a_rank - residency.expert_numbers(config, sizes))}
    state = state_memory(config, count, 1, platform)
    return {"train": state["parameters"] + state["optimizer"], "generate": 4 * count.of_a_rank}


def _restore(need: dict[str, int], programs: dict[str, dict[str, Any]], place: Place) -> dict[str, Any]:
    """Bytes of a rank that reading a checkpoint takes: of `_bytes_read`, which generate.py casts leaf by leaf, beside
    the weights that it made of them."""
    need = dict(need)
    if "memory" in programs.get("decode", {}):
        need["generate"] += programs["decode"]["memory"]["arguments"]
    fits = {"fits": max(need.values()) <= place.hardware.memory_bytes} if place.hardware else {}
    return need | fits
