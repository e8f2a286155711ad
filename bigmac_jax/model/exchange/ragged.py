"""Exact rows, nothing padded on the wire: `jax.lax.ragged_all_to_all`, or on CPU an emulation of it."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.model.exchange.rows import bin_of, bounds_of, inverse, sorted_by, spread, weigh
from bigmac_jax.model.exchange.strategy import FEW_ROWS, Plan, Slots, Strategy, count_choices, none_dropped, room
from bigmac_jax.model.exchange.wire import Wire
from bigmac_jax.model.mesh import platform


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Offsets:
    """The four arguments of a ragged all-to-all, [S] each, as `jax.lax.ragged_all_to_all` documents them."""

    input_offsets: Array
    send_sizes: Array
    output_offsets: Array
    recv_sizes: Array


def ragged_all_to_all(x_NW: Array, rows: int, offsets: Offsets, axis: tuple[str, ...]) -> Array:
    """Sends x's sections to their ranks → [rows, W], undefined where nothing arrives, NaN included.

    XLA:CPU has no such collective (jax#34755): there, every rank gathers all operands and picks its sections.
    """
    shape = rows, x_NW.shape[1]
    if platform() != "cpu":
        # Zeros would take longer to write than the rows take on the wire.
        output = jax.lax.pcast(jax.lax.empty(shape, x_NW.dtype), tuple(jax.typeof(x_NW).mat.varying), to="varying")
        sections = offsets.input_offsets, offsets.send_sizes, offsets.output_offsets, offsets.recv_sizes
        return jax.lax.ragged_all_to_all(x_NW, output, *sections, axis_name=axis)
    everyone_SNW = jax.lax.all_gather(x_NW, axis)
    sent = offsets.output_offsets, offsets.input_offsets, offsets.send_sizes
    start_S, source_S, size_S = (Wire(axis).swap_metadata(x_S) for x_S in sent)
    row = jnp.arange(rows, dtype=jnp.int32).reshape(-1, 1)
    S = size_S.size
    inside_MS = (row >= start_S.reshape(1, S)) & (row < (start_S + size_S).reshape(1, S))
    rank_M = jnp.argmax(inside_MS, axis=1)
    index_M = source_S[rank_M] + row.reshape(-1) - start_S[rank_M]
    picked_MW = everyone_SNW.at[rank_M, index_M].get(mode="clip")
    floats = jnp.issubdtype(x_NW.dtype, jnp.floating)
    nothing = jnp.nan if floats else jnp.iinfo(x_NW.dtype).max  # which is NaN, too, where it stands for a small float
    return jnp.where(inside_MS.any(axis=1, keepdims=True), picked_MW, jnp.asarray(nothing, x_NW.dtype))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sections:
    """slots: where each choice stands among the T·K rows, sorted by expert; the way there, and the way back."""

    slots: Slots
    there: Offsets
    back: Offsets


@dataclass(frozen=True)
class Ragged(Strategy[Sections | None]):
    """One row per (token, expert), exactly; dropless.

    A rank has room for its worst case, S·T·min(K, e) rows, or in rounds for buffer_factor·T·K of them, at least
    FEW_ROWS of each: ranks fill it in their order, each with the rows of its first experts there.
    """

    takes_rounds = True

    @property
    def dropless(self) -> bool:
        """Whatever the capacity factor is."""
        return True

    def room(self, tokens: int, choices: int) -> int:
        """Rows that a rank can take."""
        worst = self._worst(tokens, choices)
        if not self.in_rounds:
            return worst
        return room(max(self.buffer_factor * tokens * choices, self.ranks * FEW_ROWS), worst)

    def most_rounds(self, tokens: int, choices: int) -> int:
        return -(-self._worst(tokens, choices) // self.room(tokens, choices)) if self.in_rounds else 1

    def _worst(self, tokens: int, choices: int) -> int:
        return self.ranks * tokens * min(choices, self.local_experts)

    def plan(self, experts_TK: Array) -> Plan[Sections | None]:
        if self.ranks == 1:
            return Plan(None, experts_TK, count_choices(experts_TK, self.num_experts), none_dropped(experts_TK))
        (T, K), E, S, e = experts_TK.shape, self.num_experts, self.ranks, self.local_experts
        rows, mine = self.room(T, K), jax.lax.dynamic_index_in_dim
        sorted_N, order_N = sorted_by(experts_TK, E)
        bounds_E = bounds_of(sorted_N, E)
        counts_E, me = jnp.diff(bounds_E), jax.lax.axis_index(self.axis)

        # How many rows every rank has for every expert tells all the offsets.
        counts_SDe = self.wire.gather_metadata(counts_E).reshape(S, S, e)
        section_SD = counts_SDe.sum(2)  # what rank S has for rank D
        in_S, out_D = before(section_SD, 1), before(section_SD, 0)  # where a section stands at its source, on arrival
        size_SD = jnp.clip(rows - out_D, 0, section_SD)  # what there is room for, which this round sends
        out_D = jnp.minimum(out_D, rows)
        there = Offsets(
            input_offsets=mine(in_S, me, 0, False),
            send_sizes=mine(size_SD, me, 0, False),
            output_offsets=mine(out_D, me, 0, False),
            recv_sizes=mine(size_SD, me, 1, False),
        )
        back = Offsets(mine(out_D, me, 1, False), there.recv_sizes, mine(in_S, me, 1, False), there.send_sizes)

        # A rank's rows stand sorted by expert; the first of each section are sent.
        place_N = jnp.arange(T * K, dtype=jnp.int32)
        last_D = jnp.append(there.input_offsets + there.send_sizes, 0)  # of expert E's, which is none, nothing
        slot_N = jnp.where(place_N < last_D[sorted_N // e], place_N, T * K)
        slot_TK = jnp.zeros((T * K,), jnp.int32).at[order_N].set(slot_N, unique_indices=True).reshape(T, K)

        # Rows arrive by source, each source's sorted by expert, the last of them perhaps cut off.
        arrived_Se = jnp.minimum(jnp.cumsum(mine(counts_SDe, me, 1, False), axis=1), there.recv_sizes.reshape(S, 1))
        ends_Se = arrived_Se + before(there.recv_sizes.reshape(S, 1), 0)
        section = bin_of(jnp.arange(rows, dtype=jnp.int32), ends_Se.reshape(-1))
        expert_N1 = jnp.where(section < S * e, section % e, e).reshape(-1, 1)
        sections = Sections(Slots(slot_TK, inverse(slot_TK, T * K)), there, back)
        left_TK = jnp.where(slot_TK < T * K, E, experts_TK) if self.in_rounds else None
        return Plan(sections, expert_N1, counts_E, none_dropped(counts_E), left_TK)

    def dispatch(self, plan: Plan[Sections | None], x_TR: Array, gates_TK: Array) -> tuple[Array, Array | None]:
        if plan.routes is None:
            return x_TR, gates_TK
        assert plan.expert_NK is not None
        rows_MR = spread(x_TR, plan.routes.slots.slot_TK, plan.routes.slots.choice_M, zero_slots=False)
        return self._move(rows_MR, plan.routes, plan.expert_NK.size), None

    def combine(self, plan: Plan[Sections | None], y_NR: Array, gates_TK: Array) -> Array:
        if plan.routes is None:
            return y_NR
        back = replace(plan.routes, there=plan.routes.back, back=plan.routes.there)
        y_MR = self._move(y_NR, back, gates_TK.size)
        slots = plan.routes.slots
        return weigh(y_MR, gates_TK.astype(y_MR.dtype), slots.slot_TK, slots.choice_M, zero_slots=False)

    def _move(self, x_NR: Array, sections: Sections, rows: int) -> Array:
        def there(wire_NW: Array, sections: Sections) -> Array:
            return ragged_all_to_all(wire_NW, rows, sections.there, self.axis)

        def back(wire_MW: Array, sections: Sections) -> Array:
            return ragged_all_to_all(wire_MW, x_NR.shape[0], sections.back, self.axis)

        return self.wire.move(x_NR, sections, there, back)


def before(size_SD: Array, axis: int) -> Array:
    """The exclusive cumulative sum along an axis."""
    return jnp.cumsum(size_SD, axis=axis) - size_SD
