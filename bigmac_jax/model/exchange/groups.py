"""Rows grouped by expert: what a rank does with the rows it holds, before and after its experts.

N rows with K choices each among e local experts; n blocks of b rows, each block of a single expert.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.model.exchange.rows import collect, inverse, pick, spread


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """Blocks of rows, sorted by expert; an expert's last block is padded with zeros.

    slot_NK: the slot of each choice among the M = n·b of the blocks; M where the expert is elsewhere.
    choice_M: its inverse.
    expert_n: the expert of each block; blocks behind the last one count as the last expert's.
    sizes_e: rows of each expert's blocks, padding included.
    """

    slot_NK: Array
    choice_M: Array
    expert_n: Array
    sizes_e: Array

    def gather(self, rows_NR: Array) -> Array:
        """rows_nbR: the blocks."""
        return spread(rows_NR, self.slot_NK, self.choice_M).reshape(self.expert_n.size, -1, rows_NR.shape[-1])

    def gates(self, gates_NK: Array) -> Array:
        """gate_nb of each row of the blocks."""
        return pick(gates_NK, self.slot_NK, self.choice_M).reshape(self.expert_n.size, -1)

    def sum(self, rows_nbR: Array) -> Array:
        """y_NR: each row's outputs together."""
        return collect(rows_nbR.reshape(self.choice_M.size, -1), self.slot_NK, self.choice_M)


def sorted_by(key: Array, keys: int) -> tuple[Array, Array]:
    """(sorted keys, the positions they came from), equal keys in order; keys lie in [0, keys)."""
    size = key.size
    if (keys + 1) * size < 2**31:
        # One integer for key and position sorts several times faster than a pair.
        both = jnp.sort(key.reshape(-1).astype(jnp.int32) * size + jnp.arange(size, dtype=jnp.int32))
        return both // size, both % size
    order = jnp.argsort(key.reshape(-1), stable=True).astype(jnp.int32)
    return key.reshape(-1)[order], order


def bounds_of(sorted_keys: Array, keys: int) -> Array:
    """[keys + 1]: where each key's run starts, and the end of the last one."""
    edges = jnp.arange(keys + 1, dtype=sorted_keys.dtype)
    return jnp.searchsorted(sorted_keys, edges, method="scan_unrolled").astype(jnp.int32)


def bin_of(position: Array, ends: Array) -> Array:
    """Which of the bins, given by their ends, each position lies in; the number of bins behind the last one."""
    return jnp.searchsorted(ends, position, side="right", method="scan_unrolled").astype(jnp.int32)


def group(expert_NK: Array, experts: int, block: int, rows: int) -> Groups:
    """Groups choices by expert.

    Args:
      expert_NK: local experts; `experts` where a choice's expert is elsewhere.
      rows: the most choices that can be local.
    """
    (N, K), b = expert_NK.shape, min(block, rows)
    # Each expert's last block may hold a single row: Σ ceil(c/b) ≤ (Σ c + e·(b - 1)) / b.
    n = (rows + experts * (b - 1)) // b
    sorted_NK, order_NK = sorted_by(expert_NK, experts + 1)
    bounds_e = bounds_of(sorted_NK, experts)
    blocks_e = -(-jnp.diff(bounds_e) // b)
    ends_e = jnp.cumsum(blocks_e)
    # A choice stands as far behind its expert's first slot as behind its expert's first choice in the order.
    shift_e = jnp.append((ends_e - blocks_e) * b - bounds_e[:-1], 0)
    position = jnp.arange(N * K, dtype=jnp.int32) + shift_e[sorted_NK]
    position = jnp.where(sorted_NK < experts, position, n * b)
    slot_NK = jnp.zeros((N * K,), jnp.int32).at[order_NK].set(position, unique_indices=True).reshape(N, K)
    expert_n = jnp.minimum(bin_of(jnp.arange(n, dtype=jnp.int32), ends_e), experts - 1)
    return Groups(slot_NK, inverse(slot_NK, n * b), expert_n, blocks_e * b)
