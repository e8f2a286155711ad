"""Routers that are not a trained matrix: a network's output at one vector, and one that stays as it was drawn."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from bigmac_jax.config import Config
from bigmac_jax.model.moe import MoE
from bigmac_jax.model.parameters import Frozen, named_leaves
from bigmac_jax.model.plain_router import plain_router
from bigmac_jax.model.router import score_experts
from bigmac_jax.model.router_weights import HyperRouter, router_parameters, router_weights

from .tools import (
    abstract_layer,
    assert_close,
    leaves,
    on_mesh,
    random_like,
    random_model,
    random_tokens,
    split_tokens,
    tiny,
)

HYPER = {"router": "hyper", "hyper_width": 5}


def logits_of(config: Config, layer: MoE, x_BLD: Array) -> Array:
    weights = router_weights(config, layer.router_DE, layer.router_logit_bias_E, layer.hyper)
    return score_experts(config.model, x_BLD, weights).logits_BLE


# Of 16 inputs and 8 experts; 12 inputs are no multiple of eight ranks, which then split the experts of W.
@pytest.mark.parametrize(
    ("mesh", "width"),
    [((1, 1, 1), 16), ((4, 1, 2, 1, True), 16), pytest.param((4, 1, 2, 1, True), 12, marks=pytest.mark.full)],
    ids=str,
)
def test_logits_and_the_vectors_gradient(mesh: tuple[Any, ...], width: int) -> None:
    """Against float64, written out."""
    config = tiny(mesh, hidden_size=width, num_heads=2, **HYPER)
    draw = np.random.default_rng(0)
    B, L, E = config.data.batch_size, config.data.sequence_length, 8
    x, d = (draw.standard_normal((B, L, size)).astype(np.float32) for size in (width, E))
    with on_mesh(config):
        layer = random_like(abstract_layer(config), config)
        values = {name: value.astype(np.float64) for name, value in leaves(layer.hyper).items()}

        def total(layer: MoE, x_BLD: Array, d_BLE: Array) -> tuple[Array, Array]:
            logits_BLE = logits_of(config, layer, x_BLD)
            return jnp.sum(logits_BLE * d_BLE), logits_BLE

        step = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
        (of_layer, dx), logits = step(layer, split_tokens(x), split_tokens(d))
        found = {"logits": logits, "vector": of_layer.hyper.vector_D.get_value(), "x": dx}

    v, first, rows, last = (values[name] for name in ("vector_D", "in_DH", "out_DHE", "out_HE"))
    hidden = np.maximum(v @ first, 0)
    assert 0 < (hidden > 0).sum() < 5  # the test has both sides of the kink
    w, b = np.zeros((width, E)), np.zeros(E)
    for h in range(5):
        w, b = w + hidden[h] * rows[:, h], b + hidden[h] * last[h]
    dw, db = np.einsum("BLD,BLE->DE", x.astype(np.float64), d), d.astype(np.float64).sum((0, 1))
    d_hidden = np.array([(dw * rows[:, h]).sum() + (db * last[h]).sum() for h in range(5)])
    expected = {"logits": x @ w + b, "vector": first @ (d_hidden * (hidden > 0)), "x": d @ w.T}
    assert_close({name: np.asarray(value) for name, value in found.items()}, expected, 1e-5)


def test_what_it_starts_as() -> None:
    """A vector N(0, 1), and N(0, 0.02²) for the network, none of which is trained; another key draws another layer."""
    config = tiny(hidden_size=64, num_heads=2, num_experts=32, router="hyper", hyper_width=48)
    with on_mesh(config):
        hyper, other = (HyperRouter(config, jax.random.key(seed)) for seed in (0, 1))
    values, others = leaves(hyper), leaves(other)
    shapes = {"vector_D": (64,), "in_DH": (64, 48), "out_DHE": (64, 48, 32), "out_HE": (48, 32)}
    assert {name: value.shape for name, value in values.items()} == shapes
    for name, size in (("vector_D", 1), ("in_DH", 0.02), ("out_DHE", 0.02), ("out_HE", 0.02)):
        assert values[name].std() == pytest.approx(size, rel=0.2 if name == "vector_D" else 0.05)
        assert np.abs(values[name] - others[name]).max() > size
        assert isinstance(getattr(hyper, name), Frozen) == (name != "vector_D")


def test_a_frozen_router_starts_as_a_linear_one() -> None:
    configs = tiny(router="linear"), tiny(router="frozen")
    with on_mesh(configs[0]):
        linear_DE, frozen_DE = (router_parameters(config, jax.random.key(0))[0] for config in configs)
    assert isinstance(frozen_DE, Frozen) and not isinstance(linear_DE, Frozen)
    np.testing.assert_array_equal(frozen_DE.get_value(), linear_DE.get_value())


def test_a_model_of_the_matrix_that_is_made() -> None:
    """What is exported, and decodes: the same logits, and no network."""
    config = tiny(first_dense_layers=1, **HYPER)
    with on_mesh(config):
        model, tokens = random_model(config), split_tokens(random_tokens(config)[:, :-1])
        plain_config, plain = plain_router(config, model)
        call = jax.jit(lambda model, tokens: model(tokens, evaluating=True)[0])
        np.testing.assert_allclose(call(plain, tokens), call(model, tokens), atol=2e-6, rtol=0)
        names = named_leaves(model).keys() ^ named_leaves(plain).keys()
        assert plain_router(plain_config, plain) == (plain_config, plain)
    assert plain_config.model.router == plain.config.model.router == "affine"
    assert {name.removeprefix("layers.mlp.") for name in names} == {
        "router_DE", "router_logit_bias_E", *(f"hyper.{name}" for name in ("vector_D", "in_DH", "out_DHE", "out_HE")),
    }  # fmt: skip
