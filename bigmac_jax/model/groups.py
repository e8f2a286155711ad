"""Rows grouped by expert: what a rank does with the rows it holds, before and after its experts.

N rows with K choices each among e local experts. Each expert has C even slots; its rows beyond them stand in n blocks
of b slots, each block of a single expert.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.model.exchange.rows import bin_of, bounds_of, sorted_by


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """An expert's even slots, and its last block, may be partly empty.

    slot_NK: the slot of each choice, the e·C even ones before the n·b of the blocks; behind all where the expert is
      elsewhere.
    even_eC, block_nb: their inverse, the choice n·K + k that fills a slot; N·K: none.
    expert_n: the expert of each block; blocks behind the last one that is filled count as the last expert's.
    sizes_e: slots of each expert's blocks.
    """

    slot_NK: Array
    even_eC: Array
    block_nb: Array
    expert_n: Array
    sizes_e: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sorted:
    """Choices in the order of their experts, without a gap: M slots, of which those behind the last expert's are empty.

    slot_NK, choice_M: a choice's slot (M: its expert is elsewhere), and which choice fills a slot (N·K: none).
    expert_M: the expert of each slot; empty ones count as the last expert's.
    sizes_e: slots of each expert.
    """

    slot_NK: Array
    choice_M: Array
    expert_M: Array
    sizes_e: Array


@jax.named_scope("plan")
def sort(expert_NK: Array, experts: int, slots: int) -> Sorted:
    """Sorts choices by expert; an expert's stand by number.

    Args:
      expert_NK: as for `group`.
      slots: M, at least the most choices that can be local (`most_chosen`).
    """
    choices = expert_NK.size
    sorted_NK, order_NK = sorted_by(expert_NK, experts + 1)
    sizes_e = jnp.diff(bounds_of(sorted_NK, experts))
    place = jnp.arange(choices, dtype=jnp.int32)
    local = sorted_NK < experts
    slot = jnp.zeros_like(order_NK).at[order_NK].set(jnp.where(local, place, slots), unique_indices=True)

    def of_slots(v: Array, empty: int) -> Array:
        v = jnp.where(local, v, empty)[:slots]
        return jnp.pad(v, (0, slots - v.size), constant_values=empty)

    return Sorted(slot.reshape(expert_NK.shape), of_slots(order_NK, choices), of_slots(sorted_NK, experts - 1), sizes_e)


def most_chosen(expert_NK: Array, experts: int, most_local: int | None) -> int:
    """The most choices of local experts: `most_local`, or all that N rows can have, none of an expert twice."""
    N, K = expert_NK.shape
    return most_local or N * min(K, experts)


@jax.named_scope("plan")
def group(expert_NK: Array, experts: int, even: int, block: int, most_local: int | None = None) -> Groups:
    """Groups choices by expert, an expert's by number.

    Args:
      expert_NK: local experts, without repetition in a row; `experts` where a choice's expert is elsewhere.
      even: C.
      most_local: the most choices that are local; None: as many as can be.
    """
    N, K = expert_NK.shape
    rows = most_chosen(expert_NK, experts, most_local)
    b = min(block, rows)
    # Each expert's last block may hold a single row: Σ ceil(c/b) ≤ (Σ c + e·(b - 1)) / b.
    n = (rows + experts * (b - 1)) // b
    sorted_NK, order_NK = sorted_by(expert_NK, experts + 1)
    bounds_e = bounds_of(sorted_NK, experts)
    start_e, count_e = bounds_e[:-1], jnp.diff(bounds_e)
    blocks_e = -(-jnp.maximum(count_e - even, 0) // b)
    ends_e = jnp.cumsum(blocks_e)
    first_e = ends_e - blocks_e

    # A choice's place among those of its expert says which slot it takes.
    place = jnp.arange(N * K, dtype=jnp.int32) - bounds_e[sorted_NK]
    in_blocks = experts * even - even + jnp.append(first_e, 0)[sorted_NK] * b + place
    slot = jnp.where(place < even, sorted_NK * even + place, in_blocks)
    slot = jnp.where(sorted_NK < experts, slot, experts * even + n * b)
    slot_NK = jnp.zeros((N * K,), jnp.int32).at[order_NK].set(slot, unique_indices=True).reshape(N, K)

    def choices(start_n: Array, filled_n: Array, slots: int) -> Array:
        """[n, slots]: runs of the sorted choices."""
        offset = jnp.arange(slots, dtype=jnp.int32).reshape(1, slots)
        choice = order_NK.at[start_n.reshape(-1, 1) + offset].get(mode="clip")
        return jnp.where(offset < filled_n.reshape(-1, 1), choice, N * K)

    expert_n = jnp.minimum(bin_of(jnp.arange(n, dtype=jnp.int32), ends_e), experts - 1)
    before_n = even + b * (jnp.arange(n, dtype=jnp.int32) - first_e[expert_n])  # rows of the expert before the block
    block_nb = choices(start_e[expert_n] + before_n, count_e[expert_n] - before_n, b)
    return Groups(slot_NK, choices(start_e, count_e, even), block_nb, expert_n, blocks_e * b)
