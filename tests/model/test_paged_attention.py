"""Attention over pages is softmax(q kᵀ) v of each sequence, however many pages it has and wherever they stand."""

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from bigmac_jax.model.kernels import paged_attention

G, H, PAGE, PAGES = 2, 8, 4, 40


@pytest.mark.parametrize("C", [1, 4])
@pytest.mark.parametrize("at_once", [4, 12, 1000])
def test_equals_a_loop_over_sequences(monkeypatch: pytest.MonkeyPatch, C: int, at_once: int) -> None:
    monkeypatch.setattr(paged_attention, "_POSITIONS", at_once)
    draw, heads = np.random.default_rng(0), 3
    length_W = np.array([1, 27, 4, 13])
    table_WK = draw.permutation(PAGES)[: 4 * 7].reshape(4, 7).astype(np.int32)
    keys, values = (draw.standard_normal((G, PAGES, PAGE, H)).astype(np.float32) for _ in range(2))
    q_GWCNH = draw.standard_normal((G, 4, C, heads, H)).astype(np.float32)
    # What no sequence has written is another's that is gone.
    for w, length in enumerate(length_W):
        for page, first in zip(table_WK[w], range(0, 7 * PAGE, PAGE), strict=True):
            keys[:, page, max(0, length - first) :] = values[:, page, max(0, length - first) :] = np.nan
    # The last C positions of each sequence; of a shorter one the first position again.
    position_WC = np.maximum(length_W[:, None] - C + np.arange(C), 0).astype(np.int32)
    attend = jax.jit(paged_attention.paged_attention)
    found = np.asarray(attend(q_GWCNH.reshape(G, 4, C * heads, H), keys, values, table_WK, position_WC))
    found = found.reshape(G, 4, C, heads, H)
    for g, w, c, n in np.ndindex(G, 4, C, heads):
        seen = slice(position_WC[w, c] + 1)
        k_MH, v_MH = (pages[g, table_WK[w]].reshape(-1, H)[seen] for pages in (keys, values))
        share_M = np.exp(k_MH @ q_GWCNH[g, w, c, n])
        expected = (share_M / share_M.sum()) @ v_MH
        np.testing.assert_allclose(found[g, w, c, n], expected, atol=1e-5)


@pytest.mark.full
def test_the_kernel_of_tpu_gives_the_same() -> None:
    """Interpreted, with products of one bfloat16 pass, as TPUs have them."""
    draw, (heads, H, page) = np.random.default_rng(0), (3, 128, 16)
    length_W = np.array([1, 130, 17, 33])
    table_WK = draw.permutation(PAGES)[:40].reshape(4, 10).astype(np.int32)
    keys, values = (draw.standard_normal((G, PAGES, page, H)).astype(np.float32) for _ in range(2))
    q_GWXH = (draw.standard_normal((G, 4, heads, H)) / np.sqrt(H)).astype(np.float32)
    position_W = (length_W - 1).astype(np.int32)
    expected = np.asarray(jax.jit(paged_attention.paged_attention)(q_GWXH, keys, values, table_WK, position_W[:, None]))
    with pltpu.force_tpu_interpret_mode():
        found = np.asarray(jax.jit(paged_attention.kernel)(q_GWXH, keys, values, table_WK, position_W))
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())
