"""The cross-entropy that is fused with the output projection against float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from model.tools import (
    assert_close,
    leaves,
    on_mesh,
    random_model,
    random_tokens,
    split_batch,
    split_tokens,
    tiny,
)

from bigmac_jax.data.batch import NO_TARGET, batch_from_windows
from bigmac_jax.model.gathering import Crossing, Weight
from bigmac_jax.model.mesh import TENSOR, axes_of, replicated_spec, spec_of, token_spec
from bigmac_jax.training import loss
from bigmac_jax.training.loss import linear_cross_entropy

B, L, D, V = 8, 6, 5, 13


def inputs(scale: float = 1.0, V: int = V, L: int = L) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x_BLD, w_VD and targets_BL, among which some ids repeat and some are missing."""
    rng = np.random.default_rng(0)
    x_BLD, w_VD = scale * rng.standard_normal((B, L, D)), rng.standard_normal((V, D))
    return x_BLD.astype(np.float32), w_VD.astype(np.float32), rng.integers(V - 3, size=(B, L), dtype=np.int32)


def reference(x_BLD: Any, w_VD: Any, targets_BL: np.ndarray) -> dict[str, np.ndarray]:
    """Mean loss and its gradients from whole logits in float64."""
    x_BLD, w_VD = np.asarray(x_BLD, np.float64), np.asarray(w_VD, np.float64)
    logits_BLV = x_BLD @ w_VD.T
    logits_BLV -= logits_BLV.max(-1, keepdims=True)
    log_p_BLV = logits_BLV - np.log(np.exp(logits_BLV).sum(-1, keepdims=True))
    hit_BLV = np.eye(len(w_VD))[targets_BL]
    d_BLV = (np.exp(log_p_BLV) - hit_BLV) / targets_BL.size
    return {
        "loss": -(hit_BLV * log_p_BLV).sum() / targets_BL.size,
        "dx": d_BLV @ w_VD,
        "dw": np.einsum("BLV,BLD->VD", d_BLV, x_BLD),
    }


def _loss(x_BLD: Any, w_VD: Any, targets_BL: Any) -> Any:
    crossing = Crossing(str(w_VD.dtype), str(w_VD.dtype), "float32")
    over = TENSOR in axes_of(spec_of(w_VD))
    return linear_cross_entropy(
        x_BLD, Weight(w_VD, crossing, (TENSOR,) if over else ()), targets_BL, targets=None
    ).mean()


def fused(
    mesh: tuple[int, ...], x_BLD: Any, w_VD: Any, targets_BL: np.ndarray, factor: float = 1.0, split: bool = False
) -> dict[str, Any]:
    """`factor` times the loss, and its gradients; the table split over `tensor` if so."""
    with on_mesh(tiny(mesh, batch=B)):
        arguments = [
            jax.device_put(x_BLD, token_spec(3)),
            jax.device_put(w_VD, P(TENSOR, None) if split else replicated_spec(2)),
            jax.device_put(targets_BL, token_spec(2)),
        ]
        loss_and_gradients = jax.value_and_grad(lambda *a: factor * _loss(*a), (0, 1))
        value, (dx, dw) = jax.jit(loss_and_gradients)(*arguments)
        return {"loss": value, "dx": dx, "dw": dw}


def limit_chunks(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    monkeypatch.setattr(loss, "_CHUNK_ENTRIES", {"cpu": entries})


@pytest.mark.parametrize(
    ("mesh", "entries", "chunks"),
    [
        ((1, 1, 1), 2**22, 1),
        ((1, 1, 1), B * L * V // 4, 4),
        ((1, 1, 1), B * L * V // 5, 6),  # 48 tokens have no five equal chunks
        ((1, 1, 1), 1, B * L),
        ((2, 1, 2), 12 * V // 5, 6),  # 12 tokens a rank
        ((2, 1, 2), 2**22, 1),
        ((1, 1, 8), 6 * V // 2, 2),  # 6 tokens a rank
        ((1, 1, 8), 6 * V // 5, 6),
    ],
)
def test_equals_whole_logits(
    monkeypatch: pytest.MonkeyPatch, mesh: tuple[int, int, int], entries: int, chunks: int
) -> None:
    limit_chunks(monkeypatch, entries)
    assert loss.num_chunks(B * L // np.prod(mesh), V) == chunks
    assert_close(fused(mesh, *inputs()), reference(*inputs()), 2e-6)


def test_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is summed in float32; gradients carry two roundings to bfloat16, of 2⁻⁹ each."""
    limit_chunks(monkeypatch, 3 * V)
    x_BLD, w_VD, targets_BL = inputs()
    x_BLD, w_VD = jnp.asarray(x_BLD, jnp.bfloat16), jnp.asarray(w_VD, jnp.bfloat16)
    result, expected = fused((2, 1, 2), x_BLD, w_VD, targets_BL), reference(x_BLD, w_VD, targets_BL)
    assert result["loss"].dtype == jnp.float32 and result["dx"].dtype == result["dw"].dtype == jnp.bfloat16
    assert_close({"loss": result["loss"]}, {"loss": expected["loss"]}, 1e-6)
    assert_close(result, expected, 2**-7)


def test_inputs_without_a_target_do_not_count() -> None:
    x_BLD, w_VD, targets_BL = inputs()
    targets_BL[:, 2], targets_BL[3] = NO_TARGET, NO_TARGET
    real_BL = targets_BL != NO_TARGET
    expected = reference(x_BLD[real_BL][None], w_VD, targets_BL[real_BL][None])
    dx_BLD = np.zeros(x_BLD.shape)
    dx_BLD[real_BL] = expected["dx"][0]
    assert_close(fused((1, 1, 2), x_BLD, w_VD, targets_BL), expected | {"dx": dx_BLD}, 2e-6)


def test_huge_logits() -> None:
    """Logits of ±10⁵ overflow exp() unless the largest is subtracted."""
    result, expected = fused((1, 1, 2), *inputs(3e4)), reference(*inputs(3e4))
    assert all(np.isfinite(value).all() for value in result.values())
    assert_close(result, expected, 1e-5)


def test_scaled_by_what_follows() -> None:
    """The gradients computed in the forward pass are known up to the factor that arrives in the backward pass."""
    expected = {name: 3 * value for name, value in reference(*inputs()).items()}
    assert_close(fused((1, 1, 2), *inputs(), factor=3.0), expected, 2e-6)


@pytest.mark.parametrize("mesh", [(1, 1, 1, 2), (2, 1, 2, 2), (1, 1, 2, 4)])
@pytest.mark.parametrize("entries", [2**22, 20])
def test_a_table_that_tensor_splits(monkeypatch: pytest.MonkeyPatch, mesh: tuple[int, ...], entries: int) -> None:
    """Each rank of `tensor` takes the tokens of all and has V / tensor rows."""
    limit_chunks(monkeypatch, entries)
    x_BLD, w_VD, targets_BL = inputs(V=16, L=8)
    assert_close(fused(mesh, x_BLD, w_VD, targets_BL, split=True), reference(x_BLD, w_VD, targets_BL), 2e-6)


@pytest.mark.parametrize(
    "mesh", [*(pytest.param(mesh, marks=pytest.mark.full) for mesh in ((1, 1, 1), (2, 1, 2))), (1, 1, 2, 4, True)]
)
def test_token_scores(monkeypatch: pytest.MonkeyPatch, mesh: tuple[int, ...]) -> None:
    """-log p of each token, and whether it is the likeliest, as whole logits have them; in chunks, and where `tensor`
    splits the table."""
    limit_chunks(monkeypatch, 600)
    config = tiny(mesh, capacity_factor=0.5, tie_embeddings=False)
    windows = random_tokens(config)
    with on_mesh(config):
        model = random_model(config)
        whole = jax.jit(lambda model, tokens: model(tokens, evaluating=True)[0])
        logits_BLV = np.asarray(whole(model, split_tokens(windows[:, :-1])), np.float64)
        windows[::2, -1] = logits_BLV[::2, -1].argmax(-1)  # a target that changes no input
        scores = jax.jit(loss.token_scores)(model, jax.tree.map(split_batch, batch_from_windows(windows)))
    targets_BL = windows[:, 1:]
    largest_BL = logits_BLV.max(-1)
    log_z_BL = np.log(np.exp(logits_BLV - largest_BL[..., None]).sum(-1)) + largest_BL
    expected = log_z_BL - np.take_along_axis(logits_BLV, targets_BL[..., None], -1)[..., 0]
    np.testing.assert_allclose(scores.nll_BL, expected, rtol=1e-5)
    np.testing.assert_array_equal(scores.likeliest_BL, logits_BLV.argmax(-1) == targets_BL)
    assert np.asarray(scores.likeliest_BL)[::2, -1].all() and not np.asarray(scores.likeliest_BL).all()


def test_nll_of_tokens_over_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of two ranks, in chunks, and gradients of a sum that weighs each token, are those of one with whole
    logits."""
    limit_chunks(monkeypatch, 600)
    fields: dict[str, Any] = {"structure": "dense", "num_layers": 1, "tie_embeddings": False, "length": 6}
    windows = random_tokens(tiny(**fields))
    weights_BL = np.random.default_rng(5).standard_normal((8, 6)).astype(np.float32)

    def in_chunks(model: Any, batch: Any) -> Any:
        return jax.sharding.reshard(loss.token_nll(model, batch)[0], token_spec(2))

    def whole(model: Any, batch: Any) -> Any:
        log_p_BLV = jax.nn.log_softmax(model(batch.inputs_BL)[0])
        return -jnp.take_along_axis(log_p_BLV, batch.targets_BL[..., None], -1)[..., 0]

    def of_ranks(tensor: int, nll: Any) -> dict[str, Any]:
        def total(model: Any, weights_BL: Any, batch: Any) -> Any:
            nll_BL = nll(model, batch)
            return jnp.sum(nll_BL * weights_BL), nll_BL

        config = tiny((1, 1, 1, tensor), **fields)
        with on_mesh(config):
            step = jax.jit(jax.grad(total, has_aux=True))
            batch = jax.tree.map(split_batch, batch_from_windows(windows))
            gradients, nll_BL = step(random_model(config), split_tokens(weights_BL), batch)
            return leaves(gradients) | {"nll_BL": np.asarray(nll_BL)}

    assert_close(of_ranks(2, in_chunks), of_ranks(1, whole))


@pytest.mark.parametrize("entries", [1, 7, 100, 1000, 2**22])
def test_chunks(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    """The fewest equal chunks within the limit, or one token each where a single one exceeds it."""
    limit_chunks(monkeypatch, entries)
    for vocab in (1, 7, 50, 257):
        for tokens in range(1, 61):
            fitting = [n for n in range(1, tokens + 1) if tokens % n == 0 and tokens // n * vocab <= entries]
            assert loss.num_chunks(tokens, vocab) == min(fitting, default=tokens), (tokens, vocab)


@pytest.mark.parametrize(
    ("tokens", "vocab", "chunks"), [(64, 100, 8), (60, 100, 6), (7, 1000, 7), (7, 2000, 7), (10, 50, 1), (10, 100, 1)]
)
def test_the_fewest_equal_chunks_of_a_thousand_logits(
    tokens: int, vocab: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_CHUNK_ENTRIES", {"cpu": 1000})
    assert loss.num_chunks(tokens, vocab) == chunks
