"""No exchange: a rank computes what its own experts make of its tokens, and leaves it at that.

For drafts (`inference.drafter`): an expert of another rank is replaced by one that is here, or left out. T tokens and K
choices on this rank, E experts, e of them here.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from bigmac_jax.model.exchange.strategy import Plan, Strategy, count_choices, none_dropped


@dataclass(frozen=True, kw_only=True)
class Local(Strategy[Array]):
    """Attributes:
    stand_in_E: int32, the local expert that is computed instead of each; e: none is.
    """

    sums_at_experts = True

    stand_in_E: Array

    def plan(self, experts_TK: Array) -> Plan[Array]:
        here_TK = self.stand_in_E[experts_TK]
        # Two choices may have one stand-in: it is computed once, for the sum of their gates.
        again_TK = jnp.tril(_equal(here_TK), -1).any(-1)
        expert_TK = jnp.where(again_TK, self.local_experts, here_TK)
        return Plan(here_TK, expert_TK, count_choices(experts_TK, self.num_experts), none_dropped(experts_TK))

    def dispatch(self, plan: Plan[Array], x_TR: Array, gates_TK: Array) -> tuple[Array, Array | None]:
        return x_TR, (_equal(plan.routes) * gates_TK[:, None]).sum(-1)

    def combine(self, plan: Plan[Array], y_NR: Array, gates_TK: Array) -> Array:
        return y_NR


def _equal(here_TK: Array) -> Array:
    """[T, K, K]: which choices of a token have the same stand-in."""
    return here_TK[:, :, None] == here_TK[:, None, :]
