"""Exact rows, nothing padded on the wire: `jax.lax.ragged_all_to_all`, and its emulation where a backend lacks it."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.model.exchange.rows import bin_of, bounds_of, inverse, sorted_by, spread, weigh
from bigmac_jax.model.exchange.strategies import Plan, Sent, Slots, Strategy
from bigmac_jax.model.exchange.wire import Wire


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Offsets:
    """The four arguments of a ragged all-to-all, [S] each, as `jax.lax.ragged_all_to_all` documents them."""

    input_offsets: Array
    send_sizes: Array
    output_offsets: Array
    recv_sizes: Array

    def move(self, x_NW: Array, rows: int, axis: tuple[str, ...], emulated: bool) -> Array:
        """Sends x's sections to their ranks → [rows, W], zeros where nothing arrives."""
        output = jnp.zeros_like(x_NW, shape=(rows, x_NW.shape[1]))
        arguments = (x_NW, output, self.input_offsets, self.send_sizes, self.output_offsets, self.recv_sizes)
        if emulated:
            return emulated_ragged_all_to_all(*arguments, axis_name=axis)
        return jax.lax.ragged_all_to_all(*arguments, axis_name=axis)


def emulated_ragged_all_to_all(
    operand: Array,
    output: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    *,
    axis_name: tuple[str, ...],
) -> Array:
    """As `jax.lax.ragged_all_to_all`: gathers every operand and picks this rank's sections out of it."""
    everyone_SNW = jax.lax.all_gather(operand, axis_name)

    def to_peers(x_S: Array) -> Array:
        return Wire(axis_name).swap_metadata(x_S)

    start_S, source_S, size_S = to_peers(output_offsets), to_peers(input_offsets), to_peers(send_sizes)
    row = jnp.arange(output.shape[0], dtype=jnp.int32).reshape(-1, 1)
    S = size_S.size
    inside_MS = (row >= start_S.reshape(1, S)) & (row < (start_S + size_S).reshape(1, S))
    rank_M = jnp.argmax(inside_MS, axis=1)
    index_M = source_S[rank_M] + row.reshape(-1) - start_S[rank_M]
    picked_MW = everyone_SNW.at[rank_M, index_M].get(mode="clip")
    return jnp.where(inside_MS.any(axis=1, keepdims=True), picked_MW, output)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RaggedPlan:
    """slots: where each choice stands among the T·K rows, sorted by expert; the way there, and the way back."""

    slots: Slots
    there: Offsets
    back: Offsets


@dataclass(frozen=True)
class Ragged(Strategy):
    """One row per (token, expert), exactly; dropless. A rank has room for its worst case, S·T·min(K, e) rows."""

    def plan(self, experts_TK: Array) -> Plan:
        if self.ranks == 1:
            return self._here(experts_TK)
        (T, K), E, S, e = experts_TK.shape, self.num_experts, self.ranks, self.local_experts
        sorted_N, order_N = sorted_by(experts_TK, E)
        counts_E = jnp.diff(bounds_of(sorted_N, E))
        positions = jnp.arange(T * K, dtype=jnp.int32)
        slot_N = jnp.where(sorted_N < E, positions, T * K)
        slot_TK = jnp.zeros((T * K,), jnp.int32).at[order_N].set(slot_N, unique_indices=True).reshape(T, K)

        # How many rows every rank sends to every expert tells all the offsets.
        counts_SE = self.wire.gather_metadata(counts_E)
        me = jax.lax.axis_index(self.axis)
        size_SD = counts_SE.reshape(S, S, e).sum(2)  # from rank S to rank D
        in_S, out_D = before(size_SD, 1), before(size_SD, 0)  # where a section stands at its source, and on arrival
        mine = jax.lax.dynamic_index_in_dim
        there = Offsets(
            input_offsets=mine(in_S, me, 0, False),
            send_sizes=mine(size_SD, me, 0, False),
            output_offsets=mine(out_D, me, 0, False),
            recv_sizes=mine(size_SD, me, 1, False),
        )
        back = Offsets(mine(out_D, me, 1, False), there.recv_sizes, mine(in_S, me, 1, False), there.send_sizes)

        # Rows arrive by source, each source's sorted by expert.
        ends_Se = jnp.cumsum(mine(counts_SE.reshape(S, S, e), me, 1, False).reshape(-1))
        rows = jnp.arange(self.room(T, K), dtype=jnp.int32)
        section = bin_of(rows, ends_Se)
        expert_N1 = jnp.where(section < S * e, section % e, e).reshape(-1, 1)
        step = RaggedPlan(Slots(slot_TK, inverse(slot_TK, T * K)), there, back)
        return Plan((step,), expert_N1, counts_E, jnp.zeros_like(counts_E, shape=()))

    def dispatch(self, plan: Plan, x_TR: Array, gates_TK: Array) -> tuple[Array, Array | None]:
        if not plan.steps:
            return x_TR, gates_TK
        assert plan.expert_NK is not None
        (step,) = plan.steps
        rows_MR = spread(x_TR, step.slots.slot_TK, step.slots.choice_M)
        return self._moved(rows_MR, step, plan.expert_NK.size), None

    def combine(self, plan: Plan, y_NR: Array, gates_TK: Array) -> Array:
        if not plan.steps:
            return y_NR
        (step,) = plan.steps
        y_MR = self._moved(y_NR, replace(step, there=step.back, back=step.there), gates_TK.size)
        return weigh(y_MR, gates_TK.astype(y_MR.dtype), step.slots.slot_TK, step.slots.choice_M)

    def _moved(self, x_NR: Array, step: RaggedPlan, rows: int) -> Array:
        def there(wire_NW: Array, step: RaggedPlan) -> Array:
            return step.there.move(wire_NW, rows, self.axis, self.emulated)

        def back(wire_MW: Array, step: RaggedPlan) -> Array:
            return step.back.move(wire_MW, x_NR.shape[0], self.axis, self.emulated)

        return self.wire.move(x_NR, step, there, back)

    def room(self, tokens: int, choices: int) -> int:
        """Rows that a rank can take."""
        return self.ranks * tokens * min(choices, self.local_experts)

    def sent(self, tokens: int, choices: int) -> tuple[Sent, Sent]:
        """At uniform routing. The emulation gathers what every rank holds."""
        if not self.emulated:
            return (self.useful(tokens, choices),) * 2
        return self._per_peer(tokens * choices), self._per_peer(self.room(tokens, choices))

    def useful(self, tokens: int, choices: int) -> Sent:
        return self._per_peer(tokens * choices / self.ranks)

    def metadata(self, tokens: int, choices: int) -> tuple[Sent, Sent]:
        offsets = 2 * 3 * 4 if self.emulated else 0  # of each movement; the primitive's own are not counted
        return self._per_peer(4 * self.num_experts + offsets), self._per_peer(offsets)

    @property
    def collectives(self) -> int:
        """Counts, and rows there and back."""
        return 0 if self.ranks == 1 else 3


def before(size_SD: Array, axis: int) -> Array:
    """Sums of what stands before each entry along an axis."""
    return jnp.cumsum(size_SD, axis=axis) - size_SD
