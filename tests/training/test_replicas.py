"""Replicas: loss, gradients and new parameters are those of one device, and gradients cross once a step, in shards."""

import dataclasses
import functools
import itertools
import math
import random
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from model.tools import (
    assert_close,
    leaves,
    on_mesh,
    random_like,
    random_model,
    random_tokens,
    split_batch,
    tiny,
)

from bigmac_jax.config import Config, ConfigError, MeshConfig, OptimizerConfig, TrainConfig, TuningConfig
from bigmac_jax.data.batch import NO_TARGET, PADDING, Batch
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.model.traffic import replica_bytes
from bigmac_jax.planning import hlo
from bigmac_jax.planning.compiled_programs import compile_program
from bigmac_jax.planning.hlo_collectives import Collective, collectives
from bigmac_jax.training.replicas import describe_crossing
from bigmac_jax.training.step import make_trainer, split_model

# A large eps makes the update proportional to the gradient: Adam's own first step is its sign.
LINEAR = OptimizerConfig(learning_rate=1.0, warmup_steps=0, eps=1.0, clip_norm=1.0)
STRUCTURES: dict[str, dict[str, Any]] = {
    "bigmac": {"structure": "bigmac", "num_shared_experts": 1},
    "fine_grained": {"structure": "fine_grained", "num_shared_experts": 2, "tie_embeddings": False},
    "vanilla": {"structure": "vanilla", "first_dense_layers": 1, "dense_hidden_size": 24, "num_experts": 64},
    "bias": {"structure": "bigmac", "router_scores": "sigmoid", "balance": "bias", "latent_norm": "gate"},
    "quantile": {"structure": "fine_grained", "balance": "quantile"},
    "gated": {"structure": "bigmac", "gated": True, "activation": "silu", "tie_embeddings": False},
    "hyper": {"structure": "bigmac", "router": "hyper", "hyper_width": 6},
    "frozen": {"structure": "fine_grained", "router": "frozen"},
    "dense": {"structure": "dense"},
}


class Case(NamedTuple):
    """A way to run a step on eight devices."""

    structure: str
    mesh: tuple[int, int, int, int, int]  # replica, data, node, expert, tensor
    fsdp: bool
    sharded: bool = False  # mesh.replica_optimizer
    parts: int = 1
    chunks: int = 1
    remat: str = "none"
    exchange: str = "all_to_all"
    documents: bool = False
    lora: int = 0
    dropout: float = 0.0  # of adapters, whose draws are of a part


def draw(seed: int) -> Case:
    """Some way."""
    random_ = random.Random(seed)
    meshes = [m for m in itertools.product((2, 4, 8), (1, 2, 4), (1, 2), (1, 2, 4), (1, 2, 4)) if math.prod(m) == 8]
    mesh, fsdp = random_.choice(meshes), random_.random() < 0.7
    exchanges = ["all_to_all", "dedup", "gather", "ragged", *(["hierarchical"] if mesh[2] > 1 else [])]
    structure, parts = random_.choice(list(STRUCTURES)), random_.choice((1, 2))
    return Case(
        structure,
        mesh,
        fsdp,
        fsdp and random_.random() < 0.5,
        parts,
        1 if structure == "dense" else random_.choice((1, 2)),
        random_.choice(("none", "layer", "none" if structure == "dense" else "exchange")),
        "all_to_all" if structure == "dense" else random_.choice(exchanges),
        random_.random() < 0.5,
        2 * (structure not in ("bias", "quantile") and random_.random() < 0.4),
        0.5 if parts == 1 else 0.0,
    )


COVERING = (
    Case("bigmac", (2, 1, 1, 2, 2), True, parts=2, remat="layer", documents=True),
    Case("gated", (2, 2, 1, 2, 1), False, chunks=2, exchange="dedup", lora=2, dropout=0.5),
    Case("vanilla", (4, 1, 1, 2, 1), True, sharded=True, remat="exchange"),
    Case("dense", (2, 4, 1, 1, 1), True, sharded=True, parts=2),
    Case("hyper", (2, 2, 1, 2, 1), True, sharded=True, parts=2, remat="layer", exchange="dedup", documents=True),
    Case("frozen", (2, 1, 1, 2, 2), False, remat="exchange"),
)


def make_config(case: Case) -> Config:
    config = tiny((1, 1, 1), batch=16, z_loss_coefficient=0.01, **STRUCTURES[case.structure])
    _, data, node, expert, tensor = case.mesh
    targets = "attention,experts" if case.lora and case.structure != "dense" else "attention"
    return dataclasses.replace(
        config,
        mesh=MeshConfig(
            data, node, expert, tensor, case.fsdp, replica=case.mesh[0],
            replica_optimizer="sharded" if case.sharded else "copied",
        ),
        execution=dataclasses.replace(
            config.execution, remat=case.remat, overlap_chunks=case.chunks, exchange=case.exchange
        ),
        data=dataclasses.replace(config.data, documents="masked" if case.documents else "stream"),
        train=TrainConfig(
            accumulate_steps=case.parts, init_from="x" if case.lora else "",
            choices_from=2 if case.structure in ("hyper", "frozen") else 0, choices_steps=5,
        ),
        tuning=TuningConfig(lora_rank=case.lora, lora_targets=targets, lora_dropout=case.dropout if case.lora else 0.0),
        optimizer=LINEAR,
    )  # fmt: skip


def make_batch(config: Config) -> Batch:
    """Random tokens; where documents are masked, some in each row, padding, and targets left out."""
    tokens = random_tokens(config)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].copy()
    if not config.has_segments:
        return Batch(inputs, targets, None)
    B, L = inputs.shape
    numbers = np.sort(np.random.default_rng(1).integers(0, 3, (B, L)), axis=1).astype(np.int32)
    numbers[1::3, L - 2 :] = PADDING
    targets[numbers == PADDING] = NO_TARGET
    targets[::2, 0] = NO_TARGET
    return Batch(inputs, targets, numbers)


@functools.cache
def one_step(case: Case) -> tuple[Any, dict[str, np.ndarray]]:
    """Metrics, and the whole state by name; every parameter was random before, adapters too."""
    config = make_config(case)
    with on_mesh(config):
        mesh = jax.sharding.get_mesh()
        trainer = make_trainer(config, mesh)
        state = trainer.begin(*split_model(random_model(config))[1:], jax.random.key(0))
        if case.lora:
            state = dataclasses.replace(state, params=random_like(trainer.abstract_state.params, config))
        arguments = state, jax.tree.map(split_batch, make_batch(config)), trainer.rate(np.int32(0))
        step = trainer.step.lower(*arguments).compile()
        state, metrics = step(*arguments)
        return jax.tree.map(np.asarray, metrics), leaves(state)


def check(case: Case) -> None:
    alone = Case(case.structure, (1, 1, 1, 1, 1), False, documents=case.documents, lora=case.lora, dropout=case.dropout)
    (metrics, state), (expected_metrics, expected) = one_step(case), one_step(alone)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(getattr(metrics, name), getattr(expected_metrics, name), rtol=3e-6, err_msg=name)
    aux, expected_aux = (m.parts.aux for m in (metrics, expected_metrics))
    for name in ("z_loss", "load", "router_entropy", "balance_loss"):
        np.testing.assert_allclose(getattr(aux, name), getattr(expected_aux, name), rtol=1e-5, err_msg=name)
    moved = {name for name in expected if "router_bias" in name}
    if case.structure == "quantile":  # counted, not sorted: to the width of a bin
        for name in moved:
            np.testing.assert_allclose(state[name], expected[name], atol=2 * 2 / 1000)
    kept = {name for name in expected if np.abs(expected[name]).max() == 0}
    for name in kept:
        np.testing.assert_array_equal(state[name], expected[name])
    left = kept | (moved if case.structure == "quantile" else set())
    # Second moments are squares of gradients, and so have twice their rounding.
    assert state.keys() == expected.keys()
    squares = {name for name in expected if ".nu." in name} - left
    for names, tolerance in ((squares, 3e-5), (expected.keys() - squares - left, 1e-5)):
        assert_close({n: state[n] for n in names}, {n: expected[n] for n in names}, tolerance)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.full)
        if case.structure in ("dense", "vanilla", "hyper", "frozen", "gated")
        else case
        for case in COVERING
    ],
    ids=lambda case: "-".join(map(str, case[:2])),
)
def test_equals_one_device(case: Case) -> None:
    check(case)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(30))
def test_equals_one_device_whatever_the_mesh(seed: int) -> None:
    check(draw(seed))


def across(config: Config) -> list[Collective]:
    """What the compiled step sends between replicas."""
    compiled = compile_program(config, jax.devices())
    return [c for c in collectives(hlo.parse(compiled.text), compiled.mesh) if "replica" in c.axes]


@pytest.mark.full
@pytest.mark.parametrize(("fsdp", "sharded"), [(True, False), (True, True), (False, False)])
def test_gradients_cross_once_in_shards(fsdp: bool, sharded: bool) -> None:
    """With a batch in parts and layers in a loop: whatever is of a layer or of a part stays inside."""
    config = make_config(Case("bigmac", (2, 1, 1, 2, 2), fsdp, sharded, parts=2, remat="layer"))
    # Each replica sends its rows in as many rounds as they take.
    config = dataclasses.replace(config, execution=dataclasses.replace(config.execution, buffer_factor="auto"))
    found = across(config)
    sent = sum(c.sent_bytes for c in found)
    assert {(c.times, c.loops) for c in found} == {(1, ())}
    formula = replica_bytes(config, {"replica": 2, "data": 1, "node": 1, "expert": 2, "tensor": 2})
    # Beside them loads, shares and means of two layers, and sums for the gradients' norm.
    assert formula < sent <= formula + 400
    kinds = {c.kind for c in found if c.sent_bytes > 1000}
    assert kinds == ({"reduce-scatter", "all-gather"} if sharded else {"all-reduce"})


def test_the_sum_is_in_the_asked_dtype() -> None:
    """Of bfloat16 half the bytes; XLA:CPU adds in float32 whatever is asked, so the trace is read."""
    for dtype in ("float32", "bfloat16"):
        config = make_config(COVERING[0])
        config = dataclasses.replace(config, execution=dataclasses.replace(config.execution, reduce_dtype=dtype))
        with on_mesh(config):
            trainer = make_trainer(config, jax.sharding.get_mesh())
            batch = jax.tree.map(split_batch, make_batch(config))
            step = str(trainer.step.trace(trainer.abstract_state, batch, trainer.rate(np.int32(0))).jaxpr)
        summed = re.findall(r":(\w+)\[[^=\n]*= psum(?:_invariant)?\[[^\]]*'replica',\)", step)
        assert len(summed) > 10 and set(summed) == {"f32" if dtype == "float32" else "bf16"}


def test_what_replicas_are_not_for() -> None:
    config = make_config(COVERING[0])
    with pytest.raises(ConfigError, match=r"replica_optimizer=sharded splits .*; use it with mesh\.fsdp=True"):
        dataclasses.replace(config.mesh, fsdp=False, replica_optimizer="sharded")
    batch = dataclasses.replace(config.data, batch_size=12)
    with pytest.raises(ConfigError, match=r"a multiple of mesh\.replica × mesh\.data × .* = 8; use 16"):
        make_mesh(dataclasses.replace(config, data=batch))


@pytest.mark.parametrize(
    ("mesh", "model", "parts", "data", "slices", "expected"),
    [
        ({"fsdp": True, "data": 4}, {}, 1, 4, 2,
         ["across 2 slices in every pass: mesh.replica=2 and mesh.data=2 keep that inside"]),
        ({"fsdp": True, "data": 0}, {}, 1, 6, 3, ["across 3 slices in every pass: mesh.replica=3 keep that inside"]),
        ({"fsdp": True, "replica": 2, "data": 4}, {}, 1, 4, 2, ["mesh.replica=4 and mesh.data=2 keep"]),
        ({"fsdp": True}, {}, 1, 4, 1, []),
        ({"fsdp": True}, {}, 1, 3, 2, []),
        ({"fsdp": False}, {}, 1, 4, 2, []),
        ({"replica": 2}, {"balance": "quantile", "balance_step": "same"}, 1, 1, 1, ["all replicas 20 times in each"]),
        ({"replica": 2}, {"balance": "quantile", "balance_step": "next"}, 1, 1, 1, []),
        ({"replica": 1}, {"balance": "quantile", "balance_step": "same"}, 1, 1, 1, []),
        ({"replica": 2}, {"balance_scope": "part"}, 4, 1, 1, ["adds up the replicas' loads 4 times a step"]),
        ({"replica": 2}, {"balance_scope": "part"}, 2, 1, 1, ["adds up the replicas' loads 2 times a step"]),
        ({"replica": 2}, {"balance_scope": "part"}, 1, 1, 1, []),
        ({"replica": 2}, {"balance_scope": "step"}, 4, 1, 1, []),
        ({"replica": 1}, {"balance_scope": "part"}, 4, 1, 1, []),
        ({"replica": 2}, {"balance_scope": "part", "balance": "bias"}, 4, 1, 1, []),
        ({"replica": 2}, {"balance_scope": "part", "structure": "dense"}, 4, 1, 1, []),
    ],
)  # fmt: skip
def test_what_crosses_slow_links_too_often_is_said(
    mesh: dict, model: dict, parts: int, data: int, slices: int, expected: list[str]
) -> None:
    config = tiny(**model)
    train = dataclasses.replace(config.train, accumulate_steps=parts)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh), train=train)
    lines = describe_crossing(config, data, slices)
    assert len(lines) == len(expected) and all(said in line for said, line in zip(expected, lines, strict=True))
