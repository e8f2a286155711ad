"""Small configurations, random models and the comparisons that the tests of the model share."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from bigmac_jax.config import Config, DataConfig, ExecutionConfig, MeshConfig, ModelConfig
from bigmac_jax.model.mesh import batch_spec, make_mesh, placed, token_spec
from bigmac_jax.model.moe import MoE
from bigmac_jax.model.parameters import Declaration, declared_leaves, map_declared
from bigmac_jax.model.transformer import Transformer, init_model

from .reference import feed_forward

PAPER = {"norm": "layernorm", "positions": "learned", "activation": "gelu", "use_bias": True, "qk_norm": False}
PRESENT = {"norm": "rmsnorm", "positions": "rope", "activation": "relu2", "use_bias": False, "qk_norm": True}


def tiny(mesh: Sequence[int] = (1, 1, 1), batch: int = 8, length: int = 8, **fields: Any) -> Config:
    """Two layers of width 16, eight experts; `mesh` is data, node, expert, tensor, fsdp, split_experts; `fields` are of
    the model and of its execution."""
    defaults = {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "vocab_size": 264, "num_experts": 8, "top_k": 3,
                "capacity_factor": math.inf, "buffer_factor": math.inf, "balance_coefficient": 0.1,
                "balance_scope": "step", "unroll_layers": 1}  # fmt: skip
    fields = defaults | fields
    execution = {f.name: fields.pop(f.name) for f in dataclasses.fields(ExecutionConfig) if f.name in fields}
    return Config(
        model=ModelConfig(**fields),
        execution=ExecutionConfig(**execution),
        mesh=MeshConfig(*mesh),
        data=DataConfig(tokenizer="bytes", sequence_length=length, batch_size=batch),
    )


def on_mesh(config: Config) -> Any:
    """A context in which the mesh of `config` is the current one."""
    return jax.set_mesh(make_mesh(config))


def abstract_model(config: Config) -> Transformer:
    return jax.eval_shape(lambda key: init_model(config, key), jax.random.key(0))


def abstract_layer(config: Config) -> MoE:
    return jax.eval_shape(lambda: MoE(config, jax.random.key(0)))  # the mesh's devices may not be here


def random_model(config: Config, given: dict[str, np.ndarray] | None = None) -> Transformer:
    """A model on the current mesh with random parameters."""
    return random_like(abstract_model(config), config, given)


def random_like(abstract: Any, config: Config, given: dict[str, np.ndarray] | None = None) -> Any:
    """Every parameter random, norms and biases too: zeros and ones hide mistakes. `given` replaces some by name."""
    draw = np.random.default_rng(0).standard_normal
    shapes = {name: leaf.shape for name, leaf in declared_leaves(abstract).items()}

    def fill(path: Any, leaf: Any) -> Array:
        name = leaf_name(path)
        shape = shapes[name]
        value = draw(shape).astype(np.float32)
        if given and name in given:
            value = np.broadcast_to(given[name], shape)
        elif "embedding" in name or "positions" in name:
            value *= 0.3
        elif "scale" in name or "skip" in name:
            value = 1 + 0.1 * value
        elif "bias" in name or ".b_" in name:
            value *= 0.1
        elif "vector" not in name:
            value /= math.sqrt(shape[-2])
        behind = [(0, held - size) for held, size in zip(leaf.shape, shape, strict=True)]
        return jax.device_put(np.pad(value, behind), leaf.sharding)

    return jax.tree_util.tree_map_with_path(fill, placed(abstract, make_mesh(config)))


def random_tokens(config: Config, seed: int = 0) -> np.ndarray:
    """Inputs and targets: [B, L + 1]."""
    shape = config.data.batch_size, config.data.sequence_length + 1
    return np.random.default_rng(seed).integers(config.model.vocab_size, size=shape, dtype=np.int32)


def split_batch(x: Any) -> Array:
    """`x`, its first dimension over the current mesh."""
    return jax.device_put(x, batch_spec(np.ndim(x)))


def split_tokens(x: Any) -> Array:
    """`x` [B, L, …], on each rank its own tokens."""
    return jax.device_put(x, token_spec(np.ndim(x)))


def leaf_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def leaves(tree: Any) -> dict[str, np.ndarray]:
    """The parameters by name, such as layers.mlp.experts.w_in_eRF, without zeros behind them."""

    def cut(of: Declaration, w: np.ndarray) -> np.ndarray:
        own = tuple(map(slice, of.unpadded(w.shape)))
        behind = w.copy()
        behind[own] = 0
        assert not behind.any(), of
        return w[own]

    on_host = map_declared(cut, jax.tree.map(np.asarray, tree))
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(on_host)[0]}


def total_loss(config: ModelConfig, logits_BLV: Array, targets_BL: Array, balance_Y: Array, z_Y: Array) -> Array:
    """Mean cross-entropy, and the weighted sums of the layers' balance and z losses."""
    V = logits_BLV.shape[-1]
    cross_BL = jax.nn.logsumexp(logits_BLV, axis=-1) - jnp.sum(logits_BLV * jax.nn.one_hot(targets_BL, V), -1)
    balance = config.balance_coefficient if config.balance == "aux_loss" else 0.0
    return cross_BL.mean() + balance * balance_Y.sum() + config.z_loss_coefficient * z_Y.sum()


def loss_and_gradients(
    config: Config, tokens: np.ndarray, given: dict[str, np.ndarray] | None = None, **kwargs: Any
) -> tuple[np.ndarray, dict[str, np.ndarray], Any]:
    """Loss, gradients by name and aux of `random_model` on the mesh of `config`; `kwargs` go to the model."""

    def loss(model: Transformer, inputs_BL: Array, targets_BL: Array) -> tuple[Array, Any]:
        logits_BLV, aux = model(inputs_BL, **kwargs)
        return total_loss(config.model, logits_BLV, targets_BL, aux.balance_loss, aux.z_loss), aux

    with on_mesh(config):
        inputs, targets = split_tokens(tokens[:, :-1]), split_tokens(tokens[:, 1:])
        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, aux), gradients = step(random_model(config, given), inputs, targets)
        return np.asarray(value), leaves(gradients), jax.tree.map(np.asarray, aux)


def layer_and_gradients(config: Config, given: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """The MoE layer's output on random tokens, the gradients of y · dy by name, its loads, and the inputs."""
    shape = config.data.batch_size, config.data.sequence_length, config.model.hidden_size
    draw = np.random.default_rng(3).standard_normal
    x_BLD, dy_BLD = (draw(shape).astype(np.float32) for _ in range(2))

    def loss(layer: MoE, x_BLD: Array, dy_BLD: Array) -> tuple[Array, Any]:
        y_BLD, stats = layer(x_BLD)
        return jnp.sum(y_BLD * dy_BLD), (y_BLD, stats.load.mean(0), stats.drop_rate)

    with on_mesh(config):
        layer = random_like(abstract_layer(config), config, given)
        step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        (d_layer, dx), (y, load, drops) = step(layer, split_tokens(x_BLD), split_tokens(dy_BLD))
        assert not np.asarray(drops).any()
        return leaves(d_layer) | {"dx": np.asarray(dx), "y": np.asarray(y), "load": np.asarray(load)}


def expected_layer_and_gradients(config: Config, given: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """The same from the reference, on one device."""
    shape = config.data.batch_size, config.data.sequence_length, config.model.hidden_size
    draw = np.random.default_rng(3).standard_normal
    x_BLD, dy_BLD = (jnp.asarray(draw(shape).astype(np.float32)) for _ in range(2))
    with on_mesh(config):
        values = leaves(random_like(abstract_layer(config), config, given))

    def loss(p: dict[str, Any], x_BLD: Array) -> tuple[Array, Any]:
        y_BLD, report = feed_forward(config.model, p, x_BLD)
        return jnp.sum(y_BLD * dy_BLD), (y_BLD, report.load)

    parameters = {name: jnp.asarray(value) for name, value in values.items()}
    with jax.numpy_rank_promotion("allow"):
        (d_p, dx), (y, load) = jax.grad(loss, argnums=(0, 1), has_aux=True)(parameters, x_BLD)
    return {name: np.asarray(value) for name, value in (d_p | {"dx": dx, "y": y, "load": load}).items()}


def assert_close(actual: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Per leaf max|a − b| <= tolerance · max|b| and max|b| > 0: an absolute bound would pass on zeros."""
    assert actual.keys() == expected.keys()
    wrong = []
    for name in expected:
        a, b = np.asarray(actual[name], np.float64), np.asarray(expected[name], np.float64)
        chex.assert_equal_shape([a, b])
        difference, size = np.abs(a - b).max(), np.abs(b).max()
        if not (size > 0 and difference <= tolerance * size):
            wrong.append(f"{name}: max|a - b| = {difference:.3g}, max|b| = {size:.3g}")
    assert not wrong, "\n".join(wrong)


def some(cases: Iterable[tuple[Any, ...]], every: int = 2) -> list[Any]:
    """The first of every `every` cases for `make test`; the others are for `-m full`."""
    return [
        case
        if i % every == 0
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full)
        for i, case in enumerate(cases)
    ]


def pairwise(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Greedy covering set: each pair of levels of two factors stands in at least one of the rows."""
    levels = [list(factor) for factor in factors]
    rows = list(itertools.product(*(range(len(factor)) for factor in levels)))

    def pairs(row: tuple[int, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(row), 2))

    missing, chosen = set().union(*map(pairs, rows)), []
    while missing:
        best = max(rows, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        chosen.append(tuple(factor[i] for factor, i in zip(levels, best, strict=True)))
    return chosen
