"""Training state in host memory: the optimizer's moments (execution.offload_optimizer), updated layer by layer.

The device holds the moments of a layer at a time: it copies them there, updates them beside the layer's parameters, and
copies them back. Parameters that are of no layer, tables of tokens and the last norm, are one more such step.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding

from bigmac_jax.config import Config
from bigmac_jax.model.mesh import HOST, check_host_memory
from bigmac_jax.model.parameters import Declaration, map_declared

Update = Callable[[Any, Any, Any], tuple[Any, Any]]  # gradients, state, parameters → parameters, state


def check_offload(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError if something is to be kept in host memory, and the mesh's devices reach none."""
    execution = config.execution
    fields = {"remat=offload": execution.remat == "offload", "offload_optimizer=True": execution.offload_optimizer}
    asked = " and ".join(f"execution.{field}" for field, on in fields.items() if on)
    if asked:
        check_host_memory(mesh, asked, "execution.remat=layer and execution.offload_optimizer=False")


def _moves(of: Declaration, leaf: Any) -> bool:
    """Whether a moment, or a layer's part of it, stands in host memory."""
    sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf).sharding
    device = getattr(sharding.mesh, "abstract_mesh", sharding.mesh).abstract_device
    if device is None or device.platform != "tpu":
        return True
    return of.sliced_in_host_memory(sharding.shard_shape(leaf.shape)[-1])


def in_host_memory(opt_state: Any) -> Any:
    """The abstract state of an optimizer with its moments in host memory; counts stay on the device."""

    def place(of: Declaration, leaf: Any) -> Any:
        if not _moves(of, leaf):
            return leaf
        sharding = leaf.sharding.with_memory_kind(HOST)
        if sharding.memory_kind != HOST:  # jax knows no memory of devices that are only compiled for
            sharding = NamedSharding(sharding.mesh.abstract_mesh, sharding.spec, memory_kind=HOST)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return map_declared(place, opt_state)


def on_device(leaf: Any) -> Any:
    """An array, or an abstract one, in the devices' memory."""
    if leaf.sharding.memory_kind != HOST:
        return leaf
    sharding = leaf.sharding.with_memory_kind("device")
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.device_put(leaf, sharding)


def to_device(tree: Any) -> Any:
    """The arrays of a state in the devices' memory, inside `jax.jit`."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device), tree)


def to_host(tree: Any) -> Any:
    """The moments of an optimizer's state in host memory, inside `jax.jit`."""

    def move(of: Declaration, leaf: Array) -> Array:
        return jax.device_put(leaf, jax.memory.Space.Host) if _moves(of, leaf) else leaf

    return map_declared(move, tree)


def update_by_layers(update: Update, gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """Updates parameters with an optimizer's state in host memory → (parameters, state).

    Args:
      update: what a parameter becomes depends on no other parameter. It counts steps from the same count for each.
    """
    depths: set[int] = set()
    map_declared(lambda of, w: depths.add(_layers(of, w)), params)
    moved = {0: _update_rest(update, gradients, state, params)}
    for layers in sorted(depths - {0}):
        moved[layers] = _update_stack(update, layers, gradients, state, params)
    # Counts are those of the parameters of no layer.
    return _joined([params for params, _ in moved.values()]), _joined([state for _, state in moved.values()])


def _update_rest(update: Update, gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
    gradients, state, params = (_of_depth(0, tree) for tree in (gradients, state, params))
    params, state = update(gradients, to_device(state), params)
    return params, to_host(state)


def _update_stack(update: Update, layers: int, gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """Updates what is stacked of so many layers, one layer after the other in the arrays that there are."""
    gradients, state, params = (_of_depth(layers, tree) for tree in (gradients, state, params))

    def of_layer(layer: Array, before: tuple[Any, Any]) -> tuple[Any, Any]:
        def take(v: Array) -> Array:
            return v if v.ndim == 0 else jax.lax.dynamic_slice_in_dim(v, layer, 1)

        def put(whole: Array, part: Array) -> Array:
            return whole if whole.ndim == 0 else jax.lax.dynamic_update_slice_in_dim(whole, part, layer, 0)

        params, state = before
        own = jax.tree.map(take, (gradients, state, params))
        after, moments = update(own[0], to_device(own[1]), own[2])
        return jax.tree.map(put, before, (after, to_host(moments)))

    return jax.lax.fori_loop(0, layers, of_layer, (params, state))


def _layers(of: Declaration, w: Array) -> int:
    """Layers that a parameter, or a moment of it, is stacked of; 0 if it stands alone."""
    return w.shape[0] if w.ndim > len(of.dims) else 0


def _of_depth(layers: int, tree: Any) -> Any:
    """The tree without the parameters that are stacked of another number of layers, which Optax passes over."""
    return map_declared(lambda of, w: w if _layers(of, w) == layers else optax.MaskedNode(), tree)


def _joined(trees: list[Any]) -> Any:
    """What the first tree that has it has."""

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def first(*nodes: Any) -> Any:
        return next((node for node in nodes if not masked(node)), nodes[0])

    return jax.tree.map(first, *trees, is_leaf=masked)
