"""Attention to keys and values that stand in pages, on one rank.

W rows of X queries each (the tokens of a row, times the query heads of a key-value head), w of them that are read at a
time, G key-value heads, H head size, n pages of p positions, K pages of a sequence, M positions that are read at once,
T tokens that are written.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import paged_attention as tpu

from bigmac_jax.model.kernels import LANES, paged_attention_gpu
from bigmac_jax.model.kernels.grouped_matmul import on_this_rank
from bigmac_jax.model.mesh import platform

_POSITIONS = 128  # M
_TABLE_BYTES = 1 << 19  # of the pages' numbers in scalar memory, of which a core has 1 MiB


class _Sums(NamedTuple):
    """Running sums of the softmax over the positions read so far."""

    most_GwX: Array  # the largest score
    sum_GwX: Array  # of exp(score - the largest)
    y_GwXH: Array  # of the values, weighed like that


def write(pages_GnpH: Array, page_T: Array, place_T: Array, fresh_TGH: Array) -> Array:
    """Writes tokens to their places in pages; those of page n nowhere.

    By rows of one head: XLA transposes all pages where a dimension that isn't indexed comes first. Of pages that jax's
    TPU kernel reads, one is emptied when its first place is written: the kernel multiplies what stands behind a row's
    last token by 0, and that may be another request's NaN.
    """
    G, n, p, H = pages_GnpH.shape
    if _tpu_kernel_takes(pages_GnpH):
        page_TG = jnp.arange(G, dtype=jnp.int32)[None] * n + page_T[:, None]
        begun_TG = jnp.where(((place_T == 0) & (page_T < n))[:, None], page_TG, G * n)
        emptied = pages_GnpH.reshape(-1, p, H).at[begun_TG.reshape(-1)].set(0, mode="drop")
        pages_GnpH = emptied.reshape(pages_GnpH.shape)
    row_TG = (jnp.arange(G, dtype=jnp.int32)[None] * n + page_T[:, None]) * p + place_T[:, None]
    row_TG = jnp.where(page_T[:, None] < n, row_TG, G * n * p)
    rows = pages_GnpH.reshape(-1, H).at[row_TG.reshape(-1)].set(fresh_TGH.reshape(-1, H), mode="drop")
    return rows.reshape(pages_GnpH.shape)


def _tpu_kernel_takes(pages_GnpH: Array) -> bool:
    """Whether jax's kernel reads such pages: it multiplies in bfloat16, and heads that fill lanes."""
    return platform() == "tpu" and pages_GnpH.dtype == jnp.bfloat16 and pages_GnpH.shape[-1] % LANES == 0


@jax.named_scope("attention")
def paged_attention(q_GWXH: Array, keys_GnpH: Array, values_GnpH: Array, table_WK: Array, position_WC: Array) -> Array:
    """softmax(q kᵀ) v over the positions up to each query's own → [G, W, X, H], in the dtype of q.

    Pages are read a few at a time, up to the last that a row needs, and what they give is put together by the running
    maximum of the scores (FlashAttention): time and memory follow the sequences that there are, not the longest that
    may be, and what a row gets does not depend on how many others read. A kernel does that where it takes the heads: on
    TPU jax's for rows of one token in bfloat16, which is what it multiplies in, on GPU our own for rows of few.

    Args:
      table_WK: int32, pages of each row's sequence, in order.
      position_WC: int32, of each row's C tokens, whose query heads stand together in X.
    """
    (G, W, X, H), (_, n, p, _), K = q_GWXH.shape, keys_GnpH.shape, table_WK.shape[1]
    one_token = position_WC.shape[1] == 1 and q_GWXH.dtype == jnp.bfloat16
    if one_token and _tpu_kernel_takes(keys_GnpH) and 4 * K <= _TABLE_BYTES:
        return on_this_rank(kernel, q_GWXH, keys_GnpH, values_GnpH, table_WK, position_WC[:, 0])
    if platform() == "gpu" and paged_attention_gpu.takes(X, H):
        return on_this_rank(paged_attention_gpu.paged_attention, q_GWXH, keys_GnpH, values_GnpH, table_WK, position_WC)
    pages = min(K, max(1, _POSITIONS // p))
    M = pages * p
    last_W = position_WC.max(1)
    # The longest first: those that have more to read are the first so many.
    order_W = jnp.argsort(-last_W)
    q_GWXH, last_W, position_WC = q_GWXH[:, order_W], last_W[order_W], position_WC[order_W]
    table_WK = jnp.pad(table_WK[order_W], ((0, 0), (0, -K % pages)))
    position_WX = jnp.repeat(position_WC, X // position_WC.shape[1], axis=1)

    def read(w: int, i: Array | int, before: _Sums | None) -> _Sums:
        """The i-th M positions of the first w rows."""
        page_wk = jax.lax.dynamic_slice(table_WK, (0, i * pages), (w, pages))
        page_Gwk = jnp.arange(G, dtype=jnp.int32)[:, None, None] * n + page_wk[None]
        k_GwMH, v_GwMH = (v.reshape(G * n, p, H)[page_Gwk].reshape(G, w, M, H) for v in (keys_GnpH, values_GnpH))
        scores_GwXM = jnp.einsum("GwXH,GwMH->GwXM", q_GWXH[:, :w], k_GwMH, preferred_element_type=jnp.float32)
        at_M = i * M + jnp.arange(M, dtype=jnp.int32)
        # What stands where the row has written nothing is another request's, and may be NaN, which a share of 0 keeps.
        v_GwMH = jnp.where((at_M[None] <= last_W[:w, None])[None, ..., None], v_GwMH, 0)
        seen_wXM = at_M[None, None] <= position_WX[:w, :, None]
        scores_GwXM = jnp.where(seen_wXM[None], scores_GwXM, -jnp.inf)
        most_GwX = scores_GwXM.max(-1)
        if before is not None:
            most_GwX = jnp.maximum(most_GwX, before.most_GwX)
        share_GwXM = jnp.exp(scores_GwXM - most_GwX[..., None])
        y_GwXH = jnp.einsum(
            "GwXM,GwMH->GwXH", share_GwXM.astype(v_GwMH.dtype), v_GwMH, preferred_element_type=jnp.float32
        )
        if before is None:
            return _Sums(most_GwX, share_GwXM.sum(-1), y_GwXH)
        kept_GwX = jnp.exp(before.most_GwX - most_GwX)
        sum_GwX = kept_GwX * before.sum_GwX + share_GwXM.sum(-1)
        return _Sums(most_GwX, sum_GwX, kept_GwX[..., None] * before.y_GwXH + y_GwXH)

    def read_more(w: int, i: Array, sums: _Sums) -> _Sums:
        first = read(w, i, _Sums(*(v[:, :w] for v in sums)))
        return _Sums(*(v.at[:, :w].set(new) for v, new in zip(sums, first, strict=True)))

    # On accelerators a branch costs more than the rows that it saves.
    sizes = sorted({-(-W // 2**halved) for halved in range(5)}) if platform() == "cpu" else [W]
    reads = [functools.partial(read_more, w) for w in sizes]

    def more(i: Array, sums: _Sums) -> _Sums:
        needed = (last_W >= i * M).sum(dtype=jnp.int32)
        return jax.lax.switch(jnp.searchsorted(jnp.asarray(sizes, jnp.int32), needed), reads, i, sums)

    sums = read(W, 0, None)  # every query sees position 0, so that the largest score is finite
    if pages < K:
        sums = jax.lax.fori_loop(1, last_W[0] // M + 1, more, sums)
    y_GWXH = (sums.y_GwXH / sums.sum_GwX[..., None]).astype(q_GWXH.dtype)
    return jnp.zeros_like(y_GWXH).at[:, order_W].set(y_GWXH, unique_indices=True)


def kernel(q_GWXH: Array, keys_GnpH: Array, values_GnpH: Array, table_WK: Array, position_W: Array) -> Array:
    """`paged_attention` of rows of one token, by jax's Pallas kernel of TPUs."""
    (G, W, X, H), (_, _, p, _), K = q_GWXH.shape, keys_GnpH.shape, table_WK.shape[1]
    pages = min(K, max(1, _POSITIONS // p))
    # It reads some pages at a time. Those behind the row's last may be another's: the row's first, whose scores are
    # masked, stands for them.
    own_WK = jnp.arange(K, dtype=jnp.int32)[None] <= position_W[:, None] // p
    table_WK = jnp.where(own_WK, table_WK, table_WK[:, :1])
    table_WK = jnp.pad(table_WK, ((0, 0), (0, -K % pages)), mode="edge")
    q_WNH = q_GWXH.swapaxes(0, 1).reshape(W, G * X, H)
    w = max(1, _TABLE_BYTES // (4 * table_WK.shape[1]))  # a call has all of its rows' table in scalar memory
    read = functools.partial(tpu.paged_attention, pages_per_compute_block=pages)
    y_WNH = jnp.concatenate(
        [
            read(q_WNH[i : i + w], keys_GnpH, values_GnpH, position_W[i : i + w] + 1, table_WK[i : i + w])
            for i in range(0, W, w)
        ]
    )
    return y_WNH.reshape(W, G, X, H).swapaxes(0, 1)
