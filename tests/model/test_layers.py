"""Attention over several blocks, and what rotary positions promise."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmac_jax.model import attention, layers
from bigmac_jax.model.attention import rotate
from bigmac_jax.model.kernels.flash_attention import causal_attention
from bigmac_jax.model.layers import weight_gradient

from .tools import assert_close, on_mesh, split_batch, tiny


def plain_attention(q_BLNH: jax.Array, k_BLGH: jax.Array, v_BLGH: jax.Array) -> jax.Array:
    """Head by head, with the whole L × L table of scores."""
    L, N, H = q_BLNH.shape[1:]
    future_LL = jnp.asarray(~np.tri(L, dtype=bool))[None]
    heads = []
    for n in range(N):
        g = n * k_BLGH.shape[2] // N
        scores_BLL = jnp.einsum("BLH,BMH->BLM", q_BLNH[:, :, n], k_BLGH[:, :, g]) / math.sqrt(H)
        weights_BLL = jax.nn.softmax(jnp.where(future_LL, -jnp.inf, scores_BLL), axis=-1)
        heads.append(weights_BLL @ v_BLGH[:, :, g])
    return jnp.stack(heads, axis=2)


@pytest.mark.parametrize(("platform", "rows"), [("gpu", 1024), ("gpu", 1023), ("cpu", 1024)])
def test_an_exact_product_of_bfloat16_rows(platform: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As float32 has it, in bfloat16 products alone where there are enough rows for a GPU's tensor cores: its values
    and w's gradient to 24 bits, that of rows as the nearest of bfloat16."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, rows, 64)), jnp.bfloat16)
    w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 16), (1, rows, 16)))
    monkeypatch.setattr(layers, "platform", lambda: platform)

    def pull(x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
        y, gradients = jax.vjp(layers.exact_product, x, w)
        return y, *gradients(dy)

    y, dx, dw = jax.jit(pull)(x, w, dy)
    x64, w64, dy64 = (np.asarray(v, np.float64) for v in (x, w, dy))
    for found, expected in ((y, x64 @ w64), (dw, x64[0].T @ dy64[0])):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    exact, terms = dy64 @ w64.T, np.abs(dy64) @ np.abs(w64.T)
    assert dx.dtype == jnp.bfloat16
    assert (np.abs(np.asarray(dx, np.float64) - exact) <= 2**-8 * np.abs(exact) + 2**-15 * terms).all()
    lowered = jax.jit(pull).lower(x, w, dy).as_text()
    dots = re.findall(r"dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", lowered)
    assert dots == [("bf16", "bf16") if (platform, rows) == ("gpu", 1024) else ("f32", "f32")] * 3


# Blocks are of 128 queries, or of a quarter of the sequence: one token, one block, a short last one, four uneven ones.
@pytest.mark.parametrize(
    ("length", "kv_heads", "implementation"),
    [(1, 4, "auto"), (128, 4, "auto"), (300, 2, "blocks"), (521, 4, "auto"), (300, 2, "xla")],
)
def test_attention_is_attention(length: int, kv_heads: int, implementation: str) -> None:
    rng = np.random.default_rng(0)
    shapes = (2, length, 4, 8), (2, length, kv_heads, 8), (2, length, kv_heads, 8)
    q, k, v, dy = (rng.standard_normal(shape).astype(np.float32) for shape in (*shapes, shapes[0]))

    def run(attention: Any) -> dict[str, Any]:
        y, pull = jax.vjp(attention, *(split_batch(x) for x in (q, k, v)))
        dq, dk, dv = pull(split_batch(dy))
        # One key: its weight is 1, whatever its score.
        return {"y": y, "v": dv} | ({"q": dq, "k": dk} if length > 1 else {})

    with on_mesh(tiny((2, 1, 1))):
        actual, expected = (
            jax.jit(run, static_argnums=0)(f)
            for f in (functools.partial(causal_attention, implementation=implementation), plain_attention)
        )
    assert_close(actual, expected)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    q, k = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    turned_q, turned_k = (rotate(jnp.tile(x, (1, 16, 1, 1)), 100.0, position_BL=None)[0, :, 0] for x in (q, k))
    scores_LL = np.asarray(turned_q @ turned_k.T)
    for distance in range(-15, 16):
        diagonal = np.diagonal(scores_LL, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert np.ptp(scores_LL[:, 0]) > 1
    np.testing.assert_allclose(scores_LL[0, 0], q @ k, rtol=1e-5)  # position 0 is not turned
    angle_LH = np.outer(np.arange(16), 100.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(turned_q[:, :4], q[:4] * np.cos(angle_LH) - q[4:] * np.sin(angle_LH), atol=1e-5)


@pytest.mark.parametrize("where", ["cpu", "tpu"])
def test_tokens_anywhere_turn_as_in_a_sequence(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On accelerators without a table of all positions."""
    monkeypatch.setattr(attention, "platform", lambda: where)
    position_T, (T, L) = np.array([5, 0, 15, 5], np.int32), (4, 16)
    x_TNH = np.random.default_rng(0).standard_normal((T, 2, 8)).astype(np.float32)
    sequence = np.zeros((1, L, 2, 8), np.float32)
    for x_NH, position in zip(x_TNH, position_T, strict=True):
        sequence[:, position] = x_NH
        turned = np.asarray(rotate(jnp.asarray(sequence), 100.0, position_BL=None))[0, position]
        found = attention.rotate_to(jnp.asarray(x_NH[None]), 100.0, jnp.asarray([position]), L)[0]
        np.testing.assert_allclose(found, turned, atol=1e-6)
    program = str(jax.make_jaxpr(lambda x, at: attention.rotate_to(x, 100.0, at, 4096))(x_TNH, position_T))
    assert ("4096" in program) == (where == "cpu")


@pytest.mark.parametrize(("shape", "copied"), [((2, 2**11, 2**10), True), ((2, 2**11, 2**10 + 1), False)])
def test_a_weight_gradient_copies_matrices_of_two_million_entries(shape: tuple[int, ...], copied: bool) -> None:
    """On CPU: a product whose left matrix stands transposed takes two to four times as long."""
    x_BTX, dy_BTY = (jax.ShapeDtypeStruct(shape, np.float32) for shape in (shape, (*shape[:2], 3)))
    traced = jax.make_jaxpr(functools.partial(weight_gradient, precision=None))(x_BTX, dy_BTY)
    assert traced.out_avals[0].shape == (2, shape[2], 3)
    assert ("optimization_barrier" in str(traced)) == copied
