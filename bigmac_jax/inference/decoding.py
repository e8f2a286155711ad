"""The compiled programs of an engine: prefill reads parts of prompts into the cache, decode takes every slot one token
further, draft and verify several.

S batch shards, B slots of one, W rows of prompts, C tokens of a row, G drafted tokens, X numbers of a slot or row
(`inference.packed_rows`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bigmac_jax.inference.kv_cache import (
    Cache,
    Decoder,
    advance,
    compute_last_logits,
    compute_logits,
    make_cache,
    only_keys,
    settle,
    try_out,
)
from bigmac_jax.inference.next_token_drafts import Ahead, draft, make_ahead, read_prompts, read_sampled
from bigmac_jax.inference.packed_rows import pack_sampled, unpack_rows
from bigmac_jax.inference.sampling import RowSampling, Sampled, sample
from bigmac_jax.model.attention import Rows
from bigmac_jax.model.gathering import on_each_rank
from bigmac_jax.model.mesh import batch_ranks, batch_spec, tensor_ranks
from bigmac_jax.runtime import hosts

PROMPTS = 16  # prompts at a time, by default
PAGE_SIZE = 16  # positions of a page of the cache
DRAFTED = 4  # tokens of a draft, by default
ROW_PAGES = 4  # pages that a row of a prompt fills: a longer row rereads the prefix less often, and is padded more


class State(NamedTuple):
    """Device arrays that an engine keeps between its steps, for B slots on each batch shard."""

    cache: Cache
    token_SB: Array  # each slot's last token, to be read next
    position_SB: Array  # where it will stand
    ahead: Ahead | None  # of a decoder's next-token module


class DecodePrograms(NamedTuple):
    """The compiled programs of a decoder. They donate the state, and pack what they sample for
    `packed_rows.read_sampled`.

    Weights are a list, because flattening modules would take half as long as a small step.
    """

    weights: list[Array]
    prefill: Any  # (weights, state, rows_SWX, row_size=C) → (State, sampled, a token for each row)
    decode: Any  # (weights, state, slots_SBX) → (State, sampled, a token for each slot)
    draft: Any  # (weights, state, slots_SBX, tokens=G) → (State, drafted_GSB); of a draft model, or by the module
    verify: Any  # (weights, state, drafted_GSB, slots_SBX) → (State, sampled, G + 1 tokens in a row for each slot)


def make_decode_programs(decoder: Decoder) -> DecodePrograms:
    """Makes the programs of a decoder, or of a draft model, on the current mesh; each compiles at its first call."""
    weights, tree = jax.tree.flatten(decoder)
    mesh = jax.sharding.get_mesh()
    functions = _prefill, _decode, _draft, _verify
    return DecodePrograms(weights, *(_jit(function, tree, mesh) for function in functions))


@functools.lru_cache(32)
def _jit(function: Callable[..., Any], tree: Any, mesh: Mesh) -> hosts.Jit:
    """One program for all decoders of a structure, whose config is in the tree: other weights, as a run's at each
    evaluation of its tasks, compile nothing."""
    return hosts.Jit(functools.partial(function, tree), donate_argnames="state")


def make_state(decoder: Decoder, slots: int, pages: int, page_size: int) -> State:
    """Makes the state of an engine before its first step; slots and pages are numbers for each batch shard."""

    def make(store: Any) -> State:
        shape = batch_ranks(), slots
        zeros = [jnp.zeros(shape, jnp.int32, out_sharding=batch_spec(2)) for _ in range(2)]
        sizes = pages, page_size, slots
        cache = make_cache(dataclasses.replace(decoder, store=store), *sizes)
        return State(cache, zeros[0], zeros[1], make_ahead(decoder, *sizes))

    return jax.jit(make)(decoder.store)


def _prefill(tree: Any, weights: list[Array], state: State, rows_SWX: Array, *, row_size: int) -> tuple[State, Array]:
    """Reads rows of prompts. The token after a prompt's last row goes to its slot."""
    model = jax.tree.unflatten(tree, weights)
    sampling, rows, following_SW, tokens_SWC = unpack_rows(rows_SWX, row_size)
    tokens_ST = jnp.reshape(tokens_SWC, (tokens_SWC.shape[0], -1), out_sharding=batch_spec(2))
    x_STD, cache = advance(model, state.cache, tokens_ST, rows)
    next_SW = rows.position_SW + rows.count_SW
    sampled = sample(compute_last_logits(model, x_STD, rows.count_SW), sampling, next_SW)

    def start_slots(*values: Array) -> tuple[Array, Array]:
        slot_SW, following_SW, token_SB, position_SB, token_SW, next_SW = values
        # Out of range, and dropped, if the prompt goes on.
        slot_W = jnp.where(following_SW[0] < 0, slot_SW[0], token_SB.shape[1])
        token_SB = token_SB.at[0, slot_W].set(token_SW[0], mode="drop")
        return token_SB, position_SB.at[0, slot_W].set(next_SW[0], mode="drop")

    token_SW = jax.sharding.reshard(sampled.token, batch_spec(2))
    assert rows.slot_SW is not None
    arrays = rows.slot_SW, following_SW, state.token_SB, state.position_SB, token_SW, next_SW
    token_SB, position_SB = on_each_rank(start_slots, arrays, in_spec=batch_spec, out_specs=(batch_spec(2),) * 2)
    ahead = state.ahead
    if ahead is not None:
        ahead = read_prompts(model, ahead, x_STD, tokens_ST, rows, following_SW, token_SW)
    return State(cache, token_SB, position_SB, ahead), pack_sampled(sampled, jnp.ones_like(rows.count_SW))


def _decode(tree: Any, weights: list[Array], state: State, slots_SBX: Array) -> tuple[State, Array]:
    """Reads the last token of every slot that decodes, and samples the next one."""
    after, sampled = _decode_once(jax.tree.unflatten(tree, weights), state, slots_SBX)
    return after, pack_sampled(sampled, after.position_SB - state.position_SB)


def _draft(tree: Any, weights: list[Array], state: State, slots_SBX: Array, *, tokens: int) -> tuple[State, Array]:
    """The next tokens of the next-token module, or of the draft model, for every slot that decodes. It writes to the
    cache where `_verify` writes again; the slots keep their token and position."""
    model = jax.tree.unflatten(tree, weights)
    if state.ahead is not None:
        sampling, slots, _, _ = unpack_rows(slots_SBX)
        ahead, drafted_GSB = draft(model, state.ahead, state.position_SB, sampling, slots, tokens)
        return state._replace(ahead=ahead), drafted_GSB

    def decode_once(state: State, _: None) -> tuple[State, Array]:
        state, _sampled = _decode_once(model, state, slots_SBX)
        return state, state.token_SB

    after, drafted_GSB = jax.lax.scan(decode_once, state, None, length=tokens)
    pasts = only_keys(after.cache.pasts, state.cache.pasts)
    return state._replace(cache=after.cache._replace(pasts=pasts)), drafted_GSB


def _decode_once(model: Decoder, state: State, slots_SBX: Array) -> tuple[State, Sampled]:
    sampling, slots, _, _ = unpack_rows(slots_SBX)
    active_SB = (state.position_SB < slots.count_SW).astype(jnp.int32)
    # An idle slot stands at position 0, so that nothing is read for it.
    rows = Rows(slots.table_SWK, state.position_SB * active_SB, active_SB)
    x_SBD, cache = advance(model, state.cache, state.token_SB, rows)
    position_SB = state.position_SB + active_SB
    sampled = sample(compute_last_logits(model, x_SBD, active_SB), sampling, position_SB)
    token_SB = jnp.where(active_SB > 0, jax.sharding.reshard(sampled.token, batch_spec(2)), state.token_SB)
    ahead = state.ahead
    if ahead is not None:
        ahead = read_sampled(model, ahead, x_SBD, token_SB, rows)
    return State(cache, token_SB, position_SB, ahead), sampled


def _verify(tree: Any, weights: list[Array], state: State, drafted_GSB: Array, slots_SBX: Array) -> tuple[State, Array]:
    """Reads the last token of every slot that decodes and its draft, and samples the token after each as `_decode`
    would; they count up to the first one that was not drafted.

    A token is sampled with the random numbers of its position, here and in the draft. So it is what it would be without
    drafts, and a draft from a similar distribution is likely the same.
    """
    model = jax.tree.unflatten(tree, weights)
    sampling, slots, _, _ = unpack_rows(slots_SBX)
    G, S, B = drafted_GSB.shape
    C = G + 1

    def side_by_side(token_SB: Array, drafted_GSB: Array) -> Array:
        tokens_SBC = jnp.concatenate([token_SB[..., None], jnp.moveaxis(drafted_GSB, 0, -1)], -1)
        return tokens_SBC.reshape(token_SB.shape[0], -1)

    specs = batch_spec(2), P(None, *batch_spec(2))
    tokens_ST = on_each_rank(side_by_side, (state.token_SB, drafted_GSB), in_spec=specs, out_specs=batch_spec(2))
    count_SB = jnp.clip(slots.count_SW - state.position_SB, 0, C)
    position_SB = jnp.where(count_SB > 0, state.position_SB, 0)
    rows = Rows(slots.table_SWK, position_SB, count_SB)
    x_STD, cache, seen = try_out(model, state.cache, tokens_ST, rows)

    def repeat(slots_SB: Array) -> Array:
        """A slot's value for each of its tokens, [S, T]."""
        repeated = jnp.broadcast_to(slots_SB[..., None], (S, B, C), out_sharding=batch_spec(3))
        return jnp.reshape(repeated, (S, B * C), out_sharding=batch_spec(2))

    next_T = jnp.tile(jnp.arange(1, C + 1, dtype=jnp.int32), B)
    settings = RowSampling(*map(repeat, sampling))
    sampled = sample(compute_logits(model, x_STD), settings, repeat(position_SB) + next_T[None])

    def accept(sampled_ST: Array, tokens_ST: Array, *slots: Array) -> tuple[Array, Array, Array]:
        token_SB, position_SB, count_SB = slots
        sampled_SBC, tokens_SBC = (v.reshape(*token_SB.shape, C) for v in (sampled_ST, tokens_ST))
        equal_SBG = (sampled_SBC[..., :-1] == tokens_SBC[..., 1:]).astype(jnp.int32)
        new_SB = jnp.minimum(1 + jnp.cumprod(equal_SBG, -1).sum(-1), count_SB)
        last_SB = jnp.take_along_axis(sampled_SBC, jnp.maximum(new_SB - 1, 0)[..., None], -1)[..., 0]
        return jnp.where(new_SB > 0, last_SB, token_SB), position_SB + new_SB, new_SB

    sampled_ST = jax.sharding.reshard(sampled.token, batch_spec(2))
    arrays = sampled_ST, tokens_ST, state.token_SB, state.position_SB, count_SB
    token_SB, position_SB, new_SB = on_each_rank(accept, arrays, in_spec=batch_spec, out_specs=(batch_spec(2),) * 3)
    ahead = state.ahead
    if ahead is not None:
        ahead = read_sampled(model, ahead, x_STD, sampled_ST, rows._replace(count_SW=new_SB))
    cache = settle(model, cache, seen, new_SB)
    return State(cache, token_SB, position_SB, ahead), pack_sampled(sampled, repeat(new_SB))


def slots_per_shard(requests: int) -> int:
    """Number of slots on each batch shard for so many requests at a time, rounded up to fit the current mesh."""
    multiple = batch_ranks() * tensor_ranks()
    return -(-requests // multiple) * multiple // batch_ranks()


def round_up_length(length: int, multiple: int = 1) -> int:
    """Rounds a length up to a multiple of 16 (beyond 128, of 128) and of `multiple`: few shapes are compiled."""
    step = math.lcm(16 if length <= 128 else 128, multiple)
    return -(-length // step) * step
