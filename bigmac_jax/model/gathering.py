"""Parameters on the way to the ranks that use them: gathered from their shards, their gradients summed and scattered
back."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from bigmac_jax.model.mesh import AXES, REPLICA, TENSOR, axes_of, names, platform, spec_of, token_spec


class Crossing(NamedTuple):
    """Dtypes in which a parameter comes to the ranks that use it, and its gradient back."""

    compute: str  # it is used in
    gather: str  # it is gathered in
    reduce: str  # the ranks' gradients are summed in


class InStack(NamedTuple):
    """Stands where a layer's array stood: the stack of all layers, and which of them is meant. A loop that took it out
    of the stack would copy it in every step; a kernel reads it where it stands."""

    stack: Array  # [Y, …]
    layer: Array  # int32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    def take(self) -> Array:
        """The layer's array, copied."""
        return jax.lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False)


class Weight(NamedTuple):
    """A parameter that `on_each_rank` gathers for each rank."""

    value: Array  # with REPLICA in `split`, each replica's own, along a dimension before the others
    crossing: Crossing
    split: tuple[str, ...] = ()  # axes that it stays split over
    layer: Array | None = None  # of an `InStack`, whose stack `value` is
    shape: tuple[int, ...] = ()  # of the parameter, where `value` may have zeros behind it


def can_join(w: Weight) -> bool:
    """Whether a parameter can stand beside one of its shape: it is cast before it is gathered, and each rank has all of
    its last dimension."""
    on_mesh = not jax.sharding.get_abstract_mesh().empty
    return on_mesh and w.layer is None and w.value.dtype != w.crossing.gather and not names(spec_of(w.value)[-1])


def join(w: Weight, other: Weight) -> Weight:
    """Two parameters of one shape beside each other along the last dimension, to be gathered as one."""
    shape = (*w.shape[:-1], w.shape[-1] + other.shape[-1]) if w.shape else ()
    return w._replace(value=jnp.concatenate([w.value, other.value], axis=-1), shape=shape)


def gather_weight(w: Array, spec: P, split: tuple[str, ...], crossing: Crossing, shape: tuple[int, ...]) -> Array:
    """Gathers a parameter from its shards, inside `shard_map`; its gradient is summed over ranks and scattered back.

    Args:
      spec: how the shards stand.
      split: axes that the result stays split over; its gradient is summed over the ranks of all others.
      shape: of the parameter, without stacked layers: of what is gathered the zeros behind it are cut off.
    """
    before = (0,) * (w.ndim - len(shape))
    zeros = _zeros_behind(w.shape, spec, split, before + shape) if shape else ()
    return _gather_weight(w, spec, split, crossing, w.dtype, zeros)


def _zeros_behind(
    here: tuple[int, ...], spec: P, split: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, int, int], ...]:
    """How `jax.lax.pad` cuts off what is behind a gathered array of `shape`; () if nothing is.

    Args:
      here: the shape of a shard.
    """
    sizes, cuts = jax.sharding.get_abstract_mesh().shape, [0] * len(here)
    for dim, axes in _gathered(spec, split):
        # A dimension that stays split over another axis has no zeros (`mesh.fully_sharded`).
        if all(axis in axes for axis in names(spec[dim])) and shape[dim]:
            cuts[dim] = shape[dim] - here[dim] * math.prod(sizes[axis] for axis in axes)
    return tuple((0, cut, 0) for cut in cuts) if any(cuts) else ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def _gather_weight(
    w: Array, spec: P, split: tuple[str, ...], crossing: Crossing, dtype: Any, zeros: tuple[tuple[int, int, int], ...]
) -> Array:
    return _gather(w, spec, split, crossing, zeros)


def _gather(
    w: Array, spec: P, split: tuple[str, ...], crossing: Crossing, zeros: tuple[tuple[int, int, int], ...]
) -> Array:
    w = _cast_in_place(w, crossing.gather)
    for dim, axes in _gathered(spec, split):
        w = jax.lax.all_gather(w, axes, axis=dim, tiled=True)
    if zeros:
        w = jax.lax.pad(w, jnp.zeros((), w.dtype), zeros)
    shared = _shared(spec, split)
    return (jax.lax.pcast(w, shared, to="varying") if shared else w).astype(crossing.compute)


def _cast_in_place(w: Array, dtype: str) -> Array:
    """Casts a parameter where it is used, also in a loop over layers. XLA:TPU would move the cast in front of the loop,
    and keep a copy of all layers meanwhile, if there were no factor that it can't know to be one: 0 times infinity
    is none. (A barrier doesn't hold it up.)"""
    if jnp.dtype(dtype).itemsize < w.dtype.itemsize and platform() == "tpu":
        w = w * (1 + 0 * w[(0,) * w.ndim])
    return w.astype(dtype)


def _scatter_gradient(
    spec: P, split: tuple[str, ...], crossing: Crossing, dtype: Any, zeros: Any, _: None, dw: Array
) -> tuple[Array]:
    """The transpose of `_gather`, but for the dtype that the sum is computed in."""
    dw = dw.astype(crossing.reduce)
    if shared := _shared(spec, split):
        dw = jax.lax.psum(dw, shared)
    if zeros:
        dw = jax.lax.pad(dw, jnp.zeros((), dw.dtype), [(0, -cut, 0) for _, cut, _ in zeros])
    for dim, axes in reversed(_gathered(spec, split)):
        dw = jax.lax.psum_scatter(dw, axes, scatter_dimension=dim, tiled=True)
    if dw.dtype != dtype:
        # XLA:TPU moves such a sum out of the loop over a batch's parts, and fails on the cast behind it.
        dw = jax.lax.optimization_barrier(dw)
    return (dw.astype(dtype),)


# Not by calling `_gather_weight`: `all_but_gathered` has to see what is gathered.
_gather_weight.defvjp(
    lambda w, spec, split, crossing, _, zeros: (_gather(w, spec, split, crossing, zeros), None), _scatter_gradient
)


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
    if primitive.name == "pad" and any(after < 0 for _, after, _ in parameters["padding_config"]):
        return False  # zeros behind what was gathered are cut off
    if primitive.name in ("all_gather", "pvary"):  # the latter only says that ranks hold copies of what was gathered
        return set(names(parameters.get("axis_name", ()))) == {TENSOR}
    return True


@jax.custom_vjp
def in_turn(carry: Any, later: Any) -> tuple[Any, Any]:
    """Returns both, trees of arrays. In the backward pass the gradients of `carry` wait for those of the `later`
    parameters, which are computed even if nothing else asks for them."""
    return carry, later


def _wait(_: None, gradients: tuple[Any, Any]) -> tuple[Any, Any]:
    d_carry, d_later = gradients
    (waiting, tree), first = jax.tree.flatten(d_carry), jax.tree.leaves(d_later)

    def on_rank(waiting: list[Array], first: list[Array]) -> list[Array]:
        # One element is there when all are. XLA keeps a product with 0, because it may be of infinity; where it is, the
        # step is a bad one anyway.
        nothing = sum(0 * d[(0,) * d.ndim].astype(jnp.float32) for d in first)
        return [d + jnp.asarray(nothing, d.dtype) for d in waiting]

    if not jax.sharding.get_abstract_mesh().empty:
        specs = [spec_of(d) for d in waiting]
        on_rank = jax.shard_map(on_rank, in_specs=(specs, [spec_of(d) for d in first]), out_specs=specs)
    return jax.tree.unflatten(tree, on_rank(waiting, first)), d_later


in_turn.defvjp(lambda carry, later: ((carry, later), None), _wait)


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
      weights: a list or tuple of `Weight`, or a tree of them, which `function` takes as one last argument; of one with
        a `layer` it gets an `InStack`.
      in_spec: how the arrays stand, each, or from their number of dimensions.
      out_specs: by default a [B, L, D] of tokens.
    """
    weights = tuple(weights) if isinstance(weights, list | tuple) else (weights,)
    leaves, tree = jax.tree.flatten(weights, is_leaf=lambda node: isinstance(node, Weight))
    layers = [w.layer for w in leaves]

    def call(arrays: Sequence[Array], gathered: list[Array], layers: list[Array | None]) -> Any:
        pairs = zip(gathered, layers, strict=True)
        values = [value if layer is None else InStack(value, layer) for value, layer in pairs]
        return function(*arrays, *jax.tree.unflatten(tree, values))

    if jax.sharding.get_abstract_mesh().empty:
        return call(arrays, [w.value.astype(w.crossing.compute) for w in leaves], layers)
    specs = [spec_of(w.value) for w in leaves]
    array_specs = [in_spec(array.ndim) for array in arrays] if callable(in_spec) else in_spec

    def on_rank(arrays: list[Array], shards: list[Array], layers: list[Array | None]) -> Any:
        gathered = [
            gather_weight(shard[0], P(*spec[1:]), w.split, w.crossing, w.shape)
            if REPLICA in w.split
            else gather_weight(shard, spec, w.split, w.crossing, w.shape)
            for shard, spec, w in zip(shards, specs, leaves, strict=True)
        ]
        return call(arrays, gathered, layers)

    return jax.shard_map(
        on_rank,
        in_specs=(list(array_specs), specs, [None if layer is None else P() for layer in layers]),
        out_specs=token_spec(3) if out_specs is None else out_specs,
        axis_names=set(AXES),
    )(list(arrays), [w.value for w in leaves], layers)
