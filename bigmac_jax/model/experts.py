"""The experts of one rank: a two-layer MLP each. They do not know where the rows came from.

N rows with K choices each among e local experts, R row width, F expert hidden; n blocks of b rows, each of a single
expert. For a row of expert i (paper, equation 4; biases and the gate branch where the config has them):

    E_i(x') = σ(x' W_i↑) W_i↓
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.config import Config
from bigmac_jax.model.exchange.rows import collect, spread, weigh
from bigmac_jax.model.groups import Groups, group
from bigmac_jax.model.kernels.grouped_matmul import grouped_matmul, row_tile
from bigmac_jax.model.layers import activate, product
from bigmac_jax.model.mesh import TENSOR, platform, tensor_ranks

Weights = dict[str, Array]  # w_in_eRF, w_out_eFR; where the config has them w_gate_eRF, b_in_eF, b_gate_eF, b_out_eR
# Rows of a block: large enough for a matmul to run at speed, small enough that the padding (half a block an expert, on
# average) stays cheap.
BLOCK = 64


def apply_experts(
    config: Config, w: Weights, rows_NR: Array, gate_NK: Array | None, expert_NK: Array | None, share: int
) -> Array:
    """Sums each row's experts → y_NR: `grouped_mlp` with this rank's experts, or with its part of every expert, whose
    results the ranks of `tensor` add up. Arguments as for `grouped_mlp`."""
    if not (config.mesh.split_experts and tensor_ranks() > 1):
        return grouped_mlp(config, w, rows_NR, gate_NK, expert_NK, share)
    # Each rank has a part of every expert: it takes the rows of all tensor ranks, R wide, and they sum the results.
    # Rows that stand by expert, as many for each, stand like that when they are gathered.
    e = 1 if expert_NK is not None else w["w_in_eRF"].shape[0]
    gate_NK, expert_NK = (None if v is None else _gather_tensor(v, 1) for v in (gate_NK, expert_NK))
    if "b_out_eR" in w:  # one of them adds it
        w = w | {"b_out_eR": jnp.where(jax.lax.axis_index(TENSOR) == 0, w["b_out_eR"], 0)}
    y_NR = grouped_mlp(config, w, _gather_tensor(rows_NR, e), gate_NK, expert_NK, share * tensor_ranks())
    y_ebR = jax.lax.psum_scatter(y_NR.reshape(e, -1, y_NR.shape[1]), TENSOR, scatter_dimension=1, tiled=True)
    return y_ebR.reshape(rows_NR.shape)


def _gather_tensor(rows_NX: Array, groups: int) -> Array:
    """The rows of all tensor ranks, group by group."""
    rows = rows_NX.reshape(groups, -1, rows_NX.shape[1])
    return jax.lax.all_gather(rows, TENSOR, axis=1, tiled=True).reshape(-1, rows_NX.shape[1])


@jax.named_scope("experts")
def grouped_mlp(
    config: Config,
    weights: Weights,
    rows_NR: Array,
    gate_NK: Array | None,
    expert_NK: Array | None,
    share: int,
) -> Array:
    """Sums what each row's experts make of it → y_NR.

    Args:
      gate_NK: what their outputs are multiplied by; None if that happens elsewhere.
      expert_NK: local experts, e where a choice's expert is elsewhere; None if rows stand sorted by expert, as many
        for each.
      share: rows of an expert when all get as many.
    """
    w = {name: value.astype(rows_NR.dtype) for name, value in weights.items()}
    gate_NK = None if gate_NK is None else gate_NK.astype(rows_NR.dtype)
    e, R = w["w_in_eRF"].shape[:2]
    implementation = _implementation(config)
    if expert_NK is None:
        rows_ebR = rows_NR.reshape(e, -1, R)
        # On GPU a plain batched product is the fastest that there is.
        kernel = implementation == "kernel" and platform() != "gpu"
        y_ebR = _kernel(config, w, rows_ebR, None) if kernel else _mlp(config, w, rows_ebR)
        return y_ebR.reshape(-1, R)
    groups = layout(config, expert_NK, e, share)
    if implementation == "batched":
        # In float32, so that the gradients of the rounds are added up in it.
        wide = {name: value.astype(jnp.float32) for name, value in weights.items()}
        y_NR = _rest(config, wide, rows_NR, gate_NK, groups)
        return y_NR + _even(config, w, rows_NR, gate_NK, groups) if groups.even_eC.size else y_NR

    def mlp(rows_nbR: Array) -> Array:
        if implementation == "kernel":
            return _kernel(config, w, rows_nbR, groups)
        return _mlp(config, _of_experts(weights, groups.expert_n, rows_nbR.dtype), rows_nbR)

    return _through(mlp, rows_NR, gate_NK, groups.slot_NK, groups.block_nb)


def layout(config: Config, expert_NK: Array, experts: int, share: int) -> Groups:
    """Where the implementation wants the rows; arguments as for `grouped_mlp`."""
    if _implementation(config) == "batched":
        return group(expert_NK, experts, min(share, expert_NK.shape[0]), max(1, min(BLOCK, share // 8)))
    return group(expert_NK, experts, 0, BLOCK)


def _implementation(config: Config) -> str:
    if config.execution.grouped_matmul == "auto":
        return "batched" if platform() == "cpu" else "kernel"
    return config.execution.grouped_matmul


def _through(
    mlp: Callable[[Array], Array], rows_NR: Array, gate_NK: Array | None, slot_NK: Array, choice_nb: Array
) -> Array:
    """Rows to their slots, through `mlp`, and the outputs of each row's choices summed."""
    choice_M, R = choice_nb.reshape(-1), rows_NR.shape[1]
    y_MR = mlp(spread(rows_NR, slot_NK, choice_M).reshape(*choice_nb.shape, R)).reshape(-1, R)
    return collect(y_MR, slot_NK, choice_M) if gate_NK is None else weigh(y_MR, gate_NK, slot_NK, choice_M)


def _of_experts(weights: Weights, expert_n: Array, dtype: Any) -> Weights:
    """The weights of each block. Gathered in float32, so that the transpose sums an expert's blocks in it."""
    return {name: value.astype(jnp.float32)[expert_n].astype(dtype) for name, value in weights.items()}


def _mlp(config: Config, w: Weights, rows_nbR: Array) -> Array:
    """One batched matmul per matrix; weights are given per block."""

    def affine(x_nbX: Array, w_nXY: Array, b_nY: Array | None) -> Array:
        y_nbY = product(x_nbX, w_nXY)
        return y_nbY if b_nY is None else y_nbY + b_nY[:, None]

    hidden = [affine(rows_nbR, w["w_in_eRF"], w.get("b_in_eF"))]
    if config.model.gated:
        hidden.append(affine(rows_nbR, w["w_gate_eRF"], w.get("b_gate_eF")))
    # Of the F wide arrays only those before and behind the activation are kept for the backward pass.
    active_nbF = jax.checkpoint(lambda *hidden: activate(config.model, *hidden))(*hidden)
    return affine(active_nbF, w["w_out_eFR"], w.get("b_out_eR"))


def _even(config: Config, w: Weights, rows_NR: Array, gate_NK: Array | None, groups: Groups) -> Array:
    """The rows in even slots: one block an expert, so that the weights stay where they are."""
    slots = groups.even_eC.size
    slot_NK = jnp.minimum(groups.slot_NK, slots)
    return _through(lambda rows_eCR: _mlp(config, w, rows_eCR), rows_NR, gate_NK, slot_NK, groups.even_eC)


def _rest(config: Config, weights: Weights, rows_NR: Array, gate_NK: Array | None, groups: Groups) -> Array:
    """The rows beyond the even slots, in rounds of as many blocks as there are experts. The rounds end behind the last
    block that is filled: the time follows the rows that there are, not the room that there is."""
    n, b = groups.block_nb.shape
    size = min(n, groups.sizes_e.size)

    def in_round(i: Array, groups: Groups, weights: Weights, rows_NR: Array, gate_NK: Array | None) -> Array:
        # The last round may start early, at blocks that were computed: they are emptied.
        first = jnp.minimum(i * size, n - size)
        again = (first + jnp.arange(size, dtype=jnp.int32) < i * size).reshape(-1, 1)
        choice_sb = jax.lax.dynamic_slice_in_dim(groups.block_nb, first, size)
        choice_sb = jnp.where(again, groups.slot_NK.size, choice_sb)
        expert_s = jax.lax.dynamic_slice_in_dim(groups.expert_n, first, size)
        slot_NK = groups.slot_NK - groups.even_eC.size
        slot_NK = jnp.where(slot_NK < i * size * b, size * b, jnp.minimum(slot_NK - first * b, size * b))
        w_s = _of_experts(weights, expert_s, rows_NR.dtype)
        return _through(lambda rows_sbR: _mlp(config, w_s, rows_sbR), rows_NR, gate_NK, slot_NK, choice_sb)

    def over_rounds(groups: Groups, body: Callable[[Array, Any], Any], carry: Any) -> Any:
        filled = jnp.sum(groups.sizes_e) // b
        return jax.lax.fori_loop(0, -(-filled // size), body, carry)

    @jax.custom_vjp
    def rest(weights: Weights, rows_NR: Array, gate_NK: Array | None, groups: Groups) -> Array:
        def body(i: Array, y_NR: Array) -> Array:
            return y_NR + in_round(i, groups, weights, rows_NR, gate_NK)

        return over_rounds(groups, body, jnp.zeros_like(rows_NR))

    def backward(saved: Any, dy_NR: Array) -> Any:
        *inputs, groups = saved

        def body(i: Array, total: Any) -> Any:
            pull = jax.vjp(functools.partial(in_round, i, groups), *inputs)[1]
            return jax.tree.map(jnp.add, total, pull(dy_NR))

        return *over_rounds(groups, body, jax.tree.map(jnp.zeros_like, tuple(inputs))), None

    rest.defvjp(lambda *inputs: (rest(*inputs), inputs), backward)
    return rest(weights, rows_NR, gate_NK, groups)


def _kernel(config: Config, w: Weights, rows_nbR: Array, groups: Groups | None) -> Array:
    """A grouped matmul of the accelerator, which computes the filled blocks alone."""
    n, b, R = rows_nbR.shape
    M = n * b
    padding = -M % row_tile(M)
    if groups is None:  # block i belongs to expert i, and all are filled
        expert_n, sizes_e = jnp.arange(n, dtype=jnp.int32), jnp.full_like(rows_nbR, b, jnp.int32, shape=(n,))
    else:
        expert_n, sizes_e = groups.expert_n, groups.sizes_e

    def affine(x_MX: Array, matrix: str, bias: str) -> Array:
        y_MY = grouped_matmul(x_MX, w[matrix], sizes_e)
        if bias not in w:
            return y_MY
        biased_MY = y_MY + jnp.pad(jnp.repeat(w[bias][expert_n], b, axis=0), ((0, padding), (0, 0)))
        if groups is None and not padding:
            return biased_MY
        # What stands behind the last group, in the gradient too, is undefined, NaN included. No row sees another's, but
        # a bias sums over them. (A mask that the chunks of an overlap share makes XLA fuse their activations, and so
        # wait for all of them.)
        filled_M1 = (jnp.arange(y_MY.shape[0], dtype=jnp.int32) < jnp.sum(sizes_e)).reshape(-1, 1)
        return jnp.where(filled_M1, biased_MY, 0)

    rows_MR = jnp.pad(rows_nbR.reshape(M, R), ((0, padding), (0, 0)))
    hidden_MF = affine(rows_MR, "w_in_eRF", "b_in_eF")
    gate_MF = affine(rows_MR, "w_gate_eRF", "b_gate_eF") if config.model.gated else None
    return affine(activate(config.model, hidden_MF, gate_MF), "w_out_eFR", "b_out_eR")[:M].reshape(n, b, R)
