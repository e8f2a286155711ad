"""Decoding's attention on GPU: few tokens of a row attend to the keys and values of its sequence, which are in pages.

A Pallas kernel, lowered through Triton: a loop in XLA would start several kernels for every 128 positions, and write
what it gathers. W rows of X queries each (the tokens of a row, times the query heads of a key-value head), G key-value
heads, H head size, n pages of p positions, K pages of a sequence, which is read in S splits side by side, M positions
at a time; N = G · n · p positions in all.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_POSITIONS = 64  # M
_SPLITS = 16  # of a long sequence: a few rows with a few heads each would leave most of a GPU idle
_LEAST_ROWS, _MOST_ROWS = 16, 64  # queries of a product
_LEAST = -1e30  # a score below all others, of which differences are no NaN


def takes(queries: int, head_size: int) -> bool:
    """Whether the kernel takes rows of so many queries and heads of this size, which registers have to hold."""
    return queries <= _MOST_ROWS and head_size in (16, 32, 64, 128)


def paged_attention(
    q_GWXH: Array, keys_GnpH: Array, values_GnpH: Array, table_WK: Array, position_WC: Array, *, interpret: bool = False
) -> Array:
    """softmax(q kᵀ) v over the positions up to each query's own → [G, W, X, H], in the dtype of q.

    What stands behind a row's last position is not read: it may be another request's, and NaN.
    """
    (G, W, X, H), (_, n, p, _), K = q_GWXH.shape, keys_GnpH.shape, table_WK.shape[1]
    steps = pl.cdiv(K * p, _POSITIONS)
    splits = min(_SPLITS, steps)
    rows = max(_LEAST_ROWS, pl.next_power_of_2(X))
    position_WX = jnp.repeat(position_WC, X // position_WC.shape[1], axis=1)
    out = [
        jax.ShapeDtypeStruct((splits, G, W, rows, *more), jnp.float32)  # y, its sum of weights, the largest score
        for more in ((H,), (), ())
    ]
    y_SGWXH, sum_SGWX, most_SGWX = pl.pallas_call(
        functools.partial(_kernel, pages=n, page_size=p, steps=pl.cdiv(steps, splits)),
        out,
        grid=(splits, G, W),
        name="paged_attention_gpu",
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(
        jnp.pad(q_GWXH, ((0, 0), (0, 0), (0, rows - X), (0, 0))),
        keys_GnpH.reshape(-1, H),
        values_GnpH.reshape(-1, H),
        table_WK,
        jnp.pad(position_WX, ((0, 0), (0, rows - X))),
    )
    weight_SGWX = jnp.exp(most_SGWX - most_SGWX.max(0, keepdims=True))
    y_GWXH = (weight_SGWX[..., None] * y_SGWXH).sum(0) / (weight_SGWX * sum_SGWX).sum(0)[..., None]
    return y_GWXH[:, :, :X].astype(q_GWXH.dtype)


def _kernel(
    q_GWXH: Any,
    k_NH: Any,
    v_NH: Any,
    table_WK: Any,
    position_WX: Any,
    y_SGWXH: Any,
    sum_SGWX: Any,
    most_SGWX: Any,
    *,
    pages: int,
    page_size: int,
    steps: int,
) -> None:
    """One split of one row's sequence, for one key-value head."""
    (X, H), (split, head, row) = q_GWXH.shape[2:], (pl.program_id(axis) for axis in range(3))
    position_X, q_XH = position_WX[row], q_GWXH[head, row]
    stop = position_X.max() + 1

    def read(rows_NH: Any, row_M: Array, there_M: Array) -> Array:
        """Some rows, 0 where there are none."""
        row_MH, column_MH, there_MH = (
            jnp.broadcast_to(v, (_POSITIONS, H))
            for v in (row_M[:, None], jnp.arange(H, dtype=jnp.int32)[None], there_M[:, None])
        )
        return plgpu.load(rows_NH.at[row_MH, column_MH], mask=there_MH, other=0.0)

    def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        y_XH, sum_X, most_X = carry
        at_M = i * _POSITIONS + jnp.arange(_POSITIONS, dtype=jnp.int32)
        there_M = at_M < stop
        page_M = plgpu.load(table_WK.at[row, at_M // page_size], mask=there_M, other=0)
        row_M = (head * pages + page_M) * page_size + at_M % page_size
        scores_XM = plgpu.dot(q_XH, read(k_NH, row_M, there_M), trans_b=True)
        scores_XM = jnp.where(at_M[None] <= position_X[:, None], scores_XM, _LEAST)
        higher_X = jnp.maximum(most_X, scores_XM.max(1))
        kept_X, share_XM = jnp.exp(most_X - higher_X), jnp.exp(scores_XM - higher_X[:, None])
        v_MH = read(v_NH, row_M, there_M)
        y_XH = kept_X[:, None] * y_XH + plgpu.dot(share_XM.astype(v_MH.dtype), v_MH)
        return y_XH, kept_X * sum_X + share_XM.sum(1), higher_X

    last = jnp.minimum((split + 1) * steps, pl.cdiv(stop, _POSITIONS))
    nothing = jnp.zeros((X, H), jnp.float32), jnp.zeros(X, jnp.float32), jnp.full(X, _LEAST, jnp.float32)
    y_SGWXH[split, head, row], sum_SGWX[split, head, row], most_SGWX[split, head, row] = jax.lax.fori_loop(
        split * steps, last, step, nothing
    )
