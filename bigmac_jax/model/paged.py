"""Attention to keys and values that stand in pages, on one rank.

W rows of X queries each (the tokens of a row, times the query heads of a key-value head), G key-value heads, H head
size, n pages of p positions, K pages of a sequence, M positions that are read at a time.
"""

import jax
import jax.numpy as jnp
from jax import Array

_POSITIONS = 128  # M


@jax.named_scope("attention")
def paged_attention(q_GWXH: Array, keys_GnpH: Array, values_GnpH: Array, table_WK: Array, position_WC: Array) -> Array:
    """softmax(q kᵀ) v over the positions up to each query's own → [G, W, X, H], in the dtype of q.

    Pages are read a few at a time, up to the last that a row needs, and what they give is put together by the running
    maximum of the scores (FlashAttention): time and memory follow the longest sequence that there is, not the longest
    that may be, and what a row gets does not depend on how many others read.

    Args:
      table_WK: int32, pages of each row's sequence, in order.
      position_WC: of each row's C tokens, whose query heads stand together in X.
    """
    (G, W, X, H), (K, p) = q_GWXH.shape, (table_WK.shape[1], keys_GnpH.shape[2])
    pages = min(K, max(1, _POSITIONS // p))
    M = pages * p
    table_WK = jnp.pad(table_WK, ((0, 0), (0, -K % pages)))
    position_WX = jnp.repeat(position_WC, X // position_WC.shape[1], axis=1)

    def read(i: Array | int) -> tuple[Array, Array]:
        """scores_GWXM of the i-th M positions, values_GWMH."""
        page_Wk = jax.lax.dynamic_slice_in_dim(table_WK, i * pages, pages, axis=1)
        k_GWMH, v_GWMH = (v[:, page_Wk].reshape(G, W, M, H) for v in (keys_GnpH, values_GnpH))
        scores_GWXM = jnp.einsum("GWXH,GWMH->GWXM", q_GWXH, k_GWMH, preferred_element_type=jnp.float32)
        seen_WXM = i * M + jnp.arange(M, dtype=jnp.int32)[None, None] <= position_WX[..., None]
        return jnp.where(seen_WXM[None], scores_GWXM, -jnp.inf), v_GWMH

    def weighed(scores_GWXM: Array, most_GWX: Array, v_GWMH: Array) -> tuple[Array, Array]:
        share_GWXM = jnp.exp(scores_GWXM - most_GWX[..., None])
        y_GWXH = jnp.einsum(
            "GWXM,GWMH->GWXH", share_GWXM.astype(v_GWMH.dtype), v_GWMH, preferred_element_type=jnp.float32
        )
        return share_GWXM.sum(-1), y_GWXH

    def more(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        most_GWX, sum_GWX, y_GWXH = carry
        scores_GWXM, v_GWMH = read(i)
        above_GWX = jnp.maximum(most_GWX, scores_GWXM.max(-1))
        kept_GWX = jnp.exp(most_GWX - above_GWX)
        sums_GWX, ys_GWXH = weighed(scores_GWXM, above_GWX, v_GWMH)
        return above_GWX, kept_GWX * sum_GWX + sums_GWX, kept_GWX[..., None] * y_GWXH + ys_GWXH

    # Every query sees position 0, so that the first maximum is finite.
    scores_GWXM, v_GWMH = read(0)
    most_GWX = scores_GWXM.max(-1)
    carry = (most_GWX, *weighed(scores_GWXM, most_GWX, v_GWMH))
    if pages < K:
        _, sum_GWX, y_GWXH = jax.lax.fori_loop(1, position_WC.max() // M + 1, more, carry)
    else:
        _, sum_GWX, y_GWXH = carry
    return (y_GWXH / sum_GWX[..., None]).astype(q_GWXH.dtype)
