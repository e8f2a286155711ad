"""Row movement as gathers in both directions.

The transpose of a gather is a scatter-add, which is slow on every backend; but here the inverse of each movement is
known. N rows with K places each; M slots. `slot_NK` is where row n stands the k-th time (M: nowhere), `choice_M` its
inverse: which n·K + k fills a slot (N·K: none).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def take(x_NR: Array, index: Array) -> Array:
    """Rows by index; zeros where the index is one past the end."""
    return x_NR.at[index].get(mode="fill", fill_value=0)


def inverse(slot_NK: Array, slots: int) -> Array:
    """choice_M of slot_NK."""
    choices = slot_NK.size
    return (
        jnp.full_like(slot_NK, choices, shape=(slots,))
        .at[slot_NK.reshape(-1)]
        .set(jnp.arange(choices, dtype=slot_NK.dtype), mode="drop")
    )


@jax.custom_vjp
def spread(x_NR: Array, slot_NK: Array, choice_M: Array) -> Array:
    """rows_MR: row n in each of its slots, zeros in empty ones."""
    return take(x_NR, choice_M // slot_NK.shape[1])


def _spread_fwd(x_NR: Array, slot_NK: Array, choice_M: Array) -> tuple[Array, Any]:
    return spread(x_NR, slot_NK, choice_M), slot_NK


def _spread_bwd(slot_NK: Array, d_rows_MR: Array) -> tuple[Array, None, None]:
    return _sum([take(d_rows_MR, slot_N) for slot_N in slot_NK.T]), None, None


spread.defvjp(_spread_fwd, _spread_bwd)


@jax.custom_vjp
def collect(rows_MR: Array, slot_NK: Array, choice_M: Array) -> Array:
    """y_NR = Σ_k rows at slot_NK, zeros for nowhere: the transpose of `spread`."""
    return _sum([take(rows_MR, slot_N) for slot_N in slot_NK.T])


def _collect_fwd(rows_MR: Array, slot_NK: Array, choice_M: Array) -> tuple[Array, Any]:
    return collect(rows_MR, slot_NK, choice_M), (slot_NK, choice_M)


def _collect_bwd(saved: Any, dy_NR: Array) -> tuple[Array, None, None]:
    slot_NK, choice_M = saved
    return take(dy_NR, choice_M // slot_NK.shape[1]), None, None


collect.defvjp(_collect_fwd, _collect_bwd)


@jax.custom_vjp
def weigh(rows_MR: Array, weight_NK: Array, slot_NK: Array, choice_M: Array) -> Array:
    """y_NR = Σ_k weight_NK · rows at slot_NK."""
    return _sum([_column(w_N) * take(rows_MR, s_N) for w_N, s_N in zip(weight_NK.T, slot_NK.T, strict=True)])


def _weigh_fwd(rows_MR: Array, weight_NK: Array, slot_NK: Array, choice_M: Array) -> tuple[Array, Any]:
    return weigh(rows_MR, weight_NK, slot_NK, choice_M), (rows_MR, weight_NK, slot_NK, choice_M)


def _weigh_bwd(saved: Any, dy_NR: Array) -> tuple[Array, Array, None, None]:
    rows_MR, weight_NK, slot_NK, choice_M = saved
    dy_MR = take(dy_NR, choice_M // slot_NK.shape[1])
    d_rows_MR = _column(take(weight_NK.reshape(-1), choice_M)) * dy_MR
    d_weight_M = jnp.sum(dy_MR * rows_MR, axis=-1)
    return d_rows_MR, take(d_weight_M, slot_NK), None, None


weigh.defvjp(_weigh_fwd, _weigh_bwd)


@jax.custom_vjp
def pick(weight_NK: Array, slot_NK: Array, choice_M: Array) -> Array:
    """weight_M: of the choice that fills each slot, zero in empty ones."""
    return take(weight_NK.reshape(-1), choice_M)


def _pick_fwd(weight_NK: Array, slot_NK: Array, choice_M: Array) -> tuple[Array, Any]:
    return pick(weight_NK, slot_NK, choice_M), slot_NK


def _pick_bwd(slot_NK: Array, d_weight_M: Array) -> tuple[Array, None, None]:
    return take(d_weight_M, slot_NK), None, None


pick.defvjp(_pick_fwd, _pick_bwd)


def _column(v_N: Array) -> Array:
    return v_N.reshape(-1, 1)


def _sum(parts: list[Array]) -> Array:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
