"""Attention over pages is softmax(q kᵀ) v of each sequence, however many pages it has and wherever they stand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from bigmac_jax.model.kernels import paged_attention, paged_attention_gpu

from .test_grouped_matmul_gpu import h100

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


@pytest.mark.parametrize(("C", "heads", "K"), [(1, 1, 1), (4, 5, 10), (1, 8, 70)])
def test_the_kernel_of_gpu_gives_the_same(C: int, heads: int, K: int) -> None:
    """Interpreted; with another request's NaN wherever a row has written nothing, and pages that are nobody's."""
    draw, (W, H, page, n) = np.random.default_rng(0), (4, 16, 16, 4 * K + 3)
    length_W = np.minimum([1, K * page, 17, 33], K * page)
    table_WK = draw.permutation(n)[: W * K].reshape(W, K).astype(np.int32)
    keys, values = (np.full((G, n, page, H), np.nan, np.float32) for _ in range(2))
    for pages in (keys, values):
        for w, length in enumerate(length_W):
            for at in range(length):
                pages[:, table_WK[w, at // page], at % page] = draw.standard_normal((G, H))
    q_GWXH = draw.standard_normal((G, W, C * heads, H)).astype(np.float32)
    position_WC = np.maximum(length_W[:, None] - C + np.arange(C), 0).astype(np.int32)
    expected = jax.jit(paged_attention.paged_attention)(q_GWXH, keys, values, table_WK, position_WC)
    attend = jax.jit(functools.partial(paged_attention_gpu.paged_attention, interpret=True))
    found = attend(q_GWXH, keys, values, table_WK, position_WC)
    assert np.isfinite(found).all() and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernel_of_gpu_lowers(dtype: str) -> None:
    q, pages = jax.ShapeDtypeStruct((4, 2, 8, 128), dtype), jax.ShapeDtypeStruct((4, 512, 16, 128), dtype)
    table, position = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((2, 256), (2, 1)))
    with h100():
        traced = jax.jit(paged_attention_gpu.paged_attention).trace(q, pages, pages, table, position)
        assert "__gpu$xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_page_is_emptied_when_it_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that TPU's kernel reads. Pages 2 and 0 are begun, page 1 goes on, and a token that goes nowhere empties
    nothing."""
    monkeypatch.setattr(paged_attention, "platform", lambda: "tpu")
    page_T, place_T = np.array([2, 1, 0, 0, 3], np.int32), np.array([0, 2, 0, 1, 0], np.int32)
    fresh_TGH = np.broadcast_to(np.arange(1.0, 11.0, dtype=np.float32).reshape(5, G, 1), (5, G, 128))
    pages = jnp.full((G, 3, 4, 128), -1, jnp.bfloat16)
    found = np.asarray(paged_attention.write(pages, page_T, place_T, fresh_TGH.astype(pages.dtype)), np.float32)
    expected = np.array([[5.0, 7, 0, 0], [-1, -1, 3, -1], [1, 0, 0, 0]])
    np.testing.assert_array_equal(found[..., 9], [expected, np.where(expected > 0, expected + 1, expected)])
    for others, H in ((pages.astype(np.float32), 128), (pages[..., :64], 64)):  # which the kernel does not read
        fresh = fresh_TGH[..., :H].astype(others.dtype)
        kept = np.asarray(paged_attention.write(others, page_T, place_T, fresh), np.float32)[0, ..., 9]
        np.testing.assert_array_equal(kept, np.where(expected > 0, expected, -1))


def test_a_call_of_tpus_kernel_has_room_for_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of 8,192 pages has 32 KiB of a core's 1 MiB of scalar memory; rows go in order, whatever the calls."""
    tables = []

    def attend(q_wNH: Any, keys: Any, values: Any, length_w: Any, table_wK: Any, **_: Any) -> Any:
        tables.append(table_wK.shape)
        return q_wNH + length_w[:, None, None]

    monkeypatch.setattr(paged_attention.tpu, "paged_attention", attend)
    W, K, H = 37, 8192, 4
    q_GWXH, position_W = jnp.arange(W * H, dtype=jnp.float32).reshape(1, W, 1, H), jnp.arange(W)
    pages = jnp.zeros((1, 2, 16, H))
    y_GWXH = paged_attention.kernel(q_GWXH, pages, pages, jnp.zeros((W, K), jnp.int32), position_W)
    assert tables == [(16, K), (16, K), (5, K)]
    np.testing.assert_array_equal(y_GWXH, q_GWXH + 1 + position_W[None, :, None, None])


@pytest.mark.full
@pytest.mark.parametrize("table_bytes", [1 << 19, 130])
def test_the_kernel_of_tpu_gives_the_same(table_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, with products of one bfloat16 pass, as TPUs have them; all that nobody has written is NaN, as what a
    request whose activations overflow leaves behind."""
    draw, (W, K, heads, H, page) = np.random.default_rng(0), (4, 10, 3, 128, 16)
    length_W = np.array([1, K * page, 17, 33])
    table_WK = draw.permutation(PAGES + 3)[: W * K].reshape(W, K).astype(np.int32)
    keys, values = (jnp.full((G, PAGES + 3, page, H), np.nan, jnp.bfloat16) for _ in range(2))
    monkeypatch.setattr(paged_attention, "platform", lambda: "tpu")
    for pages_W, length in zip(table_WK, length_W, strict=True):
        at = np.arange(length, dtype=np.int32)
        keys, values = (
            paged_attention.write(
                pages, pages_W[at // page], at % page, draw.standard_normal((length, G, H)).astype(pages.dtype)
            )
            for pages in (keys, values)
        )
    keys, values = keys.astype(np.float32), values.astype(np.float32)
    monkeypatch.undo()
    monkeypatch.setattr(paged_attention, "_TABLE_BYTES", table_bytes)
    q_GWXH = (draw.standard_normal((G, W, heads, H)) / np.sqrt(H)).astype(np.float32)
    position_W = (length_W - 1).astype(np.int32)
    expected = np.asarray(jax.jit(paged_attention.paged_attention)(q_GWXH, keys, values, table_WK, position_W[:, None]))
    with pltpu.force_tpu_interpret_mode():
        found = np.asarray(jax.jit(paged_attention.kernel)(q_GWXH, keys, values, table_WK, position_W))
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())
