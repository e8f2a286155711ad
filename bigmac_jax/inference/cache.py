"""Prefill and decode over a cache of keys and values.

Rows of a batch are sequences at different positions. The cache keeps N = S·B of them, B to each of the S shards of the
batch, and has room for M positions of each. A decode step sees a shard's rows side by side, [S, B], as if they were the
tokens of one sequence: so every layer that takes each token by itself splits them over `tensor` as in training. N rows
in all, P prompt length, D hidden, G key-value heads, H head size, V vocabulary.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from bigmac_jax.config import Config
from bigmac_jax.mesh import TENSOR, batch_spec, cache_spec, on_each_rank, split_spec, token_spec
from bigmac_jax.model.layers import KeyValues
from bigmac_jax.model.transformer import Block, Transformer, init_model
from bigmac_jax.training.step import split


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoder:
    """A model as decoding wants it: layer by layer, because a step that reads one of stacked layers copies it first."""

    ends: Transformer  # embedding, final norm and unembedding; its layers are None
    layers: tuple[Block, ...]


class Cache(NamedTuple):
    """What the layers have seen."""

    layers: tuple[KeyValues, ...]  # [N, G, M, H] each
    position_SB: Array  # int32; where each row's next token stands

    @property
    def room(self) -> int:
        return self.layers[0].keys.shape[2]


def make_decoder(config: Config, model: Transformer, exchange: str = "auto", consume: bool = False) -> Decoder:
    """The decoder of a model, which computes dropless.

    Args:
      config: the model's.
      exchange: the strategy, instead of the one that suited training; `auto` takes the one that is fastest for the few
        rows of a decode step, and for the many of a prefill.
      consume: frees the model's stacked layers on the way; the model can't be used any more.
    """
    served = dataclasses.replace(config.model, exchange=exchange, overlap_chunks=1, remat=False)
    abstract = jax.eval_shape(lambda key: init_model(dataclasses.replace(config, model=served), key), jax.random.key(0))
    graphdef = split(abstract)[0]
    ends: Any = nnx.merge(graphdef, *split(model)[1:])
    leaves, treedef = jax.tree.flatten(ends.layers)
    ends.layers = None
    # Leaf by leaf, so that memory for one more leaf is enough.
    parts = []
    for leaf in leaves:
        parts.append(_unstacked(leaf))
        if consume:
            jax.block_until_ready(parts[-1])
            leaf.delete()
    return Decoder(ends, tuple(jax.tree.unflatten(treedef, layer) for layer in zip(*parts, strict=True)))


@jax.jit
def _unstacked(w: Array) -> tuple[Array, ...]:
    return tuple(w[layer] for layer in range(w.shape[0]))


def prefill(model: Decoder, tokens_NP: Array, length_SB: Array, room: int) -> tuple[Array, Cache]:
    """Reads prompts, each padded behind its end with any token.

    Args:
      tokens_NP: int32; P at most `room`.
      length_SB: tokens of each prompt, at least 1.
      room: M.

    Returns:
      (float32 logits_SBV of the token after each prompt, the cache)
    """
    x_NPD, layers = model.ends.embed(tokens_NP), []
    for layer in model.layers:
        y_NPD, fresh = layer.attention(layer.attention_norm(x_NPD))
        x_NPD = x_NPD + y_NPD
        x_NPD = x_NPD + layer.feed_forward(x_NPD, None, dropless=True)[0]
        # What stands behind a prompt's end is overwritten before it is read.
        grow = functools.partial(_with_room, room)
        specs = (cache_spec(), cache_spec())
        layers.append(KeyValues(*on_each_rank(grow, fresh, in_spec=split_spec, out_specs=specs)))
    x_SBD = on_each_rank(_last, (x_NPD, length_SB), in_spec=(token_spec(3), batch_spec(2)), out_specs=token_spec(3))
    return model.ends.logits(model.ends.final_norm(x_SBD)), Cache(tuple(layers), length_SB)


def decode(model: Decoder, cache: Cache, tokens_SB: Array) -> tuple[Array, Cache]:
    """Reads one more token of each row → float32 logits_SBV of the next one, the cache.

    A row that has filled its room goes on writing to its last position: what it gives is of no use any more.
    """
    x_SBD, layers = model.ends.embed(tokens_SB, cache.position_SB), []
    for layer, past in zip(model.layers, cache.layers, strict=True):
        y_SBD, past = layer.attention.step(layer.attention_norm(x_SBD), past, cache.position_SB)
        x_SBD = x_SBD + y_SBD
        x_SBD = x_SBD + layer.feed_forward(x_SBD, None, dropless=True)[0]
        layers.append(past)
    position_SB = jnp.minimum(cache.position_SB + 1, cache.room - 1)
    return model.ends.logits(model.ends.final_norm(x_SBD)), Cache(tuple(layers), position_SB)


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
