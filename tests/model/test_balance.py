"""Balancing: the loss by hand, the sign bias, and quantile balancing against NumPy."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmac_jax.config import Config, ModelConfig, TrainConfig, root
from bigmac_jax.data.batch import PADDING
from bigmac_jax.model.balance import (
    balance_bias,
    balance_loss,
    balance_losses,
    required_bias,
    solve_bias,
    update_bias,
)
from bigmac_jax.model.mesh import place, token_spec
from bigmac_jax.model.router import Padding

from .test_router import LOG, choices, routed
from .tools import on_mesh, random_model, tiny


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_balance_loss_is_one_when_uniform_and_e_when_one_expert_takes_all(scores: str) -> None:
    uniform, one = jnp.full(8, 1 / 8), jnp.eye(8)[3]
    assert balance_loss(uniform, uniform) == pytest.approx(1)
    assert balance_loss(one, one) == pytest.approx(8)
    # Eight tokens, each to its own expert; then all to expert 3.
    spread = routed(40 * np.eye(8) - 20, router_scores=scores, top_k=1)
    skewed = routed(np.tile(40 * np.eye(8)[3] - 20, (8, 1)), router_scores=scores, top_k=1)
    for routing, expected in ((spread, 1), (skewed, 8)):
        load_E = np.bincount(np.ravel(routing.experts_BLK), minlength=8) / 8
        assert balance_loss(routing.shares_UE[0], jnp.asarray(load_E)) == pytest.approx(expected, rel=1e-5)


def test_balance_loss_by_hand() -> None:
    """f = (1/2, 1/4, 1/4, 0) of the choices, P the mean softmax of two tokens."""
    routing = routed([LOG, [LOG[1], LOG[3], LOG[0], LOG[2]]])  # 0.4 0.3 0.2 0.1 and 0.3 0.1 0.4 0.2
    assert choices(routing) == [[0, 1], [2, 0]]
    np.testing.assert_allclose(routing.shares_UE[0], [0.35, 0.2, 0.3, 0.15], rtol=1e-6)
    load_E = jnp.asarray([0.5, 0.25, 0.25, 0])
    assert balance_loss(routing.shares_UE[0], load_E) == pytest.approx(4 * (0.175 + 0.05 + 0.075))
    # The load is a count: no gradient passes through it.
    d_shares, d_load = jax.grad(balance_loss, (0, 1))(routing.shares_UE[0], load_E)
    np.testing.assert_allclose(d_shares, 4 * load_E)
    assert not d_load.any()


def test_balance_losses_of_a_part() -> None:
    """Of two replicas of a part with half of the tokens that means are of: over these, or with the step's load."""
    shares_UE, load_UE = jnp.asarray([[0.3, 0.2], [0.1, 0.4]]), jnp.asarray([[0.5, 0.0], [0.3, 0.2]])
    own = balance_losses(shares_UE[None], load_UE[None])  # f = (0.8, 0.2), P of the two (0.6, 0.4), (0.2, 0.8)
    np.testing.assert_allclose(own, [[2 * (0.8 * 0.6 + 0.2 * 0.4), 2 * (0.8 * 0.2 + 0.2 * 0.8)]], rtol=1e-6)
    given = balance_losses(shares_UE[None], load_UE[None], jnp.asarray([[0.5, 0.5]]))
    np.testing.assert_allclose(given, [[2 * 0.5 * 0.5, 2 * 0.5 * 0.5]], rtol=1e-6)


def test_the_sign_bias() -> None:
    config = Config(model=ModelConfig(num_experts=4, balance="bias", balance_bias_rate=0.01))
    load_E = jnp.asarray([0.5, 0.25, 0.25, 0])
    bias_E = update_bias(config, jnp.asarray([0.5, 0, 0, -0.5]), load_E, load_E[:0])
    np.testing.assert_allclose(bias_E, [0.49, 0, 0, -0.49], rtol=1e-6)


def required(scores_TE: np.ndarray, bias_E: np.ndarray, top_k: int) -> np.ndarray:
    cut_T1 = -np.sort(-(scores_TE + bias_E), axis=1)[:, top_k : top_k + 1]
    return cut_T1 - scores_TE


def expected_bias(scores_TE: np.ndarray, bias_E: np.ndarray, top_k: int) -> np.ndarray:
    """One update, in float64."""
    T, E = scores_TE.shape
    sorted_TE, count = np.sort(required(scores_TE, bias_E, top_k), axis=0), round(T * top_k / E)
    new_E = (sorted_TE[count - 1] + sorted_TE[count]) / 2
    return new_E - new_E.mean()


def random_scores(experts: int, tokens: int, seed: int) -> np.ndarray:
    """Sigmoids of logits whose means differ by expert, every fourth rounded, so that there are ties."""
    draw = np.random.default_rng(seed)
    logits_TE = draw.standard_normal((tokens, experts)) + draw.standard_normal(experts)
    scores_TE = (1 / (1 + np.exp(-logits_TE))).astype(np.float32)
    return np.round(scores_TE, 2) if seed % 4 == 0 else scores_TE


def quantile(experts: int, top_k: int, mesh: tuple[int, ...] = (1, 1, 1), batch: int = 8, length: int = 40) -> Config:
    return tiny(mesh, batch, length, num_experts=experts, top_k=top_k, balance="quantile", structure="fine_grained")


@functools.lru_cache
def compiled(config: Config, sorting: bool) -> Any:
    """One update, on the current mesh. `sorting` tells programs apart where a test has changed the limit."""

    def both(scores_BLE: Any, bias_E: Any, padding: Any) -> Any:
        return solve_bias(config, required_bias(config, scores_BLE, bias_E, padding)[0], bias_E)

    return jax.jit(both)


def update(config: Config, scores_TE: np.ndarray, bias_E: np.ndarray, padding_BL: Any = None) -> np.ndarray:
    """On the current mesh."""
    B, L = config.data.batch_size, config.data.sequence_length
    scores_BLE = place(scores_TE.reshape(B, L, -1), token_spec(3))
    padding = None if padding_BL is None else Padding.of(place(padding_BL, token_spec(2)))
    return np.asarray(compiled(config, config.sorts_biases)(scores_BLE, jnp.asarray(bias_E, jnp.float32), padding))


SHAPES = ((64, 8), (40, 8), (12, 4))


@pytest.mark.parametrize(("experts", "top_k"), SHAPES)
def test_quantile_update(experts: int, top_k: int) -> None:
    """Of 200 random score matrices, from biases of zero and from random ones."""
    config = quantile(experts, top_k)
    with on_mesh(config):
        for seed in range(200):
            scores_TE = random_scores(experts, 320, seed)
            bias_E = np.random.default_rng(seed).standard_normal(experts).astype(np.float32) * (seed % 2) / 4
            found = update(config, scores_TE, bias_E)
            np.testing.assert_allclose(found, expected_bias(np.float64(scores_TE), bias_E, top_k), atol=1e-6)


@pytest.mark.parametrize(("experts", "top_k"), [pytest.param(*SHAPES[0], marks=pytest.mark.full), *SHAPES[1:]])
def test_quantiles_balance_the_loads(experts: int, top_k: int) -> None:
    """Repeated on the same scores, until every expert has its share within 2 %."""
    config = quantile(experts, top_k, batch=8, length=512)
    scores_TE, bias_E = random_scores(experts, 4096, 1), np.zeros(experts)

    def loads() -> np.ndarray:
        chosen_TK = np.argsort(-(scores_TE + bias_E), axis=1, kind="stable")[:, :top_k]
        return np.bincount(chosen_TK.ravel(), minlength=experts) / (4096 * top_k / experts)

    before = loads()
    with on_mesh(config):
        for _ in range(60):
            bias_E = update(config, scores_TE, bias_E)
    assert before.max() > 1.5 and before.min() < 0.5
    np.testing.assert_allclose(loads(), 1, atol=0.02)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2), (1, 2, 2, 2)], ids=str)
def test_histograms_come_near_the_quantiles(mesh: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """On every mesh, within a bin of what sorting gives: a fortieth of how far the bias moves."""
    config, scores_TE = quantile(12, 4, mesh), random_scores(12, 320, 1)
    bias_E = np.linspace(-0.25, 0.25, 12).astype(np.float32)
    monkeypatch.setattr(root, "_MOST_SORTED", 0)
    with on_mesh(config):
        found = update(config, scores_TE, bias_E)
    expected = expected_bias(np.float64(scores_TE), bias_E, 4)
    np.testing.assert_allclose(found, expected, atol=np.abs(expected - bias_E).max() / 40)


@pytest.mark.full
@pytest.mark.parametrize(("experts", "top_k", "spread"), [(128, 8, 0.3), (64, 8, 0.02)])
def test_histograms_balance_scores_that_lie_close_together(
    experts: int, top_k: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A softmax over many experts: new tokens each step, of which some experts are preferred. After a few steps loads
    are about as even as those of 320 tokens can be."""
    config, draw = quantile(experts, top_k), np.random.default_rng(0)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, router_scores="softmax"))
    preferred_E, bias_E, loads = draw.standard_normal(experts) * spread, np.zeros(experts), []
    with on_mesh(config):
        for sorting in (True, False):
            monkeypatch.setattr(root, "_MOST_SORTED", 2**22 if sorting else 0)
            draw, bias_E = np.random.default_rng(1), np.zeros(experts)
            for _ in range(6):
                logits_TE = draw.standard_normal((320, experts)) * spread + preferred_E
                scores_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(-1, keepdims=True)
                chosen_TK = np.argsort(-(scores_TE + bias_E), axis=1)[:, :top_k]
                loads.append(np.bincount(chosen_TK.ravel(), minlength=experts) * experts / (320 * top_k))
                bias_E = update(config, np.float32(scores_TE), bias_E)
    assert loads[0].std() > 0.8
    by_sorting, by_bins = (np.mean([load.std() for load in of[3:]]) for of in (loads[:6], loads[6:]))
    assert by_bins < 1.1 * by_sorting


def test_padding_counts_for_nothing() -> None:
    config, scores_TE = quantile(12, 4), random_scores(12, 320, 1)
    masked = dataclasses.replace(config, data=dataclasses.replace(config.data, documents="masked"))
    padding_BL = np.zeros((8, 40), bool)
    padding_BL[:, 25:] = True
    scores_TE[padding_BL.ravel()] = 0.9 * (np.arange(12) == 3)  # all would crowd one expert
    with on_mesh(config):
        found = update(masked, scores_TE, np.zeros(12), padding_BL)
    expected = expected_bias(np.float64(scores_TE[~padding_BL.ravel()]), np.zeros(12), 4)
    np.testing.assert_allclose(found, expected, atol=2 * 2 / 1000)


def test_parts_of_a_batch_are_counted_together() -> None:
    """The mean of the parts' counts is solved as the counts of all."""
    config, scores_TE = quantile(12, 4), random_scores(12, 320, 1)
    parted = dataclasses.replace(config, train=TrainConfig(accumulate_steps=2))
    half = dataclasses.replace(parted, data=dataclasses.replace(config.data, batch_size=4))
    bias_E = jnp.linspace(-0.25, 0.25, 12)
    with on_mesh(config):
        halves = [place(v.reshape(4, 40, 12), token_spec(3)) for v in np.split(scores_TE, 2)]
        counts = [required_bias(half, scores_BLE, bias_E, None)[0] for scores_BLE in halves]
        found = solve_bias(parted, (counts[0] + counts[1]) / 2, bias_E)
        np.testing.assert_allclose(found, update(parted, scores_TE, np.asarray(bias_E)), atol=1e-6)


def test_a_layer_reports_what_its_tokens_require() -> None:
    """The whole model on a mesh: required biases by layer, of the scores and the bias that chose."""
    config = tiny((2, 1, 2), balance="quantile", router_scores="sigmoid", num_layers=1)
    tokens = np.random.default_rng(0).integers(264, size=(8, 8), dtype=np.int32)
    with on_mesh(config):
        bias_E = np.linspace(-0.1, 0.1, 8).astype(np.float32)
        model = random_model(config, {"layers.mlp.router_bias_E": bias_E})
        _, aux = jax.jit(lambda model, tokens: model(tokens))(model, place(tokens, token_spec(2)))
        moved = update_bias(config, model.layers.mlp.router_bias_E[...], aux.load, aux.quantile_stats)
    assert aux.quantile_stats.shape == (1, 8, 64)
    chosen = np.asarray(aux.load)[0] * 64 * 3
    # An expert is chosen where its bias exceeds what the token requires.
    np.testing.assert_allclose(chosen, (np.asarray(aux.quantile_stats)[0] < bias_E[:, None] - 1e-6).sum(1))
    assert np.asarray(moved)[0] @ (chosen - 24) < bias_E @ (chosen - 24)


@pytest.mark.parametrize("step", ["next", "same"])
def test_batches_with_padding_come_to_the_layer(step: str) -> None:
    """What stands in the padding moves no bias."""
    config = tiny(balance="quantile", balance_step=step, num_layers=1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, documents="masked"))
    tokens = np.random.default_rng(0).integers(264, size=(8, 8), dtype=np.int32)
    segments = np.where(np.arange(8) < 5, 0, PADDING)[None].repeat(8, 0).astype(np.int32)
    with on_mesh(config):
        run, model = jax.jit(lambda model, tokens, of: model(tokens, of)[1].quantile_stats), random_model(config)
        one, other, changed = (
            np.asarray(run(model, *(place(v, token_spec(2)) for v in (there, segments))))
            for there in (tokens, np.where(segments == PADDING, 7, tokens), 263 - tokens)
        )
    np.testing.assert_array_equal(one, other)
    assert (one != changed).any()
    if step == "next":
        assert one.shape == (1, 8, 1001)
        np.testing.assert_array_equal(one[0, :, -1], 40)


def expected_even(scores_TE: np.ndarray, bias_E: np.ndarray, top_k: int) -> np.ndarray:
    """Four dual steps, in float64: below each bias lie what round(T·K/E) tokens require."""
    T, E = scores_TE.shape
    for _ in range(4):
        bias_E = np.sort(required(scores_TE, bias_E, top_k), axis=0)[round(T * top_k / E)]
        bias_E = bias_E - bias_E.mean()
    return bias_E


def even(config: Config, scores_TE: np.ndarray, bias_E: np.ndarray, padding_BL: Any = None) -> np.ndarray:
    """On the current mesh."""
    B, L = config.data.batch_size, config.data.sequence_length
    scores_BLE = place(scores_TE.reshape(B, L, -1), token_spec(3))
    padding = None if padding_BL is None else Padding.of(place(padding_BL, token_spec(2)))
    return np.asarray(_even(config.model, scores_BLE, jnp.asarray(bias_E, jnp.float32), padding))


_even = jax.jit(balance_bias, static_argnums=0)


@pytest.mark.parametrize(("experts", "top_k"), SHAPES)
def test_the_bias_that_evens_a_step(experts: int, top_k: int) -> None:
    """Against NumPy, from biases of zero and from random ones; and what it is for."""
    config = quantile(experts, top_k)
    with on_mesh(config):
        for seed in range(1, 40, 2):  # without ties: what falls between two of them is nobody's
            scores_TE = random_scores(experts, 320, seed)
            bias_E = np.random.default_rng(seed).standard_normal(experts).astype(np.float32) * (seed % 4 == 1) / 4
            found = even(config, scores_TE, bias_E)
            np.testing.assert_allclose(found, expected_even(np.float64(scores_TE), bias_E, top_k), atol=3e-5)
            chosen_TK = np.argsort(-(scores_TE + found), axis=1)[:, :top_k]
            loads_E = np.bincount(chosen_TK.ravel(), minlength=experts) / (320 * top_k / experts)
            assert loads_E.std() < 0.25


@pytest.mark.parametrize("mesh", [(2, 1, 2), (1, 2, 2, 2)], ids=str)
def test_every_mesh_evens_a_step_alike(mesh: tuple[int, ...]) -> None:
    """With padding, which counts for nothing."""
    scores_TE, bias_E = random_scores(12, 320, 1), np.linspace(-0.25, 0.25, 12).astype(np.float32)
    padding_BL = np.zeros((8, 40), bool)
    padding_BL[:, 25:] = True
    expected = expected_even(np.float64(scores_TE[~padding_BL.ravel()]), bias_E, 4)
    scores_TE[padding_BL.ravel()] = 0.9 * (np.arange(12) == 3)  # all would crowd one expert
    config = quantile(12, 4, mesh)
    with on_mesh(config):
        np.testing.assert_allclose(even(config, scores_TE, bias_E, padding_BL), expected, atol=3e-5)


def test_a_layer_balances_its_own_step() -> None:
    """In training it chooses by the bias that it solves, and reports it; evaluation has the one of the last step."""
    config = tiny((2, 1, 2), balance="quantile", balance_step="same", router_scores="sigmoid", num_layers=1)
    before = dataclasses.replace(config, model=dataclasses.replace(config.model, balance_step="next"))
    tokens = np.random.default_rng(0).integers(264, size=(8, 8), dtype=np.int32)
    run = jax.jit(lambda model, tokens, evaluating: model(tokens, evaluating=evaluating), static_argnums=2)

    def applied(config: Config, bias_E: np.ndarray, evaluating: bool) -> tuple[Any, Any]:
        model = random_model(config, {"layers.mlp.router_bias_E": np.float32(bias_E)})
        return jax.tree.map(np.asarray, run(model, place(tokens, token_spec(2)), evaluating))

    with on_mesh(config):
        bias_E = np.linspace(-0.3, 0.3, 8)
        logits_BLV, aux = applied(config, bias_E, False)
        solved_E = aux.quantile_stats[0]
        (expected_BLV, expected), (other_BLV, other) = (applied(before, b_E, False) for b_E in (solved_E, bias_E))
        np.testing.assert_array_equal(logits_BLV, expected_BLV)
        np.testing.assert_array_equal(aux.load, expected.load)
        assert aux.load.std() < other.load.std() / 2 and np.abs(logits_BLV - other_BLV).max() > 1e-3
        moved = update_bias(config, jnp.asarray(bias_E)[None], aux.load, aux.quantile_stats)
        np.testing.assert_array_equal(moved[0], solved_E)
        np.testing.assert_array_equal(applied(config, bias_E, True)[0], applied(before, bias_E, True)[0])


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_quantile_lies_between_two_tokens(top_k: int) -> None:
    """Of two tokens and four experts: half a token, or one and a half, are to choose each, and the middle is taken."""
    config = tiny(batch=1, length=2, num_experts=4, top_k=top_k, balance="quantile", balance_step="next")
    required_1ET: Any = np.array([[[0.0, 1.0], [2.0, 4.0], [1.0, 1.0], [5.0, 9.0]]])
    assert config.sorts_biases
    middles_E = np.array([0.5, 3, 1, 7]) - 2.875
    unread: Any = np.ones((1, 4))
    np.testing.assert_allclose(update_bias(config, unread, unread, required_1ET), [middles_E])


def test_quantiles_of_a_histogram_by_hand() -> None:
    """Five of eight tokens are wanted. Where a bin has all of them, they lie evenly in it; where the first edge has
    enough, it is the bias."""
    config = tiny(num_experts=8, top_k=5, balance="quantile", balance_step="next", mtp_modules=1)
    assert not config.sorts_biases
    bias_E, range_ = np.array([0.5, -0.5, 0, 0, 0, 0, 0, 0]), 0.5 + 0.5 + 1
    side = 1e-6 ** (1 - np.arange(500) / 499)  # from a millionth of the range to all of it
    edges_Eb = bias_E[:, None] + range_ * np.concatenate([-side[::-1], [0], side])
    # The last edge before the tokens, and how many stand before it.
    last_E, before_E = np.array([999, 0, 499, 500, 999, 0, 750, 250]), np.array([0, 0, 0, 0, 3, 4.5, 2, 0])
    counts_Eb = np.where(np.arange(1001) > last_E[:, None], 8.0, before_E[:, None])
    counts_Eb[1] = 8
    inside_E = (5 - before_E) / (8 - before_E)
    at, after = edges_Eb[np.arange(8), last_E], edges_Eb[np.arange(8), last_E + 1]
    expected_E = at + inside_E * (after - at)
    expected_E[1] = edges_Eb[1, 0]
    found = jax.jit(functools.partial(update_bias, config))(bias_E[None], np.ones((1, 8)), counts_Eb[None])
    np.testing.assert_allclose(found[0], expected_E - expected_E.mean(), rtol=1e-5, atol=1e-6)
