"""A narrow exchange for a trained model, against the model itself and against a torch-like reference of the algebra."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from interchange.tools import our_logits
from model.tools import on_mesh, random_model, some, tiny

from bigmac_jax.config import Config, ConfigError, ModelConfig
from bigmac_jax.data.batch import Batch, batch_from_windows
from bigmac_jax.model import layers
from bigmac_jax.tuning.conversion import latent, narrow
from bigmac_jax.tuning.conversion.calibration import ExpertInputs, walk
from bigmac_jax.tuning.conversion.latent import fit_layer

FINE = {"structure": "fine_grained"}
MODELS: dict[str, dict[str, Any]] = {
    "gated, shared": FINE | {"gated": True, "activation": "silu", "num_shared_experts": 1},
    "plain": FINE,
    "biases, dense first": FINE
    | {"use_bias": True, "norm": "layernorm", "num_layers": 3, "first_dense_layers": 1, "dense_hidden_size": 24},
}


def text(config: Config, batches: int = 4) -> list[Batch]:
    draw = np.random.default_rng(1).integers
    shape = config.data.batch_size, config.data.sequence_length + 1
    return [batch_from_windows(draw(0, 256, shape).astype(np.int32)) for _ in range(batches)]


@pytest.mark.parametrize(
    ("name", "mesh"), some(itertools.product(MODELS, [(1, 1, 1), (1, 2, 2), (1, 1, 2, 2)]), every=9)
)
def test_of_full_width_it_is_exact(name: str, mesh: tuple[int, ...]) -> None:
    config = tiny(mesh, length=16, **MODELS[name])
    with on_mesh(config):
        model, batches = random_model(config), text(config)
        target, result, errors = narrow(config, model, batches, 1.0)
        assert target.model.structure == "bigmac" and target.model.wire_size == config.model.hidden_size
        tokens_BL = batches[0].inputs_BL
        np.testing.assert_allclose(our_logits(result, tokens_BL), our_logits(model, tokens_BL), atol=1e-4)
        assert all(error.total < 1e-9 for error in errors)
        seen: list[int] = []
        walk(model, batches, lambda number, *_: seen.append(number))
    assert seen == [0, 1]


def layer(
    rank: int, ratio: float, norm: str = "none", **fields: Any
) -> tuple[ModelConfig, dict[str, Any], ExpertInputs]:
    """Random experts and tokens, whose inputs and outputs lie in `rank` of 12 dimensions."""
    draw = np.random.default_rng(0).standard_normal
    D, F, E, T = 12, 10, 4, 400
    m = ModelConfig(structure="bigmac", hidden_size=D, num_heads=2, num_experts=E, top_k=2, down_ratio=ratio,
                    expert_hidden_size=F, latent_norm=norm, **fields)  # fmt: skip
    subspace = np.linalg.qr(draw((D, rank)))[0]
    experts = {"w_in_eRF": draw((E, D, F)), "w_out_eFR": draw((E, F, rank)) @ subspace.T}
    if m.gated:
        experts["w_gate_eRF"] = draw((E, D, F))
    gates = np.abs(draw((T, 2))).astype(np.float32)
    chosen = np.argsort(draw((T, E)), axis=1)[:, :2]
    return m, experts, ExpertInputs((draw((T, rank)) @ subspace.T).astype(np.float32), gates, chosen)


def outputs(m: ModelConfig, leaves: dict[str, np.ndarray], seen: ExpertInputs) -> np.ndarray:
    """Of a layer, written out token by token."""
    wide = "down.w_DF" not in leaves
    w = leaves if wide else {name.removeprefix("experts."): value for name, value in leaves.items()}
    y_TD = []
    for x_D, gates_K, chosen_K in zip(*seen, strict=True):
        z_R = x_D if wide else x_D @ leaves["down.w_DF"]
        if not wide and "pre_dispatch" in m.latent_norms:
            z_R = z_R / np.sqrt(np.mean(z_R**2) + m.norm_eps)
        y_R = np.zeros(w["w_out_eFR"].shape[2])
        for gate, e in zip(gates_K, chosen_K, strict=True):
            h_F = np.maximum(z_R @ w["w_in_eRF"][e], 0) ** 2
            if m.gated:  # relu2 of the gate
                h_F = np.maximum(z_R @ w["w_gate_eRF"][e], 0) ** 2 * (z_R @ w["w_in_eRF"][e])
            y_R += gate * (h_F @ w["w_out_eFR"][e])
        if not wide and "skip" in m.latent_norms:
            y_R = y_R + leaves["skip_1"] * z_R
        if not wide and "combine_norm.scale_D" in leaves:
            y_R = y_R / np.sqrt(np.mean(y_R**2) + m.norm_eps) * leaves["combine_norm.scale_D"]
        y_TD.append(y_R if wide else y_R @ leaves["up.w_DF"])
    return np.array(y_TD)


@pytest.mark.parametrize("gated", [False, True])
def test_what_lies_in_few_dimensions_is_kept(gated: bool) -> None:
    """Inputs and outputs in 3 of 12 dimensions: a latent of 3 loses nothing, one of 2 does."""
    m, experts, seen = layer(3, 0.25, gated=gated)
    leaves, error = fit_layer(m, experts, seen)
    before = outputs(m, experts, seen)
    assert np.abs(outputs(m, leaves, seen) - before).max() < 1e-3 * np.abs(before).max()
    assert error.total < 1e-6 and error.inputs < 1e-6 and error.outputs < 1e-6
    m, experts, seen = layer(3, 2 / 12, gated=gated)
    assert fit_layer(m, experts, seen)[1].total > 0.01


@pytest.mark.parametrize("norm", ["none", "pre_dispatch", "post_combine", "skip", "gate"])
def test_the_error_is_that_of_the_layer(norm: str) -> None:
    m, experts, seen = layer(12, 0.5, norm)
    leaves, error = fit_layer(m, experts, seen)
    before, after = outputs(m, experts, seen), outputs(m, leaves, seen)
    np.testing.assert_allclose(error.total, np.square(after - before).sum() / np.square(before).sum(), rtol=1e-4)
    assert 0 < error.outputs < error.total < 1


def test_it_is_better_than_cutting_matrices() -> None:
    """Inputs of very different sizes by direction, which the weights' own singular vectors don't know of."""
    m, experts, seen = layer(12, 0.5)
    sizes = np.logspace(1, -1, 12)
    seen = seen._replace(inputs_TD=(seen.inputs_TD * sizes).astype(np.float32))
    leaves, error = fit_layer(m, experts, seen)
    narrow_TR = seen.inputs_TD @ leaves["down.w_DF"]
    np.testing.assert_allclose(narrow_TR.T @ narrow_TR / len(narrow_TR), np.eye(6), atol=1e-3)  # white
    u = np.linalg.svd(np.concatenate(list(experts["w_in_eRF"]), axis=1))[0][:, :6]
    v = np.linalg.svd(np.concatenate(list(experts["w_out_eFR"])))[2][:6].T
    cut = {"down.w_DF": u, "up.w_DF": v.T, "experts.w_in_eRF": u.T @ experts["w_in_eRF"],
           "experts.w_out_eFR": experts["w_out_eFR"] @ v}  # fmt: skip
    before = outputs(m, experts, seen)
    worse = np.square(outputs(m, cut, seen) - before).sum() / np.square(before).sum()
    assert error.total < 0.5 * worse, (error, worse)


def test_an_expert_without_tokens_keeps_the_layers_solution() -> None:
    m, experts, seen = layer(12, 0.5)
    leaves, _ = fit_layer(m, experts, seen._replace(experts_TK=np.where(seen.experts_TK == 3, 0, seen.experts_TK)))
    assert np.isfinite(leaves["experts.w_in_eRF"]).all() and np.abs(leaves["experts.w_in_eRF"][3]).max() > 0.01


@pytest.mark.parametrize(
    ("fields", "ratio", "match"),
    [
        ({}, 0.5, "structure=bigmac"),
        (FINE | {"latent_norm": "post_combine"}, 0.5, "latent_norm=post_combine"),
        (FINE, 1.5, "^--ratio=1.5 must lie in"),
        (FINE, 0.01, r"^--ratio × model.hidden_size = 0.01 × 16 = 0.16 must be a whole number; use --ratio=0\.0625$"),
        (FINE, 0.3, r"use --ratio=0\.3125$"),
    ],
)
def test_refusals(fields: dict[str, Any], ratio: float, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        narrow(tiny(**fields), None, [], ratio)  # type: ignore[arg-type]


def test_a_norm_that_is_none_is_refused_as_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"^--latent_norm='skipp' must be one of .*; did you mean skip\?"):
        latent.narrowed(tiny(**FINE), 0.5, "skipp")


def test_the_algebra_by_hand() -> None:
    square = np.array([[2.0, 0.0], [0.0, 8.0]])
    np.testing.assert_allclose(latent._add_ridge(square, 0.1), [[2.5, 0.0], [0.0, 8.5]])  # a tenth of the mean
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    np.testing.assert_allclose(latent._power(turn @ square @ turn.T, -0.5), turn @ np.diag([2**-0.5, 8**-0.5]) @ turn.T)
    kept, lost = latent._principal(turn @ square @ turn.T, 1)
    np.testing.assert_allclose(np.abs(kept), np.abs(turn[:, 1:]))
    assert lost == pytest.approx(0.2) and latent._principal(square, 2)[1] == 0.0
    assert latent._principal(np.diag([-1.0, 3.0, 1.0]), 1)[1] == pytest.approx(0.25)  # of rounding, none is below zero
    three, _ = latent._principal(np.diag([5.0, 7.0, 6.0]), 2)
    np.testing.assert_allclose(np.abs(three), [[0, 0], [1, 0], [0, 1]])  # the largest first
    assert (latent._RIDGE, latent._OWN_RIDGE) == (1e-6, 1e-2)
    a, b = np.array([[1.0, 1.0], [0.0, 2.0]]), np.array([[3.0], [4.0]])
    ridge = 0.01 * (1 + 5) / 2
    expected = np.linalg.inv([[1 + ridge, 1.0], [1.0, 5 + ridge]]) @ [[3.0], [11.0]]
    np.testing.assert_allclose(latent._Fit(a).solve(b), expected)
    assert latent._Fit(np.zeros((0, 2))).solve(np.zeros((0, 3))).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("activation", ["relu2", "gelu", "silu"])
@pytest.mark.parametrize("gated", [False, True])
def test_an_expert_is_that_of_the_model(norm: str, activation: str, gated: bool) -> None:
    """As the layers' own functions have it, biases too."""
    m = ModelConfig(norm=norm, activation=activation, gated=gated, use_bias=True, norm_eps=0.5, structure="bigmac")
    draw = np.random.default_rng(0).standard_normal
    shapes = {"w_in_eRF": (2, 4, 6), "b_in_eF": (2, 6), "w_out_eFR": (2, 6, 4), "b_out_eR": (2, 4)}
    shapes |= {"w_gate_eRF": (2, 4, 6), "b_gate_eF": (2, 6)} if gated else {}
    w, x = {name: draw(shape) for name, shape in shapes.items()}, draw((5, 4))
    up = x @ w["w_in_eRF"][1] + w["b_in_eF"][1]
    gate = x @ w["w_gate_eRF"][1] + w["b_gate_eF"][1] if gated else None
    expected = np.asarray(layers.activate(m, jnp.asarray(up), None if gate is None else jnp.asarray(gate)))
    np.testing.assert_allclose(latent._hidden(m, w, 1, x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(latent._outputs(w, 1, expected), expected @ w["w_out_eFR"][1] + w["b_out_eR"][1])
    w.update({name: np.zeros(shape) for name, shape in shapes.items() if name.startswith("b_")})
    without = {name: value for name, value in w.items() if not name.startswith("b_")}
    np.testing.assert_array_equal(latent._hidden(m, without, 1, x), latent._hidden(m, w, 1, x))
    np.testing.assert_array_equal(latent._outputs(without, 1, expected), latent._outputs(w, 1, expected))
    centred = x - x.mean(-1, keepdims=True) * (norm == "layernorm")
    np.testing.assert_allclose(latent._normalize(x, m), centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.5))


def test_what_a_narrowed_model_keeps() -> None:
    """The widths that it had, which down_ratio would change by itself."""
    for fields in ({"num_shared_experts": 2}, {}, {"num_shared_experts": 2, "shared_expert_hidden_size": 7}):
        before = tiny(num_layers=3, first_dense_layers=1, **FINE, **fields).model
        after = latent.narrowed(tiny(num_layers=3, first_dense_layers=1, **FINE, **fields), 0.5, "skip").model
        assert (after.structure, after.latent_size, after.latent_norm) == ("bigmac", 8, "skip")
        for name in ("expert_width", "shared_width", "mlp_width", "expert_count"):
            assert getattr(after, name) == getattr(before, name), name
    assert latent.narrowed(tiny(**FINE), 1, "none").model.latent_size == 16
    assert latent.narrowed(tiny(num_shared_experts=0, **FINE), 0.5, "none").model.shared_expert_hidden_size == 0
    assert latent.narrowed(tiny(**FINE), 1 / 16, "none").model.latent_size == 1
