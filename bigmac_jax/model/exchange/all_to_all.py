"""The paper's exchange: one row per (token, expert), as many between every pair of ranks."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.model.exchange.rows import bin_of, bounds_of, inverse, places_in_line, sorted_by, spread, weigh
from bigmac_jax.model.exchange.strategy import Plan, Slots, Strategy, count_choices, none_dropped, room, round_room


@dataclass(frozen=True)
class AllToAll(Strategy[Slots | None]):
    """One row per (token, expert), as in the paper.

    With a capacity factor f, an expert takes at most C = min(T, ceil(f·T·K/E)) rows from each rank; when it is full,
    first choices go before second ones, then token order. With f = inf each pair of ranks has room for its worst case,
    T·min(K, e) rows, or in rounds for P = buffer_factor·T·K/S of them, at least FEW_ROWS. A plan without slots sends
    nothing: one rank, dropless.
    """

    takes_rounds = True
    moves_choices = True

    def capacity(self, tokens: int, choices: int) -> int:
        """C, rows an expert takes from one rank."""
        return room(self.capacity_factor * tokens * choices / self.num_experts, tokens)

    def rows(self, tokens: int, choices: int) -> int:
        """Rows that travel between a pair of ranks."""
        if not self.dropless:
            return self.local_experts * self.capacity(tokens, choices)
        worst = self._worst(tokens, choices)
        return round_room(self.buffer_factor, tokens * choices / self.ranks, worst) if self.in_rounds else worst

    def most_rounds(self, tokens: int, choices: int) -> int:
        return -(-self._worst(tokens, choices) // self.rows(tokens, choices)) if self.in_rounds else 1

    def _worst(self, tokens: int, choices: int) -> int:
        return tokens * min(choices, self.local_experts)

    def place(self, ranked_TN: Array, choices: int) -> Array:
        """Moves choices that find their expert full to the token's next experts → experts_TK, which `plan` takes.

        1. All choices take places as `plan` gives them: first choices before second ones, then in token order, C on an
           expert. The others wait.
        2. One after the other, columns K + 1 to N get a try. In each, every token with a choice that waits offers the
           first of these, the one of lowest rank, to its expert in that column. The expert takes offers while it has
           room: first choices before second ones, then in token order. What it takes waits no longer.
        3. A choice that still waits keeps its expert, and is dropped.

        An expert that turned a choice away in step 1 is full and gets no other, so that `plan`, which knows nothing of
        tries, drops what waited and nothing else.
        """
        experts_TK, E, C = ranked_TN[:, :choices], self.num_experts, self.capacity(len(ranked_TN), choices)
        place_KT, bounds_E = places_in_line(experts_TK.T, E)
        waits_TK = (place_KT.T >= C) & (experts_TK < E)
        taken_E = jnp.minimum(jnp.diff(bounds_E), C)
        for next_T in ranked_TN[:, choices:].T:
            first_T = jnp.argmax(waits_TK, axis=1).astype(jnp.int32)
            offered_T = jnp.where(waits_TK.any(1), next_T, E)
            place_T, bounds_E = places_in_line(offered_T * choices + first_T, E, choices)
            moves_T = (offered_T < E) & (taken_E.at[offered_T].get(mode="clip") + place_T < C)
            moves_TK = moves_T[:, None] & (first_T[:, None] == jnp.arange(choices)[None])
            experts_TK = jnp.where(moves_TK, next_T[:, None], experts_TK)
            waits_TK, taken_E = waits_TK & ~moves_TK, jnp.minimum(taken_E + jnp.diff(bounds_E), C)
        return experts_TK

    def plan(self, experts_TK: Array) -> Plan[Slots | None]:
        if not self.dropless:
            return self._plan_capacity(experts_TK)
        if self.ranks == 1:
            return Plan(None, experts_TK, count_choices(experts_TK, self.num_experts), none_dropped(experts_TK))
        return self._plan_dropless(experts_TK)

    def _plan_capacity(self, experts_TK: Array) -> Plan[Slots | None]:
        E, C = self.num_experts, self.capacity(*experts_TK.shape)
        # First choices of all tokens, then second ones.
        place_KT, bounds_E = places_in_line(experts_TK.T, E)
        place_TK = place_KT.T
        slot_TK = jnp.where((experts_TK < E) & (place_TK < C), experts_TK * C + place_TK, E * C)
        dropped = jnp.sum((slot_TK == E * C) & (experts_TK < E), dtype=jnp.int32)
        return Plan(Slots(slot_TK, inverse(slot_TK, E * C)), None, jnp.diff(bounds_E), dropped)

    def _plan_dropless(self, experts_TK: Array) -> Plan[Slots | None]:
        (T, K), E, S, e = experts_TK.shape, self.num_experts, self.ranks, self.local_experts
        P = self.rows(T, K)
        sorted_N, order_N = sorted_by(experts_TK, E)
        bounds_E = bounds_of(sorted_N, E)
        # A destination's rows stand behind each other, sorted by expert.
        shift_S = P * jnp.arange(S, dtype=jnp.int32) - bounds_E[:-1:e]
        slot_N = jnp.arange(T * K, dtype=jnp.int32) + shift_S[sorted_N // e]
        slot_N = jnp.where((sorted_N < E) & (slot_N < P * (sorted_N // e + 1)), slot_N, S * P)
        slot_TK = jnp.zeros((T * K,), jnp.int32).at[order_N].set(slot_N, unique_indices=True).reshape(T, K)
        counts_E = jnp.diff(bounds_E)
        # Each source says how many rows of each expert it has; those behind them are empty.
        ends_Se = jnp.cumsum(self.wire.swap_metadata(counts_E.reshape(S, e)), axis=1)
        rows = jnp.arange(P, dtype=jnp.int32)
        expert_SP = jax.vmap(lambda ends_e: bin_of(rows, ends_e))(ends_Se)
        slots = Slots(slot_TK, inverse(slot_TK, S * P))
        left_TK = jnp.where(slot_TK < S * P, E, experts_TK) if self.in_rounds else None
        return Plan(slots, expert_SP.reshape(-1, 1), counts_E, none_dropped(experts_TK), left_TK)

    def dispatch(self, plan: Plan[Slots | None], x_TR: Array, gates_TK: Array) -> tuple[Array, Array | None]:
        if plan.routes is None:
            return x_TR, gates_TK
        S, R = self.ranks, x_TR.shape[-1]
        # Nobody reads what comes back from an empty slot, and the gradient that goes there is zero.
        rows_MR = spread(x_TR, plan.routes.slot_TK, plan.routes.choice_M, zero_slots=False)
        rows_SPR = self.wire.swap(rows_MR.reshape(S, -1, R))
        if plan.expert_NK is None:
            return rows_SPR.reshape(S, self.local_experts, -1, R), None
        return rows_SPR.reshape(-1, R), None

    def combine(self, plan: Plan[Slots | None], y_NR: Array, gates_TK: Array) -> Array:
        if plan.routes is None:
            return y_NR
        S, R = self.ranks, y_NR.shape[-1]
        y_MR = self.wire.swap(y_NR.reshape(S, -1, R)).reshape(-1, R)
        return weigh(y_MR, gates_TK.astype(y_MR.dtype), plan.routes.slot_TK, plan.routes.choice_M)
