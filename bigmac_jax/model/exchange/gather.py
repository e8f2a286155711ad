"""All rows to all ranks."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.model.exchange.rows import fewer_columns, weights_of_columns
from bigmac_jax.model.exchange.strategy import Plan, Strategy, count_choices, none_dropped


@dataclass(frozen=True)
class Gather(Strategy[Array]):
    """Every rank gets every row of the group, and returns a sum for each: for groups not larger than K.

    A plan's routes are each row's choices of local experts, e where a choice's is elsewhere.
    """

    sums_at_experts = True

    @property
    def dropless(self) -> bool:
        """Whatever the capacity factor is."""
        return True

    def plan(self, experts_TK: Array) -> Plan[Array]:
        counts_E = count_choices(experts_TK, self.num_experts)
        if self.ranks == 1:
            return Plan(experts_TK, experts_TK, counts_E, none_dropped(experts_TK))
        e = self.local_experts
        local_NK = self.wire.gather_metadata(experts_TK, tiled=True) - e * jax.lax.axis_index(self.axis)
        local_NK = jnp.where((local_NK >= 0) & (local_NK < e), local_NK, e)
        return Plan(local_NK, fewer_columns(local_NK, e), counts_E, none_dropped(local_NK))

    def dispatch(self, plan: Plan[Array], x_TR: Array, gates_TK: Array) -> tuple[Array, Array | None]:
        if self.ranks == 1:
            return x_TR, gates_TK
        rows_NR = self.wire.gather(x_TR).reshape(-1, x_TR.shape[-1])
        gates_NK = self.wire.gather_metadata(gates_TK, tiled=True)
        return rows_NR, weights_of_columns(gates_NK, plan.routes, self.local_experts)

    def combine(self, plan: Plan[Array], y_NR: Array, gates_TK: Array) -> Array:
        return y_NR if self.ranks == 1 else self.wire.reduce(y_NR.reshape(self.ranks, -1, y_NR.shape[-1]))
