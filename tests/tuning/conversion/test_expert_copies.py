"""Experts that are copies compute what the model did."""

import itertools
from typing import Any

import numpy as np
import pytest
from interchange.tools import our_logits, tokens_of
from model.tools import on_mesh, random_model, some, tiny

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.parameters import named_leaves
from bigmac_jax.tuning.conversion import upcycle, widen

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
CHEAP = ("softmax, renormalised, bias", "softmax, as it is, quantile", "sigmoid, as it is, aux_loss")


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
        ({"structure": "dense"}, lambda *of: upcycle(*of, 2, 3), "top_k=3"),
        ({"structure": "dense"}, lambda *of: widen(*of, 2), "structure=dense can't be widened"),
        ({"num_expert_groups": 2, "top_groups": 1}, lambda *of: widen(*of, 2), "num_expert_groups=2"),
        ({"top_k": 1}, lambda *of: widen(*of, 2), "top_k=1"),
        ({}, lambda *of: widen(*of, 1), "--copies=1"),
        ({"router": "hyper"}, lambda *of: widen(*of, 2), "router=hyper can't be widened"),
    ],
)
def test_refusals(fields: dict[str, Any], change: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        change(tiny(**fields), None)
