"""No exchange: a rank computes what its own experts make of its tokens, and leaves it at that.

For drafts (`inference.drafter`): a choice of another rank's expert is left out. T tokens and K choices on this rank, E
experts, e of them here.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.model.exchange.strategy import Plan, Strategy, count_choices, none_dropped


@dataclass(frozen=True, kw_only=True)
class Local(Strategy[None]):
    """Attributes:
    computed: how many of this rank's e experts it computes; choices of any other expert are left out.
    """

    sums_at_experts = True

    computed: int

    def plan(self, experts_TK: Array) -> Plan[None]:
        here_TK = experts_TK - self.local_experts * jax.lax.axis_index(self.axis)
        expert_TK = jnp.where((here_TK >= 0) & (here_TK < self.computed), here_TK, self.local_experts)
        return Plan(None, expert_TK, count_choices(experts_TK, self.num_experts), none_dropped(experts_TK))

    def dispatch(self, plan: Plan[None], x_TR: Array, gates_TK: Array) -> tuple[Array, Array | None]:
        return x_TR, gates_TK

    def combine(self, plan: Plan[None], y_NR: Array, gates_TK: Array) -> Array:
        return y_NR
