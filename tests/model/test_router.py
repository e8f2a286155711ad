"""The router against hand-worked tables. The logits are the tokens: the router's matrix is the identity."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmac_jax.config import ModelConfig
from bigmac_jax.model.gathering import Crossing, Weight
from bigmac_jax.model.router import Routing, choose_experts, score_experts

LOG = [math.log(v) for v in (4, 3, 2, 1)]  # softmax: 0.4, 0.3, 0.2, 0.1


EXACT = Crossing("float32", "float32", "float32")


def routed(logits: Any, bias: Any = None, take: int | None = None, **model: Any) -> Routing:
    """Routes one sequence of tokens, [L, E] logits."""
    logits_BLE = jnp.asarray(logits, jnp.float32)[None]
    E = logits_BLE.shape[-1]
    config = ModelConfig(**({"structure": "bigmac", "num_experts": E, "top_k": 2} | model))
    scores = score_experts(config, logits_BLE, [Weight(jnp.eye(E), EXACT)])
    taken = None if take is None else jnp.int32(take)
    return choose_experts(config, scores, None if bias is None else jnp.asarray(bias, jnp.float32), choices=taken)


def choices(routing: Routing) -> list[list[int]]:
    return routing.experts_BLK[0].tolist()


@pytest.mark.parametrize(
    ("model", "gates"),
    [
        ({"router_renormalize": False}, [0.4, 0.3]),
        ({}, [4 / 7, 3 / 7]),
        ({"router_scale": 2.5}, [10 / 7, 7.5 / 7]),
        ({"router_renormalize": False, "router_scale": 2.5}, [1.0, 0.75]),
        ({"top_k": 1}, [0.4]),  # over itself it would be 1, and the router would learn from no loss but the balance's
        ({"top_k": 4, "router_renormalize": False}, [0.4, 0.3, 0.2, 0.1]),
        # sigmoid(log v) = v / (v + 1): 4/5, 3/4, 2/3, 1/2
        ({"router_scores": "sigmoid", "router_renormalize": False}, [0.8, 0.75]),
        ({"router_scores": "sigmoid"}, [16 / 31, 15 / 31]),
        ({"router_scores": "sigmoid", "router_scale": 3.1}, [1.6, 1.5]),
    ],
)
def test_gates(model: dict[str, Any], gates: list[float]) -> None:
    forwards, backwards = LOG, LOG[::-1]
    routing = routed([forwards, backwards], **model)
    assert choices(routing) == [list(range(4))[: len(gates)], list(range(3, -1, -1))[: len(gates)]]
    np.testing.assert_allclose(routing.gates_BLK[0], [gates, gates], rtol=1e-6)
    assert routing.gates_BLK.dtype == jnp.float32


def test_gates_are_of_the_experts_that_were_placed() -> None:
    """The second choice of the first token, which is full, goes to its third expert; 0.4 and 0.2 of 0.6 remain."""
    config = ModelConfig(num_experts=4, top_k=2, capacity_factor=1.0, overflow="next", overflow_tries=1)

    def place(ranked_BLN: jax.Array) -> jax.Array:
        assert ranked_BLN.tolist() == [[[0, 1, 2], [3, 2, 1]]]
        return jnp.asarray([[[0, 2], [3, 2]]])

    scores = score_experts(config, jnp.asarray([[LOG, LOG[::-1]]]), [Weight(jnp.eye(4), EXACT)])
    routing = choose_experts(config, scores, None, place=place)
    np.testing.assert_allclose(routing.gates_BLK[0], [[2 / 3, 1 / 3], [4 / 7, 3 / 7]], rtol=1e-6)
    np.testing.assert_allclose(routing.moved_U1, [[0.25]])
    assert routing.experts_BLK.tolist() == [[[0, 2], [3, 2]]] and routed([LOG]).moved_U1.size == 0


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_ties_go_to_the_lowest_index(scores: str) -> None:
    logits = [[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 1]]
    assert choices(routed(logits, router_scores=scores)) == [[0, 1], [1, 0], [0, 2]]
    assert choices(routed(logits, router_scores=scores, num_expert_groups=2))[0] == [0, 1]  # groups tie, too


def test_the_bias_moves_the_choice_and_not_the_gates() -> None:
    model = {"balance": "bias", "router_renormalize": False}
    assert choices(routed([LOG], [0, 0, 0, 0], **model)) == [[0, 1]]
    routing = routed([LOG], [0, -0.15, 0, 0.15], **model)  # ranking 0.4, 0.15, 0.2, 0.25
    assert choices(routing) == [[0, 3]]
    np.testing.assert_allclose(routing.gates_BLK[0], [[0.4, 0.1]], rtol=1e-6)
    np.testing.assert_allclose(routing.shares_UE[0], [0.4, 0.3, 0.2, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    ("scores", "model", "expected"),
    [
        # Four groups of two. K / top_groups = 1 best of each counts: 8, 7, 5, 6.
        ([8, 0, 1, 7, 5, 4, 6, 3], {"top_k": 2, "top_groups": 2}, [0, 3]),
        ([8, 0, 1, 7, 5, 4, 6, 3], {"top_k": 3, "top_groups": 2}, [0, 3, 2]),  # not 4, 6: their groups are out
        # Of DeepSeek-V3's code, and transformers', the two best: 8, 8, 9, 9, of which equal ones go by index.
        ([8, 0, 1, 7, 5, 4, 6, 3], {"top_k": 2, "top_groups": 2, "group_scores": "top_2"}, [6, 4]),
        # Two best count: 8, 8, 9, 9, so groups 2 and 3 win although the single best are elsewhere.
        ([8, 0, 1, 7, 5, 4, 6, 3], {"top_k": 4, "top_groups": 2}, [6, 4, 5, 7]),
        ([8, 0, 1, 7, 5, 4, 6, 3], {"top_k": 2, "top_groups": 1}, [6, 7]) ,  # groups 2 and 3 tie at 9 but for rounding
        ([8, 0, 1, 7, 5, 4, 6, 3], {"top_k": 4, "top_groups": 4}, [0, 3, 6, 4]),  # all groups: no limit
    ],
)  # fmt: skip
def test_groups_limit_the_choice(scores: list[float], model: dict[str, Any], expected: list[int]) -> None:
    """Scores are given; the logits are their inverse sigmoids."""
    share = np.asarray(scores) / 10 + 0.05 + np.linspace(0, 0.001, 8)  # later ones a little larger: no ties
    routing = routed([np.log(share / (1 - share))], router_scores="sigmoid", num_expert_groups=4, **model)
    assert choices(routing) == [expected]


def test_the_bias_chooses_the_groups_too() -> None:
    share = np.array([0.9, 0.8, 0.3, 0.2])
    model = {"router_scores": "sigmoid", "num_expert_groups": 2, "balance": "bias"}
    assert choices(routed([np.log(share / (1 - share))], [0, 0, 0, 0], **model)) == [[0, 1]]
    assert choices(routed([np.log(share / (1 - share))], [0, 0, 0.8, 0.8], **model)) == [[2, 3]]


def test_z_loss_and_entropy_by_hand() -> None:
    """logsumexp is log 10 for the first token and log 4 for the second."""
    routing = routed([LOG, [0, 0, 0, 0]])
    assert routing.z_loss_U[0] == pytest.approx((math.log(10) ** 2 + math.log(4) ** 2) / 2, rel=1e-6)
    first = -sum(p * math.log(p) for p in (0.4, 0.3, 0.2, 0.1))
    assert routing.entropy_U[0] == pytest.approx((first + math.log(4)) / 2, rel=1e-6)


def test_sigmoid_shares_are_normalised_per_token() -> None:
    routing = routed([[0, 0, 0, 0], LOG], router_scores="sigmoid")
    second = np.array([4 / 5, 3 / 4, 2 / 3, 1 / 2])
    np.testing.assert_allclose(routing.shares_UE[0], (0.25 + second / second.sum()) / 2, rtol=1e-6)


def test_the_router_computes_in_float32() -> None:
    """Two experts that bfloat16 cannot tell apart."""
    x_BLD, w_DE = jnp.ones((1, 1, 1), jnp.bfloat16), jnp.asarray([[1.0, 1.001]])
    config = ModelConfig(num_experts=2, top_k=1)
    routing = choose_experts(config, score_experts(config, x_BLD, [Weight(w_DE, EXACT)]), None)
    assert choices(routing) == [[1]]
    assert routing.gates_BLK.dtype == routing.shares_UE.dtype == jnp.float32


def test_gates_carry_the_gradient_to_every_score() -> None:
    """Renormalised softmax gates are a softmax over the chosen logits; d g_0 / d logit_i = g_0 (δ_0i − g_i)."""
    g = jax.grad(lambda logits: routed([logits]).gates_BLK[0, 0, 0])(jnp.asarray(LOG))
    np.testing.assert_allclose(g, [12 / 49, -12 / 49, 0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("take", "model", "experts", "gates"),
    [
        # Softmax 0.4, 0.3, 0.2, 0.1, best first; expert 4 is none.
        (3, {}, [0, 1, 2], [4 / 9, 3 / 9, 2 / 9]),
        (2, {}, [0, 1, 4], [4 / 7, 3 / 7, 0]),
        (1, {"router_renormalize": False}, [0, 4, 4], [0.4, 0, 0]),
        (2, {"router_renormalize": False, "router_scale": 2.5}, [0, 1, 4], [1.0, 0.75, 0]),
        (2, {"router_scores": "sigmoid"}, [0, 1, 4], [16 / 31, 15 / 31, 0]),
        # Two groups of two, one of which is allowed: what is taken is the best of that.
        (1, {"top_k": 2, "num_expert_groups": 2, "router_renormalize": False}, [0, 4], [0.4, 0]),
    ],
)
def test_fewer_choices_are_the_first_ones(
    take: int, model: dict[str, Any], experts: list[int], gates: list[float]
) -> None:
    routing = routed([LOG], take=take, **{"top_k": 3} | model)
    assert choices(routing) == [experts] and routing.choices == take
    np.testing.assert_allclose(routing.gates_BLK[0], [gates], rtol=1e-6)
    everything = routed([LOG], **{"top_k": 3} | model)
    np.testing.assert_array_equal(routing.shares_UE, everything.shares_UE)  # of all scores, whatever is taken


def test_gates_of_fewer_choices_have_the_gradient_of_those() -> None:
    """As of a top-2 (above): the third choice is not there."""
    g = jax.grad(lambda logits: routed([logits], take=2, top_k=3).gates_BLK[0, 0, 0])(jnp.asarray(LOG))
    np.testing.assert_allclose(g, [12 / 49, -12 / 49, 0, 0], atol=1e-6)
