"""Weights of eight bits: integers, and a scale for every channel.

Matrices and tables of tokens are quantized; norms, biases, positions and the router are not. Products are computed in
execution.dtype: a layer's weights are dequantized where it is computed. An accelerator's compiler fuses that into the
product, but not into the kernels of experts, which get a copy.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.model.parameters import Declaration

LEVELS = 127


class Int8(NamedTuple):
    """A quantized array, which replaces the array w ≈ values · scale in a tree."""

    values: Array  # int8 [..., X, Y]
    scale: Array  # float32 [..., X, 1] or [..., 1, Y]


def should_quantize(declaration: Declaration) -> bool:
    """Whether int8 weights keep this parameter in eight bits."""
    return declaration.decays and not (declaration.exact or declaration.small)


def quantize(declaration: Declaration, w: Array) -> Int8:
    """Rounds a parameter to the nearest of 255 levels; the largest value of each channel is exact.

    A channel is a token's row of a table; in a matrix [X, Y] an index of the shorter dimension, so that there are fewer
    scales, and in a square one an output.
    """
    X, Y = w.shape[-2:]
    axis = -1 if declaration.table or X < Y else -2
    w = w.astype(jnp.float32)
    scale = jnp.max(jnp.abs(w), axis=axis, keepdims=True) / LEVELS
    return Int8(jnp.round(w / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale)


def dequantize(tree: Any, dtype: str) -> Any:
    """The tree with every `Int8` replaced by its array, in `dtype`."""

    def widen(leaf: Any) -> Any:
        return (leaf.values * leaf.scale).astype(dtype) if isinstance(leaf, Int8) else leaf

    return jax.tree.map(widen, tree, is_leaf=lambda leaf: isinstance(leaf, Int8))
