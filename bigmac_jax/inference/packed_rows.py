"""Packs what the host tells an engine's programs about slots and rows, and what they answer, into one int32 array each
way: every array more would be a transfer or a collective more. Floats and uint32 travel as the int32 of the same bits.

S batch shards, W rows (or slots) of one, C tokens of a row, K pages of a sequence, X numbers of a row.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bigmac_jax.inference.sampling import RowSampling, Sampled, Sampling
from bigmac_jax.model.attention import Rows
from bigmac_jax.model.mesh import batch_spec, replicated_spec, token_spec

# What a packed row begins with; its K pages and C tokens follow. All zeros are a row of nothing, or an idle slot.
_HEAD = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "seed": np.uint32, "request": np.int32,
         "alternatives": np.int32, "count": np.int32, "position": np.int32, "slot": np.int32,
         "following": np.int32}  # fmt: skip


def packed_size(pages: int, tokens: int = 0) -> int:
    """Length of a packed row whose sequence may have so many pages; a slot has no tokens."""
    return len(_HEAD) + pages + tokens


def pack_row(
    sampling: Sampling, request: int, count: int, table: Sequence[int], tokens: Sequence[int] = (), position: int = 0,
    slot: int = -1, following: int = -1,
) -> np.ndarray:  # fmt: skip
    """Encodes a slot, or a row of a prompt, as int32 numbers for `unpack_rows`.

    Args:
      count: tokens of the row; of a slot the positions that it may fill, 0 if it is idle.
      table: all K pages.
      position: of the row's first token.
      slot: of a prompt's row, the slot that it is read for.
      following: the prompt's token behind the row; -1: there is none, and the one that is sampled goes to the slot.
    """
    s = sampling
    head = s.temperature, s.top_k, s.top_p, s.seed, request, s.logprobs, count, position, slot + 1, following + 1
    numbers = np.array([head], np.dtype(list(_HEAD.items()))).view(np.int32)
    return np.concatenate([numbers, np.array([*table, *tokens], np.int32)])


def unpack_rows(packed_SWX: Array, tokens: int = 0) -> tuple[RowSampling, Rows, Array, Array]:
    """Decodes `pack_row`'s numbers inside a program, for rows of so many tokens → sampling settings, pages, positions
    and, of rows with tokens, slots; following_SW, -1 where a row ends its prompt; tokens_SWC."""

    def cut(start: int, stop: int) -> Array:
        # On a mesh of one rank, jax 0.12 forgets in a slice how the whole is sharded.
        return jax.sharding.reshard(packed_SWX[..., start:stop], batch_spec(3))

    columns = []
    for i, dtype in enumerate(_HEAD.values()):
        column = jax.sharding.reshard(packed_SWX[..., i], batch_spec(2))
        columns.append(jax.lax.bitcast_convert_type(column, dtype))
    *settings, count, position, slot, following = columns
    end = packed_SWX.shape[-1]
    table, row = cut(len(_HEAD), end - tokens), cut(end - tokens, end)
    # Row w of slots is slot w. A row of nothing has a slot that is out of range.
    of_rows = jnp.where(slot > 0, slot - 1, jnp.iinfo(jnp.int32).max) if tokens else None
    return RowSampling(*settings), Rows(table, position, count, of_rows), following - 1, row


def pack_sampled(sampled: Sampled, count_SW: Array) -> Array:
    """Encodes what was sampled as int32 numbers for `read_sampled`, replicated on all processes by one collective.

    Args:
      count_SW: number of new tokens that begin with each row.
    """

    def to_columns(v: Array) -> Array:
        v = v[..., None] if v.ndim == 2 else v
        return jax.sharding.reshard(jax.lax.bitcast_convert_type(v, jnp.int32), token_spec(3))

    packed_SWX = jnp.concatenate([to_columns(count_SW), *map(to_columns, sampled)], -1)
    return jax.sharding.reshard(packed_SWX, replicated_spec(3))


def read_sampled(packed_SWX: Array) -> tuple[np.ndarray, Sampled]:
    """Waits for what a program sampled and unpacks it on the host → count_SW, NumPy arrays."""
    whole: Any = np.asarray(packed_SWX)
    alternatives = (whole.shape[-1] - 3) // 2
    parts: list[Any] = np.split(whole, (1, 2, 3, 3 + alternatives), axis=-1)
    count, token, logprob, top_tokens, top_logprobs = parts
    logprob, top_logprobs = logprob.view(np.float32), top_logprobs.view(np.float32)
    return count[..., 0], Sampled(token[..., 0], logprob[..., 0], top_tokens, top_logprobs)
