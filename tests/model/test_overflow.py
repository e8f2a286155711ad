"""model.overflow=next against a brute force, written from the rule (`AllToAll.place`)."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmac_jax.config import Config, ConfigError, with_mesh
from bigmac_jax.model.choose_exchange import predict_seconds
from bigmac_jax.model.exchange import STRATEGIES, AllToAll
from bigmac_jax.model.mesh import EXPERT_GROUP, ExpertGroup, make_mesh
from bigmac_jax.model.moe import MoE
from bigmac_jax.model.router import Padding
from bigmac_jax.model.traffic import exchange_traffic

from . import reference
from .tools import abstract_layer, assert_close, leaves, on_mesh, random_like, split_tokens, tiny

CPU = ExpertGroup((1, 4), "cpu", "")
Pairs = set[tuple[int, int]]


def place_by_rule(ranked_TN: np.ndarray, K: int, E: int, C: int) -> tuple[np.ndarray, Pairs]:
    """experts_TK, and the (token, choice) pairs that are dropped."""
    experts_TK, room, waits = ranked_TN[:, :K].copy(), [C] * E, set()
    for k in range(K):
        for t, expert in enumerate(experts_TK[:, k]):
            if expert == E:
                continue
            if room[expert]:
                room[expert] -= 1
            else:
                waits.add((t, k))
    for n in range(K, ranked_TN.shape[1]):
        first = {t: min(k for u, k in waits if u == t) for t, _ in waits}
        for k, t in sorted((k, t) for t, k in first.items()):
            expert = ranked_TN[t, n]
            if room[expert]:
                room[expert] -= 1
                experts_TK[t, k] = expert
                waits.remove((t, k))
    return experts_TK, waits


def make(num_experts: int, factor: float) -> AllToAll:
    return AllToAll(num_experts, (1, 1), factor, EXPERT_GROUP)


def place(exchange: AllToAll, ranked_TN: Any) -> Any:
    """Of two choices a token."""
    return jax.jit(lambda ranked_TN: exchange.place(ranked_TN, 2))(jnp.asarray(ranked_TN))


def test_by_hand() -> None:
    """C = ceil(0.75 · 4 · 2 / 4) = 2: experts 0 and 1 take tokens 0 and 1, and both choices of 2 and 3 wait. In the
    first try token 2 offers its first choice to expert 2, token 3 to 3; in the second one their second choices."""
    ranked_TN = np.array([[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 3, 2]])
    exchange = make(4, 0.75)
    assert exchange.capacity(4, 2) == 2
    assert place(exchange, ranked_TN[:, :2]).tolist() == ranked_TN[:, :2].tolist()
    assert place(exchange, ranked_TN[:, :3]).tolist() == [[0, 1], [0, 1], [2, 1], [3, 1]]
    placed_TK = place(exchange, ranked_TN)
    assert placed_TK.tolist() == [[0, 1], [0, 1], [2, 3], [3, 2]]
    assert exchange.plan(placed_TK).dropped == 0 and exchange.plan(jnp.asarray(ranked_TN[:, :2])).dropped == 4


def test_first_choices_offer_before_second_ones() -> None:
    """One row an expert. Token 1's second choice and token 2's first one find none and offer to expert 5."""
    ranked_TN = [[0, 1, 2], [3, 1, 5], [0, 4, 5]]
    assert place(make(6, 0.1), ranked_TN).tolist() == [[0, 1], [3, 1], [5, 4]]
    ranked_TN = [[0, 1, 2], [3, 1, 5], [4, 1, 5]]  # both are second ones: token order
    assert place(make(6, 0.1), ranked_TN).tolist() == [[0, 1], [3, 5], [4, 1]]


@pytest.mark.parametrize(
    ("T", "E", "K", "tries", "factor"),
    [(16, 6, 2, 2, 1.0), (24, 8, 3, 1, 0.75), (13, 7, 1, 3, 0.5)],
)
def test_100_random_routings_equal_the_rule(T: int, E: int, K: int, tries: int, factor: float) -> None:
    """Which experts, which drops, loads and slots, with uneven popularity, and tokens with fewer choices or none."""
    exchange, rng, C = make(E, factor), np.random.default_rng(T), make(E, factor).capacity(T, K)
    favour_nE = rng.exponential(0.4, (100, 1, E))
    ranked_nTN = np.argsort(-rng.random((100, T, E)) - favour_nE, axis=-1)[..., : K + tries].astype(np.int32)
    ranked_nTN[rng.random((100, T)) < 0.1, K - 1] = E
    ranked_nTN[rng.random((100, T)) < 0.1] = E

    def run(ranked_TN: Any) -> Any:
        placed_TK = exchange.place(ranked_TN, K)
        return placed_TK, exchange.plan(placed_TK)

    placed_nTK, plans = jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(ranked_nTN))
    moved = drops = 0
    for n in range(100):
        expected_TK, dropped = place_by_rule(ranked_nTN[n], K, E, C)
        np.testing.assert_array_equal(placed_nTK[n], expected_TK)
        real_TK = expected_TK < E
        found = (plans.routes.slot_TK[n] == E * C) & real_TK
        assert set(zip(*(index.tolist() for index in np.nonzero(found)), strict=True)) == dropped
        assert plans.dropped[n] == len(dropped)
        np.testing.assert_array_equal(plans.counts_E[n], np.bincount(expected_TK[real_TK], minlength=E))
        assert all(len(set(row)) == K for row in expected_TK[real_TK.all(1)])  # no expert twice
        moved, drops = moved + (expected_TK != ranked_nTN[n, :, :K]).sum(), drops + len(dropped)
    assert moved > 100 and drops > 20


# Mesh, fields, whether there is padding.
LAYERS = [
    ((1, 1, 1), {}, False),
    ((1, 2, 4), {"capacity_factor": 0.7}, False),
    ((2, 1, 2), {"overlap_chunks": 2, "router_scores": "sigmoid", "router_scale": 2.5}, True),
    ((1, 1, 2, 2), {"balance": "bias", "num_expert_groups": 4, "top_groups": 3, "remat": "layer"}, False),
    ((1, 1, 2), {"structure": "fine_grained", "top_k": 1, "overflow_tries": 3, "exchange": "auto"}, True),
    ((1, 1, 2), {"router_renormalize": False, "wire_dtype": "float32", "structure": "fine_grained"}, False),
]


def overflowing(mesh: tuple[int, ...], **fields: Any) -> Config:
    return tiny(mesh, **{"num_layers": 1, "overflow": "next", "capacity_factor": 0.9, "balance": "none"} | fields)


def place_rank_by_rank(config: Config, scores_BLE: np.ndarray, bias_E: Any, padding_BL: np.ndarray) -> Any:
    """experts_BLK, and whether each is kept, from the rule on each rank's tokens, chunk by chunk."""
    m, mesh = config.model, config.mesh
    E, K = m.expert_count, m.choices
    ranking_BLE = scores_BLE + (0 if bias_E is None else bias_E)
    if m.top_groups < m.num_expert_groups:
        grouped = ranking_BLE.reshape(*ranking_BLE.shape[:2], m.num_expert_groups, -1)
        strength = np.sort(grouped, -1)[..., -m.group_best :].sum(-1)
        out = np.argsort(-strength, -1, kind="stable")[..., m.top_groups :]
        np.put_along_axis(grouped, out[..., None], -np.inf, 2)
        ranking_BLE = grouped.reshape(ranking_BLE.shape)
    ranked_BLN = np.argsort(-ranking_BLE, -1, kind="stable")[..., : K + m.overflow_tries]
    ranked_BLN[padding_BL] = E
    experts_BLK, kept_BLK = ranked_BLN[..., :K].copy(), np.ones((*padding_BL.shape, K), bool)
    B, L = padding_BL.shape
    rows, length = B // (mesh.data * mesh.expert_ranks), L // mesh.tensor
    for b in range(0, B, rows):
        for start in range(0, L, length):
            here = slice(b, b + rows), slice(start, start + length)
            chunks = np.split(ranked_BLN[here].reshape(rows * length, -1), config.execution.overlap_chunks)
            placed, kept = [], []
            for ranked_TN in chunks:
                C = min(len(ranked_TN), math.ceil(round(m.capacity_factor * len(ranked_TN) * K / E, 6)))
                experts_TK, dropped = place_by_rule(ranked_TN, K, E, C)
                placed.append(experts_TK)
                kept.append([[(t, k) not in dropped for k in range(K)] for t in range(len(ranked_TN))])
            experts_BLK[here] = np.concatenate(placed).reshape(rows, length, K)
            kept_BLK[here] = np.concatenate(kept).reshape(rows, length, K)
    return experts_BLK, kept_BLK, (experts_BLK != ranked_BLN[..., :K])


@pytest.mark.parametrize(
    ("mesh", "fields", "padded"), [*LAYERS[:1], *(pytest.param(*case, marks=pytest.mark.full) for case in LAYERS[1:])]
)
def test_the_layer_equals_a_dense_one_with_the_rules_experts(
    mesh: tuple[int, ...], fields: dict[str, Any], padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y, the gradients of y · dy, loads, drops and moves; the reference is in float64, with gates of the experts used,
    renormalised over a token's K, dropped ones among them."""
    config = overflowing(mesh, **fields)
    m, draw = config.model, np.random.default_rng(3).standard_normal
    x_BLD, dy_BLD = (draw((8, 8, 16)).astype(np.float32) for _ in range(2))
    padding_BL = np.zeros((8, 8), bool)
    padding_BL[:, 6:] = padded

    def loss(layer: MoE, x_BLD: Any, dy_BLD: Any, mask_BL: Any) -> Any:
        y_BLD, stats = layer(x_BLD, padding=Padding.of(mask_BL) if padded else None)
        return jnp.sum(y_BLD * dy_BLD), (y_BLD, stats)

    with on_mesh(config):
        layer = random_like(abstract_layer(config), config)
        values = leaves(layer)
        step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        (d_layer, dx), (y, stats) = step(layer, split_tokens(x_BLD), split_tokens(dy_BLD), split_tokens(padding_BL))
        found = leaves(d_layer) | {"dx": np.asarray(dx), "y": np.asarray(y)}
        stats = jax.tree.map(lambda v: np.asarray(v).mean(0), stats)

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        parameters = {name: jnp.asarray(value, jnp.float64) for name, value in values.items()}

        def scores_of(router_DE: Any, x_BLD: Any) -> Any:
            logits_BLE = x_BLD @ router_DE
            return jax.nn.softmax(logits_BLE) if m.router_scores == "softmax" else jax.nn.sigmoid(logits_BLE)

        scores_BLE = np.asarray(scores_of(parameters["router_DE"], jnp.asarray(x_BLD, jnp.float64)))
        bias_E = values.get("router_bias_E")
        experts_BLK, kept_BLK, moved_BLK = place_rank_by_rank(config, scores_BLE, bias_E, padding_BL)
        used_BLKE = experts_BLK[..., None] == np.arange(m.expert_count)

        def router(_: Any, p: Any, x_BLD: Any) -> Any:
            gates_BLK = jnp.where(used_BLKE, scores_of(p["router_DE"], x_BLD)[:, :, None], 0).sum(-1)
            if m.router_renormalize and m.choices > 1:
                gates_BLK = gates_BLK / jnp.maximum(gates_BLK.sum(-1, keepdims=True), 1e-20)
            gates_BLK = jnp.where(kept_BLK, gates_BLK * m.router_scale, 0)
            return (gates_BLK[..., None] * used_BLKE).sum(2), reference.Layer()

        monkeypatch.setattr(reference, "router", router)

        def expected_loss(p: dict[str, Any], x_BLD: Any) -> Any:
            y_BLD = reference.feed_forward(m, p, x_BLD)[0]
            return jnp.sum(y_BLD * dy_BLD), y_BLD

        bias = {name: parameters.pop(name) for name in ("router_bias_E",) if name in parameters}
        gradient = jax.jit(jax.grad(expected_loss, argnums=(0, 1), has_aux=True))
        gradients, y = gradient(parameters, jnp.asarray(x_BLD, jnp.float64))
        expected = gradients[0] | {"dx": gradients[1], "y": y}
        expected = {name: np.asarray(value) for name, value in expected.items()}
    assert all(not found.pop(name).any() for name in bias)
    assert_close(found, expected)
    choices = (~padding_BL).sum() * m.choices
    real_BLK = experts_BLK < m.expert_count
    np.testing.assert_allclose(stats.load, np.bincount(experts_BLK[real_BLK], minlength=m.expert_count) / choices, 1e-6)
    np.testing.assert_allclose(stats.drop_rate, (~kept_BLK).sum() / choices, 1e-6)
    np.testing.assert_allclose(stats.moved_rate, [moved_BLK.sum() / choices], 1e-6)
    assert moved_BLK.sum() > 3


def test_no_placement_changes_a_byte_or_a_program_that_does_not_move() -> None:
    """Evaluation neither drops nor moves, and what training sends is what it sent."""
    config = overflowing((1, 1, 4))
    dropping = dataclasses.replace(config, model=dataclasses.replace(config.model, overflow="drop"))
    assert exchange_traffic(config, 4, CPU) == exchange_traffic(dropping, 4, CPU)
    jaxprs = {}
    for name, given in {"next": config, "drop": dropping}.items():
        with on_mesh(given):
            layer = abstract_layer(given)
            x_BLD = jax.ShapeDtypeStruct((8, 8, 16), jnp.float32, sharding=split_tokens(np.zeros((8, 8, 16))).sharding)
            for evaluating in (False, True):
                call = functools.partial(MoE.__call__, evaluating=evaluating)
                jaxprs[name, evaluating] = str(jax.jit(call).trace(layer, x_BLD).jaxpr)
    assert jaxprs["next", True] == jaxprs["drop", True]
    assert jaxprs["next", False] != jaxprs["drop", False]


def test_auto_takes_an_exchange_that_counts_room_by_expert() -> None:
    config = overflowing((1, 1, 4), exchange="auto", num_experts=64, top_k=8, capacity_factor=1.0)
    group = ExpertGroup((1, 8), "gpu", "")
    training, evaluating = (predict_seconds(config, factor, 4096, group) for factor in (1.0, math.inf))
    assert list(training) == ["all_to_all"] and set(evaluating) == set(STRATEGIES)
    assert {name for name, strategy in STRATEGIES.items() if strategy.moves_choices} == {"all_to_all"}


@pytest.mark.parametrize("exchange", [name for name in STRATEGIES if name != "all_to_all"])
def test_others_are_refused_before_training_alone(exchange: str) -> None:
    config = overflowing((1, 1, 1), exchange=exchange)
    with pytest.raises(ConfigError, match=rf"model\.overflow=next needs .*not execution\.exchange={exchange}; use"):
        make_mesh(config)
    make_mesh(with_mesh(overflowing((1, 1, 1)), [f"execution.exchange={exchange}"]), fit_batch=False)
