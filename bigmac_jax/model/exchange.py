"""The exchange: moves rows to the ranks that hold their experts, and back. It knows nothing of parameters.

Runs inside `shard_map`. T tokens and K choices on this rank, S ranks of the expert group, E experts, e = E/S of them
here, R row width; rows travel and are computed in n blocks of b rows, each block of a single expert.

A strategy is a frozen object with `plan`, `dispatch`, `combine` and `wire_bytes`.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# Rows of a dropless block: large enough for a matmul to run at speed, small enough that the padding (half a block per
# expert and rank, on average) stays cheap.
BLOCK = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """Which row goes where. Slots number the rows that this rank sends, destination by destination.

    slot_TK: the slot of each choice, or the number of slots if the choice was dropped.
    choice_N: the inverse: the choice t·K + k that fills each slot, or T·K if it stays empty.
    expert_n: the local expert of each block that this rank receives; None if block i belongs to expert i.
    counts_E: how many choices fell on each expert, before any drop.
    dropped: how many choices found their expert full.
    """

    slot_TK: Array
    choice_N: Array
    expert_n: Array | None
    counts_E: Array
    dropped: Array


@dataclass(frozen=True)
class AllToAll:
    """One row per (token, expert), as in the paper.

    With a capacity factor f, an expert takes at most C = min(T, ceil(f·T·K/E)) rows from each rank; when it is full,
    first choices go before second ones, then token order. With f = inf nothing is dropped: each pair of ranks has
    room for its worst case, T·min(K, e) rows, cut into blocks of one expert each, ready to be multiplied on arrival.

    Attributes:
      axis: the mesh axes of the expert group.
      ranks: S, their size.
    """

    num_experts: int
    ranks: int
    capacity_factor: float
    axis: tuple[str, ...]

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.ranks

    @property
    def dropless(self) -> bool:
        return math.isinf(self.capacity_factor)

    def capacity(self, tokens: int, choices: int) -> int:
        """C, rows an expert takes from one rank."""
        # The product is rounded before the ceiling: 1.1 · 10 is 11.000000000000002 in floats, and 11 rows are meant.
        return min(tokens, math.ceil(round(self.capacity_factor * tokens * choices / self.num_experts, 6)))

    def blocks(self, tokens: int, choices: int) -> tuple[int, int]:
        """(blocks that travel between a pair of ranks, rows of a block)."""
        if not self.dropless:
            return self.local_experts, self.capacity(tokens, choices)
        rows = tokens * min(choices, self.local_experts)
        block = min(BLOCK, rows)
        # Each expert's last block may hold a single row: Σ ceil(c/b) ≤ (Σ c + e·(b - 1)) / b.
        return (rows + self.local_experts * (block - 1)) // block, block

    def plan(self, experts_TK: Array) -> Plan:
        """Assigns every choice a slot; the dropless plan sends each block's expert along (int32, the only metadata)."""
        (T, K), E, S = experts_TK.shape, self.num_experts, self.ranks
        blocks, block = self.blocks(T, K)
        # First choices of all tokens, then second ones: a stable sort by expert keeps that order.
        expert_KT = experts_TK.T.reshape(-1)
        order_KT = jnp.argsort(expert_KT, stable=True)
        sorted_KT = expert_KT[order_KT]
        bounds_E = jnp.searchsorted(sorted_KT, jnp.arange(E + 1, dtype=sorted_KT.dtype)).astype(jnp.int32)
        counts_E = jnp.diff(bounds_E)
        rank_KT = jnp.arange(T * K, dtype=jnp.int32) - bounds_E[sorted_KT]  # place among the choices of its expert
        if self.dropless:
            ends_Se = jnp.cumsum(-(-counts_E.reshape(S, -1) // block), axis=1)  # in blocks, within each destination
            starts_E = (ends_Se - -(-counts_E.reshape(S, -1) // block) + _column(blocks * jnp.arange(S))).reshape(-1)
            slot_KT = starts_E[sorted_KT] * block + rank_KT
            # Blocks behind the last one are empty; they count as the last expert's.
            expert_Sn = jax.vmap(lambda ends: jnp.searchsorted(ends, jnp.arange(blocks), side="right"))(ends_Se)
            expert_Sn = jnp.minimum(expert_Sn, self.local_experts - 1).astype(jnp.int32)
            expert_n = self._swap(expert_Sn).reshape(-1)
        else:
            slot_KT = jnp.where(rank_KT < block, sorted_KT * block + rank_KT, S * blocks * block)
            expert_n = None
        slots = S * blocks * block
        choice_KT = (order_KT % T) * K + order_KT // T  # from the order of the sort to t·K + k
        slot_TK = jnp.zeros_like(slot_KT).at[choice_KT].set(slot_KT, unique_indices=True).reshape(T, K)
        choice_N = (
            jnp.full_like(slot_KT, T * K, shape=(slots,))
            .at[slot_KT]
            .set(choice_KT, mode="drop", unique_indices=self.dropless)
        )
        return Plan(slot_TK, choice_N, expert_n, counts_E, jnp.sum(slot_TK == slots, dtype=jnp.int32))

    def dispatch(self, plan: Plan, x_TR: Array) -> Array:
        """Sends each row to its experts' ranks → rows_nbR, the blocks that this rank computes."""
        T, K = plan.slot_TK.shape
        blocks, block = self.blocks(T, K)
        rows_NR = _scatter_rows(x_TR, plan.choice_N, plan.slot_TK)
        rows_SnbR = self._swap(rows_NR.reshape(self.ranks, blocks, block, -1))
        if self.dropless:
            return rows_SnbR.reshape(self.ranks * blocks, block, -1)
        # One block per local expert: the rows of all ranks behind each other.
        return rows_SnbR.swapaxes(0, 1).reshape(blocks, self.ranks * block, -1)

    def combine(self, plan: Plan, rows_nbR: Array, gates_TK: Array) -> Array:
        """Sends the experts' outputs back and sums them, weighted by their gates → y_TR."""
        T, K = plan.slot_TK.shape
        blocks, block = self.blocks(T, K)
        if self.dropless:
            rows_SnbR = rows_nbR.reshape(self.ranks, blocks, block, -1)
        else:
            rows_SnbR = rows_nbR.reshape(blocks, self.ranks, block, -1).swapaxes(0, 1)
        rows_NR = self._swap(rows_SnbR).reshape(plan.choice_N.size, -1)
        return _gather_rows(rows_NR, gates_TK.astype(rows_NR.dtype), plan.slot_TK, plan.choice_N)

    def wire_bytes(self, tokens: int, choices: int, width: int, itemsize: int) -> int:
        """Payload bytes that one rank sends to others in the two exchanges of one forward pass, padding included."""
        blocks, block = self.blocks(tokens, choices)
        return 2 * (self.ranks - 1) * blocks * block * width * itemsize

    def _swap(self, rows_Sx: Array) -> Array:
        """Chunk s goes to rank s; chunk s of the result came from rank s."""
        return jax.lax.all_to_all(rows_Sx, self.axis, 0, 0, tiled=True)


STRATEGIES: dict[str, type[AllToAll]] = {"all_to_all": AllToAll}


def _column(v_S: Array) -> Array:
    return v_S.reshape(-1, 1)


def _rows(x_TR: Array, index: Array) -> Array:
    """Rows by index; zeros where the index is one past the end."""
    return x_TR.at[index].get(mode="fill", fill_value=0)


# Both row movements are gathers in both directions: the transpose of a gather is a scatter-add, which is slow on every
# backend, but here the plan knows the inverse permutation.


@jax.custom_vjp
def _scatter_rows(x_TR: Array, choice_N: Array, slot_TK: Array) -> Array:
    """rows_NR: each token's row in the slot of each of its choices, zeros in empty slots."""
    return _rows(x_TR, choice_N // slot_TK.shape[1])


def _scatter_rows_fwd(x_TR: Array, choice_N: Array, slot_TK: Array) -> tuple[Array, Any]:
    return _scatter_rows(x_TR, choice_N, slot_TK), slot_TK


def _scatter_rows_bwd(slot_TK: Array, d_rows_NR: Array) -> tuple[Array, None, None]:
    return sum(_rows(d_rows_NR, slot_T) for slot_T in slot_TK.T), None, None  # type: ignore[return-value]


_scatter_rows.defvjp(_scatter_rows_fwd, _scatter_rows_bwd)


@jax.custom_vjp
def _gather_rows(rows_NR: Array, gates_TK: Array, slot_TK: Array, choice_N: Array) -> Array:
    """y_TR = Σ_k gates_TK · rows at slot_TK; a dropped choice adds nothing."""
    return sum(_column(gate_T) * _rows(rows_NR, slot_T) for gate_T, slot_T in zip(gates_TK.T, slot_TK.T, strict=True))  # type: ignore[return-value]


def _gather_rows_fwd(rows_NR: Array, gates_TK: Array, slot_TK: Array, choice_N: Array) -> tuple[Array, Any]:
    return _gather_rows(rows_NR, gates_TK, slot_TK, choice_N), (rows_NR, gates_TK, slot_TK, choice_N)


def _gather_rows_bwd(saved: Any, dy_TR: Array) -> tuple[Array, Array, None, None]:
    rows_NR, gates_TK, slot_TK, choice_N = saved
    gate_N = _rows(gates_TK.reshape(-1), choice_N)
    d_rows_NR = _column(gate_N) * _rows(dy_TR, choice_N // slot_TK.shape[1])
    d_gates_TK = jnp.stack([jnp.sum(dy_TR * _rows(rows_NR, slot_T), axis=-1) for slot_T in slot_TK.T], axis=1)
    return d_rows_NR, d_gates_TK, None, None


_gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)
