"""Next-token modules (model.mtp_modules): their loss and all gradients are those of a float64 reference that computes
each document alone, on any mesh and with any number of parts; what does not train knows nothing of them."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from model.tools import QUICK, assert_close, leaves, on_mesh, random_model, split_batch, tiny

from bigmac_jax.config import Config, ConfigError, MeshConfig, TrainConfig, TuningConfig, load_config
from bigmac_jax.data.batch import NO_TARGET, PADDING, Batch
from bigmac_jax.inference.kv_cache import make_decoder
from bigmac_jax.model.counts import flops, parameters
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.model.parameters import named_leaves
from bigmac_jax.model.transformer import without_next_tokens
from bigmac_jax.planning.shapes import Shape
from bigmac_jax.run import loop
from bigmac_jax.training.programs import evaluate
from bigmac_jax.training.step import TrainState, make_trainer, split_model

from .next_tokens_reference import expected
from .tools import leaves_of, of_training, quick, read_records, small

B, L = 8, 8
MODELS: dict[str, dict[str, Any]] = {
    "experts": {"z_loss_coefficient": 0.1},
    "dense": {"structure": "dense", "positions": "learned", "tie_embeddings": False, "norm": "layernorm"},
    "bias": {"balance": "bias", "qk_norm": False, "tie_embeddings": False, "scale_embedding": False},
}
PLAIN = (1, 1, 1)


def config_of(model: str, mesh: tuple[Any, ...] = PLAIN, documents: bool = True, modules: int = 2, **fields: Any) -> Config:
    train = TrainConfig(**{name: fields.pop(name) for name in ("accumulate_steps", "mtp_weight") if name in fields})
    config = tiny(mesh, batch=B, length=L, mtp_modules=modules, **(MODELS[model] | fields))
    data = dataclasses.replace(config.data, documents="masked" if documents else "stream")
    return dataclasses.replace(config, data=data, train=train)


def batch_of(config: Config) -> Batch:
    """Rows of two to four documents, some of one token; a quarter of the targets does not count, and in a third of the
    rows the end is padding."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(config.model.vocab_size, size=(B, L + 1), dtype=np.int32)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].copy()
    if not config.has_segments:
        return Batch(inputs, targets)
    segments = np.sort(draw.integers(3, size=(B, L)), axis=1).astype(np.int32)
    segments[::3, 6:] = PADDING
    targets[(draw.random((B, L)) < 0.25) | (segments == PADDING)] = NO_TARGET
    return Batch(inputs, targets, segments)


def documents_of(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    if batch.segments_BL is None:
        return list(zip(batch.inputs_BL, batch.targets_BL, strict=True))
    rows = zip(batch.inputs_BL, batch.targets_BL, batch.segments_BL, strict=True)
    return [(i[s == d], t[s == d]) for i, t, s in rows for d in np.unique(s) if d != PADDING]


def gradients(config: Config) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What a step finds, and the parameters that it finds it for."""
    with on_mesh(config):
        trainer, model = make_trainer(config, make_mesh(config)), random_model(config)
        _, params, rest = split_model(model)
        step = jax.jit(trainer.gradient, compiler_options=QUICK)
        batch = jax.tree.map(split_batch, batch_of(config))
        (loss, parts), found = step(TrainState(np.int32(0), params, rest, None), batch)
        values = leaves(model)
    named = {"loss": loss, "cross_entropy": parts.cross_entropy, "next": parts.next_K, **leaves(found)}
    named |= {"load": parts.aux.load} if config.model.is_moe else {}
    return {name: np.asarray(value) for name, value in named.items()}, values


def check(config: Config) -> None:
    found, values = gradients(config)
    right = expected(config, values, documents_of(batch_of(config)))
    named = {"loss": right.loss, "cross_entropy": right.cross_entropy, "next": right.next_K}
    named |= {"load": right.load_YE} if config.model.is_moe else {}
    named |= {name: value for name, value in right.gradients.items() if name in found}
    # A single number a layer, summed over all tokens with both signs: float32 leaves it fewer digits.
    skips = {name for name in named if name.endswith("skip_1")}
    for name in skips:
        np.testing.assert_allclose(found[name], named[name], rtol=1e-3, atol=1e-6)
    assert_close({n: v for n, v in found.items() if n not in skips}, {n: v for n, v in named.items() if n not in skips}, 2e-5)
    assert any(name.startswith("mtp.") for name in found)


@pytest.mark.parametrize(
    ("model", "documents"),
    [
        ("experts", True),
        pytest.param("experts", False, marks=pytest.mark.full),
        pytest.param("dense", True, marks=pytest.mark.full),
        pytest.param("dense", False, marks=pytest.mark.full),
        pytest.param("bias", True, marks=pytest.mark.full),
    ],
)
def test_equals_float64(model: str, documents: bool) -> None:
    check(config_of(model, documents=documents))


@pytest.mark.full
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize(
    ("mesh", "fields"),
    [
        ((1, 1, 2), {}),
        ((1, 2, 2), {"exchange": "hierarchical"}),
        ((1, 1, 1, 2), {}),
        ((1, 1, 2, 2, False, True), {"remat": "exchange"}),
        ((2, 1, 1, 1, True), {}),
        ((2, 1, 2, 1, True), {"remat": "layer", "accumulate_steps": 2}),
        (PLAIN, {"accumulate_steps": 4}),
        (PLAIN, {"accumulate_steps": 2, "mtp_weight": 1.5}),
        (PLAIN, {"num_layers": 3, "modules": 1}),
        ("replicas", {}),
    ],
)
def test_meshes_and_parts_equal_float64(mesh: Any, fields: dict[str, Any], documents: bool) -> None:
    config = config_of("experts", PLAIN if mesh == "replicas" else mesh, documents, **fields)
    if mesh == "replicas":
        config = dataclasses.replace(config, mesh=MeshConfig(data=2, replica=2))
    check(config)
