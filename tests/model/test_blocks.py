"""A pattern of residual branches computes its branches in their order, whatever loops they are computed in."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from training.tools import host, session

from bigmac_jax.config import Config
from bigmac_jax.model import gathering, transformer
from bigmac_jax.model.mesh import token_spec
from bigmac_jax.model.moe import MoE
from bigmac_jax.model.parameters import leaf_name
from bigmac_jax.model.transformer import Transformer

from .tools import abstract_model, leaves, on_mesh, random_model, random_tokens, split_tokens, tiny

MAMBA: dict[str, Any] = {"mamba_heads": 4, "mamba_head_dim": 4, "mamba_groups": 2, "mamba_state": 6, "mamba_chunk": 3}
PATTERNS = [("ME*EM-", 2), ("*EME*EM-ME", 1), ("E*", 2), ("MM*E", 1), ("ME*EEE", 1), ("MEE", 1)]
SEVERAL = ("ME*E", 2)
QUICK_PATTERN = ("MEE", 1)


def of_pattern(blocks: str, times: int, **fields: Any) -> Config:
    return tiny(blocks=blocks, num_layers=times, structure="bigmac", **MAMBA, **fields)


def one_by_one(model: Transformer, tokens_BL: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Logits, and the loads of layers with experts, without a loop or a pattern's help."""
    x_BLD, loads = model.embed(tokens_BL), []
    where = {number: (stack, i) for stack in model.config.model.stacks for i, number in enumerate(stack.layers)}
    for number in range(len(where)):
        stack, i = where[number]
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], getattr(model, stack.name))
        for branch in layer.branches:
            h_BLD, mixer = getattr(layer, f"{branch}_norm")(x_BLD), getattr(layer, branch)
            y_BLD = mixer(h_BLD)
            if isinstance(mixer, MoE):
                y_BLD, stats = y_BLD
                loads.append(stats.load.mean(0))
            x_BLD = x_BLD + y_BLD
    return model.logits(model.final_norm(x_BLD)), loads


@pytest.mark.parametrize("remat", ["none", pytest.param("layer", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("blocks", "times"), [pytest.param(*of, marks=[] if of == QUICK_PATTERN else pytest.mark.full) for of in PATTERNS]
)
def test_values_and_gradients(blocks: str, times: int, remat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "platform", lambda: "gpu")  # where a layer's gradients wait for the next one's
    config = of_pattern(blocks, times, mesh=(1, 1, 2, 1, True), remat=remat)

    def in_loops(model: Transformer, tokens_BL: jax.Array) -> Any:
        logits_BLV, aux = model(tokens_BL)
        return jnp.square(logits_BLV).mean(), (logits_BLV, aux.load)

    def in_turn(model: Transformer, tokens_BL: jax.Array) -> Any:
        logits_BLV, loads = one_by_one(model, tokens_BL)
        return jnp.square(logits_BLV).mean(), (logits_BLV, jnp.stack(loads))

    with on_mesh(config):
        model, tokens = random_model(config), split_tokens(random_tokens(config)[:, :-1])
        (found, gradients), (expected, right) = (
            jax.jit(jax.value_and_grad(of, has_aux=True))(model, tokens) for of in (in_loops, in_turn)
        )
        for value, other in zip(found[1], expected[1], strict=True):
            np.testing.assert_allclose(value, other, atol=1e-5 * np.abs(other).max())
        right = leaves(right)
        for name, value in leaves(gradients).items():
            assert np.abs(value - right[name]).max() <= 3e-5 * np.abs(right[name]).max() + 1e-12, name


@pytest.mark.parametrize("config", [None, tiny((2, 1, 2, 1))], ids=["no mesh", "2x2"])
def test_gradients_wait_for_those_of_later_parameters(config: Config | None) -> None:
    """That they do can be seen: nothing times infinity is no number."""

    def loss(x: jax.Array, later: dict[str, jax.Array]) -> jax.Array:
        x, later = gathering.in_turn(x, later)
        return x.sum() + (later["finite"] + later["steep"] * jnp.float32(np.inf)).sum()

    with on_mesh(config) if config else contextlib.nullcontext():
        x, w = jnp.ones((8, 4, 2)), jnp.ones((4, 2))
        if config:
            x, w = jax.device_put(x, token_spec(3)), jax.device_put(w, P("expert"))
        dx, _ = jax.jit(jax.grad(loss, (0, 1)))(x, {"finite": w, "steep": w})
    assert np.isnan(dx).all()


def test_a_layer_waits_on_gpu_for_the_trained_parameters_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    waited_for = []

    def record(carry: Any, later: Any) -> Any:
        waited_for.append([leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(later)[0]])
        return carry, later

    config = of_pattern("MEE", 1)
    monkeypatch.setattr(transformer, "in_turn", record)
    for platform, calls in (("tpu", 0), ("gpu", 1)):
        monkeypatch.setattr(transformer, "platform", lambda platform=platform: platform)
        with on_mesh(config):
            model, tokens = abstract_model(config), jax.ShapeDtypeStruct((8, 8), jnp.int32, sharding=token_spec(2))
            jax.eval_shape(lambda model, tokens: model(tokens), model, tokens)
        assert len(waited_for) == calls
    (names,) = waited_for
    assert any("w_in_eRF" in name for name in names) and not any("router" in name for name in names)


@pytest.mark.full
def test_a_bias_is_moved_by_the_load_of_its_own_layer() -> None:
    config = of_pattern(*SEVERAL, balance="bias", balance_bias_rate=0.01)
    with session(config) as run:
        before = leaves(host(run.state))
        load_YE = np.asarray(run.step(random_tokens(config)).parts.aux.load)
        after = leaves(run.state)
    assert load_YE.shape == (4, 8)
    for place in range(2):
        name = f"rest.layers0_{place}.mlp.router_bias_E"
        moved_YE = after[name] - before[name]
        np.testing.assert_allclose(moved_YE, 0.01 * np.sign(1 / 8 - load_YE[place::2]), atol=1e-7)
    assert (load_YE[0] != load_YE[1]).any()


@pytest.mark.full
@pytest.mark.parametrize("mesh", [(1, 1, 4), (2, 1, 2, 2, True, True), (1, 2, 2)], ids=str)
def test_meshes_equal_one_device(mesh: tuple[int, ...]) -> None:
    """A step of training: loss, loads and all parameters behind it."""
    found = []
    for of in ((1, 1, 1), mesh):
        config = tiny(of, blocks="ME*EM-", num_layers=1, structure="bigmac", balance="bias", **MAMBA)
        with session(config) as run:
            metrics = run.step(random_tokens(config))
            found.append((np.asarray(metrics.loss), np.asarray(metrics.parts.aux.load), leaves(run.state)))
    (loss, load, state), (expected, of_one, one) = found
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(load, of_one, atol=1e-6)
    for name, value in state.items():
        if ".mu." in name:  # the gradient; Adam's own step divides it by its size
            assert np.abs(value - one[name]).max() <= 3e-5 * np.abs(one[name]).max() + 1e-12, name
