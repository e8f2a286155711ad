"""The device mesh: named axes, and the PartitionSpecs that everything else is written in."""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config, ConfigError, check_batch

TENSOR = "tensor"  # splits matrices of attention and dense layers, tables of tokens, and the sequence everywhere else
EXPERT_GROUP = ("node", "expert")  # the ranks that share one set of experts
BATCH = ("data", *EXPERT_GROUP)  # these split the batch
AXES = (*BATCH, TENSOR)
Entry = str | tuple[str, ...] | None  # of a PartitionSpec


def axis_sizes(config: Config, devices: int, fit_batch: bool = True) -> dict[str, int]:
    """Number of ranks on each axis of the config's mesh over so many devices.

    Args:
      fit_batch: whether the mesh must divide data.batch_size, and overlap_chunks a rank's tokens, as training needs.

    Raises:
      ConfigError: more ranks than devices, devices left that make no whole expert group, or a batch that the data axis
        (0 = the devices left) does not divide, or whose share execution.overlap_chunks does not.
    """
    mesh = config.mesh
    data = mesh.data or devices // mesh.model_ranks
    ranks = data * mesh.model_ranks
    if not 0 < ranks <= devices:
        needed = max(1, data) * mesh.model_ranks
        raise ConfigError(
            f"{mesh.describe(max(1, data))} = {needed} ranks must be at most the {devices} devices here; use fewer, or "
            f"--cpu_devices={needed} to simulate"
        )
    if not mesh.data and ranks != devices:
        raise ConfigError(
            f"the {devices} devices must be a multiple of {mesh.describe()} = {mesh.model_ranks}, because "
            f"mesh.data=0 takes all of them; use mesh.data={data} to leave {devices - ranks} idle"
        )
    if fit_batch:
        check_batch(config, data, "" if mesh.data else f" (mesh.data=0 took {data} of {devices} devices)")
    return {"data": data, "node": mesh.node, "expert": mesh.expert, TENSOR: mesh.tensor}


def make_mesh(config: Config, fit_batch: bool = True, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config.mesh` over the first of `devices` (by default this job's), Explicit axes.

    Devices stand by slice or host, so that `tensor`, then `expert`, stay where links are fast, and `node` and `data`
    cross hosts.

    Raises:
      ConfigError: as `axis_sizes`, whose `fit_batch` this is; or expert × tensor ranks that lie across hosts although
        mesh.node is there for that.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices), fit_batch)
    granule = _granules(devices)
    near = sorted(devices, key=lambda device: (granule(device), device.process_index))  # their order is kept inside
    of_granule = list(Counter(map(granule, near)).values())
    block = sizes["expert"] * sizes[TENSOR]
    size = math.gcd(*of_granule)
    if sizes["node"] > 1 and len(of_granule) > 1 and size % block:
        fits = math.gcd(sizes["expert"], size // math.gcd(sizes[TENSOR], size))
        raise ConfigError(
            f"mesh.expert × mesh.tensor = {sizes['expert']} × {sizes[TENSOR]} must divide the {size} "
            f"devices of a host, because mesh.node={sizes['node']} is what crosses hosts; "
            f"use mesh.expert={fits}, mesh.tensor={math.gcd(sizes[TENSOR], size)}"
        )
    ranks = np.asarray(near[: math.prod(sizes.values())]).reshape(tuple(sizes.values()))
    return Mesh(ranks, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _granules(devices: Sequence[Any]) -> Callable[[Any], int]:
    """Maps a device to the group that fast links join, if the runtime knows it: a slice of TPUs, perhaps of several
    hosts, or the GPUs of a host, perhaps of several processes."""
    of_slice = [getattr(device, "slice_index", None) or 0 for device in devices]
    a_process = Counter(device.process_index for device in devices)
    if devices[0].platform == "gpu" and len(set(of_slice)) == 1 and max(a_process.values()) > 1:
        return lambda device: device.process_index  # of GPUs that are only compiled for, each host is a process
    return lambda device: getattr(device, "slice_index", None) or 0


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
    """Number of ranks of the current mesh."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.values())


def batch_ranks() -> int:
    """Number of ranks that the batch is split over; batch sizes are a multiple of it."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in BATCH)


def tensor_ranks() -> int:
    return jax.sharding.get_abstract_mesh().shape.get(TENSOR, 1)


def batch_spec(ndim: int) -> P:
    """Spec of an array whose first dimension is the batch."""
    return P(BATCH, *[None] * (ndim - 1))


def token_spec(ndim: int) -> P:
    """Spec of tokens [B, L, …], on each rank its own; so stands what attention does not need whole."""
    return P(BATCH, TENSOR, *[None] * (ndim - 2))


def split_spec(ndim: int) -> P:
    """Spec of [B, L, F] or [B, L, N, H] in attention or a dense layer: whole sequences, F or heads over `tensor`."""
    return P(BATCH, None, TENSOR, *[None] * (ndim - 3))


def cache_spec() -> P:
    """Spec of pages of keys or values [G, n, p, H]: heads over `tensor`, each batch shard its own pages."""
    return P(TENSOR, BATCH, None, None)


def rank_spec(ndim: int) -> P:
    """Spec of an array whose first dimension is the ranks."""
    return P(AXES, *[None] * (ndim - 1))


def replicated_spec(ndim: int) -> P:
    return P(*[None] * ndim)


def describe_mesh(sizes: Mapping[str, int]) -> str:
    """The axes that split something, as "mesh data 2 × expert 4"."""
    split = " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
    return f"mesh {split}" if split else "one device"


def axes_of(spec: P) -> set[str]:
    """The axes that a spec splits over."""
    return {axis for entry in spec for axis in names(entry)}


def names(entry: Entry) -> tuple[str, ...]:
    """The axes of one entry of a spec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def fully_sharded(shape: Sequence[int], spec: P, sizes: Mapping[str, int]) -> P:
    """Adds the axes that `spec` leaves to the dimensions of a parameter (ZeRO-3: no two ranks keep the same numbers).

    All stand on the first dimension that they divide, behind the axes that it has: parts of a leading dimension are
    gathered where they belong, those of the last have to be moved there. Where there is none, the largest set of them
    that divides one does, and what is left goes on in the same way; an axis that divides no dimension keeps copies.
    """
    left = tuple(axis for axis in AXES if axis not in axes_of(spec))
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    while _parts(sizes, left) > 1:
        sets = [axes for size in range(len(left), 0, -1) for axes in itertools.combinations(left, size)]
        sets.sort(key=lambda axes: -_parts(sizes, axes))  # of equals, the longer first
        found = (
            (axes, dim)
            for axes in sets
            for dim, entry in enumerate(entries)
            if shape[dim] % _parts(sizes, (*names(entry), *axes)) == 0
        )
        axes, dim = next(found, ((), 0))
        if _parts(sizes, axes) == 1:
            break
        entries[dim] = (*names(entries[dim]), *axes)
        left = tuple(axis for axis in left if axis not in axes)
    return P(*entries)


def _parts(sizes: Mapping[str, int], axes: Sequence[str]) -> int:
    """Ranks along these axes together."""
    return math.prod(sizes[axis] for axis in axes)


class Crossing(NamedTuple):
    """Dtypes in which a parameter comes to the ranks that use it, and its gradient back."""

    compute: str  # it is used in
    gather: str  # it is gathered in
    reduce: str  # the ranks' gradients are summed in


class Weight(NamedTuple):
    """A parameter that `on_each_rank` gathers for each rank."""

    value: Array
    crossing: Crossing
    split: tuple[str, ...] = ()  # axes that it stays split over


def can_join(w: Weight) -> bool:
    """Whether a parameter can stand beside one of its shape: it is cast before it is gathered, and each rank has all of
    its last dimension."""
    on_mesh = not jax.sharding.get_abstract_mesh().empty
    return on_mesh and w.value.dtype != w.crossing.gather and not names(spec_of(w.value)[-1])


def join(w: Weight, other: Weight) -> Weight:
    """Two parameters of one shape beside each other along the last dimension, to be gathered as one."""
    return w._replace(value=jnp.concatenate([w.value, other.value], axis=-1))


def gather_weight(w: Array, spec: P, split: tuple[str, ...], crossing: Crossing) -> Array:
    """Gathers a parameter from its shards, inside `shard_map`; its gradient is summed over ranks and scattered back.

    Args:
      spec: how the shards stand.
      split: axes that the result stays split over; its gradient is summed over the ranks of all others.
    """
    return _gather_weight(w, spec, split, crossing, w.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather_weight(w: Array, spec: P, split: tuple[str, ...], crossing: Crossing, dtype: Any) -> Array:
    return _gather(w, spec, split, crossing)


def _gather(w: Array, spec: P, split: tuple[str, ...], crossing: Crossing) -> Array:
    w = w.astype(crossing.gather)
    for dim, axes in _gathered(spec, split):
        w = jax.lax.all_gather(w, axes, axis=dim, tiled=True)
    shared = _shared(spec, split)
    return (jax.lax.pcast(w, shared, to="varying") if shared else w).astype(crossing.compute)


def _scatter_gradient(
    spec: P, split: tuple[str, ...], crossing: Crossing, dtype: Any, _: None, dw: Array
) -> tuple[Array]:
    """The transpose of `_gather`, but for the dtype that the sum is computed in."""
    dw = dw.astype(crossing.reduce)
    if shared := _shared(spec, split):
        dw = jax.lax.psum(dw, shared)
    for dim, axes in reversed(_gathered(spec, split)):
        dw = jax.lax.psum_scatter(dw, axes, scatter_dimension=dim, tiled=True)
    if dw.dtype != dtype:
        # XLA:TPU moves such a sum out of the loop over a batch's parts, and fails on the cast behind it.
        dw = jax.lax.optimization_barrier(dw)
    return (dw.astype(dtype),)


# Not by calling `_gather_weight`: `all_but_gathered` has to see what is gathered.
_gather_weight.defvjp(lambda w, spec, split, crossing, _: (_gather(w, spec, split, crossing), None), _scatter_gradient)


def _gathered(spec: P, split: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    """Dimensions that are gathered, and the axes that each is gathered over."""
    sizes = jax.sharding.get_abstract_mesh().shape
    over = [(dim, tuple(axis for axis in names(entry) if axis not in split)) for dim, entry in enumerate(spec)]
    return [(dim, axes) for dim, axes in over if math.prod(sizes[axis] for axis in axes) > 1]


def _shared(spec: P, split: tuple[str, ...]) -> tuple[str, ...]:
    """Axes whose ranks all hold what this one does."""
    return tuple(axis for axis in AXES if axis not in axes_of(spec) and axis not in split)


def all_but_gathered(primitive: Any, *inputs: Any, **parameters: Any) -> bool:
    """A policy of `jax.checkpoint`: keeps everything but gathered parameters, which are gathered again in the backward
    pass, and wider copies.

    Ranks of `tensor` gather the sequence, which is kept. What the exchange gathers is kept by its name.
    """
    if primitive.name == "convert_element_type":  # of what was gathered narrowly, or a norm's input: cheap to do again
        return inputs[0].dtype.itemsize >= parameters["new_dtype"].itemsize
    return not (primitive.name == "all_gather" and set(names(parameters["axis_name"])) != {TENSOR})


def spec_of(array: Array) -> P:
    """The PartitionSpec of an array on the current mesh."""
    return jax.typeof(array).sharding.spec


def platform() -> str:
    """cpu, gpu or tpu: the platform of the current mesh's devices, which may only be compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def device_kind() -> str:
    """The kind of the current mesh's devices, such as 'TPU v5 lite' for v5e."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


def on_each_rank(
    function: Callable[..., Any],
    arrays: Sequence[Array],
    weights: Any = (),
    in_spec: Callable[[int], P] | Sequence[P] = token_spec,
    out_specs: Any = None,
) -> Any:
    """Calls `function(*arrays, *weights)` on each rank, with its part of the arrays, and with gathered weights in their
    dtype of computation.

    Without a mesh, it is called with the arrays themselves.

    Args:
      weights: a list or tuple of `Weight`, or a tree of them, which `function` takes as one last argument.
      in_spec: how the arrays stand, each, or from their number of dimensions.
      out_specs: by default a [B, L, D] of tokens.
    """
    weights = tuple(weights) if isinstance(weights, list | tuple) else (weights,)
    leaves, tree = jax.tree.flatten(weights, is_leaf=lambda node: isinstance(node, Weight))
    if jax.sharding.get_abstract_mesh().empty:
        return function(*arrays, *jax.tree.unflatten(tree, [w.value.astype(w.crossing.compute) for w in leaves]))
    specs = [spec_of(w.value) for w in leaves]
    array_specs = [in_spec(array.ndim) for array in arrays] if callable(in_spec) else in_spec

    def on_rank(*values: Array) -> Any:
        shards = zip(values[len(arrays) :], specs, leaves, strict=True)
        gathered = [gather_weight(shard, spec, w.split, w.crossing) for shard, spec, w in shards]
        return function(*values[: len(arrays)], *jax.tree.unflatten(tree, gathered))

    return jax.shard_map(
        on_rank,
        in_specs=(*array_specs, *specs),
        out_specs=token_spec(3) if out_specs is None else out_specs,
        axis_names=set(AXES),
    )(*arrays, *(w.value for w in leaves))


def place(values: Any, spec: P) -> Any:
    """Puts a NumPy array that every process holds whole, or a tree of them, on the current mesh."""
    sharding = NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.tree.map(lambda v: jax.make_array_from_callback(v.shape, sharding, v.__getitem__), values)


def placed(tree: Any, mesh: Mesh) -> Any:
    """Puts the shardings of an abstract tree on `mesh`, whose devices `jax.eval_shape` does not know."""

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding else P()  # scalars made without an input have no sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)
