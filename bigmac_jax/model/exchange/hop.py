"""One hop of deduplicated rows: a token's row goes once to every destination that holds one of its experts.

T tokens on this rank, K choices, S destinations with w experts each; a pair of ranks has room for C rows, which have
P choices of the destination's experts together.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.model.exchange.rows import collect, inverse, spread, take
from bigmac_jax.model.exchange.wire import Wire


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HopPlan:
    """slot_TS: where a token's row stands among the S·C that this rank sends (S·C: not sent); row_M its inverse."""

    slot_TS: Array
    choice_M: Array


@dataclass(frozen=True)
class Hop:
    """Attributes:
    ranks: S.
    experts: w, per destination.
    capacity: C; T is enough for every token.
    choices: P, at least those of one row; C·min(K, w) is enough for all that C rows can have.
    """

    wire: Wire
    ranks: int
    experts: int
    capacity: int
    choices: int

    def plan(self, expert_TK: Array) -> tuple[HopPlan, Array, Array]:
        """Chooses the rows that are sent, and tells the receivers their experts.

        Args:
          expert_TK: of the S·w experts behind this hop; S·w where there is none.

        Returns:
          (plan, expert_NK of the N = S·C rows that arrive, w where there is none; left_TK, the choices that found no
          room)
        """
        (T, K), S, w, C, P = expert_TK.shape, self.ranks, self.experts, self.capacity, self.choices
        destination_TK = expert_TK // w
        # [T, S]: the first choice that goes there, or K.
        here_TKS = destination_TK[..., None] == jnp.arange(S, dtype=jnp.int32).reshape(1, 1, S)
        first_TS = jnp.min(jnp.where(here_TKS, jnp.arange(K, dtype=jnp.int32).reshape(1, K, 1), K), axis=1)
        chosen_TS = jnp.sum(here_TKS, axis=1, dtype=jnp.int32)
        bounded = min(K, w) * C > P
        start_S = C * jnp.arange(S, dtype=jnp.int32)
        if C >= T:  # room for all: a token's slot is its own number
            token = jnp.arange(T, dtype=jnp.int32).reshape(T, 1)
            fits_TS = jnp.cumsum(chosen_TS, axis=0) <= P if bounded else True
            slot_TS = jnp.where((first_TS < K) & fits_TS, start_S.reshape(1, S) + token, S * C)
        else:
            # First choices go before second ones, then token order; one integer holds both.
            order_ST = jnp.sort((first_TS * T + jnp.arange(T, dtype=jnp.int32).reshape(T, 1)).T, axis=-1)[:, :C]
            slot_SC = start_S.reshape(S, 1) + jnp.arange(C, dtype=jnp.int32).reshape(1, C)
            slot_SC = jnp.where(order_ST < K * T, slot_SC, S * C)
            if bounded:
                chosen_SC = jnp.take_along_axis(chosen_TS.T, order_ST % T, axis=1)
                slot_SC = jnp.where(jnp.cumsum(chosen_SC, axis=1) <= P, slot_SC, S * C)
            slot_TS = (
                jnp.full_like(first_TS, S * C)
                .at[order_ST % T, jnp.arange(S, dtype=jnp.int32).reshape(S, 1)]
                .set(slot_SC, unique_indices=True)
            )
        plan = HopPlan(slot_TS, inverse(slot_TS, S * C))
        sent_TK = take_columns(slot_TS, destination_TK, S * C) < S * C
        left_TK = (expert_TK < S * w) & ~sent_TK
        # What the receiver must know: which of its experts a row is for.
        local_SCK = take(expert_TK + 1, plan.choice_M // S).reshape(S, C, K) - 1 - w * jnp.arange(S).reshape(S, 1, 1)
        dtype = jnp.int8 if w < 128 else jnp.int16
        local_SCK = jnp.where((local_SCK >= 0) & (local_SCK < w), local_SCK, w).astype(dtype)
        expert_NK = self.wire.swap_metadata(local_SCK).astype(jnp.int32).reshape(S * C, K)
        return plan, expert_NK, left_TK

    def report_back(self, plan: HopPlan, expert_TK: Array, left_NK: Array) -> Array:
        """left_TK: the choices of this rank's rows that found no room behind the hop."""
        left_SCK = self.wire.swap_metadata(left_NK.reshape(self.ranks, self.capacity, -1).astype(jnp.int8))
        left_MK = left_SCK.reshape(left_NK.shape)
        slot_TK = take_columns(plan.slot_TS, expert_TK // self.experts, left_MK.shape[0])
        choice_TK = jnp.broadcast_to(jnp.arange(expert_TK.shape[1], dtype=jnp.int32).reshape(1, -1), slot_TK.shape)
        return left_MK.at[slot_TK, choice_TK].get(mode="fill", fill_value=0) > 0

    def send(self, plan: HopPlan, x_TR: Array) -> Array:
        """rows_NR: the rows that arrive here."""
        rows_MR = spread(x_TR, plan.slot_TS, plan.choice_M)
        rows_SCR = self.wire.swap(rows_MR.reshape(self.ranks, self.capacity, -1))
        return rows_SCR.reshape(rows_MR.shape)

    def send_gates(self, plan: HopPlan, gates_TK: Array) -> Array:
        """gates_NK, float32 whatever the wire."""
        gates_MK = spread(gates_TK, plan.slot_TS, plan.choice_M)
        return self.wire.swap_metadata(gates_MK.reshape(self.ranks, self.capacity, -1)).reshape(gates_MK.shape)

    def send_back(self, plan: HopPlan, y_NR: Array) -> Array:
        """y_TR: the sums of what each destination made of a token's row."""
        y_SCR = self.wire.swap(y_NR.reshape(self.ranks, self.capacity, -1))
        return collect(y_SCR.reshape(y_NR.shape), plan.slot_TS, plan.choice_M)

    def metadata_bytes(self, choices: int) -> int:
        """Bytes of a row's experts and gates."""
        return choices * (1 if self.experts < 128 else 2) + self.gate_bytes(choices)

    def gate_bytes(self, choices: int) -> int:
        """Bytes of a row's gates, which are float32."""
        return 4 * choices


def take_columns(x_TS: Array, column_TK: Array, fill: int) -> Array:
    """x_TS at each row's columns; `fill` for a column past the end."""
    T, S = x_TS.shape
    padded = jnp.concatenate([x_TS, jnp.full((T, 1), fill, x_TS.dtype)], axis=1)
    return jnp.take_along_axis(padded, jnp.minimum(column_TK, S), axis=1)


def expected_rows(tokens: int, choices: int, experts: int, destinations: int) -> float:
    """Rows that a destination gets from `tokens` tokens whose K experts are drawn uniformly, without repetition."""
    elsewhere = experts - experts // destinations
    return tokens * (1 - math.comb(elsewhere, choices) / math.comb(experts, choices))
