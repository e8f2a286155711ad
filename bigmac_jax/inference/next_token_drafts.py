"""Drafts by a next-token module (`model.next_tokens`).

At the position of token t the module reads the model's features and token t + 1, and guesses token t + 2. So it reads
each token as soon as the model has chosen it, one position behind, and keeps a cache of its own. Where a slot's next
token stands at p, it has read up to there, at p - 1: its features guess the token at p + 1, the first of a draft. For
each one more it reads the token that it guessed, at the next position, with its own features in the place of the
model's; what a draft writes is written again when the draft was verified. Of several modules the first drafts all.

S batch shards, B slots of one, W rows, C tokens of a row, T = W · C, D hidden, G drafted tokens.
"""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.inference.int8_weights import dequantize
from bigmac_jax.inference.kv_cache import Decoder, Pasts, make_pasts, only_keys, positions, take_last, through_layer
from bigmac_jax.inference.sampling import RowSampling, sample
from bigmac_jax.model.attention import Rows
from bigmac_jax.model.gathering import on_each_rank
from bigmac_jax.model.mesh import batch_ranks, batch_spec, token_spec
from bigmac_jax.model.next_tokens import NextTokens
from bigmac_jax.model.transformer import Block


class Ahead(NamedTuple):
    """What a next-token module keeps of each slot between steps."""

    pasts: Pasts  # of its layer: the pages of a slot are those that the model has
    features_SBD: Array  # behind its norm, of the position before the slot's next token


def make_ahead(decoder: Decoder, pages: int, page_size: int, slots: int) -> Ahead | None:
    """The state of a decoder's next-token module before its first step; None without a module."""
    if decoder.next_tokens is None:
        return None
    config, layer = decoder.config, cast(Block, decoder.next_tokens.layers)
    pasts = make_pasts(config, layer, pages, page_size, slots)
    shape = batch_ranks(), slots, config.model.hidden_size
    return Ahead(pasts, jnp.zeros(shape, config.execution.dtype, out_sharding=token_spec(3)))


def read_prompts(
    model: Decoder, ahead: Ahead, x_STD: Array, tokens_ST: Array, rows: Rows, following_SW: Array, sampled_SW: Array
) -> Ahead:
    """Reads rows of prompts, which the model has read → what the module keeps.

    Args:
      x_STD: what the model's layers made of the rows.
      following_SW: the token behind each row; -1: its prompt ends, and it is `sampled_SW`.
    """

    def shift(tokens_ST: Array, count_SW: Array, following_SW: Array, sampled_SW: Array) -> Array:
        """The token behind each token."""
        tokens_SWC = tokens_ST.reshape(*count_SW.shape, -1)
        step_C = jnp.arange(tokens_SWC.shape[-1], dtype=jnp.int32)[None, None]
        behind_SW = jnp.where(following_SW < 0, sampled_SW, following_SW)
        is_last_SWC = step_C == count_SW[..., None] - 1
        return jnp.where(is_last_SWC, behind_SW[..., None], jnp.roll(tokens_SWC, -1, -1)).reshape(tokens_ST.shape)

    arrays = tokens_ST, rows.count_SW, following_SW, sampled_SW
    next_ST = on_each_rank(shift, arrays, in_spec=batch_spec, out_specs=batch_spec(2))
    h_STD, pasts = _read(model, ahead.pasts, _features(model, x_STD), next_ST, rows)

    def keep(features_SBD: Array, last_SWD: Array, slot_SW: Array, following_SW: Array) -> Array:
        # Out of range, and dropped, if the prompt goes on.
        slot_W = jnp.where(following_SW[0] < 0, slot_SW[0], features_SBD.shape[1])
        return features_SBD.at[0, slot_W].set(last_SWD[0], mode="drop")

    assert rows.slot_SW is not None
    whole = (jax.sharding.reshard(v, batch_spec(3)) for v in (ahead.features_SBD, take_last(h_STD, rows.count_SW)))
    arrays = *whole, rows.slot_SW, following_SW
    features_SBD = on_each_rank(keep, arrays, in_spec=batch_spec, out_specs=batch_spec(3))
    return Ahead(pasts, jax.sharding.reshard(features_SBD, token_spec(3)))


def read_sampled(model: Decoder, ahead: Ahead, x_STD: Array, sampled_ST: Array, rows: Rows) -> Ahead:
    """Reads what was sampled behind the tokens that slots have read → what the module keeps.

    Args:
      x_STD: what the model's layers made of the slots' tokens.
      sampled_ST: the token behind each.
      rows: the slots, with how many of these tokens stay.
    """
    h_STD, pasts = _read(model, ahead.pasts, _features(model, x_STD), sampled_ST, rows)
    reads_SB = jax.sharding.reshard(rows.count_SW, token_spec(2)) > 0
    last_SBD = take_last(h_STD, rows.count_SW)
    return Ahead(pasts, jnp.where(reads_SB[..., None], last_SBD, ahead.features_SBD))


def draft(
    model: Decoder, ahead: Ahead, position_SB: Array, sampling: RowSampling, slots: Rows, tokens: int
) -> tuple[Ahead, Array]:
    """The module's next tokens for every slot that decodes → what it keeps, drafted_GSB.

    Args:
      position_SB: where the slots' next tokens stand, behind which it drafts.
      slots: `count_SW` is the positions that each may fill.
    """
    ends = dequantize(model.ends, model.config.execution.dtype)

    def guess(h_SBD: Array, position_SB: Array) -> Array:
        return jax.sharding.reshard(sample(ends.logits(h_SBD), sampling, position_SB).token, batch_spec(2))

    def go_on(carry: tuple[Array, Array, Pasts], step: Array) -> tuple[tuple[Array, Array, Pasts], Array]:
        token_SB, h_SBD, pasts = carry
        at_SB = position_SB + step
        active_SB = (at_SB < slots.count_SW).astype(jnp.int32)
        h_SBD, pasts = _read(model, pasts, h_SBD, token_SB, Rows(slots.table_SWK, at_SB * active_SB, active_SB))
        token_SB = guess(h_SBD, at_SB + 2)
        return (token_SB, h_SBD, pasts), token_SB

    first_SB = guess(ahead.features_SBD, position_SB + 1)
    steps = jnp.arange(tokens - 1, dtype=jnp.int32)
    (_, _, pasts), others_GSB = jax.lax.scan(go_on, (first_SB, ahead.features_SBD, ahead.pasts), steps)
    return ahead._replace(pasts=only_keys(pasts, ahead.pasts)), jnp.concatenate([first_SB[None], others_GSB])


def _features(model: Decoder, x_STD: Array) -> Array:
    return dequantize(model.ends, model.config.execution.dtype).final_norm(x_STD)


def _read(model: Decoder, pasts: Pasts, h_STD: Array, next_ST: Array, rows: Rows) -> tuple[Array, Pasts]:
    """Runs the module over rows → its features, behind its norm, and its layer's pasts.

    Args:
      h_STD: the features before it, behind the norm.
      next_ST: the token behind each position.
    """
    dtype = model.config.execution.dtype
    stacked = jax.tree.map(lambda w: jax.lax.index_in_dim(w, 0, keepdims=False), model.next_tokens)
    module: NextTokens = dequantize(stacked, dtype)
    read_STD = dequantize(model.ends, dtype).embed(next_ST, positions(rows, next_ST.shape[1]))
    x_STD, turn = module.join(h_STD, read_STD), (jnp.zeros((), jnp.int32), 1)
    x_STD, pasts, *_ = through_layer(cast(Block, module.layers), x_STD, pasts, turn, rows)
    return module.final_norm(x_STD), pasts
