"""DPO against NumPy on random batches; what training and generation say of the same completion."""

import contextlib
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tools import assert_close, leaves, on_mesh, random_model, some, split_batch, tiny

from bigmac_jax.config import Config, TuningConfig
from bigmac_jax.data.batch import NO_TARGET, PADDING, Batch
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.inference.generator import Generator
from bigmac_jax.model.mesh import place
from bigmac_jax.training.dpo import dpo_loss, sum_pairs
from bigmac_jax.training.loss import WHOLE, loss_fn, token_nll
from bigmac_jax.tuning import reference_scores
from bigmac_jax.tuning.reference_scores import reference_nll

BETA = 0.3
MESHES = {"1x1": (1, 1, 1, 1), "ep 2 x tensor 2": (1, 1, 2, 2), "2x2": (2, 1, 2, 1), "ep 8": (1, 1, 8, 1)}


def tuned(mesh: Any = (1, 1, 1, 1), length: int = 16, **fields: Any) -> Config:
    config = tiny(mesh, length=length, **{"num_layers": 1, "num_shared_experts": 1} | fields)
    train = dataclasses.replace(config.train, init_from="some")
    tuning, data = TuningConfig(objective="dpo", dpo_beta=BETA), dataclasses.replace(config.data, source="rows.jsonl")
    return dataclasses.replace(config, tuning=tuning, train=train, data=data)


def random_batch(config: Config, seed: int) -> Batch:
    """Rows of two or three pairs, and padding."""
    draw = np.random.default_rng(seed)
    B, L = config.data.batch_size, config.data.sequence_length
    inputs, targets = draw.integers(256, size=(2, B, L), dtype=np.int32)
    segments = np.full((B, L), PADDING, np.int32)
    for row in segments:
        cuts = np.sort(draw.choice(np.arange(1, L), size=2 * int(draw.integers(1, 4)), replace=False))
        for number, (start, stop) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True)):
            row[start:stop] = number
    targets[(draw.random((B, L)) < 0.3) | (segments == PADDING)] = NO_TARGET
    return Batch(inputs, targets, segments, draw.uniform(3, 8, size=(B, L)).astype(np.float32))


def expected(batch: Batch, nll_BL: np.ndarray) -> tuple[float, float, float, np.ndarray]:
    """Loss, accuracy, mean margin, and the loss's gradient in nll, pair by pair in float64."""
    losses, right, margin, gradient = [], [], [], np.zeros(nll_BL.shape)
    places = []
    for row in range(len(nll_BL)):
        for pair in range((batch.segments_BL[row].max() + 1) // 2):
            gains, here = [], []
            for segment in (2 * pair, 2 * pair + 1):
                at = (batch.segments_BL[row] == segment) & (batch.targets_BL[row] != NO_TARGET)
                gains.append(float((batch.reference_BL[row].astype(np.float64) - nll_BL[row])[at].sum()))
                here.append(at)
            value = BETA * (gains[0] - gains[1])
            losses.append(np.log1p(np.exp(-value)))
            right.append(value > 0)
            margin.append(value)
            places.append((row, here, -1 / (1 + np.exp(value))))
    for row, (chosen, other), slope in places:
        gradient[row][chosen] -= BETA * slope / len(losses)
        gradient[row][other] += BETA * slope / len(losses)
    return float(np.mean(losses)), float(np.mean(right)), float(np.mean(margin)), gradient


def test_loss_and_gradient_of_50_random_batches() -> None:
    config = tuned()
    with on_mesh(config):

        def loss(nll_BL: Any, batch: Batch) -> Any:
            gain_BL = jnp.where(batch.targets_BL != NO_TARGET, batch.reference_BL - nll_BL, 0)
            rows = sum_pairs(config, gain_BL, batch.segments_BL)
            count = jnp.sum((batch.segments_BL.max(1) + 1) // 2)
            of_loss, right, margin = (v.sum() / count for v in rows)
            return of_loss, (right, margin)

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        for seed in range(50):
            batch = random_batch(config, seed)
            nll = np.random.default_rng(seed + 100).uniform(3, 8, batch.inputs_BL.shape).astype(np.float32)
            (found, (right, margin)), gradient = step(split_batch(nll), jax.tree.map(split_batch, batch))
            wanted = expected(batch, nll.astype(np.float64))
            np.testing.assert_allclose([found, right, margin], wanted[:3], rtol=2e-5, atol=1e-6)
            np.testing.assert_allclose(gradient, wanted[3], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", some(MESHES, every=4))
def test_gradients_of_the_model_on_every_mesh(name: str) -> None:
    """Of a loss whose targets weigh what the hand has for the gradient in -log p: the parameters' are the same."""
    one, config = tuned(balance_coefficient=0.0), tuned(MESHES[name], balance_coefficient=0.0)
    batch = random_batch(config, 1)

    def gradients(config: Config, loss: Any) -> Any:
        with on_mesh(config):
            placed = jax.tree.map(split_batch, batch)
            return leaves(jax.jit(jax.grad(loss))(random_model(config), placed))

    ours = gradients(config, lambda model, batch: dpo_loss(model, batch, dropout_key=None, share=WHOLE)[0])
    with on_mesh(one):
        nll_BL = jax.jit(lambda m, b: token_nll(m, b)[0])(random_model(one), jax.tree.map(split_batch, batch))
        weights = expected(batch, np.asarray(nll_BL, np.float64))[3]

    def weighted(model: Any, batch: Batch) -> Any:
        logits_BLV, _ = model(batch.inputs_BL, batch.segments_BL)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), jnp.maximum(batch.targets_BL, 0)[..., None], -1)
        return -jnp.sum(jnp.asarray(weights, jnp.float32) * log_p[..., 0])

    assert_close(ours, gradients(one, weighted), 3e-5)


def test_the_reference_scores_every_window_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven in batches of three, which two ranks make four: the last one is not full."""
    config = tuned((2, 1, 1, 1), structure="dense", num_shared_experts=0)
    batch = random_batch(config, 3)
    rows = [np.stack([of[w] for of in batch[:3]] + [np.zeros_like(batch.inputs_BL[w])]) for w in range(8)]
    shapes, told = list[Any](), list[Any]()
    monkeypatch.setattr(
        reference_scores, "place", lambda b, spec: (shapes.append(b.inputs_BL.shape), place(b, spec))[1]
    )

    @contextlib.contextmanager
    def progress(*given: Any, silent: bool) -> Iterator[Any]:
        told.append([*given, silent])
        yield SimpleNamespace(update=told.append)

    monkeypatch.setattr(reference_scores, "Progress", progress)
    with on_mesh(config):
        model = random_model(config)
        found = reference_nll(model, rows[:7], batch_size=3, quiet=True)  # type: ignore[arg-type]
        nll_BL = jax.jit(lambda m, b: token_nll(m, b)[0])(model, jax.tree.map(split_batch, batch))
    assert told == [["reference", 7, "window", True], 4, 3]
    assert shapes == [(4, 16)] * 2 and found.shape == (7, 16) and found.dtype == np.float32
    there = batch.targets_BL[:7] != NO_TARGET
    np.testing.assert_allclose(found[there], np.asarray(nll_BL)[:7][there], rtol=1e-5)


@pytest.mark.full
def test_tokens_are_as_likely_as_the_loss_of_pretraining_has_them() -> None:
    config = tuned((1, 1, 2, 2), balance_coefficient=0.0)
    batch = random_batch(config, 2)
    with on_mesh(config):
        placed, model = jax.tree.map(split_batch, batch), random_model(config)
        nll_BL = np.asarray(jax.jit(lambda m, b: token_nll(m, b)[0])(model, placed))
        mean = np.asarray(jax.jit(lambda m, b: loss_fn(m, b, dropout_key=None, share=WHOLE)[0])(model, placed))
    np.testing.assert_allclose(nll_BL[batch.targets_BL != NO_TARGET].mean(), mean, rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("name", MESHES)
def test_training_and_generation_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sampled completions: log-probabilities, and the experts that each token is sent to in each layer."""
    from bigmac_jax.model.moe import MoE

    config = tuned(MESHES[name], length=32, num_layers=2)
    routed: list[tuple[np.ndarray, np.ndarray]] = []  # rows that a router read, and the experts it chose
    routing_of = MoE.route

    def recorded(layer: MoE, x_BLD: jax.Array, *arguments: Any) -> Any:
        routing, quantile_stats = routing_of(layer, x_BLD, *arguments)
        whole = jax.sharding.reshard((x_BLD, routing.experts_BLK), jax.sharding.PartitionSpec(None, None, None))
        jax.debug.callback(lambda x, experts: routed.append((np.asarray(x), np.asarray(experts))), *whole)
        return routing, quantile_stats

    prompts = [tuple(range(40 + i, 45 + 2 * i)) for i in range(4)]
    with on_mesh(config):
        model = random_model(config)
        generator = Generator(config, model, batch_size=8, tokenizer=ByteTokenizer())
        done = generator.generate(prompts, max_tokens=8, temperature=1.0, ignore_eos=True)
        B, L = config.data.batch_size, 32
        inputs, targets, segments = np.zeros((3, B, L), np.int32)
        targets[:], segments[:] = NO_TARGET, PADDING
        for row, (prompt, completion) in enumerate(zip(prompts, done, strict=True)):
            tokens = np.array([*prompt, *completion.tokens], np.int32)
            inputs[row, : len(tokens) - 1], segments[row, : len(tokens) - 1] = tokens[:-1], 0
            targets[row, len(prompt) - 1 : len(tokens) - 1] = completion.tokens
        batch = jax.tree.map(split_batch, Batch(inputs, targets, segments))
        nll_BL = np.asarray(jax.jit(lambda m, b: token_nll(m, b)[0])(model, batch))
        for row, completion in enumerate(done):
            ours = -nll_BL[row][targets[row] != NO_TARGET]
            np.testing.assert_allclose(ours, completion.logprobs, atol=1e-5)
        # The experts of a prompt and its completion: read at once, and read from the cache token by token.
        monkeypatch.setattr(MoE, "route", recorded)
        jax.clear_caches()  # programs that were traced before do not record
        jax.block_until_ready(jax.jit(lambda m, b: token_nll(m, b)[0])(model, batch))
        jax.effects_barrier()
        length = len(prompts[0]) + 7
        of_training = {x.tobytes(): (x[0, :length], experts[0, :length]) for x, experts in routed}.values()
        assert len(of_training) == config.model.num_layers
        routed.clear()
        alone = Generator(config, model, batch_size=1, tokenizer=ByteTokenizer())
        assert alone.generate(prompts[:1], max_tokens=8, temperature=1.0, ignore_eos=True)[0].tokens == done[0].tokens
        jax.effects_barrier()
        # Callbacks come in any order: a row is known by what the router read.
        x_TD = np.concatenate([x.reshape(-1, x.shape[-1]) for x, _ in routed])
        experts_TK = np.concatenate([experts.reshape(-1, experts.shape[-1]) for _, experts in routed])
        for x_LD, experts_LK in of_training:
            distance_LT = np.abs(x_LD[:, None] - x_TD).max(-1)
            assert distance_LT.min(-1).max() < 1e-4
            np.testing.assert_array_equal(experts_TK[distance_LT.argmin(-1)], experts_LK)
    jax.clear_caches()
