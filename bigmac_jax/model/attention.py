"""Attention, and the positions of its tokens.

B batch, L length, D hidden, N heads, G key-value heads, H head size; of cached keys and values n pages, p positions of
one, K pages of a sequence.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from bigmac_jax.config import Config, ModelConfig
from bigmac_jax.model.gathering import on_each_rank
from bigmac_jax.model.kernels.flash_attention import causal_attention
from bigmac_jax.model.kernels.paged_attention import paged_attention, write
from bigmac_jax.model.layers import Linear, Norm, residual_scale, split_outputs
from bigmac_jax.model.mesh import batch_spec, cache_spec, platform, replicated_spec, split_spec, tensor_ranks


class Documents(NamedTuple):
    """The documents of whole sequences; a token sees its own document alone."""

    segment_BL: Array  # int32, one number a document
    position_BL: Array  # int32, within the document


def find_documents(segments_BL: Array) -> Documents:
    """Makes `Documents` from the segments of `data.batch.Batch`."""

    def positions(segments_BL: Array) -> Array:
        place_BL = jnp.broadcast_to(jnp.arange(segments_BL.shape[1], dtype=jnp.int32), segments_BL.shape)
        begins_BL = jnp.diff(segments_BL, axis=1, prepend=segments_BL[:, :1]) != 0
        return place_BL - jax.lax.cummax(jnp.where(begins_BL, place_BL, 0), axis=1)

    segments_BL = jax.sharding.reshard(segments_BL, batch_spec(2))
    position_BL = on_each_rank(positions, (segments_BL,), in_spec=batch_spec, out_specs=batch_spec(2))
    return Documents(segments_BL, position_BL)


@jax.named_scope("rotary")
def rotate(x_BLNH: Array, theta: float, position_BL: Array | None) -> Array:
    """Rotary position embedding (RoFormer): pairs (i, i + H/2) turn by position · theta^(-2i/H).

    Args:
      position_BL: below L; None: 0 to L - 1.
    """
    if position_BL is None:
        angles = _angles(x_BLNH, theta, x_BLNH.shape[1])
        return _turn(x_BLNH, *(v_LH.reshape(1, v_LH.shape[0], 1, v_LH.shape[1]) for v_LH in angles))

    def on_rank(x_BLNH: Array, position_BL: Array) -> Array:
        angles = _angles(x_BLNH, theta, x_BLNH.shape[1])
        return _turn(x_BLNH, *(v_LH[position_BL][:, :, None] for v_LH in angles))

    specs = split_spec(4), batch_spec(2)
    return on_each_rank(on_rank, (x_BLNH, position_BL), in_spec=specs, out_specs=split_spec(4))


def rotate_to(x_TNH: Array, theta: float, position_T: Array, length: int) -> Array:
    """Rotates tokens that stand at any positions below `length` (`rotate`)."""
    if platform() == "cpu":
        angles: Sequence[Array] = [v_LH[position_T] for v_LH in _angles(x_TNH, theta, length)]
    else:  # of these positions alone: a slot may have very many, and each layer of a step would compute them all
        angles = _angles_at(x_TNH, theta, position_T, jnp)
    return _turn(x_TNH, *(v_TH[:, None] for v_TH in angles))


def _angles(x: Array, theta: float, length: int) -> Sequence[Array]:
    """Sines and cosines [L, H/2] of the positions 0 to L - 1, in the dtype of x [..., H]."""
    # Constants on CPU, where XLA would compute a sine and a cosine for every entry of x, and again in the gradient.
    xp = np if platform() == "cpu" else jnp
    return _angles_at(x, theta, xp.arange(length), xp)


def _angles_at(x: Array, theta: float, position_L: Any, xp: Any) -> Sequence[Array]:
    half = x.shape[-1] // 2
    angle_LH = xp.outer(position_L, theta ** (-xp.arange(half) / half))
    return jnp.asarray(xp.sin(angle_LH), x.dtype), jnp.asarray(xp.cos(angle_LH), x.dtype)


@jax.custom_vjp
def _turn(x_BLNH: Array, sin: Array, cos: Array) -> Array:
    first, second = jnp.split(x_BLNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


# The gradient turns back.
_turn.defvjp(
    lambda x_BLNH, sin, cos: (_turn(x_BLNH, sin, cos), (sin, cos)),
    lambda angle, dy_BLNH: (_turn(dy_BLNH, -angle[0], angle[1]), None, None),
)


class KeyValues(NamedTuple):
    """The KV cache of several layers, in pages [G, n, p, H]: n pages for all layers together, p positions a page."""

    keys: Array
    values: Array


class Rows(NamedTuple):
    """Where the tokens of a decoding step stand: W rows for each of S batch shards, a row being C consecutive tokens of
    a sequence."""

    table_SWK: Array  # int32; the sequence's pages, in order
    position_SW: Array  # int32; of the first token
    count_SW: Array  # int32; how many of the C there are
    slot_SW: Array | None = None  # int32; whose past a Mamba layer goes on with, row by row; None: row w has slot w


class Attention(nnx.Module):
    """Causal attention with optional grouped key-value heads, query-key norm and rotary positions; heads are split over
    `tensor`. Of key-value heads that are fewer than its ranks, each rank takes the one that its query heads ask."""

    def __init__(self, config: Config, key: Array):
        self.config = config
        m = config.model
        D, N, G, H = m.hidden_size, m.num_heads, m.kv_heads, m.head_size
        keys = jax.random.split(key, 4)
        few = G if tensor_ranks() > G else 0
        part, bias = "attention", m.use_bias
        self.query = Linear(config, keys[0], D, N * H, part, bias, split="outputs")
        self.key = Linear(config, keys[1], D, G * H, part, bias, split="outputs", heads=few)
        self.value = Linear(config, keys[2], D, G * H, part, bias, split="outputs", heads=few)
        self.out = Linear(config, keys[3], N * H, D, part, bias, residual_scale(config), split="inputs")
        self.query_norm = Norm(config, H, "rmsnorm") if m.qk_norm else None
        self.key_norm = Norm(config, H, "rmsnorm") if m.qk_norm else None

    def __call__(self, x_BLD: Array, documents: Documents | None = None) -> Array:
        """Attends over whole sequences, from their first position."""
        q_BLNH, k_BLGH, v_BLGH = self._heads(x_BLD)
        m = self.config.model
        segments, position_BL = ((), None) if documents is None else ((documents.segment_BL,), documents.position_BL)
        if m.positions == "rope":
            q_BLNH, k_BLGH = (rotate(x_BLNH, m.rope_theta, position_BL) for x_BLNH in (q_BLNH, k_BLGH))
        y_BLNH = on_each_rank(
            functools.partial(causal_attention, implementation=self.config.execution.attention),
            (q_BLNH, k_BLGH, v_BLGH, *segments),
            in_spec=(*[split_spec(4)] * 3, *[batch_spec(2)] * len(segments)),
            out_specs=split_spec(4),
        )
        return self._joined(y_BLNH)

    def step(self, x_STD: Array, past: KeyValues, first: Array, rows: Rows) -> tuple[Array, KeyValues]:
        """Attends from the next tokens of sequences to the KV cache, and appends their keys and values.

        Args:
          x_STD: the rows of each shard side by side, like the tokens of one sequence: T = W · C.
          past: the pages. Those of this layer hold each sequence up to its row's first token, if the rows of this step
            don't.
          first: int32, where this layer's pages begin on a rank.

        Returns:
          (y_STD, `past` with the tokens' own keys and values)
        """
        specs = (*[split_spec(4)] * 3, *[cache_spec()] * 2, replicated_spec(0))
        y_STNH, *past = on_each_rank(
            functools.partial(_append_and_attend, self.config.model),
            (*self._heads(x_STD), *past, first, *rows[:3]),
            in_spec=(*specs, batch_spec(3), batch_spec(2), batch_spec(2)),
            out_specs=(split_spec(4), cache_spec(), cache_spec()),
        )
        return self._joined(y_STNH), KeyValues(*past)

    def _heads(self, x_BLD: Array) -> tuple[Array, Array, Array]:
        """q_BLNH, k_BLGH, v_BLGH before their rotation."""
        B, L, _ = x_BLD.shape
        # The shardings are given because jax 0.12 forgets that of a batch of one in a reshape.
        q_BLNH, k_BLGH, v_BLGH = (
            jnp.reshape(y_BLF, (B, L, -1, self.config.model.head_size), out_sharding=split_spec(4))
            for y_BLF in split_outputs(x_BLD, self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            q_BLNH, k_BLGH = self.query_norm(q_BLNH), self.key_norm(k_BLGH)
        return q_BLNH, k_BLGH, v_BLGH

    def _joined(self, y_BLNH: Array) -> Array:
        B, L = y_BLNH.shape[:2]
        return self.out(jnp.reshape(y_BLNH, (B, L, -1), out_sharding=split_spec(3)))


def _append_and_attend(
    config: ModelConfig,
    q_STNH: Array,
    k_STGH: Array,
    v_STGH: Array,
    keys_GnpH: Array,
    values_GnpH: Array,
    first: Array,
    table_SWK: Array,
    position_SW: Array,
    count_SW: Array,
) -> tuple[Array, Array, Array]:
    """`Attention.step` on one rank, whose S is 1."""
    G, n, p, H = keys_GnpH.shape
    _, W, K = table_SWK.shape
    q_TNH, k_TGH, v_TGH = (v.reshape(v.shape[1:]) for v in (q_STNH, k_STGH, v_STGH))
    table_WK, C = table_SWK.reshape(W, K), q_TNH.shape[0] // W
    step_C, count_W1 = jnp.arange(C, dtype=jnp.int32)[None], count_SW.reshape(W, 1)
    # Those beyond a row's count stand at its last token: behind it may be another request's numbers, and NaN.
    seen_WC = position_SW.reshape(W, 1) + jnp.clip(step_C, 0, jnp.maximum(count_W1 - 1, 0))
    position_WC = jnp.minimum(seen_WC, K * p - 1)
    if config.positions == "rope":
        place_T = position_WC.reshape(-1)
        q_TNH, k_TGH = (rotate_to(v, config.rope_theta, place_T, K * p) for v in (q_TNH, k_TGH))
    table_WK = table_WK + first
    page_WC = jnp.take_along_axis(table_WK, position_WC // p, axis=1)
    page_T = jnp.where(step_C < count_W1, page_WC, n).reshape(-1)  # n: nowhere
    place_T = (position_WC % p).reshape(-1)
    keys_GnpH, values_GnpH = (
        write(pages, page_T, place_T, fresh_TGH) for pages, fresh_TGH in ((keys_GnpH, k_TGH), (values_GnpH, v_TGH))
    )
    q_GWXH = (q_TNH / math.sqrt(H)).reshape(W, C, G, -1, H).transpose(2, 0, 1, 3, 4).reshape(G, W, -1, H)
    y_GWXH = paged_attention(q_GWXH, keys_GnpH, values_GnpH, table_WK, position_WC)
    y_TNH = y_GWXH.reshape(G, W, C, -1, H).transpose(1, 2, 0, 3, 4)
    return y_TNH.reshape(q_STNH.shape), keys_GnpH, values_GnpH
