"""The exchange strategies: who sends which rows to whom.

All run inside `shard_map` and share one interface: `plan` decides from the router's choice alone, `dispatch` brings
rows, and where it pays their gates, to the ranks that hold their experts, `combine` brings the experts' outputs back
and sums them, `wire_bytes` says what that costs. None knows of parameters.

T tokens and K choices on this rank, S = node × expert ranks, E experts, e = E/S of them here; N rows of width R arrive.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.model.exchange.hop import Hop, expected_rows
from bigmac_jax.model.exchange.rows import bin_of, bounds_of, inverse, sorted_by, spread, weigh
from bigmac_jax.model.exchange.wire import Wire, row_bytes

# Bytes a second that one rank sends inside its machine and to others, for `exchange=auto`: an NVLink- or ICI-class link
# and its share of a 100 Gb/s network card, as in the paper's cluster.
FAST_LINK = 200e9
SLOW_LINK = 12.5e9
# Seconds that a collective takes however little it sends; what decides for the few rows of a decode step.
LATENCY = 10e-6
# Rows a pair that a buffer factor reserves at least: of a decode step's few tokens f times the expected rows would be
# one or two, and the rounds many.
FEW_ROWS = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Where each choice stands among the rows that this rank sends; as in `rows`."""

    slot_TK: Array
    choice_M: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """Which row goes where.

    steps: what each transport step needs (`Slots`, `HopPlan`, `Offsets`), in the order of dispatch.
    expert_NK: the local experts of each row that arrives, e where there is none; None if the rows arrive sorted by
      expert, as many for each.
    counts_E: how many of this rank's choices fell on each expert, before any drop.
    dropped: how many choices were dropped on this rank.
    left_TK: experts of the choices that another round must send, E for those that this one did; None without rounds.
    """

    steps: tuple[Any, ...]
    expert_NK: Array | None
    counts_E: Array
    dropped: Array
    left_TK: Array | None = None


class Sent(NamedTuple):
    """What one rank sends, rows or bytes: inside its machine, and to other machines."""

    fast: float
    slow: float

    def times(self, factor: float) -> "Sent":
        return Sent(self.fast * factor, self.slow * factor)

    def plus(self, other: "Sent") -> "Sent":
        return Sent(self.fast + other.fast, self.slow + other.slow)


@dataclass(frozen=True)
class Strategy:
    """Attributes:
    sizes: ranks of the group by axis: machines (slow links), ranks of a machine (fast links).
    capacity_factor: f; inf drops nothing.
    axis: the mesh axes, as `sizes`.
    forward, backward: wire formats of rows and of their gradients.
    emulated: the backend has no ragged all-to-all.
    buffer_factor: of a dropless exchange, room over the rows expected at uniform routing, as f. What exceeds it is sent
      in further rounds (`rounds`): `plan` tells what is left, and plans that again. inf reserves the worst case.
    """

    # Whether a rank weighs and sums the outputs of a row's experts before they return, so that `combine` is linear.
    sums_at_experts: ClassVar[bool] = False
    # Whether it can send in rounds.
    takes_rounds: ClassVar[bool] = False

    num_experts: int
    sizes: tuple[int, int]
    capacity_factor: float
    axis: tuple[str, str]
    forward: str = "float32"
    backward: str = "float32"
    emulated: bool = False
    buffer_factor: float = math.inf

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.ranks

    @property
    def dropless(self) -> bool:
        return math.isinf(self.capacity_factor)

    @property
    def in_rounds(self) -> bool:
        """Whether plans tell what is left for another round."""
        finite = math.isfinite(self.buffer_factor)
        return self.takes_rounds and self.dropless and finite and self.ranks > 1

    def most_rounds(self, tokens: int, choices: int) -> int:
        """That it takes when every token's rows go to one rank."""
        return 1

    @property
    def wire(self) -> Wire:
        """Between all ranks of the group."""
        return Wire(self.axis, self.forward, self.backward)

    def plan(self, experts_TK: Array) -> Plan:
        """Decides one round. An expert E is none: padding's, or a choice that an earlier round sent."""
        raise NotImplementedError

    def dispatch(self, plan: Plan, x_TR: Array, gates_TK: Array) -> tuple[Array, Array | None]:
        """Brings each row to its experts' ranks.

        Returns:
          rows_NR, and gate_NK that their experts' outputs are to be multiplied by; None where `combine` does that.
        """
        raise NotImplementedError

    def combine(self, plan: Plan, y_NR: Array, gates_TK: Array) -> Array:
        """Brings what the experts made of each row back and sums each token's, weighted by its gates → y_TR."""
        raise NotImplementedError

    def sent(self, tokens: int, choices: int) -> tuple[Sent, Sent]:
        """Rows that a rank sends in `dispatch` and in `combine`, padding included."""
        raise NotImplementedError

    def useful(self, tokens: int, choices: int) -> Sent:
        """Rows of one exchange that hold a token, at uniform routing."""
        raise NotImplementedError

    def metadata(self, tokens: int, choices: int) -> tuple[Sent, Sent]:
        """Bytes that a rank sends beside rows (experts, counts, gates): forward, and in the gradient."""
        raise NotImplementedError

    def wire_bytes(self, tokens: int, choices: int, width: int, format: str = "") -> int:
        """Payload bytes that one rank sends to others in the two exchanges of one direction, padding included.

        `format`: that of the rows; by default the forward pass's.
        """
        rows = sum(sum(sent) for sent in self.sent(tokens, choices))
        return round(rows) * row_bytes(format or self.forward, width)

    def seconds(self, tokens: int, choices: int, width: int) -> float:
        """Of the exchanges of a forward pass, predicted from collectives and the bytes on fast and slow links."""
        dispatch, combine = self.sent(tokens, choices)
        sent = dispatch.plus(combine).times(row_bytes(self.forward, width)).plus(self.metadata(tokens, choices)[0])
        return sent.fast / FAST_LINK + sent.slow / SLOW_LINK + self.collectives * LATENCY

    @property
    def collectives(self) -> int:
        """Of a forward pass, those of metadata included."""
        raise NotImplementedError

    def _here(self, experts_TK: Array) -> Plan:
        """On one rank nothing is sent."""
        return Plan((), experts_TK, counts(experts_TK, self.num_experts), jnp.zeros_like(experts_TK, shape=()))

    def _per_peer(self, amount: float) -> Sent:
        """`amount` to each other rank."""
        machines, size = self.sizes
        return Sent((size - 1) * amount, (machines - 1) * size * amount)


@dataclass(frozen=True)
class AllToAll(Strategy):
    """One row per (token, expert), as in the paper.

    With a capacity factor f, an expert takes at most C = min(T, ceil(f·T·K/E)) rows from each rank; when it is full,
    first choices go before second ones, then token order. With f = inf each pair of ranks has room for its worst case,
    T·min(K, e) rows, or in rounds for P = buffer_factor·T·K/S of them, at least FEW_ROWS.
    """

    takes_rounds = True

    def capacity(self, tokens: int, choices: int) -> int:
        """C, rows an expert takes from one rank."""
        return room(self.capacity_factor * tokens * choices / self.num_experts, tokens)

    def rows(self, tokens: int, choices: int) -> int:
        """Rows that travel between a pair of ranks."""
        if not self.dropless:
            return self.local_experts * self.capacity(tokens, choices)
        worst = self._worst(tokens, choices)
        return buffer(self.buffer_factor, tokens * choices / self.ranks, worst) if self.in_rounds else worst

    def most_rounds(self, tokens: int, choices: int) -> int:
        return -(-self._worst(tokens, choices) // self.rows(tokens, choices)) if self.in_rounds else 1

    def _worst(self, tokens: int, choices: int) -> int:
        return tokens * min(choices, self.local_experts)

    def plan(self, experts_TK: Array) -> Plan:
        if self.dropless:
            return self._here(experts_TK) if self.ranks == 1 else self._dropless_plan(experts_TK)
        (T, K), E, C = experts_TK.shape, self.num_experts, self.capacity(*experts_TK.shape)
        # First choices of all tokens, then second ones; sorting by expert keeps that order.
        sorted_KT, order_KT = sorted_by(experts_TK.T, E)
        bounds_E = bounds_of(sorted_KT, E)
        rank_KT = jnp.arange(T * K, dtype=jnp.int32) - bounds_E[sorted_KT]  # place among the choices of its expert
        slot_KT = jnp.where((sorted_KT < E) & (rank_KT < C), sorted_KT * C + rank_KT, E * C)
        slot_TK = jnp.zeros((K * T,), jnp.int32).at[order_KT].set(slot_KT, unique_indices=True).reshape(K, T).T
        dropped = jnp.sum((slot_TK == E * C) & (experts_TK < E), dtype=jnp.int32)
        return Plan((Slots(slot_TK, inverse(slot_TK, E * C)),), None, jnp.diff(bounds_E), dropped)

    def _dropless_plan(self, experts_TK: Array) -> Plan:
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
        return Plan((slots,), expert_SP.reshape(-1, 1), counts_E, jnp.zeros_like(counts_E, shape=()), left_TK)

    def dispatch(self, plan: Plan, x_TR: Array, gates_TK: Array) -> tuple[Array, Array | None]:
        if not plan.steps:
            return x_TR, gates_TK
        (slots,), S, R = plan.steps, self.ranks, x_TR.shape[-1]
        rows_SPR = self.wire.swap(spread(x_TR, slots.slot_TK, slots.choice_M).reshape(S, -1, R))
        if plan.expert_NK is None:
            rows_SPR = rows_SPR.reshape(S, self.local_experts, -1, R).swapaxes(0, 1)
        return rows_SPR.reshape(-1, R), None

    def combine(self, plan: Plan, y_NR: Array, gates_TK: Array) -> Array:
        if not plan.steps:
            return y_NR
        (slots,), S, R = plan.steps, self.ranks, y_NR.shape[-1]
        if plan.expert_NK is None:
            y_NR = y_NR.reshape(self.local_experts, S, -1, R).swapaxes(0, 1)
        y_MR = self.wire.swap(y_NR.reshape(S, -1, R)).reshape(-1, R)
        return weigh(y_MR, gates_TK.astype(y_MR.dtype), slots.slot_TK, slots.choice_M)

    def sent(self, tokens: int, choices: int) -> tuple[Sent, Sent]:
        return (self._per_peer(self.rows(tokens, choices)),) * 2

    def useful(self, tokens: int, choices: int) -> Sent:
        return self._per_peer(tokens * choices / self.ranks)

    def metadata(self, tokens: int, choices: int) -> tuple[Sent, Sent]:
        return self._per_peer(4 * self.local_experts if self.dropless else 0), Sent(0, 0)

    @property
    def collectives(self) -> int:
        """Rows there and back; where they are not of a fixed number, how many."""
        return 0 if self.ranks == 1 else 3 if self.dropless else 2


@dataclass(frozen=True)
class Dedup(Strategy):
    """One row per (token, destination rank), with its gates; a rank sums the outputs of a row's experts, weighted,
    before they return.

    A pair of ranks has room for f times the rows expected at uniform routing, at most T, which is also what f = inf
    takes; when it is full, first choices go before second ones, then token order. In rounds it has room for
    buffer_factor times the expected rows, at least FEW_ROWS.
    """

    sums_at_experts = True
    takes_rounds = True

    def hops(self, tokens: int, choices: int) -> list[Hop]:
        """The hops from here to the experts; a hop of one destination is none."""
        if self.ranks == 1:
            return []
        return [Hop(self.wire, self.ranks, self.local_experts, self._capacity(tokens, tokens, choices, self.ranks))]

    def _capacity(self, at_most: int, tokens: int, choices: int, destinations: int) -> int:
        """C of a hop to each of `destinations`, which share the experts, for the rows of `tokens`."""
        if self.dropless and not self.in_rounds:
            return at_most
        expected = expected_rows(tokens, choices, self.num_experts, destinations)
        if self.in_rounds:
            return buffer(self.buffer_factor, expected, at_most)
        return room(self.capacity_factor * expected, at_most)

    def most_rounds(self, tokens: int, choices: int) -> int:
        if not self.in_rounds:
            return 1
        # Through each hop pass the rows that arrived with it, or as many as it has room for.
        rows, a_round = tokens, tokens
        for hop in self.hops(tokens, choices):
            a_round = min(a_round, hop.capacity)
            rounds, rows, a_round = -(-rows // a_round), rows * hop.ranks, a_round * hop.ranks
        return rounds

    def plan(self, experts_TK: Array) -> Plan:
        hops = self.hops(*experts_TK.shape)
        chosen, steps, left = [experts_TK], [], []  # before each hop
        for hop in hops:
            step, expert_NK, left_NK = hop.plan(chosen[-1])
            chosen.append(expert_NK)
            steps.append(step)
            left.append(left_NK)
        counts_E, none = counts(experts_TK, self.num_experts), jnp.zeros_like(experts_TK, shape=())
        if not self.in_rounds:
            dropped = sum((jnp.sum(left_NK, dtype=jnp.int32) for left_NK in left), none)
            return Plan(tuple(steps), chosen[-1], counts_E, dropped)
        # A choice that finds no room at a later hop is sent again from here.
        left_TK = left[-1]
        for hop, step, before_TK, here_TK in list(zip(hops, steps, chosen[:-1], left, strict=True))[-2::-1]:
            left_TK = here_TK | hop.report_back(step, before_TK, left_TK)
        left_TK = jnp.where(left_TK, experts_TK, self.num_experts)
        return Plan(tuple(steps), chosen[-1], counts_E, none, left_TK)

    def dispatch(self, plan: Plan, x_TR: Array, gates_TK: Array) -> tuple[Array, Array | None]:
        for hop, step in self._steps(plan, gates_TK):
            x_TR, gates_TK = hop.send(step, x_TR), hop.send_gates(step, gates_TK)
        return x_TR, gates_TK

    def combine(self, plan: Plan, y_NR: Array, gates_TK: Array) -> Array:
        for hop, step in reversed(self._steps(plan, gates_TK)):
            y_NR = hop.send_back(step, y_NR)
        return y_NR

    def _steps(self, plan: Plan, gates_TK: Array) -> list[tuple[Hop, Any]]:
        return list(zip(self.hops(*gates_TK.shape), plan.steps, strict=True))

    def sent(self, tokens: int, choices: int) -> tuple[Sent, Sent]:
        return (self._over_hops(self.hops(tokens, choices), lambda hop: hop.capacity),) * 2

    def useful(self, tokens: int, choices: int) -> Sent:
        reached = expected_rows(tokens, choices, self.num_experts, self.ranks)
        return self._over_hops(self.hops(tokens, choices), lambda hop: reached)

    def metadata(self, tokens: int, choices: int) -> tuple[Sent, Sent]:
        hops = self.hops(tokens, choices)
        return (
            self._over_hops(hops, lambda hop: hop.capacity * hop.metadata_bytes(choices)),
            self._over_hops(hops, lambda hop: hop.capacity * hop.gate_bytes(choices)),
        )

    @property
    def collectives(self) -> int:
        """In each hop experts, rows, gates, and rows back; in rounds a hop before another one is told what is left."""
        hops = len(self.hops(1, 1))
        return 4 * hops + (max(0, hops - 1) if self.in_rounds else 0)

    def _over_hops(self, hops: list[Hop], amount: Callable[[Hop], float]) -> Sent:
        """What a rank sends if it is `amount` to each destination of a hop."""
        return self._per_peer(amount(hops[0])) if hops else Sent(0, 0)


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
            capacity = self._capacity(rows, sources, choices, reached)
            wire = Wire((axis,), self.forward, self.backward)
            hops.append(Hop(wire, size, self.num_experts // reached, capacity))
            rows = size * capacity
        return hops

    def useful(self, tokens: int, choices: int) -> Sent:
        machines, size = self.sizes
        across = expected_rows(tokens, choices, self.num_experts, machines)
        inside = expected_rows(tokens * machines, choices, self.num_experts, self.ranks)
        return Sent((size - 1) * inside, (machines - 1) * across)

    def _over_hops(self, hops: list[Hop], amount: Callable[[Hop], float]) -> Sent:
        sent = {hop.wire.axis[0]: (hop.ranks - 1) * amount(hop) for hop in hops}
        return Sent(sent.get(self.axis[1], 0), sent.get(self.axis[0], 0))


@dataclass(frozen=True)
class Gather(Strategy):
    """Every rank gets every row of the group, and returns a sum for each: for groups not larger than K. Dropless."""

    sums_at_experts = True

    def plan(self, experts_TK: Array) -> Plan:
        if self.ranks == 1:
            return self._here(experts_TK)
        e = self.local_experts
        local_NK = self.wire.gather_metadata(experts_TK, tiled=True) - e * jax.lax.axis_index(self.axis)
        expert_NK = jnp.where((local_NK >= 0) & (local_NK < e), local_NK, e)
        return Plan((), expert_NK, counts(experts_TK, self.num_experts), jnp.zeros_like(expert_NK, shape=()))

    def dispatch(self, plan: Plan, x_TR: Array, gates_TK: Array) -> tuple[Array, Array | None]:
        if self.ranks == 1:
            return x_TR, gates_TK
        rows_NR = self.wire.gather(x_TR).reshape(-1, x_TR.shape[-1])
        return rows_NR, self.wire.gather_metadata(gates_TK, tiled=True)

    def combine(self, plan: Plan, y_NR: Array, gates_TK: Array) -> Array:
        return y_NR if self.ranks == 1 else self.wire.reduce(y_NR.reshape(self.ranks, -1, y_NR.shape[-1]))

    def sent(self, tokens: int, choices: int) -> tuple[Sent, Sent]:
        return (self._per_peer(tokens),) * 2

    def useful(self, tokens: int, choices: int) -> Sent:
        return self._per_peer(expected_rows(tokens, choices, self.num_experts, self.ranks))

    def metadata(self, tokens: int, choices: int) -> tuple[Sent, Sent]:
        return self._per_peer(tokens * choices * (4 + 4)), self._per_peer(tokens * choices * 4)

    @property
    def collectives(self) -> int:
        """Experts, rows, gates, and the sums."""
        return 0 if self.ranks == 1 else 4


def room(rows: float, at_most: int) -> int:
    """⌈rows⌉ in [1, at_most]."""
    # Rounded before the ceiling: 1.1 · 10 is 11.000000000000002 in floats, and 11 rows are meant.
    return min(at_most, max(1, math.ceil(round(rows, 6))))


def buffer(factor: float, expected: float, worst: int) -> int:
    """Rows that a pair has room for in each round."""
    return room(max(factor * expected, FEW_ROWS), worst)


def counts(experts_TK: Array, experts: int) -> Array:
    """counts_E: how many choices fell on each expert; those of expert E, which is none, are left out."""
    return jnp.zeros_like(experts_TK, shape=(experts,)).at[experts_TK.reshape(-1)].add(1, mode="drop")
