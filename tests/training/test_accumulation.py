"""Parts of a batch, its mesh and how many rows a rank has change nothing: losses, loads and gradients are those of one
device that computes the batch at once.

The class is structure × objective × documents × mesh × rows a rank × parts. `make test` runs a covering set of pairs;
the full suite all.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import numpy as np
import pytest
from model.tools import assert_close, leaves, on_mesh, pairwise, random_model, split_batch, tiny

from bigmac_jax.config import Config, TrainConfig, TuningConfig
from bigmac_jax.data.batch import NO_TARGET, PADDING, Batch, batch_from_windows
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.training.accumulation import describe_first_pass
from bigmac_jax.training.step import TrainState, make_trainer, split_model

STRUCTURES: dict[str, dict[str, Any]] = {
    "bigmac": {"z_loss_coefficient": 0.1},
    "dense": {"structure": "dense"},
    "fine_grained": {"structure": "fine_grained", "router_scores": "sigmoid", "balance": "bias"},
}
OTHER_STRUCTURES: dict[str, dict[str, Any]] = {
    "vanilla": {"structure": "vanilla", "num_experts": 64},
    "control": {"structure": "fine_grained", "latent_norm": "skip", "balance": "quantile", "norm": "layernorm"},
}
OBJECTIVES = ("pretrain", "sft", "dpo", "distilled")
DOCUMENTS = ("stream", "masked", "best_fit")
# data, node, expert, tensor, fsdp. Behind the axes that split the batch stand some of size one.
MESHES = [(1, 1, 1), (4, 2, 1), (2, 1, 1, 2)]
OTHER_MESHES = [(4, 1, 1, 1, True), (2, 1, 1), (1, 1, 2), (1, 2, 2)]
ROWS, PARTS = (1, 2, 3), (2, 4)
L = 8


def config_of(structure: str, objective: str, documents: str, mesh: tuple[Any, ...], batch: int, parts: int) -> Config:
    given = {"num_layers": 1, "balance_coefficient": 0.5} | (STRUCTURES | OTHER_STRUCTURES)[structure]
    config = tiny(mesh, batch=batch, length=L, **given)
    tuning = TuningConfig(objective=objective if objective in ("sft", "dpo") else "pretrain")
    if objective == "distilled":
        tuning = TuningConfig(teacher="teacher")
    data = dataclasses.replace(
        config.data,
        source="rows.jsonl",
        documents="stream" if documents == "stream" else "masked",
        packing="best_fit" if documents == "best_fit" else "stream",
    )
    train = TrainConfig(accumulate_steps=parts, init_from="model" if objective == "dpo" else "")
    return dataclasses.replace(config, tuning=tuning, data=data, train=train)


def batch_of(config: Config, padded: bool) -> Batch:
    """Rows of two to four documents; with `padded` a third of the rows is padding from the middle on, and the second
    row is nothing else."""
    rows, draw = config.data.batch_size, np.random.default_rng(0)
    tokens = draw.integers(config.model.vocab_size, size=(rows, L + 1), dtype=np.int32)
    batch = batch_from_windows(tokens)
    if not config.has_segments:
        return batch
    # Of preferences, document 2p is chosen and 2p + 1 is not.
    segments = np.where(np.arange(L) < 5, np.arange(L) // 2, 3)[None].repeat(rows, 0).astype(np.int32)
    if padded:
        segments[::3, 4:] = PADDING
        segments[1] = PADDING
    answers = draw.random(segments.shape) < 0.7 if config.tuning.objective != "pretrain" else True
    targets = np.where((segments != PADDING) & answers, batch.targets_BL, NO_TARGET).astype(np.int32)
    reference = draw.uniform(3, 8, segments.shape).astype(np.float32) if config.tuning.objective == "dpo" else None
    return Batch(batch.inputs_BL, targets, segments, reference)


def gradients(config: Config, batch: Batch) -> dict[str, np.ndarray]:
    """The loss, what the routers did, and the gradient of each parameter."""
    teacher = None
    if config.tuning.teacher:
        model = dataclasses.replace(config.model, structure="dense", latent_norm="none")
        teacher = dataclasses.replace(config, model=model, tuning=TuningConfig())
    with on_mesh(config):
        trainer = make_trainer(config, make_mesh(config), teacher)
        _, params, rest = split_model(random_model(config))
        rest = jax.tree.map(lambda bias: bias + 0.1 * np.arange(bias.shape[-1], dtype=np.float32)[None] % 3, rest)
        of_teacher = random_model(teacher) if teacher is not None else None
        state = TrainState(np.int32(0), params, rest, None, teacher=of_teacher)
        step = jax.jit(trainer.gradient)
        (loss, parts), found = step(state, jax.tree.map(split_batch, batch))
    named = {"loss": loss, "cross_entropy": parts.cross_entropy}
    if config.model.is_moe:
        named |= {name: getattr(parts.aux, name) for name in ("load", "z_loss", "balance_loss", "router_entropy")}
        np.testing.assert_allclose(np.asarray(parts.aux.load).sum(-1), 1, rtol=1e-5)
    named |= {name: value for name, value in leaves(found).items() if np.asarray(value).any()}
    return {name: np.asarray(value) for name, value in named.items()}


FACTORS = (STRUCTURES, OBJECTIVES, DOCUMENTS, MESHES, ROWS, PARTS)
COVERING = pairwise(*FACTORS)
EVERY = itertools.product([*STRUCTURES, *OTHER_STRUCTURES], OBJECTIVES, DOCUMENTS, MESHES + OTHER_MESHES, ROWS, PARTS)
FEW = COVERING[::6]  # test_replicas.py and the oracle cross them, too
FIELDS = ("structure", "objective", "documents", "mesh", "rows", "parts")


@pytest.mark.parametrize(FIELDS, FEW)
def test_parts_meshes_and_rows_change_nothing(
    structure: str, objective: str, documents: str, mesh: tuple[Any, ...], rows: int, parts: int
) -> None:
    check(structure, objective, documents, mesh, rows, parts)


@pytest.mark.full
@pytest.mark.parametrize(FIELDS, [case for case in EVERY if case not in set(FEW)])
def test_parts_meshes_and_rows_change_nothing_anywhere(
    structure: str, objective: str, documents: str, mesh: tuple[Any, ...], rows: int, parts: int
) -> None:
    check(structure, objective, documents, mesh, rows, parts)


def check(structure: str, objective: str, documents: str, mesh: tuple[Any, ...], rows: int, parts: int) -> None:
    batch_size = math.prod(mesh[:3]) * parts * rows
    config = config_of(structure, objective, documents, mesh, batch_size, parts)
    batch = batch_of(config, documents == "best_fit" or objective in ("sft", "dpo"))
    one = config_of(structure, objective, documents, (1, 1, 1), batch_size, 1)
    found, expected = gradients(config, batch), gradients(one, batch)
    # A single number, summed over all tokens with both signs: float32 leaves it fewer digits.
    skip = [of.pop("layers.mlp.skip_1", None) for of in (found, expected)]
    assert_close(found, expected, 2e-5)
    if skip[1] is not None:
        np.testing.assert_allclose(*skip, rtol=1e-3)


@pytest.mark.full
@pytest.mark.parametrize(("mesh", "parts"), [((2, 1, 1), 2), *((mesh, 4) for mesh in MESHES + OTHER_MESHES)])
def test_balance_by_part_is_the_mean_of_the_parts_alone(mesh: tuple[Any, ...], parts: int) -> None:
    """balance_scope=part: each part has its own f and P, over the tokens that it has; all else is of the whole step."""
    fields = ("fine_grained", "pretrain", "best_fit")
    config = config_of(*fields, mesh, math.prod(mesh[:3]) * parts, parts)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, balance="aux_loss", balance_scope="part")
    )
    one = dataclasses.replace(config_of(*fields, (1, 1, 1), config.data.batch_size, 1), model=config.model)
    batch = batch_of(config, padded=True)
    found, whole = gradients(config, batch), gradients(one, batch)
    alone = []
    for m in range(parts):
        rows = jax.tree.map(lambda v: v[m::parts], batch)  # noqa: B023
        data = dataclasses.replace(one.data, batch_size=len(rows.inputs_BL))
        alone.append(gradients(dataclasses.replace(one, data=data), rows)["balance_loss"])
    np.testing.assert_allclose(found["balance_loss"], np.mean(alone, 0), rtol=1e-5)
    assert abs(found["balance_loss"] / whole["balance_loss"] - 1).max() > 1e-3
    assert_close(
        {n: found[n] for n in ("cross_entropy", "load", "z_loss")},
        {n: whole[n] for n in ("cross_entropy", "load", "z_loss")},
    )


@pytest.mark.parametrize(
    ("model", "remat", "parts", "share"),
    [
        ({}, "none", 4, "25 %"),
        ({}, "layer", 4, "20 %"),
        ({}, "none", 1, ""),
        ({"balance": "bias"}, "none", 4, ""),
        ({"balance_scope": "part"}, "none", 4, ""),
        ({"structure": "dense"}, "none", 4, ""),
    ],
    ids=str,
)
def test_a_pass_that_counts_loads_is_named(model: dict[str, Any], remat: str, parts: int, share: str) -> None:
    config = dataclasses.replace(tiny(remat=remat, **model), train=TrainConfig(accumulate_steps=parts))
    line = describe_first_pass(config)
    assert share in line if share else line == ""
