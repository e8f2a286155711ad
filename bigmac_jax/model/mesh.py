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
from bigmac_jax.config.errors import near_divisors

REPLICA = "replica"  # each holds the parameters, sharded over the other axes, and sums gradients with the others once
TENSOR = "tensor"  # splits matrices of attention and dense layers, tables of tokens, and the sequence everywhere else
EXPERT_GROUP = ("node", "expert")  # the ranks that share one set of experts
BATCH = (REPLICA, "data", *EXPERT_GROUP)  # these split the batch
AXES = (*BATCH, TENSOR)
INSIDE = AXES[1:]  # a replica
HOST = "pinned_host"  # jax's name of the memory beside a device that it copies from by itself
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
    data = mesh.data or devices // mesh.fixed_ranks
    ranks = data * mesh.fixed_ranks
    if not 0 < ranks <= devices:
        needed = max(1, data) * mesh.fixed_ranks
        raise ConfigError(
            f"{mesh.describe(max(1, data))} = {needed} ranks must be at most the {devices} devices here; use fewer, or "
            f"--cpu_devices={needed} to simulate"
        )
    if not mesh.data and ranks != devices:
        raise ConfigError(
            f"the {devices} devices must be a multiple of {mesh.describe()} = {mesh.fixed_ranks}, because "
            f"mesh.data=0 takes all of them; use mesh.data={data} to leave {devices - ranks} idle"
        )
    if fit_batch:
        check_batch(config, data, "" if mesh.data else f" (mesh.data=0 took {data} of {devices} devices)")
    return {REPLICA: mesh.replica, "data": data, "node": mesh.node, "expert": mesh.expert, TENSOR: mesh.tensor}


def make_mesh(config: Config, fit_batch: bool = True, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config.mesh` over the first of `devices` (by default this job's), Explicit axes.

    Devices stand by slice or host, so that `tensor`, then `expert`, stay where links are fast, and `node`, `data` and
    `replica` cross hosts; chips of a slice by where they are, along its first axis first, or XLA finds no ring through
    all of a v5p slice, and gathers by sums of zeros, which send twice as much.

    Raises:
      ConfigError: as `axis_sizes`, whose `fit_batch` this is; or expert × tensor ranks that lie across hosts although
        mesh.node is there for that, or across slices; or replicas that are parts of several.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices), fit_batch)
    granule = _granules(devices)
    near = sorted(devices, key=lambda device: (granule(device), _place(device)))  # their order is kept inside
    of_granule = list(Counter(map(granule, near)).values())
    if len(of_granule) > 1:
        check_links(sizes, math.gcd(*of_granule), devices[0].platform)
    ranks = np.asarray(near[: math.prod(sizes.values())]).reshape(tuple(sizes.values()))
    return Mesh(ranks, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def check_links(sizes: Mapping[str, int], size: int, platform: str) -> None:
    """Refuses a mesh that would put on slow links, between slices or hosts of `size` devices, what is not for them."""
    near = "slice" if platform == "tpu" else "host"
    expert, tensor, replicas = sizes["expert"], sizes[TENSOR], sizes[REPLICA]
    block, replica = expert * tensor, math.prod(sizes.values()) // replicas
    rule = f"mesh.expert × mesh.tensor = {expert} × {tensor} must divide the {size} devices of a {near}"
    fits = math.gcd(expert, size // math.gcd(tensor, size))
    fix = f"mesh.expert={fits}, mesh.tensor={math.gcd(tensor, size)}"
    if sizes["node"] > 1 and size % block:
        raise ConfigError(f"{rule}, because mesh.node={sizes['node']} is what crosses {near}s; use {fix}")
    if platform == "tpu" and size % block:
        raise ConfigError(
            f"{rule}, or rows would cross {near}s; use {fix}, and mesh.node={expert // fits} if they are to"
        )
    if replicas > 1 and replicas * replica > size and replica % size and size % replica:
        raise ConfigError(
            f"mesh.replica={replicas} makes replicas of {replica} devices, which must be a multiple of the {size} of a "
            f"{near}, or divide them; use mesh.replica={near_divisors(replicas * replica // size, replicas)}"
        )


def slices(mesh: Mesh) -> int:
    """Slices of TPUs that one replica of the mesh lies on; 1 for other devices."""
    if mesh.devices.flat[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", None) or 0 for device in mesh.devices[0].flat})


def _place(device: Any) -> tuple[int, ...]:
    """What orders the devices of a slice, or of all hosts: a TPU's coordinates, the last first; of others the
    process."""
    coordinates = getattr(device, "coords", None) if device.platform == "tpu" else None
    return tuple(coordinates)[::-1] if coordinates else (device.process_index,)


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


def replicas() -> int:
    """Number of replicas of the current mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(REPLICA, 1)


def per_replica(v: Array) -> Array:
    """Splits the first dimension, of the batch or of all ranks, into [replicas, what each has of it]: what is summed of
    it then stays with its replica."""
    shape = replicas(), v.shape[0] // replicas(), *v.shape[1:]
    if jax.sharding.get_abstract_mesh().empty:
        return v.reshape(shape)
    first, *others = spec_of(v)
    return v.reshape(shape, out_sharding=P(REPLICA, tuple(axis for axis in names(first) if axis != REPLICA), *others))


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


def fully_sharded(
    shape: Sequence[int], spec: P, sizes: Mapping[str, int], over: Sequence[str] = INSIDE, pads: bool = False
) -> P:
    """Adds the axes of `over` that `spec` leaves to the dimensions of a parameter (ZeRO-3: no two ranks of a replica
    keep the same numbers).

    All stand on the first dimension that they divide, behind the axes that it has: parts of a leading dimension are
    gathered where they belong, those of the last have to be moved there. Where there is none, the largest set of them
    that divides one does, and what is left goes on in the same way; an axis that divides no dimension keeps copies.

    Args:
      pads: instead of copies, dimensions may be split that the axes do not divide (`padded_shape`), so that a rank
        keeps the fewest numbers.
    """
    left = tuple(axis for axis in over if axis not in axes_of(spec))
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
    copies = _parts(sizes, left)
    if not pads or copies == 1:
        return P(*entries)
    padded = _split_with_padding(tuple(shape), spec, tuple((axis, sizes[axis]) for axis in over))
    return min(P(*entries), padded, key=lambda found: math.prod(shard_shape(shape, found, sizes)))


@functools.lru_cache(maxsize=4096)
def _split_with_padding(shape: tuple[int, ...], spec: P, axes: tuple[tuple[str, int], ...]) -> P:
    """The split over all axes that `spec` leaves of which a rank keeps the fewest numbers; of equals, that of the
    fewest dimensions, and the first of them. A dimension that `spec` splits already gets no zeros: its parts have to
    stay where they are."""
    sizes = dict(axes)
    left = [axis for axis, size in axes if size > 1 and axis not in axes_of(spec)]
    own = [*spec, *[None] * (len(shape) - len(spec))]

    def split(dims: Sequence[int]) -> P:
        added = [tuple(axis for axis, at in zip(left, dims, strict=True) if at == dim) for dim in range(len(shape))]
        return P(*(entry if not more else (*names(entry), *more) for entry, more in zip(own, added, strict=True)))

    free = [dim for dim, entry in enumerate(own) if not names(entry)]
    ways = sorted(itertools.product(free, repeat=len(left)), key=lambda dims: (len(set(dims)), dims))
    return min(map(split, ways), key=lambda found: math.prod(shard_shape(shape, found, sizes)), default=spec)


def shard_shape(shape: Sequence[int], spec: P, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of what each rank holds of an array, with zeros where ranks do not divide a dimension."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    return tuple(-(-n // _parts(sizes, names(entry))) for n, entry in zip(shape, entries, strict=True))


def padded_shape(shape: Sequence[int], spec: P, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape with zeros behind each dimension, so that ranks divide it."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    here = shard_shape(shape, spec, sizes)
    return tuple(n * _parts(sizes, names(entry)) for n, entry in zip(here, entries, strict=True))


def _parts(sizes: Mapping[str, int], axes: Sequence[str]) -> int:
    """Ranks along these axes together."""
    return math.prod(sizes[axis] for axis in axes)


def spec_of(array: Array) -> P:
    """The PartitionSpec of an array on the current mesh."""
    return jax.typeof(array).sharding.spec


def join(*arrays: Array) -> Array:
    """Concatenates arrays along their first dimension, which is split over nothing."""
    ends = list(itertools.accumulate(map(len, arrays)))
    return _put_together(tuple(zip([0, *ends[:-1]], ends, [1] * len(ends), strict=True)), arrays)


def interleave(*arrays: Array) -> Array:
    """Joins arrays [Y, …] to one whose rows are in turn of each."""
    rows = len(arrays) * len(arrays[0])
    return _put_together(tuple((place, rows, len(arrays)) for place in range(len(arrays))), arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _put_together(places: tuple[tuple[int, int, int], ...], arrays: tuple[Array, ...]) -> Array:
    """Each array's rows stand at its place (first, end, step) of the whole."""
    if places[0][2] == 1:
        return jnp.concatenate(arrays)
    turns = jnp.stack(arrays, axis=1)
    # The sharding is given, because a reshape of dimensions of 1 forgets how the others are split.
    shape = turns.shape[0] * turns.shape[1], *turns.shape[2:]
    return jnp.reshape(turns, shape, out_sharding=spec_of(arrays[0]))


def _take_apart(places: tuple[tuple[int, int, int], ...], _: None, dy: Array) -> tuple[tuple[Array, ...]]:
    parts = (dy[first:end:step] for first, end, step in places)
    if jax.sharding.get_abstract_mesh().empty:
        return (tuple(parts),)
    # On a mesh of one rank, jax 0.12 forgets in a slice how the whole is sharded.
    return (tuple(jax.sharding.reshard(part, spec_of(dy)) for part in parts),)


_put_together.defvjp(lambda places, arrays: (_put_together(places, arrays), None), _take_apart)


def platform() -> str:
    """cpu, gpu or tpu: the platform of the current mesh's devices, which may only be compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def check_host_memory(mesh: Mesh, asked: str, instead: str) -> None:
    """Raises ConfigError if the mesh's devices reach no host memory; one that is only compiled for doesn't say.

    Args:
      asked: what needs it.
      instead: what to use without.
    """
    device = mesh.devices.flat[0]
    try:
        kinds = [memory.kind for memory in device.addressable_memories()]
    except jax.errors.JaxRuntimeError:
        return
    if kinds and HOST not in kinds:
        raise ConfigError(
            f"{asked} needs {HOST} memory, and {device.device_kind} has {', '.join(kinds)} alone; use {instead}"
        )


def device_kind() -> str:
    """The kind of the current mesh's devices, such as 'TPU v5 lite' for v5e."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


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
