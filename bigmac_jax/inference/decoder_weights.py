"""A model's weights as a decoder keeps them: cast or quantized, gathered, stacked or layer by layer, and the experts
perhaps in host memory."""

import functools
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config
from bigmac_jax.inference.int8_weights import quantize, should_quantize
from bigmac_jax.model.parameters import Declaration, map_declared
from bigmac_jax.model.resident import order_of_layers, stack_in_host, with_experts


def convert(config: Config, tree: Any, *, consume: bool, weights: str, gathered: bool, layers: int = 0) -> list[Any]:
    """The tree with weights as the decoder keeps them, once, or once for each of its stacked layers."""
    leaves, treedef = jax.tree.flatten(tree)
    declarations = jax.tree.leaves(map_declared(lambda declaration, _: declaration, tree))
    converted = []
    for given, declaration in zip(leaves, declarations, strict=True):
        w = given
        if not isinstance(declaration, Declaration):
            declaration = None  # a variable that is no parameter
        dtype = declaration.crossing(config.execution).compute if declaration else str(w.dtype)
        if declaration and gathered and config.mesh.fsdp:
            w = _gather(w, declaration, dtype if weights != "int8" else str(w.dtype))
        converted.append(_convert_leaf(w, declaration, dtype, weights == "int8", layers))
        if consume:
            jax.block_until_ready(converted[-1])
            given.delete()
    return [jax.tree.unflatten(treedef, part) for part in zip(*converted, strict=True)]


def hold_experts(config: Config, stacks: dict[Any, Any], *, consume: bool, weights: str) -> tuple[dict[Any, Any], Any]:
    """Takes the experts of all layers from the stacks → the stacks without, and the experts' parameters in host memory,
    [Y, …], as a decoder keeps them. What mesh.fsdp has split stays so: a host has no room for every rank's whole, and
    less of it is copied."""
    experts = {stack: of.mlp.experts for stack, of in stacks.items() if stack.experts}
    leaves, trees = zip(*map(jax.tree.flatten, experts.values()), strict=True)
    declarations = jax.tree.leaves(map_declared(lambda declaration, _: declaration, next(iter(experts.values()))))
    int8 = weights == "int8"

    def of_layer(declaration: Declaration, w: Array) -> Any:
        dtype = declaration.crossing(config.execution).compute
        return _convert_leaf(w, declaration, dtype, int8, 0)[0]

    held = []
    for arrays, declaration in zip(zip(*leaves, strict=True), declarations, strict=True):
        held.append(stack_in_host(arrays, order_of_layers(config), functools.partial(of_layer, declaration)))
        if consume:
            for array in arrays:
                array.delete()
    without = {stack: with_experts(of, None) if stack.experts else of for stack, of in stacks.items()}
    return without, jax.tree.unflatten(trees[0], held)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _gather(w: Array, declaration: Declaration, dtype: str) -> Array:
    """A parameter, perhaps of stacked layers, split as it is without mesh.fsdp, and without the zeros behind it."""
    layers = w.ndim - len(declaration.dims)
    own = declaration.spec(w.shape[layers:], False, jax.sharding.get_abstract_mesh().shape)
    whole = jax.sharding.reshard(w.astype(dtype), P(*[None] * layers, *own))
    shape = declaration.unpadded(w.shape)
    return whole if w.shape == shape else whole[tuple(map(slice, shape))]


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _convert_leaf(w: Array, declaration: Declaration | None, dtype: str, int8: bool, layers: int) -> tuple[Any, ...]:
    converted = quantize(declaration, w) if declaration and int8 and should_quantize(declaration) else w.astype(dtype)
    if not layers:
        return (converted,)
    parts, tree = jax.tree.flatten(converted)
    return tuple(jax.tree.unflatten(tree, [part[layer : layer + 1] for part in parts]) for layer in range(layers))
