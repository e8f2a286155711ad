"""The device mesh: named axes, and the PartitionSpecs that everything else is written in."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config, ConfigError

AXES = ("data", "node", "expert")
EXPERT_GROUP = ("node", "expert")  # the ranks that share one set of experts
BATCH = AXES  # every axis splits the batch


def axis_sizes(config: Config, devices: int, fit_batch: bool = True) -> dict[str, int]:
    """How many ranks stand on each axis, on so many devices.

    Args:
      fit_batch: whether the mesh must divide data.batch_size, and overlap_chunks a rank's tokens, as training needs.

    Raises:
      ConfigError: more ranks than devices, devices left that make no whole expert group, or a batch that the data axis
        (0 = the devices left) does not divide, or whose share model.overlap_chunks does not.
    """
    mesh = config.mesh
    data = mesh.data or devices // mesh.expert_ranks
    ranks = data * mesh.expert_ranks
    if not 0 < ranks <= devices:
        needed = max(1, data) * mesh.expert_ranks
        raise ConfigError(
            f"mesh.data × mesh.node × mesh.expert = {max(1, data)} × {mesh.node} × {mesh.expert} = {needed} ranks "
            f"must be at most the {devices} devices here; use fewer, or --cpu_devices={needed} to simulate"
        )
    if not mesh.data and ranks != devices:
        raise ConfigError(
            f"the {devices} devices must be a multiple of mesh.node × mesh.expert = {mesh.expert_ranks}, because "
            f"mesh.data=0 takes all of them; use mesh.data={data} to leave {devices - ranks} idle"
        )
    shards = ranks * config.train.accumulate_steps
    if fit_batch and config.data.batch_size % shards:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} must be a multiple of mesh.data × mesh.node × mesh.expert × "
            f"train.accumulate_steps = {shards} (mesh.data={mesh.data} took {data} of {devices} devices); "
            f"use {-(-config.data.batch_size // shards) * shards}, or set mesh.data"
        )
    tokens, chunks = config.data.batch_size * config.data.sequence_length // shards, config.model.overlap_chunks
    if fit_batch and tokens % chunks:
        raise ConfigError(
            f"model.overlap_chunks={chunks} must divide the {tokens} tokens of a rank (mesh.data={mesh.data} took "
            f"{data} of {devices} devices); use {math.gcd(chunks, tokens)}"
        )
    return {"data": data, "node": mesh.node, "expert": mesh.expert}


def make_mesh(config: Config, fit_batch: bool = True, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config.mesh` over the first of `devices` (by default this job's), Explicit axes.

    Raises:
      ConfigError: as `axis_sizes`, whose `fit_batch` this is.
    """
    devices = jax.devices() if devices is None else devices
    sizes = tuple(axis_sizes(config, len(devices), fit_batch).values())
    ranks = np.asarray(devices[: math.prod(sizes)]).reshape(sizes)
    return Mesh(ranks, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


class ExpertGroup(NamedTuple):
    """The ranks that share one set of experts, and what they are."""

    sizes: tuple[int, int]  # machines, ranks of a machine
    platform: str  # cpu, gpu or tpu
    device_kind: str  # such as 'TPU v5 lite', for v5e


def current_group() -> ExpertGroup:
    shape = jax.sharding.get_abstract_mesh().shape
    node, expert = EXPERT_GROUP
    return ExpertGroup((shape[node], shape[expert]), platform(), device_kind())


def ranks() -> int:
    """Of the current mesh."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.values())


def batch_spec(ndim: int) -> P:
    """An array whose first dimension is the batch."""
    return P(BATCH, *[None] * (ndim - 1))


def expert_spec(ndim: int) -> P:
    """A parameter whose first dimension is the experts."""
    return P(EXPERT_GROUP, *[None] * (ndim - 1))


def replicated_spec(ndim: int) -> P:
    return P(*[None] * ndim)


def platform() -> str:
    """cpu, gpu or tpu: of the current mesh's devices, which may be those of a machine that is only compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def device_kind() -> str:
    """Such as 'TPU v5 lite', for v5e: of the same devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


def on_each_rank(function: Callable[..., Any], out_specs: Any, *arrays: jax.Array) -> Any:
    """`function` of each rank's rows of arrays whose first dimension is the batch; without a mesh, of the arrays."""
    if jax.sharding.get_abstract_mesh().empty:
        return function(*arrays)
    in_specs = tuple(batch_spec(array.ndim) for array in arrays)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(BATCH))(*arrays)


def placed(tree: Any, mesh: Mesh) -> Any:
    """The abstract tree of a `jax.eval_shape` with its shardings on real devices (eval_shape's stand on none)."""

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding else P()  # scalars made without an input have no sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)
