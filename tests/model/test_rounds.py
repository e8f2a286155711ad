"""An exchange that reserves less than its worst case sends in rounds: it gives the reference's layer and gradients at
any skew, and takes one round where rows are spread evenly."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.extend import core

from bigmac_jax.config.execution import AUTO_BUFFER_FACTOR
from bigmac_jax.data.batch import batch_from_windows
from bigmac_jax.model.choose_exchange import choose_exchange, predict_seconds
from bigmac_jax.model.exchange import STRATEGIES, Plan, Strategy, in_rounds
from bigmac_jax.model.exchange.costs import cost
from bigmac_jax.model.exchange.strategy import FEW_ROWS
from bigmac_jax.model.mesh import EXPERT_GROUP, make_mesh, placed
from bigmac_jax.training.loss import token_scores

from .test_exchange import on_ranks
from .test_expert_parallel import name
from .test_strategies import check
from .tools import (
    abstract_layer,
    assert_close,
    loss_and_gradients,
    on_mesh,
    random_model,
    random_tokens,
    split_batch,
    split_tokens,
    tiny,
)

EXCHANGES = ("all_to_all", "dedup", "hierarchical", "ragged")
# data, node, expert, tensor, fsdp, split_experts; in (1, 4, 2) a machine has two experts, fewer than a token chooses.
MESHES = ((1, 1, 2), (1, 1, 8), (2, 1, 4), (1, 2, 4), (1, 4, 2), (1, 2, 2, 2), (1, 1, 4, 2, True, True),
          (2, 2, 2, 1, True))  # fmt: skip
FACTORS = (1.0, 1.5)
CHUNKS = (1, 2)
# What the bias adds to the scores of experts; a token's scores are about 1/8 each.
SKEWS = {"random": {}, "skewed": {4: 0.2, 5: 0.1}, "same experts": {4: 30.0, 5: 20.0, 6: 10.0}}
QUICK_CASES = [("all_to_all", (1, 1, 4, 2, True, True), 1.5, 2, "same experts")]
REST = sorted(set(itertools.product(EXCHANGES, MESHES, FACTORS, CHUNKS, SKEWS)) - set(QUICK_CASES))
FIELDS = ("exchange", "mesh", "factor", "chunks", "skew")


def run(exchange: str, mesh: tuple, factor: float, chunks: int, skew: str) -> None:
    ranks, T = math.prod(mesh[:4]), 64 // chunks
    config = tiny(mesh, exchange=exchange, buffer_factor=factor, overlap_chunks=chunks, length=8 * ranks,
                  grouped_matmul="kernel" if chunks == 1 else "batched", balance="bias", use_bias=True)  # fmt: skip
    bias_E = np.zeros(8, np.float32)
    for expert, value in SKEWS[skew].items():
        bias_E[expert] = value
    check(config, {"router_bias_E": bias_E})
    with on_mesh(config):
        several = choose_exchange(config, math.inf, T).most_rounds(T, 3) > 1
    assert several


@pytest.mark.parametrize(FIELDS, QUICK_CASES, ids=name)
def test_equals_the_reference(exchange: str, mesh: tuple, factor: float, chunks: int, skew: str) -> None:
    run(exchange, mesh, factor, chunks, skew)


@pytest.mark.full
@pytest.mark.parametrize(FIELDS, REST, ids=name)
def test_equals_the_reference_everywhere(exchange: str, mesh: tuple, factor: float, chunks: int, skew: str) -> None:
    run(exchange, mesh, factor, chunks, skew)


@pytest.mark.full
@pytest.mark.parametrize(("remat", "chunks"), [("none", 1), ("layer", 1), ("exchange", 1), ("exchange", 2)])
def test_layers_that_are_computed_again(remat: str, chunks: int) -> None:
    """Of a whole model, whose first layer takes further rounds: its loss and gradients are those without rounds."""
    bias_LE = np.zeros((2, 8), np.float32)
    bias_LE[0, :4] = 30.0, 20.0, 10.0, 5.0
    found = []
    for fields in ({"buffer_factor": 1.0, "remat": remat, "overlap_chunks": chunks}, {}):
        config = tiny((1, 1, 4), length=32, balance="bias", **fields)
        found.append(loss_and_gradients(config, random_tokens(config), {"layers.mlp.router_bias_E": bias_LE}))
    with on_mesh(config):
        assert choose_exchange(tiny((1, 1, 4), buffer_factor=1.0), math.inf, 64).most_rounds(64, 3) > 1
    (loss, gradients, _), (expected, of_one_round, _) = found
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert not gradients.pop("layers.mlp.router_bias_E").any() and of_one_round.pop("layers.mlp.router_bias_E").size
    assert_close(gradients, of_one_round)


def taken(exchange: Strategy, experts: Any) -> int:
    """How many rounds it takes; `experts` is [ranks · T, K]."""

    def on_rank(experts_TK: Array) -> Array:
        plan, of_rank = exchange.plan(experts_TK), jnp.ones_like(experts_TK, jnp.float32)
        return in_rounds(exchange, lambda *_: of_rank[:1, 0], EXPERT_GROUP, [plan], [of_rank], [of_rank], {})[0]

    (rounds,) = set(on_ranks(exchange.sizes, on_rank)(np.asarray(experts, np.int32)).tolist())  # all ranks agree
    return rounds


# Eight experts on 2 × 2 ranks. Every pair of them twice: as many rows for each rank as are expected, 28 for all_to_all
# and 26 for dedup, whose rows are 44 for a machine, and there 52 for a rank.
EVEN = [*itertools.combinations(range(8), 2)] * 2
SAME = [(4, 5)] * len(EVEN)


@pytest.mark.parametrize(
    ("exchange", "factor", "expected"),
    [
        ("all_to_all", 1.0, 4),  # 112 rows, 28 a round
        pytest.param("all_to_all", 1.5, 3, marks=pytest.mark.full),
        ("dedup", 1.0, 4),  # 56 rows, 26 a round, but of their 112 choices 28
        pytest.param("dedup", 1.5, 3, marks=pytest.mark.full),  # 42 choices of 21 rows
        ("hierarchical", 1.0, 4),  # 56 rows of each of two ranks through a hop of 56 choices a round
        ("hierarchical", 1.5, 3),
        ("ragged", 1.0, 4),  # 4 × 112 rows, 112 a round
    ],
)
def test_rounds_are_as_many_as_rows_need(exchange: str, factor: float, expected: int) -> None:
    made = STRATEGIES[exchange](8, (2, 2), math.inf, EXPERT_GROUP, buffer_factor=factor)
    assert taken(made, EVEN * 4) == 1
    assert taken(made, SAME * 4) == made.most_rounds(len(SAME), 2) == expected
    # A rank whose rows all go to one takes as many, and the others wait for it. Where others share the room, fewer.
    alone = taken(made, EVEN * 3 + SAME)
    assert alone == expected if exchange not in ("hierarchical", "ragged") else 1 < alone <= expected


def test_a_pair_of_ranks_has_room_for_rows_and_for_their_choices() -> None:
    """Eight experts on 2 × 2 ranks, 32 tokens: a pair has room for 32 rows, which are all, with 48 choices of two
    experts. Rank 0 sends 15 rows of one choice to rank 2, then 17 of two, of which 16 have room: 15 + 32 choices."""
    exchange = STRATEGIES["dedup"](8, (2, 2), math.inf, EXPERT_GROUP, buffer_factor=3.0)
    (hop,) = exchange.hops(32, 2)
    assert (hop.capacity, hop.choices) == (32, 48)
    mine = [(4, 0)] * 15 + [(4, 5)] * 17
    others = [(6, 7)] * 32

    def on_rank(experts_TK: Array) -> tuple[Array, Array]:
        plan = exchange.plan(experts_TK)
        assert plan.left_TK is not None and plan.expert_NK is not None
        assert plan.most_local == 4 * 48 < math.prod(plan.expert_NK.shape)  # what grouping reserves, of all ranks
        return plan.left_TK, jnp.sum(plan.expert_NK < 2, keepdims=True)

    left, arrived = on_ranks((2, 2), on_rank)(np.asarray(mine + others * 3, np.int32))
    assert left[:32].tolist() == [[8, 8]] * 31 + [[4, 5]]
    assert arrived.reshape(-1).tolist() == [15, 0, 47, 3 * 48]
    assert left[32:64].tolist() == [[8, 8]] * 24 + [[6, 7]] * 8


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_step_of_decoding_takes_one_round(exchange: str) -> None:
    made = STRATEGIES[exchange](64, (2, 4), math.inf, EXPERT_GROUP, buffer_factor=1.0)
    assert made.most_rounds(1, 8) == 1 and made.most_rounds(FEW_ROWS // 2, 2) == 1
    assert made.most_rounds(512, 8) > 1
    # Sixteen slots on eight ranks, eight choices of 128 experts; asking whether anything is left is a collective.
    alone, several = (cost(STRATEGIES[exchange](128, (1, 8), math.inf, EXPERT_GROUP, buffer_factor=room), tokens, 8)
                      for room, tokens in ((1.5, 2), (1.5, 512)))  # fmt: skip
    assert several.collectives == alone.collectives + 1


def test_gradients_of_weights_are_summed_in_float32() -> None:
    """Three further rounds, whose gradients in bfloat16 are 1, 2⁻⁸ and 2⁻⁸: added in bfloat16 they are 1."""
    exchange = STRATEGIES["all_to_all"](8, (1, 4), math.inf, EXPERT_GROUP, buffer_factor=1.0)

    def one_round(plan: Plan, x_TR: Array, gates_TK: Array, w: Array) -> Array:
        left = jnp.sum(plan.left_TK < 8)  # 48, 32, 16, 0 of 64
        part = jnp.where(left > 32, 0, jnp.where(left > 16, 1, 2**-8))
        return x_TR * (w * part.astype(w.dtype))

    def on_rank(experts_TK: Array, x_TR: Array, w: Array) -> Array:
        plan, gates_TK = exchange.plan(experts_TK), jnp.ones_like(experts_TK, jnp.bfloat16)

        def loss(w: Array) -> Array:
            return in_rounds(exchange, one_round, EXPERT_GROUP, [plan], [x_TR], [gates_TK], w)[0].sum()

        return jax.grad(loss)(w)

    x = np.zeros((4 * 64, 1), jnp.bfloat16)
    x[::64] = 1
    gradient = on_ranks((1, 4), on_rank)(np.full((4 * 64, 1), 3, np.int32), x, np.ones((4, 1), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient.astype(np.float32), 1 + 2**-7)


def made_outside_loops(program: Any) -> Iterator[tuple[str, str]]:
    """What makes each array of a program, and its type; what a `while` runs is left out."""
    for equation in program.eqns:
        yield from ((equation.primitive.name, str(made.aval)) for made in equation.outvars)
        if equation.primitive.name != "while":
            for inner in core.jaxprs_in_params(equation.params):
                yield from made_outside_loops(inner)


def test_rounds_that_nothing_needs_make_nothing() -> None:
    """Gradients of weights [5, 7] in bfloat16: outside of the loops only the first round's product makes such an array.
    No sum begins with zeros, none is widened, and nothing is added up."""
    exchange = STRATEGIES["all_to_all"](8, (1, 4), math.inf, EXPERT_GROUP, buffer_factor=1.0)

    def one_round(plan: Plan, x_TR: Array, gates_TK: Array, w: Array) -> Array:
        return x_TR @ w

    def on_rank(experts_TK: Array, x_TR: Array, w: Array) -> Array:
        plan, gates_TK = exchange.plan(experts_TK), jnp.ones_like(experts_TK, jnp.bfloat16)

        def loss(x_TR: Array, w: Array) -> Array:
            y = in_rounds(exchange, one_round, EXPERT_GROUP, [plan], [x_TR], [gates_TK], w)
            return y[0].astype(jnp.float32).sum()

        program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x_TR, w)
        of_weights = [made for made in made_outside_loops(program.jaxpr) if "[5,7]" in made[1]]
        assert {kind.split("[")[0] for _, kind in of_weights} == {"bfloat16"}, of_weights
        assert sorted(name for name, _ in of_weights) == ["transpose", "while"], of_weights
        return x_TR

    on_ranks((1, 4), on_rank)(
        np.full((4 * 64, 1), 3, np.int32), np.ones((4 * 64, 5), jnp.bfloat16), np.ones((4 * 5, 7), jnp.bfloat16)
    )


def program(mesh: tuple = (1, 2, 2), **fields: Any) -> str:
    """Of a layer's forward pass."""
    config = tiny(mesh, length=32, **fields)
    with on_mesh(config):
        x_BLD = jax.ShapeDtypeStruct((8, 32, 16), np.float32, sharding=split_tokens(np.zeros((8, 32, 16))).sharding)
        layer = placed(abstract_layer(config), make_mesh(config))
        return str(jax.make_jaxpr(lambda layer, x: layer(x)[0])(layer, x_BLD))


@pytest.mark.full
def test_without_a_factor_there_are_no_rounds() -> None:
    """Neither the loop nor what the ranks agree with is in the program; nor where the worst case has room."""
    for exchange in EXCHANGES:
        assert "pmax" in program(exchange=exchange, buffer_factor=1.0)
        assert "pmax" not in program(exchange=exchange)
        with_capacity = program(exchange=exchange, buffer_factor=1.0, capacity_factor=1.25)
        if exchange == "ragged":  # which drops nothing whatever the capacity is, and so goes on in rounds
            assert with_capacity == program(exchange=exchange, buffer_factor=1.0)
        else:
            assert with_capacity == program(exchange=exchange, capacity_factor=1.25)


def test_auto_is_a_number_for_what_sends_in_rounds_and_nothing_to_the_others() -> None:
    number = AUTO_BUFFER_FACTOR
    for exchange in EXCHANGES:
        assert program(exchange=exchange, buffer_factor="auto") == program(exchange=exchange, buffer_factor=number)
    assert program(exchange="gather", buffer_factor="auto") == program(exchange="gather")
    one_rank = (2, 1, 1)
    assert program(one_rank, buffer_factor="auto") == program(one_rank)


def test_an_exchange_that_auto_takes_has_what_was_asked() -> None:
    """A factor is for those that send in rounds; with buffer_factor=auto the others stand beside them."""
    asked = {}
    for factor in (1.5, "auto", math.inf):
        config = tiny((1, 1, 4), exchange="auto", buffer_factor=factor)
        with on_mesh(config):
            asked[factor] = predict_seconds(config, math.inf, 65536)  # to ask takes less than these bytes
    here = {*EXCHANGES} - {"ragged"}  # which is emulated on CPU
    assert asked[1.5].keys() == here and asked["auto"].keys() == asked[math.inf].keys() == here | {"gather"}
    assert asked["auto"]["gather"] == asked[math.inf]["gather"]
    assert asked["auto"]["all_to_all"] < asked[math.inf]["all_to_all"]


@pytest.mark.full
@pytest.mark.parametrize("exchange", [*EXCHANGES[:2], "hierarchical"])
def test_evaluation_of_a_model_with_a_capacity(exchange: str) -> None:
    """It is dropless, and in rounds gives the scores that it gives without."""
    fields = {"exchange": exchange, "capacity_factor": 0.5, "length": 32, "balance": "bias"}
    bias_E = np.asarray([0, 0, 0, 0, 30, 20, 10, 0], np.float32)
    scores, agreements = {}, {}
    for factor in (1.5, math.inf):
        config = tiny((1, 2, 2), buffer_factor=factor, **fields)
        with on_mesh(config):
            batch = jax.tree.map(split_batch, batch_from_windows(random_tokens(config)))
            arguments = random_model(config, {"layers.mlp.router_bias_E": bias_E}), batch
            agreements[factor] = str(jax.make_jaxpr(token_scores)(*arguments)).count("pmax")
            scores[factor] = jax.jit(token_scores)(*arguments)._asdict()
    assert agreements[1.5] > agreements[math.inf]
    np.testing.assert_array_equal(*(of.pop("likeliest_BL") for of in scores.values()))
    assert_close(scores[1.5], scores[math.inf])
