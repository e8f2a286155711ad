"""The programs of an engine: prefill reads parts of prompts into the cache, decode takes every slot one token further,
draft and verify several.

S batch shards, B slots of one, W rows of prompts, C tokens of a row, K pages of a sequence, G drafted tokens, X numbers
that the host says of a slot or row.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config
from bigmac_jax.inference.kv_cache import Cache, Decoder, advance, logits_of_each, logits_of_last, make_cache
from bigmac_jax.inference.sampling import Chosen, Draws, sample
from bigmac_jax.model.attention import Rows
from bigmac_jax.model.mesh import batch_ranks, batch_spec, on_each_rank, replicated_spec, tensor_ranks, token_spec
from bigmac_jax.runtime import hosts

PROMPTS = 16  # at a time, where nobody says otherwise
PAGE_SIZE = 16  # positions of a page
DRAFTED = 4  # tokens of a draft, where nobody says otherwise
ROW_PAGES = 4  # that a row of a prompt fills: a longer row reads what stands before it less often, and is padded more


class State(NamedTuple):
    """What stays on the devices between the steps of an engine of B slots a shard."""

    cache: Cache
    token_SB: Array  # each slot's last one, to be read next
    position_SB: Array  # where it will stand


class Decoding(NamedTuple):
    """A decoder's programs. They are given its weights as a list: flattening modules would take half as long as a small
    step. What the host says of slots and rows comes as one array of numbers, `packed`."""

    weights: list[Array]
    # The state is donated; what was chosen is for `read`.
    prefill: Any  # (weights, state, rows_SWX, row_size=C) → (State, chosen of each row)
    decode: Any  # (weights, state, slots_SBX) → (State, chosen of each slot)
    verify: Any  # (weights, state, drafted_GSB, slots_SBX) → (State, chosen of each slot, G + 1 in a row)


class Drafting(NamedTuple):
    """A drafter's program, as `Decoding`."""

    weights: list[Array]
    draft: Any  # (weights, state, slots_SBX, tokens=G) → (State, drafted_GSB); the state is donated


def make_decoding(decoder: Decoder) -> Decoding:
    weights, tree = jax.tree.flatten(decoder)
    return Decoding(weights, *(_program(of, tree, jax.sharding.get_mesh()) for of in (_prefill, _decode, _verify)))


def make_drafting(drafter: Decoder) -> Drafting:
    """`drafter`: of `inference.drafter.make_drafter`."""
    weights, tree = jax.tree.flatten(drafter)
    return Drafting(weights, _program(_draft, tree, jax.sharding.get_mesh()))


@functools.lru_cache(16)
def _program(of: Callable[..., Any], tree: Any, mesh: Mesh) -> hosts.Jit:
    """Of all decoders of a kind, whose config is in the tree: one that has other weights, as a run's has at each
    evaluation of its tasks, compiles nothing."""
    return hosts.Jit(functools.partial(of, tree), donate_argnames="state")


def make_state(config: Config, decoder: Decoder, slots: int, pages: int, page_size: int) -> State:
    """An engine's before its first step; sizes are of each shard of the batch."""

    def make() -> State:
        shape = batch_ranks(), slots
        zeros = (jnp.zeros(shape, jnp.int32, out_sharding=batch_spec(2)) for _ in range(2))
        return State(make_cache(config, decoder, pages, page_size), *zeros)

    return jax.jit(make)()


class Packed(NamedTuple):
    """A slot, or a row of a prompt, as the host says it: `draws`, and what else is no part of the sequence."""

    draws: tuple[float | int, ...]  # `inference.sampling.draws_of`
    length: int  # tokens of the row; of a slot the positions that it may fill, 0 if it is idle
    position: int = 0  # of a row's first token
    slot: int = -1  # that the token behind a prompt's last row goes to; -1: the prompt goes on


_HEAD = len(Draws._fields) + 3
_FLOATS = tuple(Draws._fields.index(name) for name in ("temperature", "top_p"))
IDLE = Packed((0,) * len(Draws._fields), 0)


def pack(of: Packed, table: Sequence[int], tokens: Sequence[int] = ()) -> list[int]:
    """As `_unpack` reads it: numbers of 32 bits, tokens of the row, pages."""
    numbers = [_bits(v) if i in _FLOATS else _signed(int(v)) for i, v in enumerate(of.draws)]
    return [*numbers, of.length, of.position, of.slot, *tokens, *table]


def packed_size(pages: int, tokens: int = 0) -> int:
    """Numbers of one row, of so many pages a sequence."""
    return _HEAD + tokens + pages


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _signed(value: int) -> int:
    """The int32 of the same bits."""
    return value - (1 << 32) if value >= 1 << 31 else value


def _unpack(packed_SWX: Array, tokens: int) -> tuple[Any, ...]:
    """draws, count_SW, position_SW, slot_SW, tokens_SWC, table_SWK."""

    def stands(part: Array) -> Array:  # as the whole; on a mesh of one rank, jax 0.12 forgets it in a slice
        return jax.sharding.reshard(part, batch_spec(part.ndim))

    columns = [stands(packed_SWX[..., i]) for i in range(_HEAD)]
    drawn = Draws(*columns[: len(Draws._fields)])
    drawn = drawn._replace(
        temperature=jax.lax.bitcast_convert_type(drawn.temperature, jnp.float32),
        top_p=jax.lax.bitcast_convert_type(drawn.top_p, jnp.float32),
        seed=jax.lax.bitcast_convert_type(drawn.seed, jnp.uint32),
    )
    rest = packed_SWX[..., _HEAD:]
    return drawn, *columns[len(Draws._fields) :], stands(rest[..., :tokens]), stands(rest[..., tokens:])


def _prefill(tree: Any, weights: list[Array], state: State, rows_SWX: Array, *, row_size: int) -> tuple[State, Array]:
    """Reads rows of prompts. The token behind a prompt's last row goes to its slot."""
    model = jax.tree.unflatten(tree, weights)
    drawn, count_SW, position_SW, slot_SW, tokens_SWC, table_SWK = _unpack(rows_SWX, row_size)
    tokens_ST = jnp.reshape(tokens_SWC, (tokens_SWC.shape[0], -1), out_sharding=batch_spec(2))
    x_STD, cache = advance(model, state.cache, tokens_ST, Rows(table_SWK, position_SW, count_SW))
    behind_SW = position_SW + count_SW
    chosen = sample(logits_of_last(model, x_STD, count_SW), drawn, behind_SW)

    def start(slot_SW: Array, *values: Array) -> tuple[Array, ...]:
        token_SB, position_SB, *of_rows = values
        # Nowhere, if the prompt goes on.
        slot_W = jnp.where(slot_SW[0] < 0, token_SB.shape[1], slot_SW[0])
        return tuple(
            of_slots.at[0, slot_W].set(new[0], mode="drop")
            for of_slots, new in zip((token_SB, position_SB), of_rows, strict=True)
        )

    token_SW = jax.sharding.reshard(chosen.token, batch_spec(2))
    arrays = slot_SW, state.token_SB, state.position_SB, token_SW, behind_SW
    token_SB, position_SB = on_each_rank(start, arrays, in_spec=batch_spec, out_specs=(batch_spec(2),) * 2)
    return State(cache, token_SB, position_SB), _on_all(chosen, jnp.ones_like(count_SW))


def _decode(tree: Any, weights: list[Array], state: State, slots_SBX: Array) -> tuple[State, Array]:
    """Reads the last token of every slot that decodes, and chooses the next one."""
    after, chosen = _one_more(jax.tree.unflatten(tree, weights), state, slots_SBX)
    return after, _on_all(chosen, after.position_SB - state.position_SB)


def _draft(tree: Any, weights: list[Array], state: State, slots_SBX: Array, *, tokens: int) -> tuple[State, Array]:
    """The next tokens of every slot that decodes, by the drafter. What it writes to the cache stands where `_verify`
    will write: the slots themselves stay where they are."""
    model = jax.tree.unflatten(tree, weights)

    def one(state: State, _: None) -> tuple[State, Array]:
        state, _chosen = _one_more(model, state, slots_SBX)
        return state, state.token_SB

    after, drafted_GSB = jax.lax.scan(one, state, None, length=tokens)
    return State(after.cache, state.token_SB, state.position_SB), drafted_GSB


def _one_more(model: Decoder, state: State, slots_SBX: Array) -> tuple[State, Chosen]:
    drawn, limit_SB, _, _, _, table_SBK = _unpack(slots_SBX, 0)
    active_SB = (state.position_SB < limit_SB).astype(jnp.int32)
    # An idle slot stands at 0, so that nothing is read for it.
    rows = Rows(table_SBK, state.position_SB * active_SB, active_SB)
    x_SBD, cache = advance(model, state.cache, state.token_SB, rows)
    position_SB = state.position_SB + active_SB
    chosen = sample(logits_of_last(model, x_SBD, active_SB), drawn, position_SB)
    token_SB = jnp.where(active_SB > 0, jax.sharding.reshard(chosen.token, batch_spec(2)), state.token_SB)
    return State(cache, token_SB, position_SB), chosen


def _verify(tree: Any, weights: list[Array], state: State, drafted_GSB: Array, slots_SBX: Array) -> tuple[State, Array]:
    """Reads the last token of every slot that decodes and those drafted behind it, and chooses the token behind each as
    `_decode` would; they count up to the first one that was not drafted.

    A token is chosen with the random numbers of its position, here and in the draft. So it is what it would be without
    drafts, and what was drawn from a distribution much like its own is likely the same.
    """
    model = jax.tree.unflatten(tree, weights)
    drawn, limit_SB, _, _, _, table_SBK = _unpack(slots_SBX, 0)
    G, S, B = drafted_GSB.shape
    C = G + 1

    def rows_of(token_SB: Array, drafted_GSB: Array) -> Array:
        tokens_SBC = jnp.concatenate([token_SB[..., None], jnp.moveaxis(drafted_GSB, 0, -1)], -1)
        return tokens_SBC.reshape(token_SB.shape[0], -1)

    specs = batch_spec(2), P(None, *batch_spec(2))
    tokens_ST = on_each_rank(rows_of, (state.token_SB, drafted_GSB), in_spec=specs, out_specs=batch_spec(2))
    count_SB = jnp.clip(limit_SB - state.position_SB, 0, C)
    position_SB = jnp.where(count_SB > 0, state.position_SB, 0)
    rows = Rows(table_SBK, position_SB, count_SB)
    x_STD, cache = advance(model, state.cache, tokens_ST, rows)

    def of_tokens(of_slots_SB: Array) -> Array:
        repeated = jnp.broadcast_to(of_slots_SB[..., None], (S, B, C), out_sharding=batch_spec(3))
        return jnp.reshape(repeated, (S, B * C), out_sharding=batch_spec(2))

    logits_STV = logits_of_each(model, x_STD)
    behind_T = jnp.tile(jnp.arange(1, C + 1, dtype=jnp.int32), B)
    chosen = sample(logits_STV, Draws(*map(of_tokens, drawn)), of_tokens(position_SB) + behind_T[None])

    def accepted(chosen_ST: Array, tokens_ST: Array, *of_slots: Array) -> tuple[Array, Array, Array]:
        token_SB, position_SB, count_SB = of_slots
        chosen_SBC, tokens_SBC = (v.reshape(*token_SB.shape, C) for v in (chosen_ST, tokens_ST))
        equal_SBG = (chosen_SBC[..., :-1] == tokens_SBC[..., 1:]).astype(jnp.int32)
        new_SB = jnp.minimum(1 + jnp.cumprod(equal_SBG, -1).sum(-1), count_SB)
        last_SB = jnp.take_along_axis(chosen_SBC, jnp.maximum(new_SB - 1, 0)[..., None], -1)[..., 0]
        return jnp.where(new_SB > 0, last_SB, token_SB), position_SB + new_SB, new_SB

    arrays = jax.sharding.reshard(chosen.token, batch_spec(2)), tokens_ST, state.token_SB, state.position_SB, count_SB
    token_SB, position_SB, new_SB = on_each_rank(accepted, arrays, in_spec=batch_spec, out_specs=(batch_spec(2),) * 3)
    return State(cache, token_SB, position_SB), _on_all(chosen, of_tokens(new_SB))


def _on_all(chosen: Chosen, count_SW: Array) -> Array:
    """On every process, in one array of numbers: one collective.

    Args:
      count_SW: of each row, how many tokens count of those that begin with it.
    """

    def columns(v: Array) -> Array:
        v = v[..., None] if v.ndim == 2 else v
        v = v if v.dtype == jnp.int32 else jax.lax.bitcast_convert_type(v, jnp.int32)
        return jax.sharding.reshard(v, token_spec(3))

    whole_SWX = jnp.concatenate([columns(count_SW), *map(columns, chosen)], -1)
    return jax.sharding.reshard(whole_SWX, replicated_spec(3))


def read(chosen_SWX: Array) -> tuple[np.ndarray, Chosen]:
    """What a program chose, on the host: count_SW, and arrays of NumPy."""
    whole: Any = np.asarray(chosen_SWX)
    likely = (whole.shape[-1] - 3) // 2
    parts: list[Any] = np.split(whole, (1, 2, 3, 3 + likely), axis=-1)
    count, token, logprob, tokens, logprobs = parts
    logprob, logprobs = logprob.view(np.float32), logprobs.view(np.float32)
    return count[..., 0], Chosen(token[..., 0], logprob[..., 0], tokens, logprobs)


def slots_of(requests: int) -> int:
    """Slots of each shard that hold so many requests on the current mesh."""
    unit = batch_ranks() * tensor_ranks()
    return -(-requests // unit) * unit // batch_ranks()


def bucket(length: int, multiple: int) -> int:
    """A length that holds this one, of few, so that few programs are compiled."""
    step = math.lcm(16 if length <= 128 else 128, multiple)
    return -(-length // step) * step
