"""What is fastest on so many devices, by the cost model; and where nothing fits, what would make something fit."""

import contextlib
import heapq
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

from bigmac_jax.config import Config, ConfigError, MeshConfig, check_batch, with_overrides
from bigmac_jax.config.resuming import part_notes
from bigmac_jax.config.section import flat_values
from bigmac_jax.planning.candidates import Machine, Variant, variants
from bigmac_jax.planning.cost import Times, step_time

NEAREST = 12  # of those that don't fit, how many are timed
MORE_DEVICES = (2, 4, 8, 16, 32, 64)
SMALLER = (2, 4)
ROWS = 100  # of the description


@dataclass(frozen=True)
class Candidate(Variant):
    """One whose time is known."""

    times: Times


def search(config: Config, machine: Machine) -> list[Candidate]:
    """The ways to run `config` on all devices that fit into memory, by tokens a second; behind them the `NEAREST` that
    don't, by memory.

    They differ in mesh, fsdp, split_experts, exchange, overlap_chunks, remat and accumulate_steps, none of which
    changes what is computed but for drops (a full expert drops others where rows are counted by rank) and for what
    `part_notes` names. Of those that differ in accumulate_steps alone there is the one with the fewest parts that
    fit: more are slower.

    Raises:
      ConfigError: no mesh of so many devices is valid.
    """
    found = list(variants(config, machine))
    if not found:
        raise ConfigError(_why_none(config, machine.devices))
    missed = heapq.nlargest(NEAREST, (v for v in found if not v.fits), key=lambda v: v.headroom)
    timed = [
        Candidate(**vars(v), times=step_time(v.config, v.sizes, machine.hardware, machine.topology))
        for v in itertools.chain((v for v in found if v.fits), missed)
    ]
    fit = sorted((c for c in timed if c.fits), key=lambda c: (-c.times.tokens_per_s, -c.headroom))
    return fit + sorted((c for c in timed if not c.fits), key=lambda c: (-c.headroom, -c.times.tokens_per_s))


def flags(before: Config, after: Config) -> list[str]:
    """What turns one config into the other on a command line."""
    old = flat_values(before)
    return [f"--config.{name}={value}" for name, value in flat_values(after).items() if old[name] != value]


def what_would_fit(config: Config, machine: Machine) -> list[str]:
    """Flags of plan.py, each of which alone lets something fit: of each kind the one that changes least."""

    def fits(other: Config, devices: int = machine.devices) -> bool:
        return any(v.fits for v in variants(other, replace(machine, devices=devices, topology=None), lean=True))

    more = next((machine.devices * n for n in MORE_DEVICES if fits(config, machine.devices * n)), 0)
    found = [f"--devices={more}"] if more else []
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


def _less_headroom(nearest: Candidate) -> list[str]:
    """Where the nearest fits, but for what was to stay free."""
    return [f"--headroom={math.floor(100 * nearest.headroom) / 100:g}"] if nearest.headroom >= 0 else []


def _why_none(config: Config, devices: int) -> str:
    """The rule that the simplest mesh breaks."""
    try:
        simplest = replace(config, mesh=MeshConfig(data=devices), train=replace(config.train, accumulate_steps=1))
        check_batch(simplest, devices)
        reason = "its expert groups make no block of the topology"
    except ConfigError as error:
        reason = str(error)
    return f"--search finds no mesh of {devices} devices for this config: {reason}"


def describe(config: Config, machine: Machine) -> tuple[Config, dict[str, Any]]:
    """The best config, or where nothing fits the nearest; and for JSON what plan.py says of the search.

    Raises:
      ConfigError: as `search`.
    """
    found = search(config, machine)
    best = found[0]
    return best.config, {
        "best": {
            "fits": best.fits,
            "flags": flags(config, best.config),
            "notes": part_notes(config, best.config),
            "tokens_per_s": best.times.tokens_per_s,
            "memory": sum(best.memory.values()),
            "headroom": best.headroom,
            "would_fit": [] if best.fits else _less_headroom(best) + what_would_fit(config, machine),
        },
        "searched": {"fit": sum(candidate.fits for candidate in found), "headroom": machine.headroom},
        "search": [_row(candidate) for candidate in found[:ROWS]],
    }


def _row(candidate: Candidate) -> dict[str, Any]:
    mesh, execution = candidate.config.mesh, candidate.config.execution
    return {
        "mesh": candidate.sizes,
        "fsdp": mesh.fsdp,
        "split_experts": mesh.split_experts,
        "exchange": execution.exchange,
        "overlap_chunks": execution.overlap_chunks,
        "remat": execution.remat,
        "accumulate_steps": candidate.config.train.accumulate_steps,
        "fits": candidate.fits,
        "memory": sum(candidate.memory.values()),
        "headroom": candidate.headroom,
        "time": candidate.times.as_dict(),
    }
