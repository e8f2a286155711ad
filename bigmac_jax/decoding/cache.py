"""Prefill and decode over a cache of keys and values.

Rows of a batch are sequences at different positions. The cache keeps N = S·B of them, B to each of the S shards of the
batch, and has room for M positions of each. A decode step sees a shard's rows side by side, [S, B], as if they were the
tokens of one sequence: so every layer that takes each token by itself splits them over `tensor` as in training. N rows
in all, P prompt length, D hidden, G key-value heads, H head size, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from bigmac_jax.config import Config
from bigmac_jax.mesh import TENSOR, batch_spec, cache_spec, on_each_rank, platform, split_spec, token_spec
from bigmac_jax.model.attention import KeyValues
from bigmac_jax.model.parameters import Declaration, map_declared
from bigmac_jax.model.transformer import Block, Transformer, init_model
from bigmac_jax.training.step import split


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoder:
    """A model as decoding wants it: in the dtype of the computation, layers in groups, each stacked and scanned.

    A group is all layers of a kind, so that compilation does not take longer the more there are; on CPU it is one
    layer, because there a step that reads one of stacked layers copies it first.
    """

    ends: Transformer  # embedding, final norm and unembedding; its stacks of layers are None
    groups: tuple[Block, ...]


class Cache(NamedTuple):
    """What the layers have seen."""

    groups: tuple[KeyValues, ...]  # [Y, N, G, M, H] each, Y layers of a group
    position_SB: Array  # int32; where each row's next token stands

    @property
    def room(self) -> int:
        return self.groups[0].keys.shape[3]


def decoding(config: Config, exchange: str = "auto") -> Config:
    """The config that a decoder computes with.

    Args:
      exchange: the strategy, instead of the one that suited training; `auto` takes the one that is fastest for the few
        rows of a decode step, and for the many of a prefill.
    """
    execution = dataclasses.replace(config.execution, exchange=exchange, overlap_chunks=1, remat="none")
    return dataclasses.replace(config, execution=execution)


def make_decoder(config: Config, model: Transformer, exchange: str = "auto", consume: bool = False) -> Decoder:
    """The decoder of a model, which computes dropless.

    Args:
      config, exchange: as for `decoding`.
      consume: frees the model's arrays on the way; the model can't be used any more.
    """
    # No array is made here: the mesh may be of devices that are only compiled for.
    abstract = jax.eval_shape(lambda: init_model(decoding(config, exchange), jax.random.key(0)))
    ends: Any = nnx.merge(split(abstract)[0], *split(model)[1:])
    stacks = [stack for stack in (ends.first, ends.layers) if stack is not None]
    ends.first = ends.layers = None
    ends = map_declared(functools.partial(_cast, config, consume), ends)
    return Decoder(ends, tuple(group for stack in stacks for group in _groups(config, stack, consume)))


def _groups(config: Config, stack: Block, consume: bool) -> Iterator[Block]:
    """Of a stack of layers. Leaf by leaf, so that memory for one more leaf is enough."""
    stored = jax.tree.map(lambda leaf: str(leaf.dtype), stack)
    dtypes = jax.tree.leaves(map_declared(lambda of, _: of.crossing(config.execution).compute, stored))
    one_by_one = platform() == "cpu" and not config.execution.unroll_layers
    leaves, treedef = jax.tree.flatten(stack)
    parts = []
    for leaf, dtype in zip(leaves, dtypes, strict=True):
        parts.append(_grouped(leaf, dtype, one_by_one))
        if consume:
            jax.block_until_ready(parts[-1])
            leaf.delete()
    return (jax.tree.unflatten(treedef, group) for group in zip(*parts, strict=True))


def _cast(config: Config, consume: bool, of: Declaration, w: Array) -> Array:
    dtype = of.crossing(config.execution).compute
    if w.dtype == dtype:
        return w
    cast = w.astype(dtype)
    if consume:
        jax.block_until_ready(cast)
        w.delete()
    return cast


@functools.partial(jax.jit, static_argnums=(1, 2))
def _grouped(w: Array, dtype: str, one_by_one: bool) -> tuple[Array, ...]:
    w = w.astype(dtype)
    return tuple(w[layer : layer + 1] for layer in range(w.shape[0])) if one_by_one else (w,)


def prefill(model: Decoder, tokens_NP: Array, length_SB: Array, room: int) -> tuple[Array, Cache]:
    """Reads prompts, each padded behind its end with any token.

    Args:
      tokens_NP: int32; P at most `room`.
      length_SB: tokens of each prompt, at least 1.
      room: M.

    Returns:
      (float32 logits_SBV of the token after each prompt, the cache)
    """

    def step(x_NPD: Array, layer: Block) -> tuple[Array, KeyValues]:
        y_NPD, fresh = layer.attention(layer.attention_norm(x_NPD))
        x_NPD = x_NPD + y_NPD
        x_NPD = x_NPD + layer.feed_forward(x_NPD, None, dropless=True)[0]
        # What stands behind a prompt's end is overwritten before it is read.
        grow = functools.partial(_with_room, room)
        specs = (cache_spec(4), cache_spec(4))
        return x_NPD, KeyValues(*on_each_rank(grow, fresh, in_spec=split_spec, out_specs=specs))

    x_NPD, groups = model.ends.embed(tokens_NP), []
    for group in model.groups:
        x_NPD, seen = jax.lax.scan(step, x_NPD, group)
        groups.append(seen)
    x_SBD = on_each_rank(_last, (x_NPD, length_SB), in_spec=(token_spec(3), batch_spec(2)), out_specs=token_spec(3))
    return model.ends.logits(model.ends.final_norm(x_SBD)), Cache(tuple(groups), length_SB)


def decode(model: Decoder, cache: Cache, tokens_SB: Array) -> tuple[Array, Cache]:
    """Reads one more token of each row → float32 logits_SBV of the next one, the cache.

    A row that has filled its room goes on writing to its last position: what it gives is of no use any more.
    """

    def step(carry: tuple[Array, KeyValues], xs: tuple[Block, Array]) -> tuple[tuple[Array, KeyValues], None]:
        (x_SBD, past), (layer, number) = carry, xs
        y_SBD, past = layer.attention.step(layer.attention_norm(x_SBD), past, number, cache.position_SB)
        x_SBD = x_SBD + y_SBD
        return (x_SBD + layer.feed_forward(x_SBD, None, dropless=True)[0], past), None

    x_SBD, groups = model.ends.embed(tokens_SB, cache.position_SB), []
    for group, past in zip(model.groups, cache.groups, strict=True):
        numbers = jnp.arange(past.keys.shape[0], dtype=jnp.int32)
        (x_SBD, past), _ = jax.lax.scan(step, (x_SBD, past), (group, numbers))
        groups.append(past)
    position_SB = jnp.minimum(cache.position_SB + 1, cache.room - 1)
    return model.ends.logits(model.ends.final_norm(x_SBD)), Cache(tuple(groups), position_SB)


def _with_room(room: int, *values: Array) -> tuple[Array, ...]:
    """[N, P, G, H] → [N, G, M, H]."""
    return tuple(jnp.pad(v.swapaxes(1, 2), ((0, 0), (0, 0), (0, room - v.shape[1]), (0, 0))) for v in values)


def _last(x_NPD: Array, length_SB: Array) -> Array:
    """On one rank: the features of each prompt's last token, [1, b, D], of the rank's own share of the rows."""
    N, P, _ = x_NPD.shape
    place_N = length_SB.reshape(N) - 1 - jax.lax.axis_index(TENSOR) * P
    here_N = (place_N >= 0) & (place_N < P)
    x_ND = jnp.where(here_N[:, None], x_NPD[jnp.arange(N), jnp.clip(place_N, 0, P - 1)], 0)
    return jax.lax.psum_scatter(x_ND, TENSOR, scatter_dimension=0, tiled=True)[None]
