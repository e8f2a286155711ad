"""Experts that are copies compute what the model did."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from interchange.tools import our_logits, tokens_of
from model.tools import on_mesh, random_model, some, tiny

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.parameters import named_leaves
from bigmac_jax.tuning.conversion import expert_copies, upcycle, widen

DENSE: dict[str, dict[str, Any]] = {
    "gated": {"gated": True},
    "biases": {"use_bias": True, "norm": "layernorm", "positions": "learned"},
}
# Scores × gates × balance: every router that there is.
SPARSE: dict[str, dict[str, Any]] = {
    f"{scores}, {'renormalised' if renormalised else 'as it is'}, {balance}": {
        "router_scores": scores, "router_renormalize": renormalised, "balance": balance,
        "router_scale": 2.0, "num_shared_experts": int(renormalised),
        "structure": "bigmac" if balance == "bias" else "fine_grained",
    }
    for scores, renormalised, balance in itertools.product(
        ("softmax", "sigmoid"), (True, False), ("aux_loss", "bias", "quantile")
    )
}  # fmt: skip
SPARSE |= {router: {"router": router, "router_scale": 2.0} for router in ("affine", "frozen")}
CHEAP = ("softmax, as it is, quantile", "sigmoid, as it is, aux_loss")


def _same(config: Config, change: Any) -> Any:
    with on_mesh(config):
        model, tokens_BL = random_model(config), tokens_of(config)
        before = our_logits(model, tokens_BL)
        target, result = change(config, model)
        np.testing.assert_allclose(our_logits(result, tokens_BL), before, atol=1e-5)
        return target, result


@pytest.mark.parametrize("name", some(DENSE))
@pytest.mark.parametrize(("mesh",), some([((1, 1, 1),), ((1, 2, 2),), ((2, 1, 2, 2),)], 3))
def test_an_upcycled_model_is_the_dense_one(name: str, mesh: tuple[int, ...]) -> None:
    target, _ = _same(tiny(mesh, structure="dense", **DENSE[name]), lambda *of: upcycle(*of, 8, 2))
    assert target.model.structure == "fine_grained" and target.model.num_experts == 8


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        *((name, (1, 1, 1)) for name in CHEAP),
        *(pytest.param(name, (1, 1, 1), marks=pytest.mark.full) for name in SPARSE if name not in CHEAP),
        *(pytest.param(name, (1, 2, 2), marks=pytest.mark.full) for name in SPARSE),
    ],
)
def test_a_widened_model_is_the_one_that_it_was(name: str, mesh: tuple[int, ...]) -> None:
    target, _ = _same(tiny(mesh, **SPARSE[name]), lambda *of: widen(*of, 2, 0.0))
    assert (target.model.num_experts, target.model.top_k) == (16, 6)


@pytest.mark.full
def test_noise_makes_copies_differ() -> None:
    config = tiny()
    with on_mesh(config):
        model = random_model(config)
        _, result = widen(config, model, 2, 0.05)
        for name in ("router_DE", "experts.w_in_eRF", "experts.w_out_eFR"):
            before, after = (np.asarray(named_leaves(of)[f"layers.mlp.{name}"]) for of in (model, result))
            axis = 2 if name == "router_DE" else 1
            change = after - np.repeat(before, 2, axis=axis)
            np.testing.assert_allclose(change.std() / np.sqrt(np.square(before).mean()), 0.05, rtol=0.1)
            first, second = (np.take(change, range(i, 16, 2), axis) for i in range(2))
            assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.2


@pytest.mark.parametrize(
    ("fields", "change", "match"),
    [
        ({}, lambda *of: upcycle(*of, 8, 2), "structure=bigmac can't be upcycled"),
        ({"structure": "dense"}, lambda *of: upcycle(*of, 8, 1), "--top_k=1"),
        ({"structure": "dense"}, lambda *of: upcycle(*of, 2, 3), "^--top_k=3 must be at most --experts=2; use 2$"),
        ({"structure": "dense", "mesh": (1, 1, 4)}, lambda *of: upcycle(*of, 6, 2),
         "^--experts=6 must be a multiple of .*; use --experts=8, or 2 ranks$"),
        ({"structure": "dense", "balance": "quantile"}, lambda *of: upcycle(*of, 8, 8), "or --top_k=7$"),
        ({"structure": "dense"}, lambda *of: widen(*of, 2), "structure=dense can't be widened"),
        ({"num_expert_groups": 2, "top_groups": 1}, lambda *of: widen(*of, 2), "num_expert_groups=2"),
        ({"top_k": 1}, lambda *of: widen(*of, 2), "top_k=1"),
        ({}, lambda *of: widen(*of, 1), "--copies=1"),
        ({}, lambda *of: widen(*of, 2**40), "^--copies × model.num_experts=.* must be at most"),
        ({"router": "hyper"}, lambda *of: widen(*of, 2), "router=hyper can't be widened"),
    ],
)  # fmt: skip
def test_refusals(fields: dict[str, Any], change: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        change(tiny(**fields), None)


@pytest.mark.parametrize(("scores", "bias"), [("softmax", 0.5), ("sigmoid", 1.5)])
def test_noise_is_of_the_matrices_and_of_their_size(scores: str, bias: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of each one's root mean square, another for each copy; a bias that is added to a softmax is divided."""
    draw = np.random.default_rng(1).standard_normal
    of_layer, of_expert = np.array([1.0, 0.01])[:, None, None], 4.0 ** np.arange(8).reshape(2, 4, 1, 1)
    leaves = {
        "embedding_VD": draw((9, 8)), "layers.mlp.router_DE": 3 * of_layer * draw((2, 8, 4)),
        "layers.mlp.router_bias_E": np.full((2, 4), 1.5), "layers.mlp.router_logit_bias_E": np.full((2, 4), 2.5),
        "layers.mlp.experts.w_in_eRF": of_expert * draw((2, 4, 8, 30)), "layers.mlp.experts.b_in_eF": draw((2, 4, 6)),
        "layers.mlp.shared.up.w_DF": draw((2, 8, 6)),
    }  # fmt: skip
    leaves = {name: value.astype(np.float32) for name, value in leaves.items()}
    monkeypatch.setattr(expert_copies, "declared_leaves", lambda model: leaves)
    monkeypatch.setattr(expert_copies, "rebuild_model", lambda config, model, given: given if model is None else {})
    config = tiny(router_scores=scores, num_experts=4, top_k=2)
    found: Any = widen(config, None, 3, 0.1)[1]  # type: ignore[arg-type]
    assert found.keys() == leaves.keys() - {"embedding_VD", "layers.mlp.shared.up.w_DF"}
    for name, axis in (("router_DE", 2), ("experts.w_in_eRF", 1)):
        before = np.repeat(leaves[f"layers.mlp.{name}"], 3, axis)
        copies = found[f"layers.mlp.{name}"]
        change = (copies - before) / np.sqrt(np.square(before).mean((-2, -1), keepdims=True))
        assert copies.shape[axis] == 12 and abs(change.mean()) < 0.02
        np.testing.assert_allclose(np.sqrt(np.square(change).mean((-2, -1))), 0.1, rtol=0.15)
        assert not np.allclose(np.take(change, 0, axis), np.take(change, 1, axis))
    np.testing.assert_array_equal(
        found["layers.mlp.experts.b_in_eF"], np.repeat(leaves["layers.mlp.experts.b_in_eF"], 3, 1)
    )
    assert found["layers.mlp.router_bias_E"].tolist() == [[bias] * 12] * 2
    assert found["layers.mlp.router_logit_bias_E"].tolist() == [[2.5] * 12] * 2
    exact: Any = widen(config, None, 2, 0.0)[1]  # type: ignore[arg-type]
    router = leaves["layers.mlp.router_DE"]
    np.testing.assert_array_equal(exact["layers.mlp.router_DE"], np.repeat(router, 2, 2))
    again: Any = widen(config, None, 3)[1]  # type: ignore[arg-type]
    size = np.sqrt(np.square(again["layers.mlp.router_DE"] - np.repeat(router, 3, 2)).mean() / np.square(router).mean())
    assert size == pytest.approx(0.01, rel=0.2)  # by default


@pytest.mark.parametrize(
    ("scores", "renormalize", "scale"),
    [("softmax", False, 2.0), ("softmax", True, 2.0), ("sigmoid", True, 2.0), ("sigmoid", False, 0.5)],
)
def test_gates_of_copies_sum_to_the_old_one(scores: str, renormalize: bool, scale: float) -> None:
    config = tiny(router_scores=scores, router_renormalize=renormalize, router_scale=2.0, num_shared_experts=1)
    m = expert_copies.widened(config, 4).model
    assert (m.num_experts, m.top_k, m.router_scale, m.expert_hidden_size) == (32, 12, scale, config.model.expert_width)


def test_the_width_of_an_upcycled_model_may_be_any() -> None:
    """Nothing in it is a quarter as wide."""
    m = expert_copies.upcycled(tiny(structure="dense", hidden_size=18, num_heads=3), 8, 2).model
    assert (m.structure, m.hidden_size, m.expert_width) == ("fine_grained", 18, 72)


def test_an_upcycled_model_is_as_dense_as_it_was() -> None:
    """What a dense model does not read is set so that its copies compute what it does."""
    unread = {"router_renormalize": False, "router_scale": 2.0, "num_shared_experts": 2, "capacity_factor": 1.25,
              "overflow": "next", "num_expert_groups": 2, "top_groups": 2}  # fmt: skip
    given = tiny(structure="dense", **unread)
    m = expert_copies.upcycled(given, 6, 2).model
    assert (m.num_experts, m.top_k, m.expert_hidden_size) == (6, 2, given.model.expert_width)
    set_to = {"router_renormalize": True, "router_scale": 1.0, "num_shared_experts": 0, "capacity_factor": math.inf,
              "overflow": "drop", "latent_norm": "none", "num_expert_groups": 1, "top_groups": 1,
              "first_dense_layers": 0}  # fmt: skip
    assert {name: getattr(m, name) for name in set_to} == set_to
