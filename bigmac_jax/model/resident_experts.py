"""Experts in host memory: of all layers they stand there, and of every layer those that are used most on the device, in
N slots (after SE-MoE, arXiv 2205.10034).

A step of a layer copies what its tokens chose and what no slot has, one expert at a time, into the slot of the expert
that is used least. Where the tokens chose more than N experts, the layer computes in rounds of N at most.

Y layers with experts, in the order in which they are computed; E experts, N slots of each layer, K top-k, R row width.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config
from bigmac_jax.model.exchange.strategy import count_choices
from bigmac_jax.model.experts import Weights, apply_experts
from bigmac_jax.model.gathering import on_each_rank
from bigmac_jax.model.mesh import rank_spec, replicated_spec, spec_of, token_spec
from bigmac_jax.model.moe import MoE, RowWeights, narrow, widen
from bigmac_jax.model.router import Padding, Routing

_NEVER = jnp.iinfo(jnp.int32).max


class Held(NamedTuple):
    """The experts on the device, of all layers."""

    slots: list[Array]  # the leaves of a layer's parameters, each [Y, N, …]
    expert_YN: Array  # int32: which expert stands in a slot; -1: none
    uses_YE: Array  # int32: how many steps chose an expert
    layer: Array  # int32: the layer that is computed next


def start_held(store: Any, slots: int) -> Held:
    """Empty slots, so many of each layer.

    Args:
      store: the tree of a layer's parameters, each [Y, E, …] in host memory.
    """
    leaves = jax.tree.leaves(store)
    (Y, E), N = leaves[0].shape[:2], slots
    empty = [jnp.zeros((Y, N, *w.shape[2:]), w.dtype, out_sharding=spec_of(w)) for w in leaves]
    return Held(empty, jnp.full((Y, N), -1, jnp.int32), jnp.zeros((Y, E), jnp.int32), jnp.zeros((), jnp.int32))


def compute_held(
    store: Any, held: Held, layer: Any, compute: Callable[[Any], tuple[Any, ...]], dequantize: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], Held]:
    """Calls `compute(layer)` with a layer that takes its experts from the slots → what it returns, and the slots.

    Args:
      compute: a layer → what it makes of its tokens, others, and what its MoE reports.
      dequantize: makes parameters that are multiplied of those that were copied.
    """
    layer = copy.copy(layer)
    layer.mlp = HeldMoE(layer.mlp, store, held, dequantize)
    *made, (stats, held) = compute(layer)
    Y = len(held.expert_YN)
    return (*made, stats), held._replace(layer=(held.layer + 1) % Y)


class HeldMoE(MoE):
    """A layer with experts in slots. What it reports is its statistics, and the slots as it leaves them."""

    def __init__(self, moe: MoE, store: Any, held: Held, dequantize: Callable[[Any], Any]):
        for name, value in vars(moe).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        # As leaves, so that nobody dequantizes what stands in host memory.
        leaves, self.tree = jax.tree.flatten(store)
        self.store, self.held, self.dequantize = nnx.data(leaves), nnx.data(held), dequantize

    def __call__(
        self,
        x_BLD: Array,
        evaluating: bool = False,
        padding: Padding | None = None,
        choices: Array | None = None,
    ) -> tuple[Array, Any]:
        routing, quantile_stats = self.route(x_BLD, evaluating, padding, choices)
        x_BLR, counts_SE = on_each_rank(
            functools.partial(_begin_on_rank, self.config),
            (x_BLD, routing.experts_BLK),
            self.weights(),
            out_specs=(token_spec(3), rank_spec(2)),
        )
        y_BLR, held = self._routed(x_BLR, routing, jax.sharding.reshard(counts_SE, replicated_spec(2)).sum(0))
        y_BLD = on_each_rank(functools.partial(_end_on_rank, self.config), (x_BLR, y_BLR), self.weights())
        dropped_S = jnp.zeros_like(counts_SE[:, 0])
        report = self.report(routing, counts_SE, dropped_S, padding, quantile_stats)
        return self.finish(x_BLD, y_BLD), (report, held)

    def _routed(self, x_BLR: Array, routing: Routing, counts_E: Array) -> tuple[Array, Held]:
        """y'_BLR = Σ_{i∈T} p_i(x) E_i(x'), float32, in rounds."""
        held, layer, E = self.held, self.held.layer, len(counts_E)
        N = held.expert_YN.shape[1]
        chosen_E = counts_E > 0
        if self.draft_experts:  # a draft leaves the others out
            chosen_E = chosen_E & (jnp.arange(E) < self.draft_experts)
        expert_N = _index(held.expert_YN, layer)
        uses_E = _index(held.uses_YE, layer) + chosen_E

        def in_round(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            left_E, slots, expert_N, y_BLR = carry
            now_E = choose_round(left_E, expert_N, uses_E)
            slots, expert_N = self._fetch(slots, expert_N, uses_E, now_E)
            slot_E = jnp.where(now_E, find_slots(expert_N, E), N)
            y_BLR = y_BLR + on_each_rank(
                functools.partial(_round_on_rank, self.config),
                (x_BLR, routing.gates_BLK, routing.experts_BLK, slot_E),
                self._experts(slots),
                in_spec=(token_spec(3), token_spec(3), token_spec(3), replicated_spec(1)),
            )
            return left_E & ~now_E, slots, expert_N, y_BLR

        carry = chosen_E, held.slots, expert_N, jnp.zeros_like(x_BLR, jnp.float32)
        if routing.experts_BLK.size <= N:  # as decoding's few tokens
            carry = in_round(carry)
        else:
            carry = jax.lax.while_loop(lambda carry: carry[0].any(), in_round, carry)
        _, slots, expert_N, y_BLR = carry
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
        return y_BLR, Held(slots, put(held.expert_YN, expert_N), put(held.uses_YE, uses_E), layer)

    def _fetch(self, slots: list[Array], expert_N: Array, uses_E: Array, now_E: Array) -> tuple[list[Array], Array]:
        """Copies the experts of a round that stand in no slot."""
        layer, E = self.held.layer, len(now_E)

        def copy_one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            slots, expert_N, missing_E = carry
            expert = jnp.argmax(missing_E).astype(jnp.int32)
            slot = least_used(expert_N, uses_E, now_E)

            def put(slots_YN: Array, store_YE: Array) -> Array:
                zeros = [jnp.zeros((), jnp.int32)] * (store_YE.ndim - 2)
                row_1 = jax.lax.dynamic_slice_in_dim(_flat(store_YE), layer * E + expert, 1)
                row_11 = jnp.expand_dims(jax.device_put(row_1, jax.memory.Space.Device), 0)
                return jax.lax.dynamic_update_slice(slots_YN, row_11, (layer, slot, *zeros))

            slots = [put(*pair) for pair in zip(slots, self.store, strict=True)]
            return slots, expert_N.at[slot].set(expert), missing_E & (jnp.arange(E) != expert)

        missing_E = now_E & (find_slots(expert_N, E) == len(expert_N))
        carry = slots, expert_N, missing_E
        return jax.lax.while_loop(lambda carry: carry[2].any(), copy_one, carry)[:2]

    def _experts(self, slots: list[Array]) -> dict[str, Any]:
        """The parameters in the layer's slots, for `on_each_rank`."""
        own = [_index(w, self.held.layer) for w in slots]
        return self.dequantize(jax.tree.unflatten(self.tree, own)).weights(self.config)


def choose_round(left_E: Array, expert_N: Array, uses_E: Array) -> Array:
    """Which of the experts that are left a round computes, at most N: those that stand in slots, then those that are
    used least, so that the last round leaves those in the slots that are used most. Of equals the first."""
    E, N = len(left_E), len(expert_N)
    here_E = find_slots(expert_N, E) < N
    cost_E = jnp.where(left_E, jnp.where(here_E, -1, uses_E), _NEVER)
    place_E = jnp.zeros_like(uses_E).at[jnp.argsort(cost_E)].set(jnp.arange(E, dtype=jnp.int32))
    return left_E & (place_E < N)


def least_used(expert_N: Array, uses_E: Array, now_E: Array) -> Array:
    """The slot that an expert takes: an empty one, or that of the expert that is used least, of those that the round
    does not need. Of equals the first."""
    cost_N = jnp.where(now_E[expert_N], _NEVER, uses_E[expert_N])
    return jnp.argmin(jnp.where(expert_N < 0, -1, cost_N)).astype(jnp.int32)


def find_slots(expert_N: Array, experts: int) -> Array:
    """slot_E: where an expert stands; N: nowhere."""
    N = len(expert_N)
    place_N = jnp.where(expert_N < 0, experts, expert_N)
    return jnp.full((experts,), N, jnp.int32).at[place_N].set(jnp.arange(N, dtype=jnp.int32), mode="drop")


def _index(w: Array, layer: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(w, layer, keepdims=False)


def _flat(w_YE: Array) -> Array:
    """[Y · E, …]: a copy from host memory starts and ends in one dimension."""
    (Y, E, *shape), (_, *spec) = w_YE.shape, spec_of(w_YE)
    return jnp.reshape(w_YE, (Y * E, *shape), out_sharding=P(*spec))


# On one rank.


def _begin_on_rank(config: Config, x_BLD: Array, experts_BLK: Array, w: RowWeights) -> tuple[Array, Array]:
    """x'_BLR, and counts_1E, choices of each expert."""
    x_TR = narrow(config.model, w, x_BLD.reshape(-1, x_BLD.shape[-1]))
    counts_E = count_choices(experts_BLK, config.model.expert_count)
    return x_TR.reshape(*x_BLD.shape[:-1], -1), counts_E[None]


def _round_on_rank(
    config: Config, x_BLR: Array, gates_BLK: Array, experts_BLK: Array, slot_E: Array, w: Weights
) -> Array:
    """What the experts of a round add to y'_BLR. A choice of another is of no slot, and not computed."""
    x_TR, gates_TK, experts_TK = (v.reshape(-1, v.shape[-1]) for v in (x_BLR, gates_BLK, experts_BLK))
    N = len(w["w_in_eRF"])
    slot_TK = slot_E.at[experts_TK].get(mode="fill", fill_value=N)
    y_TR = apply_experts(config, w, x_TR, gates_TK, slot_TK, gates_TK.size // N)
    return y_TR.astype(jnp.float32).reshape(x_BLR.shape)


def _end_on_rank(config: Config, x_BLR: Array, y_BLR: Array, w: RowWeights) -> Array:
    """y_BLD."""
    x_TR, y_TR = (v.reshape(-1, v.shape[-1]) for v in (x_BLR, y_BLR))
    return widen(config.model, w, x_TR, y_TR.astype(x_TR.dtype)).reshape(*x_BLR.shape[:-1], -1)
