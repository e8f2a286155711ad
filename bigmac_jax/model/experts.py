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
from bigmac_jax.model.gathering import InStack
from bigmac_jax.model.groups import Groups, Sorted, group, most_chosen, sort
from bigmac_jax.model.kernels import even_matmul_tpu
from bigmac_jax.model.kernels.grouped_matmul import grouped_matmul, row_tile
from bigmac_jax.model.layers import activate, product
from bigmac_jax.model.mesh import TENSOR, platform, tensor_ranks

# w_in_eRF, w_out_eFR; where the config has them w_gate_eRF, b_in_eF, b_gate_eF, b_out_eR. Where a gate is not among
# them, it stands beside W_in in w_in_eRF and b_in_eF, which are twice as wide.
Weights = dict[str, Array]
AnyWeights = dict[str, Any]  # of which matrices may be an `InStack`
# Rows of a block: large enough for a matmul to run at speed, small enough that the padding (half a block an expert, on
# average) stays cheap.
BLOCK = 64


def apply_experts(
    config: Config,
    w: AnyWeights,
    rows: Array,
    gate_NK: Array | None,
    expert_NK: Array | None,
    share: int,
    most_local: int | None = None,
) -> Array:
    """Sums each row's experts → y, as rows: `grouped_mlp` with this rank's experts, or with its part of every expert,
    whose results the ranks of `tensor` add up. Arguments as for `grouped_mlp`."""
    if not (config.mesh.split_experts and tensor_ranks() > 1):
        return grouped_mlp(config, w, rows, gate_NK, expert_NK, share, most_local)
    # Each rank has a part of every expert: it takes the rows of all tensor ranks, R wide, and they sum the results.
    gate_NK, expert_NK = (None if v is None else _gather_tensor(v) for v in (gate_NK, expert_NK))
    if "b_out_eR" in w:  # one of them adds it
        w = w | {"b_out_eR": jnp.where(jax.lax.axis_index(TENSOR) == 0, w["b_out_eR"], 0)}
    of_all = share * tensor_ranks(), most_local and most_local * tensor_ranks()
    y = grouped_mlp(config, w, _gather_tensor(rows), gate_NK, expert_NK, *of_all)
    return jax.lax.psum_scatter(y, TENSOR, scatter_dimension=y.ndim - 2, tiled=True)


def _gather_tensor(rows: Array) -> Array:
    """The rows [N, …] or [S, e, C, …] of all tensor ranks."""
    return jax.lax.all_gather(rows, TENSOR, axis=rows.ndim - 2, tiled=True)


@jax.named_scope("experts")
def grouped_mlp(
    config: Config,
    weights: AnyWeights,
    rows: Array,
    gate_NK: Array | None,
    expert_NK: Array | None,
    share: int,
    most_local: int | None = None,
) -> Array:
    """Sums what each row's experts make of it → y, as rows.

    Args:
      rows: [N, R], or [S, e, C, R], C of each of S ranks for each expert.
      gate_NK: what their outputs are multiplied by; None if that happens elsewhere.
      expert_NK: local experts, e where a choice's expert is elsewhere; None for rows [S, e, C, R].
      share: rows of an expert when all get as many.
      most_local: how many choices are of a local expert at most; None: as many as the shape of expert_NK allows.
    """
    if expert_NK is None:
        return _even_mlp(config, _taken(weights), rows)
    rows_NR, e = rows, weights["w_in_eRF"].shape[0]
    gate_NK = None if gate_NK is None else gate_NK.astype(rows_NR.dtype)
    implementation = _implementation(config)
    if implementation == "kernel":
        by_expert = sort_for_kernel(expert_NK, e, most_local)

        def kernel(rows_MR: Array) -> Array:
            filled_M1 = (jnp.arange(len(rows_MR), dtype=jnp.int32) < jnp.sum(by_expert.sizes_e)).reshape(-1, 1)
            return _kernel(config, weights, rows_MR, by_expert.expert_M, by_expert.sizes_e, filled_M1)

        # All slots that are empty stand behind the last group, where nobody reads.
        return _through(kernel, rows_NR, gate_NK, by_expert.slot_NK, by_expert.choice_M, zero_slots=False)
    weights, groups = _taken(weights), layout(config, expert_NK, e, share, most_local)
    if implementation == "batched":
        w = {name: value.astype(rows_NR.dtype) for name, value in weights.items()}
        # In float32, so that the gradients of the rounds are added up in it.
        wide = {name: value.astype(jnp.float32) for name, value in weights.items()}
        y_NR = _rest(config, wide, rows_NR, gate_NK, groups)
        return y_NR + _even(config, w, rows_NR, gate_NK, groups) if groups.even_eC.size else y_NR
    w_n = _of_experts(weights, groups.expert_n, rows_NR.dtype)
    mlp = _in_blocks(functools.partial(_mlp, config, w_n), groups.block_nb)
    return _through(mlp, rows_NR, gate_NK, groups.slot_NK, groups.block_nb.reshape(-1))


def _taken(weights: AnyWeights) -> Weights:
    """The layer's arrays, where no kernel reads them in their stack."""
    return {name: w.take() if isinstance(w, InStack) else w for name, w in weights.items()}


def sort_for_kernel(expert_NK: Array, experts: int, most_local: int | None) -> Sorted:
    """Where the kernel wants the rows: sorted, in a number of slots that its row tiles divide."""
    rows = most_chosen(expert_NK, experts, most_local)
    return sort(expert_NK, experts, rows + -rows % row_tile(rows))


def layout(config: Config, expert_NK: Array, experts: int, share: int, most_local: int | None) -> Groups:
    """Where the other implementations want the rows; arguments as for `grouped_mlp`."""
    if _implementation(config) == "batched":
        even, block = min(share, expert_NK.shape[0]), max(1, min(BLOCK, share // 8))
        return group(expert_NK, experts, even, block, most_local)
    return group(expert_NK, experts, 0, BLOCK, most_local)


def _implementation(config: Config) -> str:
    if config.execution.grouped_matmul == "auto":
        return "batched" if platform() == "cpu" else "kernel"
    return config.execution.grouped_matmul


def _through(
    mlp: Callable[[Array], Array],
    rows_NR: Array,
    gate_NK: Array | None,
    slot_NK: Array,
    choice_M: Array,
    zero_slots: bool = True,
) -> Array:
    """Rows to their slots, through `mlp`, and the outputs of each row's choices summed. `zero_slots`: as in `rows`."""
    # A row of no expert that its sender weighs is an empty place of its buffer, or one that it did not send.
    zero_rows = zero_slots or gate_NK is not None or slot_NK.shape[1] > 1
    y_MR = mlp(spread(rows_NR, slot_NK, choice_M, zero_slots, zero_rows))
    if gate_NK is None:
        return collect(y_MR, slot_NK, choice_M, zero_slots, zero_rows)
    return weigh(y_MR, gate_NK, slot_NK, choice_M, zero_slots)


def _in_blocks(mlp: Callable[[Array], Array], choice_nb: Array) -> Callable[[Array], Array]:
    """`mlp` of blocks [n, b, R] as one of rows [n·b, R]."""
    return lambda rows_MR: mlp(rows_MR.reshape(*choice_nb.shape, -1)).reshape(rows_MR.shape)


def _of_experts(weights: Weights, expert_n: Array, dtype: Any) -> Weights:
    """The weights of each block. Gathered in float32, so that the transpose sums an expert's blocks in it."""
    return {name: value.astype(jnp.float32)[expert_n].astype(dtype) for name, value in weights.items()}


def _mlp(config: Config, w: Weights, rows_nbR: Array) -> Array:
    """One batched matmul per matrix; weights are given per block."""

    def affine(x_nbX: Array, w_nXY: Array, b_nY: Array | None) -> Array:
        y_nbY = product(x_nbX, w_nXY)
        return y_nbY if b_nY is None else y_nbY + b_nY[:, None]

    hidden = _hidden(config, w, lambda matrix, bias: affine(rows_nbR, w[matrix], w.get(bias)))
    # Of the F wide arrays only those before and behind the activation are kept for the backward pass.
    active_nbF = jax.checkpoint(lambda *hidden: activate(config.model, *hidden))(*hidden)
    return affine(active_nbF, w["w_out_eFR"], w.get("b_out_eR"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def bias_of_rows(b_eY: Array, expert_M: Array, dtype: str) -> Array:
    """The bias of each row's expert → [M, Y], in `dtype`; its gradient is summed in float32."""
    # Highest: of float32 an accelerator's matrix unit takes fewer bits by default, and would round the bias.
    return jnp.matmul(_one_hot(b_eY, expert_M, dtype), b_eY.astype(dtype), precision="highest")


def _one_hot(b_eY: Array, expert_M: Array, dtype: str) -> Array:
    return jax.nn.one_hot(expert_M, len(b_eY), dtype=dtype)


def _bias_fwd(b_eY: Array, expert_M: Array, dtype: str) -> tuple[Array, Any]:
    return bias_of_rows(b_eY, expert_M, dtype), (b_eY, expert_M)


def _bias_bwd(dtype: str, saved: Any, dy_MY: Array) -> tuple[Array, None]:
    b_eY, expert_M = saved
    one_hot_Me = _one_hot(b_eY, expert_M, dtype)
    sum_over_rows = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
    return sum_over_rows("Me,MY->eY", one_hot_Me, dy_MY).astype(b_eY.dtype), None


bias_of_rows.defvjp(_bias_fwd, _bias_bwd)


def _hidden(config: Config, w: Weights, affine: Callable[[str, str], Array]) -> list[Array]:
    """What the activation takes: x W_in + b_in, and where the experts are gated the gate's, from names of both."""
    hidden = affine("w_in_eRF", "b_in_eF")
    if not config.model.gated:
        return [hidden]
    return [hidden, affine("w_gate_eRF", "b_gate_eF")] if "w_gate_eRF" in w else jnp.split(hidden, 2, axis=-1)


def _even(config: Config, w: Weights, rows_NR: Array, gate_NK: Array | None, groups: Groups) -> Array:
    """The rows in even slots: one block an expert, so that the weights stay where they are."""
    slots = groups.even_eC.size
    slot_NK = jnp.minimum(groups.slot_NK, slots)
    mlp = _in_blocks(functools.partial(_mlp, config, w), groups.even_eC)
    return _through(mlp, rows_NR, gate_NK, slot_NK, groups.even_eC.reshape(-1))


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
        mlp = _in_blocks(functools.partial(_mlp, config, w_s), choice_sb)
        return _through(mlp, rows_NR, gate_NK, slot_NK, choice_sb.reshape(-1))

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


def _even_mlp(config: Config, weights: Weights, rows_SeCR: Array) -> Array:
    """The MLP of rows that each rank sent as many of to each expert."""
    S, e, C, R = rows_SeCR.shape
    kernel, F = _implementation(config) == "kernel", weights["w_in_eRF"].shape[2]
    if (
        kernel
        and platform() == "tpu"
        and even_matmul_tpu.fits(rows_SeCR.shape, R, F, itemsize=rows_SeCR.dtype.itemsize)
    ):

        def affine(x_SeCX: Array, matrix: str, bias: str) -> Array:
            w = weights[matrix]
            y_SeCY = even_matmul_tpu.even_matmul(x_SeCX, w, str(w.dtype))
            return y_SeCY if bias not in weights else y_SeCY + weights[bias].astype(y_SeCY.dtype)[:, None]

        hidden = _hidden(config, weights, functools.partial(affine, rows_SeCR))
        return affine(activate(config.model, *hidden), "w_out_eFR", "b_out_eR")
    rows_ebR = rows_SeCR.swapaxes(0, 1).reshape(e, S * C, R)
    # On GPU a plain batched product is the fastest that there is.
    if kernel and platform() != "gpu":
        y_ebR = _even_kernel(config, weights, rows_ebR.reshape(-1, R), e)
    else:
        y_ebR = _mlp(config, {name: value.astype(rows_SeCR.dtype) for name, value in weights.items()}, rows_ebR)
    return y_ebR.reshape(e, S, C, R).swapaxes(0, 1)


def _even_kernel(config: Config, w: Weights, rows_NR: Array, experts: int) -> Array:
    """The kernel on rows that stand by expert, as many for each."""
    N, each = len(rows_NR), len(rows_NR) // experts
    sizes_e = jnp.full_like(rows_NR, each, jnp.int32, shape=(experts,))
    padding = -N % row_tile(N)
    rows_MR = jnp.pad(rows_NR, ((0, padding), (0, 0)))
    expert_M = jnp.minimum(jnp.arange(N + padding, dtype=jnp.int32) // each, experts - 1)
    filled_M1 = (jnp.arange(N + padding) < N).reshape(-1, 1) if padding else None
    return _kernel(config, w, rows_MR, expert_M, sizes_e, filled_M1)[:N]


def _kernel(
    config: Config, w: AnyWeights, rows_MR: Array, expert_M: Array, sizes_e: Array, filled_M1: Array | None
) -> Array:
    """A grouped matmul of the accelerator, which computes the filled rows alone.

    Args:
      expert_M: the expert of each row, of those behind the last group any.
      sizes_e: rows of each expert.
      filled_M1: the rows that are of an expert; None where all are.
    """

    def affine(x_MX: Array, matrix: str, bias: str) -> Array:
        y_MY = grouped_matmul(x_MX, w[matrix], sizes_e)
        if bias not in w:
            return y_MY
        biased_MY = y_MY + bias_of_rows(w[bias], expert_M, str(y_MY.dtype))
        if filled_M1 is None:
            return biased_MY
        # What stands behind the last group, in the gradient too, is undefined, NaN included. No row sees another's, but
        # a bias sums over them. (A mask that the chunks of an overlap share makes XLA fuse their activations, and so
        # wait for all of them.)
        return jnp.where(filled_M1, biased_MY, 0)

    hidden = _hidden(config, w, functools.partial(affine, rows_MR))
    return affine(activate(config.model, *hidden), "w_out_eFR", "b_out_eR")
