"""One hop of deduplicated rows: a token's row goes once to every destination that holds one of its experts.

T tokens on this rank, K choices, S destinations with w experts each; a pair of ranks has room for C rows, which have
P choices of the destination's experts together. A row has at most I = min(K, S) places, and J = min(K, w) choices
behind the hop.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.model.exchange.rows import collect, fewer_columns, inverse, spread, take, weights_of_columns
from bigmac_jax.model.exchange.wire import Wire


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HopPlan:
    """Attributes:
    slot_TI: where a token's row stands among the M = S·C that this rank sends (M: nowhere), by destination, or where
      choices are fewer by the first choice that goes there.
    place_M: its inverse, as in `rows`.
    slot_TK: the slot that each choice travels in; M: not sent.
    local_MK: the destination's experts that a slot's row is for, w where a choice is not of them.
    """

    slot_TI: Array
    place_M: Array
    slot_TK: Array
    local_MK: Array


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
          (plan, expert_NJ of the N = S·C rows that arrive, w where there is none; left_TK, the choices that found no
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
        slot_TK = take_columns(slot_TS, destination_TK, S * C)
        slot_TI = slot_TS
        if K < S:  # a place a choice, and no row twice
            choice_1K = jnp.arange(K, dtype=jnp.int32).reshape(1, K)
            slot_TI = jnp.where(take_columns(first_TS, destination_TK, K) == choice_1K, slot_TK, S * C)
        place_M = inverse(slot_TI, S * C)
        # What the receiver must know: which of its experts a row is for.
        expert_MK = take(expert_TK + 1, place_M // slot_TI.shape[1]) - 1
        local_SCK = expert_MK.reshape(S, C, K) - w * jnp.arange(S, dtype=jnp.int32).reshape(S, 1, 1)
        local_SCK = jnp.where((local_SCK >= 0) & (local_SCK < w), local_SCK, w)
        plan = HopPlan(slot_TI, place_M, slot_TK, local_SCK.reshape(S * C, K))
        return plan, self._tell_experts(plan), (expert_TK < S * w) & (slot_TK == S * C)

    def _tell_experts(self, plan: HopPlan) -> Array:
        """expert_NJ."""
        local_MJ = fewer_columns(plan.local_MK, self.experts)
        local_SCJ = local_MJ.reshape(self.ranks, self.capacity, -1)
        local_SCJ = local_SCJ.astype(jnp.int8 if self.experts < 128 else jnp.int16)
        return self.wire.swap_metadata(local_SCJ).astype(jnp.int32).reshape(local_MJ.shape)

    def report_back(self, plan: HopPlan, expert_TK: Array, left_NJ: Array) -> Array:
        """left_TK: the choices of this rank's rows that found no room behind the hop."""
        left_SCJ = self.wire.swap_metadata(left_NJ.reshape(self.ranks, self.capacity, -1).astype(jnp.int8))
        left_MJ, (_, K) = left_SCJ.reshape(left_NJ.shape), expert_TK.shape
        column_TK = expert_TK % self.experts if self.experts < K else jnp.arange(K, dtype=jnp.int32).reshape(1, K)
        return left_MJ.at[plan.slot_TK, column_TK].get(mode="fill", fill_value=0) > 0

    def send(self, plan: HopPlan, x_TR: Array) -> Array:
        """rows_NR: the rows that arrive here."""
        rows_MR = spread(x_TR, plan.slot_TI, plan.place_M)
        rows_SCR = self.wire.swap(rows_MR.reshape(self.ranks, self.capacity, -1))
        return rows_SCR.reshape(rows_MR.shape)

    def send_gates(self, plan: HopPlan, gates_TK: Array) -> Array:
        """gates_NJ, float32 whatever the wire."""
        gates_MK = spread(gates_TK, plan.slot_TI, plan.place_M)
        gates_MJ = weights_of_columns(gates_MK, plan.local_MK, self.experts)
        return self.wire.swap_metadata(gates_MJ.reshape(self.ranks, self.capacity, -1)).reshape(gates_MJ.shape)

    def send_back(self, plan: HopPlan, y_NR: Array) -> Array:
        """y_TR: the sums of what each destination made of a token's row."""
        y_SCR = self.wire.swap(y_NR.reshape(self.ranks, self.capacity, -1))
        return collect(y_SCR.reshape(y_NR.shape), plan.slot_TI, plan.place_M)

    def metadata_bytes(self, choices: int) -> int:
        """Bytes of a row's experts and gates."""
        return min(choices, self.experts) * (1 if self.experts < 128 else 2) + self.gate_bytes(choices)

    def gate_bytes(self, choices: int) -> int:
        """Bytes of a row's gates, which are float32."""
        return 4 * min(choices, self.experts)


def take_columns(x_TS: Array, column_TK: Array, fill: int) -> Array:
    """x_TS at each row's columns; `fill` for a column past the end."""
    T, S = x_TS.shape
    padded = jnp.concatenate([x_TS, jnp.full((T, 1), fill, x_TS.dtype)], axis=1)
    return jnp.take_along_axis(padded, jnp.minimum(column_TK, S), axis=1)


def expected_rows(tokens: int, choices: int, experts: int, destinations: int) -> float:
    """Rows that a destination gets from `tokens` tokens whose K experts are drawn uniformly, without repetition."""
    elsewhere = experts - experts // destinations
    return tokens * (1 - math.comb(elsewhere, choices) / math.comb(experts, choices))
