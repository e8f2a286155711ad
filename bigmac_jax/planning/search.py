"""Which mesh and which settings are fastest, by the cost model; and the configurations of a sweep."""

import dataclasses
import difflib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bigmac_jax import counts
from bigmac_jax.config import Config, ConfigError, MeshConfig
from bigmac_jax.config.reading import field_values, overridden
from bigmac_jax.counts import Sizes
from bigmac_jax.mesh import axis_sizes
from bigmac_jax.model.moe import predicted_seconds
from bigmac_jax.planning.cluster import mesh_group
from bigmac_jax.planning.cost import Times, parameters, step_time
from bigmac_jax.planning.hardware import Hardware
from bigmac_jax.planning.hardware.torus import Shape

OVERLAP_CHUNKS = (1, 2, 4, 8)
ACCUMULATE_STEPS = (1, 2, 4, 8)
REMAT = ("none", "exchange", "layer")


@dataclass(frozen=True)
class Candidate:
    """Attributes:
    sizes: ranks by axis of the mesh.
    memory: bytes of one rank by part (`counts.memory`).
    fits: whether the machine has as many.
    """

    config: Config
    sizes: Sizes
    times: Times
    memory: dict[str, int]
    fits: bool


def search(config: Config, devices: int, hardware: Hardware, topology: Shape | None = None) -> list[Candidate]:
    """All ways to run `config` on all of `devices`; those that fit into memory first, then by tokens a second.

    They differ in mesh, exchange, overlap_chunks, remat and accumulate_steps, none of which changes what is computed
    but for drops: a full expert drops others where rows are counted by rank.
    """
    found = []
    for variant in _variants(config, devices, hardware):
        try:
            sizes = axis_sizes(variant, devices)
            times = step_time(variant, sizes, hardware, topology)
        except ConfigError:
            continue
        group = mesh_group(sizes, hardware)
        count = parameters(variant, sizes)
        memory = counts.memory(variant, devices, group, count)
        found.append(Candidate(variant, sizes, times, memory, sum(memory.values()) <= hardware.memory_bytes))
    return sorted(found, key=lambda c: (not c.fits, -c.times.tokens_per_s))


def _variants(config: Config, devices: int, hardware: Hardware) -> Iterator[Config]:
    """Those that are valid so far: a batch that the ranks don't divide is left to `axis_sizes`."""
    shards = devices // config.mesh.tensor
    for expert_ranks in _divisors(shards):
        for node in _divisors(expert_ranks):
            mesh = replace(config.mesh, data=shards // expert_ranks, node=node, expert=expert_ranks // node)
            for accumulate, remat in itertools.product(ACCUMULATE_STEPS, REMAT):
                for name, chunks in _exchanges(config, mesh, hardware):
                    try:
                        yield replace(
                            config,
                            mesh=mesh,
                            execution=replace(config.execution, exchange=name, overlap_chunks=chunks, remat=remat),
                            train=replace(config.train, accumulate_steps=accumulate),
                        )
                    except ConfigError:
                        continue


def _exchanges(config: Config, mesh: MeshConfig, hardware: Hardware) -> Iterator[tuple[str, int]]:
    """Strategies and chunks that differ on this mesh."""
    m = config.model
    if mesh.expert_ranks == 1:
        yield config.execution.exchange, 1
        return
    if not m.is_moe:  # on any other mesh it runs as it does on this one
        return
    group = mesh_group({"data": mesh.data, "node": mesh.node, "expert": mesh.expert}, hardware)
    names = predicted_seconds(config, m.capacity_factor, 1, group)  # of those that the machine has
    two_levels = mesh.node > 1 and mesh.expert > 1
    for name in names:
        # On one level a hierarchical exchange is `dedup`; the others don't look at levels.
        if (name == "hierarchical") == two_levels and (two_levels or mesh.node == 1):
            yield from ((name, chunks) for chunks in OVERLAP_CHUNKS)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def sweep(config: Config, axes: dict[str, list[str]]) -> list[Config]:
    """Every combination of values, as the command line spells them; the last axis changes fastest.

    Args:
      axes: values by field, which may be named without its section: {"structure": ["bigmac", "fine_grained"], …}.

    Raises:
      ConfigError: a name that is no field or several, a value of the wrong type, or a combination that is invalid.
    """
    names = [_field(config, name) for name in axes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{twice[0]} is swept twice; name it once, with all of its values")
    return [
        overridden(dataclasses.asdict(config), [f"{name}={value}" for name, value in zip(names, values, strict=True)])
        for values in itertools.product(*axes.values())
    ]


def _field(config: Config, name: str) -> str:
    """The full name, as model.top_k for top_k."""
    known = [full for full, _ in field_values(dataclasses.asdict(config))]
    if name in known:
        return name
    meant = [full for full in known if full.rpartition(".")[2] == name]
    if not meant:
        short = [full.rpartition(".")[2] for full in known]
        close = difflib.get_close_matches(name, known + short, n=1, cutoff=0.5) or ["a field such as model.top_k"]
        raise ConfigError(f"{name!r} is not a field of the config; did you mean {close[0]}?")
    if len(meant) > 1:
        raise ConfigError(f"{name!r} may be {' or '.join(meant)}; use the full name")
    return meant[0]
