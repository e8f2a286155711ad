"""Rounds: an exchange with room for less than its worst case sends again until nothing is left.

The first round stands with the caller, differentiated as usual: at uniform routing it is the only one. The others are a
loop that ends when no rank has anything left; its backward pass goes through the same rounds again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.model.exchange.strategy import Plan, Strategy

FURTHER = "further_rounds"  # the scope of the loops, by which compiled programs tell them from others


def further_rounds(
    exchange: Strategy,
    in_round: Callable[..., Array],
    axes: tuple[str, ...],
    left_TK: Array,
    y_TR: Array,
    *inputs: Any,
) -> Array:
    """Adds `in_round(plan, *inputs)` to the first round's y_TR, for each round that it takes to send what is left.

    Args:
      axes: mesh axes whose ranks go through the same number of rounds; a collective of a round joins no others.
      left_TK: the expert of each choice that is left to send, E for those that were sent.
      y_TR: of the first round; the loop begins with it, and so behind the first round's collectives.
      inputs: x_TR, and pytrees of what else y depends on, such as weights, so that they get gradients.
    """

    def over_rounds(body: Callable[[Plan], Any], left_TK: Array, first: Any) -> tuple[Any, Array]:
        """`first` and `body(plan)` of all rounds added up, in float32, and whether anything is left: 0."""

        def anything(left_TK: Array) -> Array:
            return jax.lax.pmax(jnp.any(left_TK < exchange.num_experts).astype(jnp.int32), axes)

        def trip(carry: Any) -> Any:
            left_TK, _, total = carry
            plan = exchange.plan(left_TK)
            total = jax.tree.map(lambda sum, part: sum + part.astype(sum.dtype), total, body(plan))
            assert plan.left_TK is not None
            return plan.left_TK, anything(plan.left_TK), total

        total = jax.tree.map(lambda x: x.astype(jnp.float32), first)
        with jax.named_scope(FURTHER):
            carry = left_TK, anything(left_TK), total
            _, more, total = jax.lax.while_loop(lambda carry: carry[1] > 0, trip, carry)
        return jax.tree.map(lambda sum, x: sum.astype(x.dtype), total, first), more

    @jax.custom_vjp
    def rest(left_TK: Array, y_TR: Array, *inputs: Any) -> Array:
        return over_rounds(lambda plan: in_round(plan, *inputs), left_TK, y_TR)[0]

    def forward(left_TK: Array, y_TR: Array, *inputs: Any) -> tuple[Array, Any]:
        return rest(left_TK, y_TR, *inputs), (left_TK, *inputs)

    def backward(saved: Any, dy_TR: Array) -> Any:
        left_TK, *inputs = saved

        def body(plan: Plan) -> Any:
            return jax.vjp(functools.partial(in_round, plan), *inputs)[1](dy_TR)

        gradients, more = over_rounds(body, left_TK, jax.tree.map(jnp.zeros_like, tuple(inputs)))
        return None, _behind_loop(dy_TR, more), *gradients

    rest.defvjp(forward, backward)
    return rest(left_TK, y_TR, *inputs)


def _behind_loop(dy_TR: Array, more: Array) -> Array:
    """dy_TR, which on CPU devices is there once the loop that gives `more`, 0, has ended.

    XLA:CPU up to jax 0.11 begins a collective that does not need a loop's results while the loop's own collectives run,
    and then gives one the arrays of the other, or waits for ever.
    """

    def once_ended(dy_TR: Array, more: Array) -> Array:
        return jnp.where(more > 0, jnp.nan, dy_TR)

    return jax.lax.platform_dependent(dy_TR, more, cpu=once_ended, default=lambda dy_TR, more: dy_TR)
