"""What a parameter is, said once: its dimensions, where they are split, what it starts as, whether it decays, in which
dtype it is gathered, and which part of the model it is counted with.

The declaration stands on the variable. Initialisation, the optimizer, the counts, the decoder and the exchange of
parameters between ranks ask it; none of them reads a name.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config, ExecutionConfig
from bigmac_jax.model.gathering import Crossing, InStack, Weight
from bigmac_jax.model.kernels import LANES
from bigmac_jax.model.mesh import REPLICA, Entry, fully_sharded, names, padded_shape


def leaf_name(path: Any) -> str:
    """A parameter's name from its path in the model."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def named_leaves(model: Any) -> dict[str, Any]:
    """The parameters of a model, which may be abstract, by name."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}


def declared_leaves(model: Any) -> dict[str, Any]:
    """The parameters of a model, which may be abstract, by name, in the shapes that are declared, on any mesh."""
    return named_leaves(map_declared(without_padding, model))


@dataclass(frozen=True)
class Declaration:
    """A parameter.

    Attributes:
      dims: a letter a dimension, as in the names: "eRF". Layers, which stack it, come before them.
      part: of the model, for counts: attention, mamba, experts, router, shared, projections, mlp, embedding, norms.
      value: what it starts as: the standard deviation of N(0, value²), or with `constant` every entry.
      axes: of the mesh, that each dimension is split over, whatever mesh.fsdp is.
      decays: whether weight decay makes it smaller: matrices and tables of tokens, not norms, biases and positions.
      small: too small to be worth a gather: mesh.fsdp leaves it whole.
      draw: draws what it starts as instead, in place of N(0, 1): a function of key, shape and out_sharding.
      selects: starts as a choice of coordinates instead: orthonormal, of the same mean square.
      slow: trained at optimizer.projection_rate.
      exact: multiplied in float32 whatever execution.dtype is, and so gathered in float32.
      table: its rows are looked up, or compared with.
      trained: whether a run trains it; if not, it stays what it starts as.
      pads: whether mesh.fsdp may put zeros behind it, so that ranks divide it. They stay zeros, and `gather_weight`
        cuts them off: what is multiplied elsewhere gets none.
      shape: without them, nor stacked layers; `parameter` says it.
    """

    dims: str
    part: str
    value: float
    constant: bool = False
    axes: tuple[Entry, ...] = ()
    decays: bool = True
    small: bool = False
    draw: Callable[..., Array] | None = None
    selects: bool = False
    slow: bool = False
    exact: bool = False
    table: bool = False
    trained: bool = True
    pads: bool = True
    shape: tuple[int, ...] = ()

    @property
    def hidden_matrix(self) -> bool:
        """Whether Muon trains the parameter: it is a matrix between hidden activations, no table, router or vector."""
        return self.decays and not (self.table or self.exact)

    def sliced_in_host_memory(self, columns: int) -> bool:
        """Whether XLA:TPU updates layers of it in host memory, with so many columns on a rank: of a matrix that fills
        whole lanes. Of vectors in bfloat16, two of which share a sublane, it compiles no slice."""
        return len(self.dims) > 1 and columns % LANES == 0

    @property
    def split(self) -> tuple[str, ...]:
        """The axes that it stays split over where it is used."""
        return tuple(axis for entry in self.axes for axis in names(entry))

    def spec(self, shape: tuple[int, ...], fsdp: bool, sizes: Mapping[str, int]) -> P:
        """PartitionSpec of the parameter, without stacked layers, on a mesh of `sizes`."""
        own = P(*(*self.axes, *[None] * (len(shape) - len(self.axes))))
        return fully_sharded(shape, own, sizes, pads=self.pads) if fsdp and not self.small else own

    def unpadded(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an array of the parameter, or of some of its experts, without zeros behind it."""
        layers = len(shape) - len(self.dims)
        return (*shape[:layers], *map(min, shape[layers:], self.shape)) if self.shape else shape

    def crossing(self, execution: ExecutionConfig) -> Crossing:
        """Dtypes in which ranks gather it and sum its gradient."""
        if self.exact:
            return Crossing("float32", "float32", "float32" if self.small else execution.reduce_dtype)
        # The narrower of the two: a cast behind the gather would give the same numbers, and send more.
        narrow = "bfloat16" in (execution.dtype, execution.gather_dtype)
        return Crossing(execution.dtype, "bfloat16" if narrow else "float32", execution.reduce_dtype)


def shard_spec(of: Declaration, shape: tuple[int, ...], spec: P, fsdp: bool, sizes: Mapping[str, int]) -> P:
    """How a gradient stands while replicas add theirs, so that no two ranks of a replica send the same numbers.

    Args:
      shape, spec: of the parameter, with stacked layers.
    """
    return spec if fsdp or of.small else fully_sharded(shape, spec, sizes)


def stacked_spec(of: Declaration, shape: tuple[int, ...], fsdp: bool, sizes: Mapping[str, int]) -> P:
    """How a parameter stands, of a stack of layers or alone: each rank has all layers."""
    layers = len(shape) - len(of.dims)
    return P(*[None] * layers, *of.spec(shape[layers:], fsdp, sizes))


def state_spec(
    of: Declaration, shape: tuple[int, ...], spec: P, sharded: bool, sizes: Mapping[str, int], by_layers: bool
) -> P:
    """How the optimizer's state of a parameter stands.

    Args:
      shape, spec: as for `shard_spec`.
      sharded: over replicas.
      by_layers: layers are updated one after the other, so that each rank has a part of each of them.
    """
    if not sharded or of.small:
        return spec
    whole = len(shape) - len(of.dims) if by_layers else 0
    return P(*spec[:whole], *fully_sharded(shape[whole:], P(*spec[whole:]), sizes, over=(REPLICA,)))


class Frozen(nnx.Variable):
    """A parameter that is declared `trained=False`. It stands with what no gradient updates (`TrainState.rest`): it has
    no gradient, no moments, no decay and no average."""


class Adapted(NamedTuple):
    """Stands where an array stood, for their sum: w + a b (`model.adapters`)."""

    w: Array
    a: Array
    b: Array

    def sum(self, exact: bool) -> Array:
        """Their sum. If `exact`, a b is of float32 whatever the device takes for it by default."""
        precision = jax.lax.Precision.HIGHEST if exact else None
        ab = jnp.matmul(self.a, self.b, precision=precision)  # of which each replica may have its own
        return self.w.reshape((1,) * (ab.ndim - self.w.ndim) + self.w.shape) + ab


def parameter(config: Config, key: Array | None, shape: tuple[int, ...], declaration: Declaration) -> nnx.Variable:
    """A float32 parameter, drawn where it will stand: each rank draws its shard. Values don't depend on the mesh."""
    assert len(shape) == len(declaration.dims), declaration
    sizes = jax.sharding.get_abstract_mesh().shape
    spec = declaration.spec(shape, config.mesh.fsdp, sizes)

    def start(shape: tuple[int, ...], out_sharding: P) -> Array:
        if declaration.constant:
            return jnp.full(shape, declaration.value, jnp.float32, out_sharding=out_sharding)
        assert key is not None, declaration
        draw = _selection if declaration.selects else declaration.draw or jax.random.normal
        return declaration.value * draw(key, shape, out_sharding=out_sharding)

    value = pad_behind(start, shape, padded_shape(shape, spec, sizes) if sizes else shape, spec)
    kind = nnx.Param if declaration.trained else Frozen
    return kind(value, declaration=dataclasses.replace(declaration, shape=shape))


def pad_behind(make: Callable[..., Array], shape: tuple[int, ...], padded: tuple[int, ...], spec: P) -> Array:
    """The array that `make(shape, out_sharding=…)` returns, whose values depend on the shape, with zeros behind it."""
    entries = zip([*spec, *[None] * (len(shape) - len(spec))], shape, padded, strict=True)
    whole = P(*(entry if n == size else None for entry, n, size in entries))
    return _resize(make(shape, out_sharding=whole), padded, spec)


def _resize(w: Array, shape: tuple[int, ...], spec: P) -> Array:
    """An array with zeros behind it, or without them, sharded by `spec`."""
    if w.shape == shape:
        return w
    changes = [n - size for n, size in zip(shape, w.shape, strict=True)]
    # Ranks divide a dimension before or behind, not both: meanwhile it is whole.
    meanwhile = P(*(None if change else entry for change, entry in zip(changes, spec, strict=True)))
    changed = jax.lax.pad(jax.sharding.reshard(w, meanwhile), jnp.zeros((), w.dtype), [(0, n, 0) for n in changes])
    return jax.sharding.reshard(changed, spec)


_resize_alone = jax.jit(_resize, static_argnums=(1, 2))


def without_padding(of: Declaration, w: Any) -> Any:
    """A parameter in the shape that is declared, on any mesh; of an abstract one, that shape."""
    shape = of.unpadded(w.shape)
    if shape == w.shape:
        return w
    whole = P(*(entry if n == size else None for entry, n, size in zip(w.sharding.spec, shape, w.shape, strict=True)))
    if isinstance(w, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, w.dtype, sharding=w.sharding.update(spec=whole))
    return _resize_alone(w, shape, whole)


def with_padding(w: Any, like: Any) -> Array:
    """A parameter in the declared shape as `like`, an array or an abstract one, is sharded and padded."""
    if w.shape == like.shape:
        return jax.device_put(w, like.sharding)
    return _resize_alone(w, like.shape, like.sharding.spec)


def _selection(key: Array, shape: tuple[int, ...], out_sharding: P) -> Array:
    """A matrix that takes as many of the longer side's coordinates as the shorter has, in any order and each once; its
    mean square is one."""
    longer = shape.index(max(shape))
    taken = jax.random.permutation(key, max(shape))[: min(shape)]
    at = jax.lax.broadcasted_iota(taken.dtype, shape, longer, out_sharding=out_sharding)
    return math.sqrt(max(shape)) * (at == jnp.expand_dims(taken, longer)).astype(jnp.float32)


def declared(variable: nnx.Variable) -> Declaration:
    """The declaration of a parameter; AttributeError for a variable that is none."""
    return variable.declaration


def map_declared(function: Callable[[Declaration, Array], Any], tree: Any) -> Any:
    """Maps `function(declaration, array)` over the parameters of `tree`; other variables stay."""

    def apply(node: Any) -> Any:
        if not isinstance(node, nnx.Param | Frozen):
            return node
        return jax.tree.map(lambda leaf: function(declared(node), leaf), node)

    return jax.tree.map(apply, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def count_numbers(tree: Any) -> int:
    """Numbers in the parameters of `tree`, zeros behind them not among them."""
    return sum(jax.tree.leaves(map_declared(lambda of, w: math.prod(of.unpadded(w.shape)), tree)))


def weight(config: Config, variable: nnx.Variable, compute: str = "") -> Weight:
    """Makes a `Weight` for `on_each_rank`, gathered in the dtype `compute`, by default that of the computation."""
    of = declared(variable)
    crossing = of.crossing(config.execution)
    value = variable.get_value()
    if isinstance(value, InStack):
        dtype = str(value.stack.dtype)
        if dtype == crossing.gather:
            return Weight(value.stack, Crossing(dtype, dtype, dtype), of.split, value.layer, of.shape)
        value = value.take()  # a cast would copy the stack
    value = value.sum(of.exact) if isinstance(value, Adapted) else value
    split = (*of.split, REPLICA) if value.ndim > len(of.dims) else of.split  # (`training.replicas`)
    return Weight(value, crossing._replace(compute=compute or crossing.compute), split, shape=of.shape)
