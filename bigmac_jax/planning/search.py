"""Searches for the fastest way to run a config on a machine, and where nothing fits, for what would make it fit."""

import contextlib
import heapq
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bigmac_jax.config import Config, ConfigError, MeshConfig, check_batch, with_overrides
from bigmac_jax.config.resuming import drop_notes, part_notes
from bigmac_jax.config.section import flat_values
from bigmac_jax.model import counts
from bigmac_jax.planning.candidates import Axes, Machine, Variant, variants
from bigmac_jax.planning.cost import Times, step_time
from bigmac_jax.planning.hardware.torus import larger

NEAREST = 12  # candidates that don't fit and are timed all the same
MORE_DEVICES = (2, 4, 8, 16, 32, 64)
SMALLER = (2, 4)
ROWS = 100  # candidates in the description


@dataclass(frozen=True)
class Candidate(Variant):
    """A variant with its predicted times."""

    times: Times


def search(config: Config, machine: Machine) -> list[Candidate]:
    """Finds the ways to run `config` on all devices that fit into memory, by tokens a second; behind them the `NEAREST`
    that don't, by memory.

    They differ in mesh, fsdp, split_experts, exchange, overlap_chunks, remat, offload_optimizer and accumulate_steps.
    None of these changes what is computed, but for what `drop_notes` and `part_notes` name.

    Raises:
      ConfigError: no mesh of so many devices is valid.
    """
    found = list(variants(config, machine))
    if not found:
        raise ConfigError(_why_none(config, machine.devices))
    missed = heapq.nlargest(NEAREST, (v for v in found if not v.fits), key=lambda v: v.headroom)
    timed = [
        Candidate(**vars(v), times=_times(v, machine)) for v in itertools.chain((v for v in found if v.fits), missed)
    ]
    fit = sorted((c for c in timed if c.fits), key=_rank)
    return fit + sorted((c for c in timed if not c.fits), key=lambda c: (-c.headroom, -c.times.tokens_per_s))


def fastest(config: Config, machine: Machine, among: Collection[Axes] | None = None) -> list[Candidate]:
    """Finds the best candidate of each mesh on which something fits, in the order of `search`.

    Args:
      among: the meshes to look at; None is all.
    """
    best: dict[Axes, Candidate] = {}
    for v in variants(config, machine, fitting=True, among=among):
        found = Candidate(**vars(v), times=_times(v, machine))
        mesh = axes(found)
        if mesh not in best or _rank(found) < _rank(best[mesh]):
            best[mesh] = found
    return sorted(best.values(), key=_rank)


def _times(variant: Variant, machine: Machine) -> Times:
    return step_time(variant.config, variant.sizes, machine.hardware, machine.topology, machine.load)


def axes(candidate: Candidate) -> Axes:
    """The ranks of its mesh."""
    sizes = candidate.sizes
    return sizes["replica"], sizes["data"], sizes["node"], sizes["expert"], sizes["tensor"]


def _rank(candidate: Candidate) -> tuple[float, float]:
    """The smaller the better, of those that fit."""
    return -candidate.times.tokens_per_s, -candidate.headroom


def flags(before: Config, after: Config) -> list[str]:
    """The command-line flags that turn one config into the other."""
    old = flat_values(before)
    return [f"--config.{name}={value}" for name, value in flat_values(after).items() if old[name] != value]


def what_would_fit(config: Config, machine: Machine) -> list[str]:
    """Flags of plan.py each of which alone makes something fit; of each kind the one that changes least."""

    hardware = machine.hardware

    def fits(other: Config, times: int = 1) -> bool:
        topology = machine.topology and larger(machine.topology, times, hardware.machine_ranks // hardware.cores)
        here = replace(machine, devices=machine.devices * times, topology=topology)
        return any(True for _ in variants(other, here, lean=True, fitting=True))

    times = next((n for n in MORE_DEVICES if fits(config, n)), 0)
    found = [f"--devices={machine.devices * times}"] if times else []
    data = config.data
    for kind in (
        ["execution.dtype=bfloat16"],
        ["optimizer.moment_dtype=bfloat16"],
        [f"data.batch_size={data.batch_size // n}" for n in SMALLER if data.batch_size % n == 0],
        [f"data.sequence_length={data.sequence_length // n}" for n in SMALLER if data.sequence_length % n == 0],
    ):
        for override in kind:
            with contextlib.suppress(ConfigError):  # a value that the config's other fields don't allow
                other = with_overrides(config, [override])
                if other != config and fits(other):
                    found.append(f"--config.{override}")
                    break
    return found


def _why_none(config: Config, devices: int) -> str:
    """The error for no valid mesh, with the rule that the simplest one breaks."""
    try:
        simplest = replace(config, mesh=MeshConfig(data=devices), train=replace(config.train, accumulate_steps=1))
        check_batch(simplest, devices)
        reason = "its expert groups make no block of the topology"
    except ConfigError as error:
        reason = str(error)
    return f"--search finds no mesh of {devices} devices for this config: {reason}"


def describe(config: Config, machine: Machine) -> tuple[Config, dict[str, Any]]:
    """Searches, and returns (the best config, or the nearest if nothing fits; what plan.py's JSON says of the search).

    Raises:
      ConfigError: as `search`.
    """
    found = search(config, machine)
    best, would_fit = found[0], list[str]()
    if not best.fits:
        if best.headroom >= 0:  # it fits, but for what was to stay free
            would_fit.append(f"--headroom={math.floor(100 * best.headroom) / 100:g}")
        would_fit += what_would_fit(config, machine)
    return best.config, {
        "best": {
            "fits": best.fits,
            "flags": flags(config, best.config),
            "notes": drop_notes(config, best.config) + part_notes(config, best.config),
            "tokens_per_s": best.times.tokens_per_s,
            "memory": sum(best.memory.values()),
            "headroom": best.headroom,
            "would_fit": would_fit,
            "without_first_pass": _spare_first_pass(config, found[:ROWS], machine) if best.fits else None,
        },
        "searched": {"fit": sum(candidate.fits for candidate in found), "headroom": machine.headroom},
        "search": [_row(candidate) for candidate in found[:ROWS]],
    }


def _spare_first_pass(config: Config, found: Sequence[Candidate], machine: Machine) -> dict[str, Any] | None:
    """What a search would find if every part of the batch were balanced on its own, so that no pass counted the loads
    of all parts first; None where it is no faster. It changes the balance loss, so a search does not choose it."""
    by_part = [
        replace(c, config=replace(c.config, model=replace(c.config.model, balance_scope="part")))
        for c in found
        if c.fits and counts.counts_loads(c.config)
    ]
    best = min((replace(c, times=_times(c, machine)) for c in by_part), key=_rank, default=found[0])
    if _rank(best) >= _rank(found[0]):
        return None
    return {"flags": flags(config, best.config), "tokens_per_s": best.times.tokens_per_s}


def _row(candidate: Candidate) -> dict[str, Any]:
    mesh, execution = candidate.config.mesh, candidate.config.execution
    return {
        "mesh": candidate.sizes,
        "fsdp": mesh.fsdp,
        "split_experts": mesh.split_experts,
        "exchange": execution.exchange,
        "overlap_chunks": execution.overlap_chunks,
        "remat": execution.remat,
        "offload_optimizer": execution.offload_optimizer,
        "replica_optimizer": mesh.replica_optimizer,
        "accumulate_steps": candidate.config.train.accumulate_steps,
        "fits": candidate.fits,
        "memory": sum(candidate.memory.values()),
        "headroom": candidate.headroom,
        "time": candidate.times.as_dict(),
    }
