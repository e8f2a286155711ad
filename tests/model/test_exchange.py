"""The exchange against hand-worked tables: who is dropped, which row goes where, and what crosses the wire."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bigmac_jax.mesh import EXPERT_GROUP
from bigmac_jax.model.exchange import STRATEGIES, AllToAll, Plan

from .program import compiled_all_to_alls, forward, payloads
from .reference import reference
from .tools import QUICK, assert_close, leaves, on_mesh, random_model, random_tokens, split_batch, tiny

INF = math.inf


def make(num_experts: int, ranks: int, factor: float) -> AllToAll:
    return STRATEGIES["all_to_all"](num_experts, ranks, factor, EXPERT_GROUP)


def on_ranks(ranks: int, function: Any) -> Any:
    """`function` in a shard_map over `ranks` ranks, the first dimension of its arguments and results split."""
    config = tiny((1, 1, ranks))
    with on_mesh(config):
        mapped = jax.jit(
            jax.shard_map(function, in_specs=P(EXPERT_GROUP), out_specs=P(EXPERT_GROUP)), compiler_options=QUICK
        )

    def run(*arrays: Any) -> Any:
        with on_mesh(config):
            return jax.tree.map(np.asarray, mapped(*(jax.device_put(x, P(EXPERT_GROUP)) for x in arrays)))

    return run


def stack(plan: Plan) -> Plan:
    """With a leading dimension of ranks."""
    return jax.tree.map(lambda x: x[None], plan)


def unstack(plan: Plan) -> list[Plan]:
    return [jax.tree.map(lambda x, s=s: x[s], plan) for s in range(plan.dropped.size)]


def plans(exchange: AllToAll, experts: Any) -> list[Plan]:
    """The plan of each rank; `experts` is [ranks · T, K]."""
    run = on_ranks(exchange.ranks, lambda experts_TK: stack(exchange.plan(experts_TK)))
    return unstack(run(np.asarray(experts, np.int32)))


def dropped(plan: Plan) -> set[tuple[int, int]]:
    """The dropped (token, choice) pairs."""
    return set(zip(*(index.tolist() for index in np.nonzero(plan.slot_TK == plan.choice_N.size)), strict=True))


# Four tokens, two choices, three experts; an expert holds C rows.
TABLE = [[0, 1], [0, 2], [0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("factor", "capacity", "expected"),
    [
        # Expert 0 is the first choice of tokens 0, 1, 2 and the second one of 3; expert 1 the first choice of 3 and the
        # second one of 0 and 2, in this order; expert 2 the second choice of 1.
        (0.375, 1, {(1, 0), (2, 0), (3, 1), (0, 1), (2, 1)}),
        (0.75, 2, {(2, 0), (3, 1), (2, 1)}),
        (1.0, 3, {(3, 1)}),  # ceil(1.0 · 4 · 2 / 3) = 3
        (1.25, 4, set()),
        (9.0, 4, set()),  # never more than T rows: a token sends at most one to an expert
    ],
)
def test_full_experts_keep_first_choices_then_earlier_tokens(factor: float, capacity: int, expected: set) -> None:
    exchange = make(3, 1, factor)
    assert exchange.capacity(4, 2) == capacity
    (plan,) = plans(exchange, TABLE)
    assert dropped(plan) == expected
    assert plan.dropped == len(expected)
    assert plan.counts_E.tolist() == [4, 3, 1]  # drops included


def test_slots_of_a_capacity_plan() -> None:
    (plan,) = plans(make(3, 1, 0.75), TABLE)  # two rows an expert: slots 0-1, 2-3, 4-5; 6 = dropped
    assert plan.slot_TK.tolist() == [[0, 3], [1, 4], [6, 6], [2, 6]]
    assert plan.choice_N.tolist() == [0, 2, 6, 1, 3, 8]  # t·2 + k; 8 = empty
    assert plan.expert_n is None


def test_each_rank_drops_by_itself() -> None:
    """The capacity is per source rank: the same experts are full for one rank and not for the other."""
    first, second = plans(make(4, 2, 1.0), [[0, 1], [0, 1], [2, 3], [0, 3], [3, 2], [1, 0], [2, 1], [0, 3]])
    assert dropped(first) == {(3, 0)}  # C = ceil(4 · 2 / 4) = 2
    assert dropped(second) == set()
    assert first.counts_E.tolist() == [3, 2, 1, 2]
    assert second.counts_E.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(("factor", "capacity"), [(1.0, 10), (1.1, 11), (1.11, 12), (0.01, 1), (99.0, 50)])
def test_capacity_is_the_ceiling_of_the_exact_product(factor: float, capacity: int) -> None:
    assert make(10, 1, factor).capacity(50, 2) == capacity  # 1.1 · 50 · 2 / 10 is 11.000000000000002 in floats


def test_slots_of_a_dropless_plan() -> None:
    """Two ranks, two experts each, T = 3, K = 2: room for 3 · 2 rows + padding a pair, in blocks of 6."""
    exchange = make(4, 2, INF)
    assert exchange.blocks(3, 2) == (2, 6)
    first, second = plans(exchange, [[1, 3], [1, 0], [1, 3], [2, 0], [2, 1], [2, 3]])
    # Rank 0 sends to rank 0 a block of expert 0, then one of expert 1; to rank 1 one of expert 3 and an empty one.
    assert first.slot_TK.tolist() == [[6, 12], [7, 0], [8, 13]]
    assert second.slot_TK.tolist() == [[12, 0], [13, 6], [14, 18]]
    # Local experts of the blocks that a rank receives, first those from rank 0.
    assert first.expert_n.tolist() == [0, 1, 0, 1]
    assert second.expert_n.tolist() == [1, 1, 0, 1]


SHAPES = {  # ranks, experts, T a rank, K
    "one token": (2, 4, 1, 2),
    "K = E": (2, 4, 5, 4),
    "one expert a rank": (4, 4, 7, 2),
    "one expert a rank, all chosen": (4, 4, 3, 4),
    "more rows than a block, and no multiple": (2, 4, 67, 2),
    "one rank": (1, 4, 70, 3),
    "eight ranks": (8, 16, 9, 5),
}
SKEWS = ("uniform", "one", "rank")


def choices(shape: tuple[int, int, int, int], skew: str) -> np.ndarray:
    """[ranks · T, K] experts without repetition in a row: at random, all the same, or those of the last rank first."""
    ranks, E, T, K = shape
    score = np.random.default_rng(0).random((ranks * T, E))
    if skew == "one":
        score = np.broadcast_to(np.arange(E) == E // 2, score.shape) + 0.0
    if skew == "rank":
        score[:, E - E // ranks :] += 1
    return np.argsort(-score, axis=1, kind="stable")[:, :K].astype(np.int32)


def drops_by_hand(experts_TK: np.ndarray, capacity: int) -> int:
    room = [capacity] * (experts_TK.max() + 1)
    drops = 0
    for expert in experts_TK.T.reshape(-1):
        drops += room[expert] == 0
        room[expert] = max(0, room[expert] - 1)
    return drops


def check_plan(exchange: AllToAll, plan: Plan, experts_TK: np.ndarray) -> np.ndarray:
    """Slots and choices are inverse, and a slot lies where its expert is; returns which choices were kept."""
    (T, K), E, slots = experts_TK.shape, exchange.num_experts, plan.choice_N.size
    kept = plan.slot_TK.reshape(-1) < slots
    assert plan.counts_E.tolist() == np.bincount(experts_TK.reshape(-1), minlength=E).tolist()
    capacity = T if exchange.dropless else exchange.capacity(T, K)
    assert plan.dropped == (~kept).sum() == drops_by_hand(experts_TK, capacity)
    np.testing.assert_array_equal(plan.choice_N[plan.slot_TK.reshape(-1)[kept]], np.flatnonzero(kept))
    assert (plan.choice_N == T * K).sum() == slots - kept.sum()
    destination = plan.slot_TK.reshape(-1)[kept] // (slots // exchange.ranks)
    np.testing.assert_array_equal(destination, experts_TK.reshape(-1)[kept] // exchange.local_experts)
    return kept.reshape(T, K)


@pytest.mark.parametrize("factor", [INF, 1.0], ids=["dropless", "capacity"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dispatch_and_combine_are_an_inverse_pair(shape: tuple[int, int, int, int], factor: float) -> None:
    """Experts that multiply by a number: y_t = Σ_k g_tk · a_e(t,k) · x_t over the choices kept, and its gradients."""
    ranks, E, T, K = shape
    exchange = make(E, ranks, factor)
    rng = np.random.default_rng(1)
    x, dy = (rng.standard_normal((ranks * T, 3)).astype(np.float32) for _ in range(2))
    gates, a_E = rng.random((ranks * T, K)).astype(np.float32), 1 + np.arange(E, dtype=np.float32)

    def layer(plan: Plan, x_TR: jax.Array, gates_TK: jax.Array, a_e: jax.Array) -> jax.Array:
        rows_nbR = exchange.dispatch(plan, x_TR)
        a_n = a_e if plan.expert_n is None else a_e[plan.expert_n]
        return exchange.combine(plan, rows_nbR * a_n[:, None, None], gates_TK)

    def with_gradients(experts_TK: jax.Array, dy_TR: jax.Array, *inputs: jax.Array) -> Any:
        plan = exchange.plan(experts_TK)
        y_TR, pull = jax.vjp(functools.partial(layer, plan), *inputs)
        return stack(plan), y_TR, pull(dy_TR)

    run = on_ranks(ranks, with_gradients)
    for skew in SKEWS:
        experts = choices(shape, skew)
        stacked, y, (dx, d_gates, d_a) = run(experts, dy, x, gates, a_E)
        kept = np.concatenate(
            [check_plan(exchange, p, experts[s * T : (s + 1) * T]) for s, p in enumerate(unstack(stacked))]
        )
        assert factor < INF or kept.all()
        weight, dot = np.where(kept, gates * a_E[experts], 0), (x * dy).sum(1, keepdims=True)
        expected_d_a = np.bincount(experts.reshape(-1), np.where(kept, gates * dot, 0).reshape(-1), E)
        expected = {"y": weight.sum(1, keepdims=True) * x, "x": weight.sum(1, keepdims=True) * dy}
        expected |= {"gates": np.where(kept, a_E[experts] * dot, 0), "a": expected_d_a}
        assert_close({"y": y, "x": dx, "gates": d_gates, "a": d_a}, expected)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2), (1, 2, 4)], ids=str)
def test_aux_reports_each_layers_drops(mesh: tuple[int, int, int]) -> None:
    """Layer 0 routes freely, layer 1 sends every token to experts 5, 2 and 7."""
    config = tiny(mesh, balance="bias", capacity_factor=0.8)
    bias = np.zeros((2, 8), np.float32)
    bias[1, [5, 2, 7]] = 30, 20, 10
    tokens = random_tokens(config)[:, :-1]
    with on_mesh(config):
        model = random_model(config, {"layers.mlp.router_bias_E": bias})
        values = leaves(model)
        run = jax.jit(lambda m, t, dropless: m(t, dropless=dropless)[1], static_argnums=2, compiler_options=QUICK)
        aux, free = (jax.tree.map(np.asarray, run(model, split_batch(tokens), dropless)) for dropless in (False, True))

    layers = reference(config.model, {name: jnp.asarray(value) for name, value in values.items()}, tokens)[1]
    capacity = {64: 20, 16: 5, 8: 3}[64 // math.prod(mesh)]  # ceil(0.8 · T · 3 / 8)
    experts_STK = np.asarray(layers[0].experts).reshape(math.prod(mesh), -1, 3)
    drops = sum(drops_by_hand(experts_TK, capacity) for experts_TK in experts_STK)
    assert 0 < drops < 96
    np.testing.assert_allclose(aux.drop_rate, [drops / 192, 1 - capacity * math.prod(mesh) / 64], rtol=1e-6)
    np.testing.assert_allclose(aux.load[1], np.isin(np.arange(8), [5, 2, 7]) / 3, rtol=1e-6)
    assert not free.drop_rate.any()


@pytest.mark.parametrize("factor", [INF, 1.25])
@pytest.mark.parametrize(("structure", "width"), [("bigmac", 4), ("fine_grained", 16)])
@pytest.mark.parametrize("mesh", [(1, 1, 4), (2, 2, 2), (1, 1, 8)], ids=str)
def test_wire_bytes_are_the_programs(mesh: tuple[int, int, int], structure: str, width: int, factor: float) -> None:
    """What the compiled all-to-alls of a layer move, less the share that a rank keeps for itself."""
    config = tiny(mesh, structure=structure, capacity_factor=factor, num_layers=1)
    ranks, tokens = config.mesh.expert_ranks, 64 // math.prod(mesh)
    received = [payloads(parts) for parts in compiled_all_to_alls(forward(config))]
    moved = sum(math.prod(shape) * 4 for parts in received for _, shape in parts)
    assert moved > 0
    assert make(8, ranks, factor).wire_bytes(tokens, 3, width, 4) * ranks == moved * (ranks - 1)
    assert make(8, 1, factor).wire_bytes(tokens, 3, width, 4) == 0
