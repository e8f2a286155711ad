"""Rounds: an exchange with room for less than its worst case sends again until nothing is left.

The first round is differentiated as usual: at uniform routing it is the only one. The others are a loop that ends when
no rank has anything left; its backward pass goes through the same rounds again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.model.exchange.strategy import Plan, Strategy

FURTHER = "further_rounds"  # the scope of the loops, by which compiled programs tell them from others


def in_rounds(
    exchange: Strategy,
    one_round: Callable[..., Array],
    axes: tuple[str, ...],
    plans: Sequence[Plan],
    x: Sequence[Array],
    gates: Sequence[Array],
    weights: Any,
) -> list[Array]:
    """y_TR of each chunk: `one_round(plan, x_TR, gates_TK, weights)`, and of all chunks together again for what found
    no room, as often as it takes.

    Args:
      axes: mesh axes whose ranks go through the same number of rounds; a collective of a round joins no others.
      plans: of the chunks' first rounds.
      x, gates: x_TR and gates_TK of each chunk, as long as each other.
      weights: a pytree of what else y depends on, so that it gets a gradient.
    """

    def first(plans: Sequence[Plan], x: Sequence[Array], gates: Sequence[Array], weights: Any) -> list[Array]:
        return [one_round(*chunk, weights) for chunk in zip(plans, x, gates, strict=True)]

    def further(plan: Plan, x: Sequence[Array], gates: Sequence[Array], weights: Any) -> list[Array]:
        return jnp.split(one_round(plan, jnp.concatenate(x), jnp.concatenate(gates), weights), len(x))

    if exchange.most_rounds(*gates[0].shape) == 1:
        return first(plans, x, gates, weights)

    @jax.custom_vjp
    def rounds(plans: Sequence[Plan], *inputs: Any) -> list[Array]:
        return _add_further(exchange, axes, _left(plans), lambda plan: further(plan, *inputs), first(plans, *inputs))

    def forward(plans: Sequence[Plan], *inputs: Any) -> tuple[list[Array], Any]:
        y, first_gradients = jax.vjp(partial(first, plans), *inputs)
        y = _add_further(exchange, axes, _left(plans), lambda plan: further(plan, *inputs), y)
        return y, (first_gradients, _left(plans), inputs)

    def backward(saved: Any, dy: list[Array]) -> Any:
        first_gradients, left_TK, inputs = saved

        def further_gradients(plan: Plan) -> Any:
            return jax.vjp(partial(further, plan), *inputs)[1](dy)

        return None, *_add_further(exchange, axes, left_TK, further_gradients, first_gradients(dy))

    rounds.defvjp(forward, backward)
    return rounds(plans, x, gates, weights)


def _left(plans: Sequence[Plan]) -> Array:
    """left_TK of all chunks."""
    return jnp.concatenate([plan.left_TK for plan in plans if plan.left_TK is not None])


def _add_further(
    exchange: Strategy, axes: tuple[str, ...], left_TK: Array, of_round: Callable[[Plan], Any], first: Any
) -> Any:
    """`first` and `of_round(plan)` of all further rounds added up in float32, in the dtypes of `first`.

    The loops begin with `first`, and so behind the first round's collectives. The outer one is an `if`: where nothing
    is left, nothing is widened, copied or added.
    """

    def anything(left_TK: Array) -> Array:
        return jax.lax.pmax(jnp.any(left_TK < exchange.num_experts).astype(jnp.int32), axes)

    def is_left(carry: Any) -> Array:
        return carry[1] > 0

    def add_round(carry: Any) -> Any:
        left_TK, _, total = carry
        plan = exchange.plan(left_TK)
        total = jax.tree.map(lambda sum, part: sum + part.astype(sum.dtype), total, of_round(plan))
        assert plan.left_TK is not None
        return plan.left_TK, anything(plan.left_TK), total

    def add_rounds(carry: Any) -> Any:
        left_TK, more, total = carry
        wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), total)
        left_TK, more, wide = jax.lax.while_loop(is_left, add_round, (left_TK, more, wide))
        return left_TK, more, jax.tree.map(lambda sum, x: sum.astype(x.dtype), wide, total)

    with jax.named_scope(FURTHER):
        return jax.lax.while_loop(is_left, add_rounds, (left_TK, anything(left_TK), first))[2]
