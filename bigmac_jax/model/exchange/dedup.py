"""One row per (token, destination): to ranks at once, or first to machines and then to their ranks."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from bigmac_jax.model.exchange.hop import Hop, HopPlan, expected_rows
from bigmac_jax.model.exchange.strategy import Plan, Strategy, count_choices, none_dropped, room, round_room
from bigmac_jax.model.exchange.wire import Wire

HopPlans = tuple[HopPlan, ...]  # in the order of dispatch


@dataclass(frozen=True)
class Dedup(Strategy[HopPlans]):
    """One row per (token, destination rank), with its gates; a rank sums the outputs of a row's experts, weighted,
    before they return.

    A pair of ranks has room for f times the rows expected at uniform routing, at most T, which is also what f = inf
    takes; when it is full, first choices go before second ones, then token order. In rounds it has room for
    buffer_factor times the expected rows, at least FEW_ROWS, and of their choices for as many times the expected ones:
    a rank computes few more choices than fall on it, and not min(K, e) for each row.
    """

    sums_at_experts = True
    takes_rounds = True

    @property
    def dropless(self) -> bool:
        """The capacity factor is of rows that are sent: one rank sends none."""
        return self.ranks == 1 or super().dropless

    def hops(self, tokens: int, choices: int) -> list[Hop]:
        """The hops from here to the experts; empty on one rank."""
        if self.ranks == 1:
            return []
        capacity = self._capacity(tokens, tokens, choices, self.ranks)
        most = self._most_choices(capacity, tokens, choices)
        return [Hop(self.wire, self.ranks, self.local_experts, capacity, most)]

    def _capacity(self, at_most: int, tokens: int, choices: int, destinations: int) -> int:
        """C of a hop to each of `destinations`, which share the experts, for the rows of `tokens`."""
        if self.dropless and not self.in_rounds:
            return at_most
        expected = expected_rows(tokens, choices, self.num_experts, destinations)
        if self.in_rounds:
            return round_room(self.buffer_factor, expected, at_most)
        return room(self.capacity_factor * expected, at_most)

    def _most_choices(self, capacity: int, tokens: int, choices: int) -> int:
        """P of the last hop, by which a rank gets the choices of `tokens` of each source."""
        of_row = min(choices, self.local_experts)
        if not self.in_rounds:
            return capacity * of_row
        return round_room(self.buffer_factor, tokens * choices / self.ranks, capacity * of_row, of_row)

    def most_rounds(self, tokens: int, choices: int) -> int:
        if not self.in_rounds:
            return 1
        # Through each hop pass the rows that arrived with it, or as many as it has room for.
        rows, a_round = tokens, tokens
        for hop in self.hops(tokens, choices):
            a_round = min(a_round, hop.capacity, hop.choices // min(choices, hop.experts))
            rounds, rows, a_round = -(-rows // a_round), rows * hop.ranks, a_round * hop.ranks
        return rounds

    def plan(self, experts_TK: Array) -> Plan[HopPlans]:
        hops = self.hops(*experts_TK.shape)
        chosen, plans, left = [experts_TK], [], []  # before each hop
        for hop in hops:
            hop_plan, expert_NK, left_NK = hop.plan(chosen[-1])
            chosen.append(expert_NK)
            plans.append(hop_plan)
            left.append(left_NK)
        counts_E, dropped = count_choices(experts_TK, self.num_experts), none_dropped(experts_TK)
        most_local = hops[-1].ranks * hops[-1].choices if hops else None
        if not self.in_rounds:
            dropped = sum((jnp.sum(left_NK, dtype=jnp.int32) for left_NK in left), dropped)
            return Plan(tuple(plans), chosen[-1], counts_E, dropped, most_local=most_local)
        # A choice that finds no room at a later hop is sent again from here.
        left_TK = left[-1]
        for hop, hop_plan, before_TK, here_TK in list(zip(hops, plans, chosen[:-1], left, strict=True))[-2::-1]:
            left_TK = here_TK | hop.report_back(hop_plan, before_TK, left_TK)
        left_TK = jnp.where(left_TK, experts_TK, self.num_experts)
        return Plan(tuple(plans), chosen[-1], counts_E, dropped, left_TK, most_local)

    def dispatch(self, plan: Plan[HopPlans], x_TR: Array, gates_TK: Array) -> tuple[Array, Array | None]:
        for hop, hop_plan in self._hops_of(plan, gates_TK):
            x_TR, gates_TK = hop.send(hop_plan, x_TR), hop.send_gates(hop_plan, gates_TK)
        return x_TR, gates_TK

    def combine(self, plan: Plan[HopPlans], y_NR: Array, gates_TK: Array) -> Array:
        for hop, hop_plan in reversed(self._hops_of(plan, gates_TK)):
            y_NR = hop.send_back(hop_plan, y_NR)
        return y_NR

    def _hops_of(self, plan: Plan[HopPlans], gates_TK: Array) -> list[tuple[Hop, HopPlan]]:
        return list(zip(self.hops(*gates_TK.shape), plan.routes, strict=True))


@dataclass(frozen=True)
class Hierarchical(Dedup):
    """A token's row goes once to every machine that holds one of its experts, then inside the machine once to every
    rank that does; sums come back the same way.

    In rounds, a row that finds no room at the second hop starts again from its own rank, with what is left of its
    choices.
    """

    def hops(self, tokens: int, choices: int) -> list[Hop]:
        hops, rows, reached = [], tokens, 1
        for axis, size in zip(self.axis, self.sizes, strict=True):
            if size == 1:
                continue
            reached *= size
            # After the first hop a rank holds the rows of the ranks with its number in every machine.
            sources = tokens * reached // size
            capacity, experts = self._capacity(rows, sources, choices, reached), self.num_experts // reached
            last = reached == self.ranks  # of rows that go on, the choices cost nothing
            most = self._most_choices(capacity, sources, choices) if last else capacity * min(choices, experts)
            hops.append(Hop(Wire((axis,), self.forward, self.backward), size, experts, capacity, most))
            rows = size * capacity
        return hops
