"""The experts of one rank: a grouped two-layer MLP over blocks of rows. It does not know where the rows came from.

n blocks of b rows, e local experts, R row width, F expert hidden. For a row of expert i (paper, equation 4; biases and
the gate branch where the config has them):

    E_i(x') = σ(x' W_i↑) W_i↓
"""

import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.config import ModelConfig
from bigmac_jax.mesh import platform
from bigmac_jax.model.exchange.groups import Groups, bin_of
from bigmac_jax.model.layers import activate, tall_product

Weights = dict[str, Array]  # w_in_eRF, w_out_eFR; where the config has them w_gate_eRF, b_in_eF, b_gate_eF, b_out_eR
# Blocks that one task of the loop takes at a time: large matmuls run faster, and single blocks cover the rest.
_TASK_BLOCKS = (16, 4, 1)


def grouped_mlp(
    config: ModelConfig, weights: Weights, rows_nbR: Array, gate_nb: Array | None, groups: Groups | None
) -> Array:
    """Applies each block's expert.

    Args:
      gate_nb: what each row's output is multiplied by; None if that happens elsewhere.
      groups: which block is whose; None if block i belongs to expert i.

    Returns:
      rows_nbR. What stands in the slots that no choice fills is undefined; nothing gathers it.
    """
    w = {name: value.astype(rows_nbR.dtype) for name, value in weights.items()}
    assert gate_nb is None or gate_nb.shape == rows_nbR.shape[:2]
    implementation = config.grouped_matmul
    if implementation == "auto":
        implementation = "loop" if platform() == "cpu" else "kernel"
    if groups is None:  # the capacity layout: equal blocks, weighed when they are back
        return _kernel(config, w, rows_nbR, None) if implementation == "kernel" else _batched(config, w, rows_nbR)
    if implementation == "loop":
        if gate_nb is None:
            gate_nb = jnp.ones_like(rows_nbR[..., 0])
        return _loop(config, w, rows_nbR, gate_nb.astype(rows_nbR.dtype), groups)
    if implementation == "kernel":
        y_nbR = _kernel(config, w, rows_nbR, groups)
    else:
        y_nbR = _batched(config, {name: value[groups.expert_n] for name, value in w.items()}, rows_nbR)
    return y_nbR if gate_nb is None else gate_nb[..., None].astype(y_nbR.dtype) * y_nbR


def _batched(config: ModelConfig, w: Weights, rows_nbR: Array) -> Array:
    """One batched matmul per matrix; weights are given per block."""

    def affine(x_nbX: Array, w_nXY: Array, b_nY: Array | None) -> Array:
        y_nbY = jnp.einsum("nbX,nXY->nbY", x_nbX, w_nXY)
        return y_nbY if b_nY is None else y_nbY + b_nY[:, None]

    hidden_nbF = affine(rows_nbR, w["w_in_eRF"], w.get("b_in_eF"))
    gate_nbF = affine(rows_nbR, w["w_gate_eRF"], w.get("b_gate_eF")) if config.gated else None
    return affine(activate(config, hidden_nbF, gate_nbF), w["w_out_eFR"], w.get("b_out_eR"))


def _kernel(config: ModelConfig, w: Weights, rows_nbR: Array, groups: Groups | None) -> Array:
    """A grouped matmul of the accelerator, which computes the filled blocks alone."""
    n, b, R = rows_nbR.shape
    if groups is None:  # block i belongs to expert i, and all are filled
        expert_n, sizes_e = jnp.arange(n, dtype=jnp.int32), jnp.full_like(rows_nbR, b, jnp.int32, shape=(n,))
    else:
        expert_n, sizes_e = groups.expert_n, groups.sizes_e
    filled_M1 = (jnp.arange(n * b, dtype=jnp.int32) < jnp.sum(sizes_e)).reshape(-1, 1)

    def affine(x_MX: Array, matrix: str, bias: str) -> Array:
        # The kernels leave what stands behind the last group undefined, NaN included.
        y_MY = jnp.where(filled_M1, grouped_matmul(x_MX, w[matrix], sizes_e), 0)
        return y_MY + jnp.repeat(w[bias][expert_n], b, axis=0) if bias in w else y_MY

    rows_MR = rows_nbR.reshape(n * b, R)
    hidden_MF = affine(rows_MR, "w_in_eRF", "b_in_eF")
    gate_MF = affine(rows_MR, "w_gate_eRF", "b_gate_eF") if config.gated else None
    return affine(activate(config, hidden_MF, gate_MF), "w_out_eFR", "b_out_eR").reshape(n, b, R)


def grouped_matmul(x_MX: Array, w_eXY: Array, sizes_e: Array) -> Array:
    """Rows of group i times matrix i; rows behind the last group are undefined.

    On TPU jax's Pallas megablox kernel, because plain `ragged_dot` compiles to a product over every group on v5e and
    v6e; on GPU tokamax's, where it is installed.
    """
    if platform() == "tpu":
        from jax.experimental.pallas.ops.tpu.megablox import gmm

        return gmm(x_MX, w_eXY, sizes_e, preferred_element_type=x_MX.dtype, tiling=_tiling(x_MX, w_eXY))
    if platform() == "gpu" and importlib.util.find_spec("tokamax"):
        import tokamax

        return tokamax.ragged_dot(x_MX, w_eXY, sizes_e)
    return jax.lax.ragged_dot(x_MX, w_eXY, sizes_e)


def _tiling(x_MX: Array, w_eXY: Array) -> tuple[int, int, int]:
    """Tiles of the Pallas kernel: rows of a block, and at most 512 of either side of a matrix."""
    M, X = x_MX.shape
    return math.gcd(M, 128), min(512, X), min(512, w_eXY.shape[2])


class _Tasks(NamedTuple):
    """Runs of `blocks` blocks of one expert: where each starts, whose it is, and how many there are."""

    blocks: int
    start_t: Array
    expert_t: Array
    total: Array


def _tasks(groups: Groups, block: int) -> list[_Tasks]:
    """Splits each expert's blocks into runs of the sizes of _TASK_BLOCKS, the longest first."""
    n = groups.expert_n.size
    left_e = groups.sizes_e // block
    next_e = jnp.cumsum(left_e) - left_e
    tasks = []
    for blocks in _TASK_BLOCKS:
        runs_e = left_e // blocks
        ends_e = jnp.cumsum(runs_e)
        t = jnp.arange(max(1, n // blocks), dtype=jnp.int32)
        expert_t = jnp.minimum(bin_of(t, ends_e), left_e.size - 1)
        start_t = next_e[expert_t] + blocks * (t - (ends_e - runs_e)[expert_t])
        tasks.append(_Tasks(blocks, start_t, expert_t, ends_e[-1]))
        left_e, next_e = left_e - blocks * runs_e, next_e + blocks * runs_e
    return tasks


def _loop(config: ModelConfig, w: Weights, rows_nbR: Array, gate_nb: Array, groups: Groups) -> Array:
    """A loop over runs of blocks, which ends behind the last one that is filled: the time follows the rows that there
    are, not the room that there is.

    A gate p of y = p (a W + c) has the gradient dy·(a W + c) = (dy Wᵀ)·a + dy·c, whose product the activations'
    gradient needs too; so the outputs are not kept.
    """
    n, b, R = rows_nbR.shape

    def over_tasks(groups: Groups, body: Callable[..., Any], carry: Any) -> Any:
        for tasks in _tasks(groups, b):
            if tasks.blocks > n:
                continue

            def step(t: Array, carry: Any, tasks: _Tasks = tasks) -> Any:
                return body(carry, tasks.start_t[t] * b, tasks.blocks * b, tasks.expert_t[t])

            carry = jax.lax.fori_loop(0, tasks.total, step, carry)
        return carry

    def rows(x_MX: Array, start: Array, size: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(x_MX, start, size)

    def put(x_MX: Array, part: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x_MX, part, start, 0)

    def of_expert(v_e: Array, expert: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(v_e, expert, keepdims=False)

    def affine(x: Array, w: Weights, matrix: str, bias: str, expert: Array) -> Array:
        y = x @ of_expert(w[matrix], expert)
        return y + of_expert(w[bias], expert).reshape(1, -1) if bias in w else y

    hidden = ("in", "gate") if config.gated else ("in",)

    def forward(x_MR: Array, gate_M1: Array, w: Weights, groups: Groups) -> tuple[Array, tuple[Array, ...]]:
        def body(carry: Any, start: Array, size: int, i: Array) -> Any:
            y_MR, *pre_MF = carry
            x = rows(x_MR, start, size)
            pre = [affine(x, w, f"w_{k}_eRF", f"b_{k}_eF", i) for k in hidden]
            y = rows(gate_M1, start, size) * affine(_activated(config, *pre), w, "w_out_eFR", "b_out_eR", i)
            return put(y_MR, y, start), *(put(p, part, start) for p, part in zip(pre_MF, pre, strict=True))

        F = w["w_in_eRF"].shape[2]
        empty = [jnp.zeros_like(x_MR, shape=(n * b, F)) for _ in hidden]
        y_MR, *pre_MF = over_tasks(groups, body, (jnp.zeros_like(x_MR), *empty))
        return y_MR, tuple(pre_MF)

    def backward(saved: Any, dy_MR: Array) -> tuple[Array, Array, Weights, None]:
        x_MR, gate_M1, pre_MF, w, groups = saved

        def body(carry: Any, start: Array, size: int, i: Array) -> Any:
            d_MR, d_gate_M1, dw = carry
            x, gate, dy, *pre = (rows(v, start, size) for v in (x_MR, gate_M1, d_MR, *pre_MF))
            a, pull = jax.vjp(lambda *pre: _activated(config, *pre), *pre)
            da = dy @ of_expert(w["w_out_eFR"], i).T  # of a gate of 1
            d_gate = jnp.sum(a * da, axis=1, keepdims=True)
            if "b_out_eR" in w:
                d_gate = d_gate + dy @ of_expert(w["b_out_eR"], i).reshape(-1, 1)
            d_pre = pull(gate * da)
            parts = {"w_out_eFR": tall_product(gate * a, dy), "b_out_eR": (gate * dy).sum(0)}
            for k, d in zip(hidden, d_pre, strict=True):
                parts |= {f"w_{k}_eRF": tall_product(x, d), f"b_{k}_eF": d.sum(0)}
            dw = {k: jax.lax.dynamic_update_index_in_dim(v, of_expert(v, i) + parts[k], i, 0) for k, v in dw.items()}
            dx = _total([d @ of_expert(w[f"w_{k}_eRF"], i).T for k, d in zip(hidden, d_pre, strict=True)])
            return put(d_MR, dx, start), put(d_gate_M1, d_gate, start), dw

        zeros = {name: jnp.zeros_like(value) for name, value in w.items()}
        # dx takes the place of dy, which no other task reads.
        return *over_tasks(groups, body, (dy_MR, jnp.zeros_like(gate_M1), zeros)), None

    @jax.custom_vjp
    def mlp(x_MR: Array, gate_M1: Array, w: Weights, groups: Groups) -> Array:
        return forward(x_MR, gate_M1, w, groups)[0]

    def mlp_fwd(x_MR: Array, gate_M1: Array, w: Weights, groups: Groups) -> tuple[Array, Any]:
        y_MR, pre_MF = forward(x_MR, gate_M1, w, groups)
        return y_MR, (x_MR, gate_M1, pre_MF, w, groups)

    mlp.defvjp(mlp_fwd, backward)
    return mlp(rows_nbR.reshape(n * b, R), gate_nb.reshape(n * b, 1), w, groups).reshape(n, b, R)


def _activated(config: ModelConfig, hidden: Array, gate: Array | None = None) -> Array:
    return activate(config, hidden, gate)


def _total(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]
