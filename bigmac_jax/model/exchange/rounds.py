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
    *inputs: Any,
) -> Array:
    """Sums `in_round(plan, *inputs)` over the rounds that it takes to send what is left → y_TR, like inputs[0].

    Args:
      axes: mesh axes whose ranks go through the same number of rounds; a collective of a round joins no others.
      left_TK: the expert of each choice that is left to send, E for those that were sent.
      inputs: x_TR, and pytrees of what else y depends on, such as weights, so that they get gradients.
    """

    def over_rounds(body: Callable[[Plan], Any], left_TK: Array, like: Any) -> Any:
        """`body(plan)` added up over the rounds: in float32, then as `like`."""

        def anything(left_TK: Array) -> Array:
            return jax.lax.pmax(jnp.any(left_TK < exchange.num_experts).astype(jnp.int32), axes)

        def trip(carry: Any) -> Any:
            left_TK, _, total = carry
            plan = exchange.plan(left_TK)
            total = jax.tree.map(lambda sum, part: sum + part.astype(sum.dtype), total, body(plan))
            assert plan.left_TK is not None
            return plan.left_TK, anything(plan.left_TK), total

        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), like)
        with jax.named_scope(FURTHER):
            total = jax.lax.while_loop(lambda carry: carry[1] > 0, trip, (left_TK, anything(left_TK), zeros))[2]
        return jax.tree.map(lambda sum, x: sum.astype(x.dtype), total, like)

    @jax.custom_vjp
    def rest(left_TK: Array, *inputs: Any) -> Array:
        return over_rounds(lambda plan: in_round(plan, *inputs), left_TK, inputs[0])

    def backward(saved: Any, dy_TR: Array) -> Any:
        left_TK, *inputs = saved

        def body(plan: Plan) -> Any:
            return jax.vjp(functools.partial(in_round, plan), *inputs)[1](dy_TR)

        return None, *over_rounds(body, left_TK, tuple(inputs))

    rest.defvjp(lambda *saved: (rest(*saved), saved), backward)
    return rest(left_TK, *inputs)
