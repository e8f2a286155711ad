"""Row movement as gathers in both directions, and the sorting that plans it.

The transpose of a gather is a scatter-add, which is slow on every backend; but here the inverse of each movement is
known. N rows with K places each; M slots. `slot_NK` is where row n stands the k-th time (M: nowhere), `choice_M` its
inverse: which n·K + k fills a slot (N·K: none).

Slots that nothing fills, and rows that stand nowhere, are zero, in gradients too. Zeros cost a pass over all slots or
rows; where nobody reads them, zero_slots=False and, for K = 1, zero_rows=False leave anything there.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from bigmac_jax.model.mesh import platform


def take(x_NR: Array, index: Array, zeros: bool = True) -> Array:
    """Rows by index; where the index is one past the end zeros, or without `zeros` the last row."""
    return x_NR.at[index].get(mode="fill", fill_value=0) if zeros else x_NR.at[index].get(mode="clip")


def inverse(slot_NK: Array, slots: int) -> Array:
    """choice_M of slot_NK."""
    choices = slot_NK.size
    return (
        jnp.full_like(slot_NK, choices, shape=(slots,))
        .at[slot_NK.reshape(-1)]
        .set(jnp.arange(choices, dtype=slot_NK.dtype), mode="drop")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
@jax.named_scope("rows")
def spread(x_NR: Array, slot_NK: Array, choice_M: Array, zero_slots: bool = True, zero_rows: bool = True) -> Array:
    """rows_MR: row n in each of its slots."""
    return take(x_NR, choice_M // slot_NK.shape[1], zero_slots)


def _spread_fwd(x_NR: Array, slot_NK: Array, choice_M: Array, zero_slots: bool, zero_rows: bool) -> tuple[Array, Any]:
    return spread(x_NR, slot_NK, choice_M, zero_slots, zero_rows), slot_NK


@jax.named_scope("rows")
def _spread_bwd(zero_slots: bool, zero_rows: bool, slot_NK: Array, d_rows_MR: Array) -> tuple[Array, None, None]:
    return _of_rows(d_rows_MR, slot_NK, zero_rows), None, None


spread.defvjp(_spread_fwd, _spread_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
@jax.named_scope("rows")
def collect(rows_MR: Array, slot_NK: Array, choice_M: Array, zero_slots: bool = True, zero_rows: bool = True) -> Array:
    """y_NR = Σ_k rows at slot_NK: the transpose of `spread`."""
    return _of_rows(rows_MR, slot_NK, zero_rows)


def _collect_fwd(
    rows_MR: Array, slot_NK: Array, choice_M: Array, zero_slots: bool, zero_rows: bool
) -> tuple[Array, Any]:
    return collect(rows_MR, slot_NK, choice_M, zero_slots, zero_rows), (slot_NK, choice_M)


@jax.named_scope("rows")
def _collect_bwd(zero_slots: bool, zero_rows: bool, saved: Any, dy_NR: Array) -> tuple[Array, None, None]:
    slot_NK, choice_M = saved
    return take(dy_NR, choice_M // slot_NK.shape[1], zero_slots), None, None


collect.defvjp(_collect_fwd, _collect_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
@jax.named_scope("rows")
def weigh(rows_MR: Array, weight_NK: Array, slot_NK: Array, choice_M: Array, zero_slots: bool = True) -> Array:
    """y_NR = Σ_k weight_NK · rows at slot_NK."""
    return _sum([_column(w_N) * take(rows_MR, s_N) for w_N, s_N in zip(weight_NK.T, slot_NK.T, strict=True)])


def _weigh_fwd(
    rows_MR: Array, weight_NK: Array, slot_NK: Array, choice_M: Array, zero_slots: bool
) -> tuple[Array, Any]:
    return weigh(rows_MR, weight_NK, slot_NK, choice_M, zero_slots), (rows_MR, weight_NK, slot_NK, choice_M)


@jax.named_scope("rows")
def _weigh_bwd(zero_slots: bool, saved: Any, dy_NR: Array) -> tuple[Array, Array, None, None]:
    rows_MR, weight_NK, slot_NK, choice_M = saved
    dy_MR = take(dy_NR, choice_M // slot_NK.shape[1], zeros=False)
    d_rows_MR = _column(take(weight_NK.reshape(-1), choice_M, zero_slots)) * dy_MR  # an empty slot's weight is zero
    d_weight_M = jnp.sum(dy_MR * rows_MR, axis=-1)
    return d_rows_MR, take(d_weight_M, slot_NK), None, None


weigh.defvjp(_weigh_fwd, _weigh_bwd)


def sorted_by(key: Array, keys: int) -> tuple[Array, Array]:
    """(sorted keys, the positions they came from), equal keys in order; keys lie in [0, keys)."""
    size = key.size
    if (keys + 1) * size < 2**31:
        # One integer for key and position sorts several times faster than a pair.
        both = jnp.sort(key.reshape(-1).astype(jnp.int32) * size + jnp.arange(size, dtype=jnp.int32))
        return both // size, both % size
    order = jnp.argsort(key.reshape(-1), stable=True).astype(jnp.int32)
    return key.reshape(-1)[order], order


def bounds_of(sorted_keys: Array, keys: int) -> Array:
    """[keys + 1]: where each key's run starts, and the end of the last one."""
    edges = jnp.arange(keys + 1, dtype=sorted_keys.dtype)
    return jnp.searchsorted(sorted_keys, edges, method="scan_unrolled").astype(jnp.int32)


def places_in_line(key: Array, lines: int, turns: int = 1) -> tuple[Array, Array]:
    """Each entry's place in its line, and [lines + 1] how the lines stand behind each other.

    Args:
      key: line · turns + turn, whose lines lie in [0, lines]; the last one is nobody's. Lower turns stand first, equal
        ones as they come.
    """
    sorted_N, order_N = sorted_by(key, (lines + 1) * turns)
    line_N = sorted_N // turns
    bounds = bounds_of(line_N, lines)
    place_N = jnp.arange(key.size, dtype=jnp.int32) - bounds[line_N]
    place_N = jnp.zeros((key.size,), jnp.int32).at[order_N].set(place_N, unique_indices=True)
    return place_N.reshape(key.shape), bounds


def fewer_columns(expert_NK: Array, experts: int) -> Array:
    """expert_NJ, J = min(K, e): the local experts of each row, in a column each where choices are more.

    Args:
      expert_NK: local experts, without repetition in a row; e = `experts` where a choice's expert is elsewhere.
    """
    if expert_NK.shape[1] <= experts:
        return expert_NK
    expert_1e = jnp.arange(experts, dtype=expert_NK.dtype).reshape(1, -1)
    return jnp.where(jnp.any(_by_expert(expert_NK, experts), axis=1), expert_1e, experts)


def weights_of_columns(weight_NK: Array, expert_NK: Array, experts: int) -> Array:
    """weight_NJ: the weights in the columns that `fewer_columns` gives the experts; 0 where there is none."""
    if expert_NK.shape[1] <= experts:
        return weight_NK
    return jnp.sum(jnp.where(_by_expert(expert_NK, experts), weight_NK[..., None], 0), axis=1)


def _by_expert(expert_NK: Array, experts: int) -> Array:
    """[N, K, e]: whether a row's choice is the expert."""
    return expert_NK[..., None] == jnp.arange(experts, dtype=expert_NK.dtype).reshape(1, 1, -1)


def bin_of(position: Array, ends: Array) -> Array:
    """Which of the bins, given by their ends, each position lies in; the number of bins behind the last one."""
    # An accelerator compares each with all ends in one pass; of a search each halving is a gather there.
    method = "scan_unrolled" if platform() == "cpu" else "compare_all"
    return jnp.searchsorted(ends, position, side="right", method=method).astype(jnp.int32)


def _column(v_N: Array) -> Array:
    return v_N.reshape(-1, 1)


def _of_rows(rows_MR: Array, slot_NK: Array, zero_rows: bool) -> Array:
    """Σ_k rows at slot_NK."""
    assert zero_rows or slot_NK.shape[1] == 1, slot_NK.shape
    return _sum([take(rows_MR, slot_N, zero_rows) for slot_N in slot_NK.T])


def _sum(parts: list[Array]) -> Array:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    if platform() != "tpu":
        return total
    # Row by row, as the parts are gathered: for a reader that wants columns XLA would turn over every part.
    return with_layout_constraint(total, Layout(tuple(range(total.ndim))))
