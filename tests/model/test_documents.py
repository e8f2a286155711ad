"""Documents of one window don't see each other: losses and gradients of one are what they are alone."""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import pytest

from bigmac_jax.config import Config
from bigmac_jax.data.batch import NO_TARGET, PADDING, Batch
from bigmac_jax.model.attention import find_documents
from bigmac_jax.model.exchange import STRATEGIES
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.model.router import Padding
from bigmac_jax.training.loss import WHOLE, loss_fn, token_scores
from bigmac_jax.training.step import make_trainer

from .tools import PAPER, PRESENT, assert_close, leaves, on_mesh, random_model, split_batch, split_tokens, tiny

B, L = 8, 16
EXCHANGES = ["all_to_all", *(pytest.param(name, marks=pytest.mark.full) for name in STRATEGIES if name != "all_to_all"),
             "capacity"]  # fmt: skip
NUMBERS = np.array([0] * 5 + [1] + [2] * 7 + [PADDING] * 3, np.int32)  # one of them is a single token
OWN = slice(6, 13)  # the document that is looked at


def batch_of(tokens: np.ndarray, numbers: np.ndarray, counted: slice) -> Batch:
    """Whose targets are those of `counted` alone."""
    targets = np.full((B, L), NO_TARGET, np.int32)
    targets[:, counted] = tokens[:, 1:][:, counted]
    return jax.tree.map(split_batch, Batch(tokens[:, :-1], targets, np.broadcast_to(numbers, (B, L))))


def loss_and_gradients(model: Any, batch: Batch) -> dict[str, np.ndarray]:
    def loss(model: Any) -> jax.Array:
        return loss_fn(model, batch, dropout_key=None, share=WHOLE)[1].cross_entropy_U.mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(model)
    # That of a bias on all keys is nothing but rounding: it moves all scores of a query alike.
    return {"loss": np.asarray(value)} | {n: v for n, v in leaves(gradients).items() if "key.b_F" not in n}


# Every model with both backbones; `make test` takes some.
CASES = [
    ((1, 1, 1), {"structure": "dense"}, PAPER),
    ((1, 1, 2, 2), {"structure": "bigmac", "num_kv_heads": 2, "tie_embeddings": False}, PRESENT),
]
OTHERS: list[Any] = [(mesh, model, PRESENT if backbone is PAPER else PAPER) for mesh, model, backbone in CASES]
OTHERS += itertools.product([(2, 1, 2)], [{"structure": "fine_grained", "tie_embeddings": False}], [PAPER, PRESENT])
OTHERS += itertools.product(
    [(1, 1, 2)], [{"structure": "vanilla", "num_experts": 32}, {"structure": "bigmac"}], [PAPER, PRESENT]
)


@pytest.mark.parametrize(
    ("mesh", "model", "backbone"),
    [CASES[0], *(pytest.param(*case, marks=pytest.mark.full) for case in [CASES[1], *OTHERS])],
)
def test_a_document_does_not_see_the_others(
    mesh: tuple[int, ...], model: dict[str, Any], backbone: dict[str, Any]
) -> None:
    config = tiny(mesh, batch=B, length=L, **backbone, **model)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 256, (B, L + 1)).astype(np.int32)
    other = tokens.copy()
    other[:, : OWN.start] = draw.integers(0, 256, (B, OWN.start))
    other[:, OWN.stop + 1 :] = draw.integers(0, 256, (B, L - OWN.stop))
    first = np.roll(tokens, -OWN.start, axis=1)  # the document alone, at the beginning of the window
    size = OWN.stop - OWN.start
    alone = np.where(np.arange(L) < size, 5, PADDING).astype(np.int32)
    with on_mesh(config):
        random = random_model(config)
        found = loss_and_gradients(random, batch_of(tokens, NUMBERS, OWN))
        assert_close(loss_and_gradients(random, batch_of(other, NUMBERS, OWN)), found, 1e-6)
        assert_close(loss_and_gradients(random, batch_of(first, alone, slice(0, size))), found, 1e-5)
        # No token that stands elsewhere is given a gradient, unless the table is also the unembedding's.
        if not config.model.tie_embeddings:
            others = np.setdiff1d(tokens, tokens[:, OWN])
            assert (found["embedding_VD"][others] == 0).all()
        stream = batch_of(tokens, NUMBERS, OWN)._replace(segments_BL=None)
        assert abs(loss_and_gradients(random, stream)["loss"] - found["loss"]) > 1e-3


def test_positions_begin_anew() -> None:
    with on_mesh(tiny(batch=B, length=L)):
        documents = find_documents(split_batch(np.broadcast_to(NUMBERS, (B, L))))
    assert np.asarray(documents.position_BL)[3].tolist() == [*range(5), 0, *range(7), *range(3)]


@pytest.mark.parametrize("mesh", [(1, 1, 4), pytest.param((1, 1, 2, 2), marks=pytest.mark.full)])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_padding_goes_to_no_expert(mesh: tuple[int, ...], exchange: str) -> None:
    """It takes no room, gets nothing, and the router's losses and loads don't count it."""
    execution = {"exchange": exchange} if exchange != "capacity" else {"capacity_factor": 1.0}
    config = tiny(mesh, batch=B, length=L, z_loss_coefficient=0.1, latent_norm="post_combine", **execution)
    x_BLD = np.random.default_rng(0).standard_normal((B, L, 16)).astype(np.float32)
    padding_BL = np.zeros((B, L), bool)
    padding_BL[:, 4:] = True
    x_BLD[padding_BL] = x_BLD[0, 5]  # all alike
    evaluating = exchange != "capacity"  # a real token loses no choice to padding: three quarters of the room are free
    call = jax.jit(lambda layer, x, mask: layer(x, evaluating, Padding.of(mask)))
    with on_mesh(config):
        layer = jax.tree.map(lambda leaf: leaf[0], random_model(config).layers.mlp)
        y_BLD, aux = call(layer, split_tokens(x_BLD), split_tokens(padding_BL))
        short = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=4))
    with on_mesh(short):
        real_BLD, real = jax.jit(lambda layer, x: layer(x, True))(
            jax.tree.map(lambda leaf: leaf[0], random_model(short).layers.mlp), split_tokens(x_BLD[:, :4])
        )
    y_BLD = np.asarray(y_BLD)
    np.testing.assert_allclose(y_BLD[:, :4], real_BLD, rtol=1e-5, atol=1e-6)
    assert (y_BLD[padding_BL] == 0).all()
    np.testing.assert_allclose(aux.z_loss, real.z_loss, rtol=1e-5)
    np.testing.assert_allclose(aux.router_entropy, real.router_entropy, rtol=1e-5)
    np.testing.assert_allclose(aux.load, real.load, rtol=1e-6)
    assert aux.drop_rate == 0


def masked_batch(config: Config, rows_without: int) -> Batch:
    draw = np.random.default_rng(4)
    tokens = draw.integers(0, 256, (B, L + 1)).astype(np.int32)
    targets = np.where(draw.random((B, L)) < 0.3, NO_TARGET, tokens[:, 1:])
    targets[:rows_without] = NO_TARGET
    return jax.tree.map(split_batch, Batch(tokens[:, :-1], targets.astype(np.int32), np.broadcast_to(NUMBERS, (B, L))))


@pytest.mark.parametrize("mesh", [(1, 1, 1), pytest.param((1, 1, 2, 2), marks=pytest.mark.full)])
def test_the_loss_is_the_mean_over_the_targets(mesh: tuple[int, ...]) -> None:
    config = tiny(mesh, batch=B, length=L)
    with on_mesh(config):
        model, batch = random_model(config), masked_batch(config, 2)
        scores = jax.jit(token_scores)(model, batch)
        loss = jax.jit(loss_fn)(model, batch, None, WHOLE)[1].cross_entropy_U.mean()
    counted = np.asarray(batch.targets_BL) != NO_TARGET
    assert float(loss) == pytest.approx(float(np.asarray(scores.nll_BL)[counted].mean()), rel=1e-6)


@pytest.mark.full
def test_parts_of_a_batch_weigh_as_many_targets_as_they_have() -> None:
    config = tiny(batch=B, length=L, balance="none")
    made = {}
    for parts in (1, 4):
        train = dataclasses.replace(config.train, accumulate_steps=parts)
        with on_mesh(dataclasses.replace(config, train=train)):
            trainer = make_trainer(dataclasses.replace(config, train=train), make_mesh(config))
            state, batch = trainer.init(jax.random.key(0)), masked_batch(config, 3)
            step = trainer.step.lower(state, batch, rate := trainer.rate(0)).compile()
            state, metrics = step(state, batch, rate)
            made[parts] = {"loss": np.asarray(metrics.loss), "norm": np.asarray(metrics.grad_norm)} | leaves(
                state.params
            )
    assert_close(made[4], made[1], 1e-5)
