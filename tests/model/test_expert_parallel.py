"""Expert parallelism changes nothing: loss and every gradient on each mesh equal the dense one-device reference."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmac_jax.config import Config
from bigmac_jax.model.moe import Aux

from .reference import Layer, reference
from .tools import (  # fmt: skip
    PAPER,
    PRESENT,
    assert_close,
    leaves,
    loss_and_gradients,
    on_mesh,
    pairwise,
    random_model,
    random_tokens,
    some,
    tiny,
    total_loss,
)

MESHES = ((1, 1, 1), (2, 1, 2), (2, 1, 4), (1, 1, 8), (1, 2, 4))  # data, node, expert; test_axes.py has more
MORE_MESHES = ((1, 1, 2), (1, 1, 4), (1, 2, 2))
STRUCTURES = {
    "vanilla": {"structure": "vanilla", "num_experts": 128},
    "fine_grained": {"structure": "fine_grained", "num_shared_experts": 2},
    "bigmac": {"structure": "bigmac"},
    "paper": {"structure": "bigmac", "latent_norm": "none"},
    "pre_dispatch": {"structure": "bigmac", "latent_norm": "pre_dispatch", "num_shared_experts": 1},
    "normed": {"structure": "bigmac", "latent_norm": "post_combine"},
    "gate": {"structure": "bigmac", "latent_norm": "gate"},
    "control": {
        "structure": "fine_grained",
        "latent_norm": "gate",
        "num_layers": 3,
        "first_dense_layers": 2,
        "dense_hidden_size": 24,
    },
}
ROUTERS = {
    "softmax": {"z_loss_coefficient": 0.1},
    "sigmoid": {"router_scores": "sigmoid", "balance": "bias", "router_scale": 1.5},
    "groups": {"router_renormalize": False, "num_expert_groups": 4, "top_groups": 2, "router_scale": 2.5},
    "unbalanced": {"router_scores": "sigmoid", "router_renormalize": False, "balance": "none"},
}
MADE = {
    "hyper": {"router": "hyper", "hyper_width": 6, "z_loss_coefficient": 0.1},
    "affine": {"router": "affine", "router_scores": "sigmoid", "balance": "bias"},
    "frozen": {"router": "frozen", "num_expert_groups": 4, "top_groups": 2},
}
BACKBONES = {
    "paper": PAPER,
    "present": PRESENT | {"num_kv_heads": 2},
    "gated": PRESENT | {"activation": "silu", "gated": True, "use_bias": True, "positions": "none",
                        "tie_embeddings": False, "scale_embedding": False, "norm_eps": 0.1, "head_dim": 6},
}  # fmt: skip
# The capacity layout with room for every choice (f·T·K/E >= T) drops nothing either.
LAYOUTS = {"dropless": {}, "capacity": {"capacity_factor": 8.0}}

# A ninth of what has every pair of levels of the main ones, and what does not meet the exchange once each; the product
# is for `-m full`, and so is the first of the pairs: other tests have what it has.
PAIRS = pairwise(MESHES, ["vanilla", "fine_grained", "bigmac"], ["softmax", "sigmoid", "groups"], BACKBONES, LAYOUTS)
COVERING = [
    ((2, 1, 4), "pre_dispatch", "unbalanced", "gated", "dropless"),
    *PAIRS[3::9],
    ((1, 2, 4), "paper", "softmax", "paper", "dropless"),
    ((2, 1, 4), "bigmac", "hyper", "present", "capacity"),
    ((2, 1, 2), "normed", "sigmoid", "present", "capacity"),
    ((1, 1, 8), "control", "softmax", "paper", "dropless"),
]
EVERYWHERE = set(itertools.product(MESHES + MORE_MESHES, STRUCTURES, ROUTERS, BACKBONES, ["dropless"]))
EVERYWHERE |= set(itertools.product(MESHES, ["fine_grained", "bigmac"], MADE, ["present"], ["dropless"]))
REST = sorted((EVERYWHERE | set(PAIRS)) - set(COVERING))


def check(config: Config, given: dict[str, np.ndarray] | None = None, tolerance: float = 1e-5) -> Aux:
    """Compares loss, loads and gradients with the reference; returns aux."""
    tokens = random_tokens(config)

    def loss(p: dict[str, Any]) -> tuple[Any, list[Layer]]:
        logits_BLV, layers = reference(config.model, p, tokens[:, :-1])
        balance_Y, z_Y = (jnp.asarray([getattr(v, kind) for v in layers]) for kind in ("balance_loss", "z_loss"))
        return total_loss(config.model, logits_BLV, tokens[:, 1:], balance_Y, z_Y), layers

    with on_mesh(config):
        values = leaves(random_model(config, given))
    parameters = {name: jnp.asarray(value) for name, value in values.items()}  # on one device
    (expected, layers), expected_gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
    value, gradients, aux = loss_and_gradients(config, tokens, given)

    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(aux.load, [v.load for v in layers], rtol=1e-6)
    assert not aux.drop_rate.any()
    for name in gradients.keys() & {"layers.mlp.router_bias_E"}:  # chooses, and is never differentiated
        assert not gradients.pop(name).any() and not expected_gradients.pop(name).any()
    if config.model.use_bias and not config.model.qk_norm:
        # A key's bias adds the same to all scores of a query: its gradient is zero, and rounding.
        for stack in ("first", "layers")[not config.model.first_dense_layers :]:
            zero = [of.pop(f"{stack}.attention.key.b_F") for of in (gradients, expected_gradients)]
            assert np.abs(zero).max() < 1e-6 * np.abs(gradients[f"{stack}.attention.query.b_F"]).max()
    for skip in gradients.keys() & {"layers.mlp.skip_1"}:  # one number a layer, summed over all tokens with both signs
        np.testing.assert_allclose(gradients.pop(skip), expected_gradients.pop(skip), rtol=1e-4)
    assert_close(gradients, expected_gradients, tolerance)
    return aux


def name(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def build(mesh: tuple[int, ...], structure: str, router: str, backbone: str, layout: str) -> Config:
    return tiny(mesh, **(STRUCTURES[structure] | (ROUTERS | MADE)[router] | BACKBONES[backbone] | LAYOUTS[layout]))


@pytest.mark.parametrize(("mesh", "structure", "router", "backbone", "layout"), some(COVERING, every=4), ids=name)
def test_equals_the_reference(mesh: tuple[int, ...], structure: str, router: str, backbone: str, layout: str) -> None:
    check(build(mesh, structure, router, backbone, layout))


@pytest.mark.full
@pytest.mark.parametrize(("mesh", "structure", "router", "backbone", "layout"), REST, ids=name)
def test_equals_the_reference_everywhere(
    mesh: tuple[int, ...], structure: str, router: str, backbone: str, layout: str
) -> None:
    check(build(mesh, structure, router, backbone, layout))


@pytest.mark.parametrize(
    ("mesh", "backbone"), some([((1, 1, 1), "gated"), ((8, 1, 1), "present"), ((1, 2, 4), "paper")], every=3), ids=name
)
def test_dense_equals_the_reference(mesh: tuple[int, ...], backbone: str) -> None:
    check(tiny(mesh, structure="dense", **BACKBONES[backbone]))


@pytest.mark.full  # of the exchanges, each by itself, test_strategies.py has it
@pytest.mark.parametrize(("mesh", "top_k"), [((1, 2, 2), 2), ((1, 1, 8), 1), ((2, 1, 4), 1)], ids=name)
def test_every_token_may_choose_the_same_experts(mesh: tuple[int, ...], top_k: int) -> None:
    """The worst skew: all rows of all ranks go to one rank, to `top_k` of its experts."""
    config = tiny(mesh, top_k=top_k, balance="bias", router_renormalize=False)
    favourites = np.where((np.arange(8) >= 4) & (np.arange(8) < 4 + top_k), 100.0, 0.0).astype(np.float32)
    # With jax 0.12 the router's gradient is 1.3e-5 off: of 64 tokens' sums, which cancel here, little is left.
    aux = check(config, {"layers.mlp.router_bias_E": favourites}, tolerance=3e-5)
    np.testing.assert_allclose(aux.load, [favourites / favourites.sum()] * 2)
