"""Experts in host memory: of all layers they stand there, and of K layers on the device, in a ring. While a layer
computes, what the layer K behind it needs is copied (SE-MoE, arXiv 2205.10034). Or of every layer those stand on the
device that are used most (`resident_experts`).

Y layers with experts, in the order in which they are computed; K of the ring, in P slots.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config, ExecutionConfig
from bigmac_jax.config.errors import require
from bigmac_jax.model.mesh import HOST, check_host_memory, describe_mesh, spec_of
from bigmac_jax.model.moe import MoE
from bigmac_jax.model.parameters import leaf_name
from bigmac_jax.model.resident_experts import Held, compute_held, start_held


class Ring(NamedTuple):
    """The experts on the device: those of the K layers that are computed next, the first of the model's behind its
    last."""

    slots: Any  # the tree of a layer's parameters, each [P, …]
    layer: Array  # int32: the layer that is computed next
    slot: Array  # int32: where it stands; those behind it follow, and begin again at 0


def start(store: Any, execution: ExecutionConfig) -> Ring | Held:
    """What stands on the device before the first layer is computed.

    Args:
      store: the tree of a layer's parameters, each [Y, …] in host memory.
    """
    if execution.resident_experts:
        return start_held(store, execution.resident_experts)
    return start_ring(store, execution.resident_layers)


def start_ring(store: Any, layers: int) -> Ring:
    """The ring of so many layers before the first one is computed.

    Args:
      store: the tree of a layer's parameters, each [Y, …] in host memory.
    """
    # One slot alone would be no ring to a compiler: it copies into what a layer has read, and so behind the layer.
    slots = max(2, layers)
    first = jax.tree.map(lambda w: jax.device_put(w[:slots], jax.memory.Space.Device), store)
    return Ring(first, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def compute_layer(
    store: Any,
    on_device: Ring | Held | None,
    execution: ExecutionConfig,
    layer: Any,
    compute: Callable[[Any], tuple[Any, ...]],
    dequantize: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[tuple[Any, ...], Ring | Held | None]:
    """Calls `compute(layer)`, with experts that stand on the device if the layer's own are in host memory → what it
    returns, and what stands there then.

    Args:
      compute: a layer → what it makes of its tokens, others, and what its MoE reports.
      dequantize: makes parameters that are multiplied of copied ones, where `compute` does not see these.
    """
    if on_device is None or not lacks_experts(layer):
        return compute(layer), on_device
    if isinstance(on_device, Held):
        return compute_held(store, on_device, layer, compute, dequantize)
    return compute_with_ring(store, on_device, execution.resident_layers, layer, compute)


def compute_with_ring(
    store: Any, ring: Ring, layers: int, layer: Any, compute: Callable[[Any], tuple[Any, ...]]
) -> tuple[tuple[Any, ...], Ring]:
    """Calls `compute(layer)` with the experts of the ring, and copies what the ring needs next meanwhile → what it
    returns, and the ring.

    Args:
      layers: K.
      compute: a layer → what it makes of its tokens, and others.
    """
    (Y, P), (_, at, slot) = (jax.tree.leaves(tree)[0].shape[0] for tree in (store, ring.slots)), ring

    def fetch(w: Array) -> Array:
        row = jax.lax.dynamic_index_in_dim(w, (at + layers) % Y, keepdims=False)
        return jax.device_put(row, jax.memory.Space.Device)

    # Nothing here depends on what is computed, so that the copy starts with the layer.
    coming = jax.tree.map(fetch, store)
    own = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, slot, keepdims=False), ring.slots)
    made, *others = compute(with_experts(layer, own))
    # What has come takes a slot when the layer has been computed, and not before, or the products would wait for the
    # copy: the layer's own, which is free then.
    made, coming = jax.lax.optimization_barrier((made, coming))
    free = (slot + layers) % P
    slots = jax.tree.map(lambda w, row: jax.lax.dynamic_update_index_in_dim(w, row, free, 0), ring.slots, coming)
    return (made, *others), Ring(slots, (at + 1) % Y, (slot + 1) % P)


def lacks_experts(layer: Any) -> bool:
    """Whether the experts of a layer, or of a stack of layers, are elsewhere."""
    mlp = getattr(layer, "mlp", None)
    return isinstance(mlp, MoE) and mlp.experts is None


def with_experts(layer: Any, experts: Any) -> Any:
    """The layer with other experts; None takes them away. The layer that is given stays."""
    layer, mlp = copy.copy(layer), copy.copy(layer.mlp)
    mlp.experts, layer.mlp = experts, mlp
    return layer


def is_resident(config: Config) -> bool:
    """Whether experts stand in host memory: execution.resident_layers are fewer than the layers with experts, or
    resident_experts than a layer's experts."""
    execution, m = config.execution, config.model
    return m.is_moe and (0 < execution.resident_layers < m.moe_layers or holds_experts(config))


def holds_experts(config: Config) -> bool:
    """Whether those experts of every layer stand on the device that are used most, and not all."""
    return 0 < config.execution.resident_experts < config.model.expert_count


def with_resident(config: Config, layers: int | None = None, experts: int | None = None) -> Config:
    """The config with other execution.resident_layers and resident_experts; None keeps its own.

    Raises:
      ConfigError: both.
    """
    asked = {"resident_layers": layers, "resident_experts": experts}
    changes: Any = {name: value for name, value in asked.items() if value is not None}
    return (
        dataclasses.replace(config, execution=dataclasses.replace(config.execution, **changes)) if changes else config
    )


def check_resident(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError where execution.resident_layers or resident_experts asks for what the model or the devices of
    a mesh do not have; nothing is compiled."""
    execution, m = config.execution, config.model
    asked = {"resident_layers": execution.resident_layers, "resident_experts": execution.resident_experts}
    for name, value in asked.items():
        if not value:
            continue
        require(m.is_moe, f"{name}={value} is of experts, and model.structure={m.structure} has none; use {name}=0")
        check_host_memory(mesh, f"{name}={value}", f"{name}=0")
    if holds_experts(config):
        check_one_rank(config, mesh.shape)


def check_one_rank(config: Config, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError where execution.resident_experts would be of several ranks.

    Args:
      sizes: of the mesh's axes.
    """
    ranks = math.prod(sizes.values())
    require(
        ranks == 1,
        f"resident_experts={config.execution.resident_experts} is for one device, and this mesh has {ranks} "
        f"({describe_mesh(sizes)}); use resident_layers=1, or a mesh of one",
    )


def order_of_layers(config: Config) -> list[tuple[int, int]]:
    """Lists for each layer with experts, in the order in which they are computed, its stack's number among those with
    experts and its place there."""
    stacks = [stack.experts for stack in config.model.stacks if stack.experts]
    places = {layer: (number, place) for number, stack in enumerate(stacks) for place, layer in enumerate(stack)}
    return [places[layer] for layer in range(len(places))]


def hold(config: Config, model: Any) -> Any:
    """The model with its experts in host memory, as an evaluation computes it; arrays that are there are shared. The
    model may have been made with other execution.resident_layers and resident_experts. The model itself, where all of
    its experts stay on the device."""
    if not is_resident(config):
        return model
    model, execution = copy.copy(model), config.execution
    model.config = with_resident(model.config, execution.resident_layers, execution.resident_experts)
    stacks = [stack.name for stack in config.model.stacks if stack.experts]
    experts = [getattr(model, name).mlp.experts for name in stacks]
    leaves, trees = zip(*map(jax.tree.flatten, experts), strict=True)
    order = order_of_layers(config)
    held = [stack_in_host(arrays, order) for arrays in zip(*leaves, strict=True)]
    model.resident = nnx.data(jax.tree.unflatten(trees[0], held))
    for name in stacks:
        setattr(model, name, with_experts(getattr(model, name), None))
    return model


def stack_in_host(
    arrays: Sequence[Array], order: Sequence[tuple[int, int]], convert: Callable[[Array], Any] | None = None
) -> Any:
    """A parameter of all layers in host memory, [Y, …]; by `convert`, from one layer's array to a tree, a tree of them.
    A device holds one layer of it at a time.

    Args:
      arrays: of each stack.
      order: as of `order_of_layers`.
    """
    if convert is None and len(arrays) == 1:  # as it stands
        return jax.device_put(arrays[0], host_sharding(arrays[0]))
    rows = (take_layer(arrays[stack], place) for stack, place in order)
    if isinstance(arrays[0], jax.core.Tracer):  # in `jax.eval_shape`, which asks for shapes alone
        row = next(rows)
        return jax.tree.map(lambda v: jnp.stack([v] * len(order)), convert(row) if convert else row)
    return _write_rows(map(convert or (lambda row: row), rows), len(order))


def in_host(array: Array) -> bool:
    """Whether an array stands in host memory."""
    return array.sharding.memory_kind == HOST


@jax.jit
def take_layer(w: Array, place: Any) -> Array:
    """One layer of a parameter [layers, …], on the device."""
    row = jax.lax.dynamic_index_in_dim(w, place, keepdims=False)
    return jax.device_put(row, jax.memory.Space.Device)


def _write_rows(rows: Iterable[Any], count: int) -> Any:
    """Stacks rows, which are trees of arrays, in host memory, one at a time."""
    tree, written, shardings, shapes = None, list[dict[Any, np.ndarray]](), list[NamedSharding](), list[Any]()
    for place, row in enumerate(rows):
        leaves, tree = jax.tree.flatten(row)
        if not place:
            shapes = [(count, *leaf.shape) for leaf in leaves]
            shardings = [
                NamedSharding(leaf.sharding.mesh, P(None, *spec_of(leaf)), memory_kind=HOST) for leaf in leaves
            ]
            written = [
                {s.device: np.empty((count, *s.data.shape), s.data.dtype) for s in leaf.addressable_shards}
                for leaf in leaves
            ]
        for leaf, shards in zip(leaves, written, strict=True):
            for shard in leaf.addressable_shards:
                shards[shard.device][place] = shard.data
    assert tree is not None
    stacked = []
    for shape, sharding, shards in zip(shapes, shardings, written, strict=True):
        pieces = [
            jax.device_put(shard, jax.sharding.SingleDeviceSharding(device, memory_kind=HOST))
            for device, shard in shards.items()
        ]
        stacked.append(jax.make_array_from_single_device_arrays(shape, sharding, pieces))
        shards.clear()
    return jax.tree.unflatten(tree, stacked)


def host_sharding(array: Array) -> NamedSharding:
    """The array's sharding, in host memory."""
    return NamedSharding(jax.sharding.get_mesh(), spec_of(array), memory_kind=HOST)


def experts_in_host(abstract: Any, mesh: Mesh) -> Any:
    """The abstract parameters of a model, those of its layers' experts to be read into host memory. Next-token modules
    keep theirs on the device."""

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = leaf_name(path).split(".")
        if "mtp" in names or names[-3:-1] != ["mlp", "experts"]:
            return leaf
        sharding = NamedSharding(mesh, leaf.sharding.spec, memory_kind=HOST)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, abstract)


def placed_in_host(tree: Any, mesh: Mesh) -> Any:
    """Puts an abstract tree into the host memory of a mesh, whose devices may only be compiled for: the sharding is of
    the abstract mesh, for GPUs that are not there know no memory kinds."""

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh.abstract_mesh, leaf.sharding.spec, memory_kind=HOST)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree)
