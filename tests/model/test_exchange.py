"""The exchange against hand-worked tables: who is dropped, which row goes where, and what crosses the wire."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bigmac_jax.model.exchange import STRATEGIES, AllToAll, Plan, Strategy
from bigmac_jax.model.exchange.costs import cost
from bigmac_jax.model.exchange.hop import expected_rows
from bigmac_jax.model.exchange.rows import sorted_by
from bigmac_jax.model.mesh import EXPERT_GROUP

from .reference import reference
from .tools import assert_close, leaves, on_mesh, random_model, random_tokens, split_batch, tiny

INF = math.inf


Sizes = tuple[int, int]  # machines, ranks of a machine


def make(num_experts: int, sizes: Sizes, factor: float, name: str = "all_to_all", **formats: str) -> Any:
    return STRATEGIES[name](num_experts, sizes, factor, EXPERT_GROUP, **formats)


def on_ranks(sizes: Sizes, function: Any) -> Any:
    """`function` in a shard_map over the ranks, the first dimension of its arguments and results split."""
    config = tiny((1, *sizes))
    with on_mesh(config):
        mapped = jax.jit(jax.shard_map(function, in_specs=P(EXPERT_GROUP), out_specs=P(EXPERT_GROUP)))

    def run(*arrays: Any) -> Any:
        with on_mesh(config):
            return jax.tree.map(np.asarray, mapped(*(jax.device_put(x, P(EXPERT_GROUP)) for x in arrays)))

    return run


def stack(plan: Plan) -> Plan:
    """With a leading dimension of ranks."""
    return jax.tree.map(lambda x: x[None], plan)


def unstack(plan: Plan) -> list[Plan]:
    return [jax.tree.map(lambda x, s=s: x[s], plan) for s in range(plan.dropped.size)]


def plans(exchange: Strategy, experts: Any) -> list[Plan]:
    """The plan of each rank; `experts` is [ranks · T, K]."""
    run = on_ranks(exchange.sizes, lambda experts_TK: stack(exchange.plan(experts_TK)))
    return unstack(run(np.asarray(experts, np.int32)))


def dropped(plan: Plan) -> set[tuple[int, int]]:
    """The dropped (token, choice) pairs of a capacity plan."""
    slots = plan.routes
    return set(zip(*(index.tolist() for index in np.nonzero(slots.slot_TK == slots.choice_M.size)), strict=True))


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
    exchange = make(3, (1, 1), factor)
    assert exchange.capacity(4, 2) == capacity
    (plan,) = plans(exchange, TABLE)
    assert dropped(plan) == expected
    assert plan.dropped == len(expected)
    assert plan.counts_E.tolist() == [4, 3, 1]  # drops included


def test_slots_of_a_capacity_plan() -> None:
    (plan,) = plans(make(3, (1, 1), 0.75), TABLE)  # two rows an expert: slots 0-1, 2-3, 4-5; 6 = dropped
    slots = plan.routes
    assert slots.slot_TK.tolist() == [[0, 3], [1, 4], [6, 6], [2, 6]]
    assert slots.choice_M.tolist() == [0, 2, 6, 1, 3, 8]  # t·2 + k; 8 = empty
    assert plan.expert_NK is None


def test_each_rank_drops_by_itself() -> None:
    """The capacity is per source rank: the same experts are full for one rank and not for the other."""
    first, second = plans(make(4, (1, 2), 1.0), [[0, 1], [0, 1], [2, 3], [0, 3], [3, 2], [1, 0], [2, 1], [0, 3]])
    assert dropped(first) == {(3, 0)}  # C = ceil(4 · 2 / 4) = 2
    assert dropped(second) == set()
    assert first.counts_E.tolist() == [3, 2, 1, 2]
    assert second.counts_E.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(("factor", "capacity"), [(1.0, 10), (1.1, 11), (1.11, 12), (0.01, 1), (1e-9, 1), (99.0, 50)])
def test_capacity_is_the_ceiling_of_the_exact_product(factor: float, capacity: int) -> None:
    assert make(10, (1, 1), factor).capacity(50, 2) == capacity  # 1.1 · 50 · 2 / 10 is 11.000000000000002 in floats


def test_sorting_pairs_and_single_integers_agree() -> None:
    key = np.random.default_rng(0).integers(0, 7, 1000).astype(np.int32)
    one, pair = sorted_by(jnp.asarray(key), 7), sorted_by(jnp.asarray(key), 2**30)  # the pair would overflow int32
    np.testing.assert_array_equal(one, pair)
    np.testing.assert_array_equal(one[1], np.argsort(key, kind="stable"))


def test_slots_of_a_dropless_plan() -> None:
    """Two ranks, two experts each, T = 3, K = 2: room for 3 · 2 rows a pair, sorted by expert."""
    exchange = make(4, (1, 2), INF)
    assert exchange.rows(3, 2) == 6
    first, second = plans(exchange, [[1, 3], [1, 0], [1, 3], [2, 0], [2, 1], [2, 3]])
    assert first.routes.slot_TK.tolist() == [[1, 6], [2, 0], [3, 7]]
    assert second.routes.slot_TK.tolist() == [[6, 0], [7, 1], [8, 9]]
    # Rank 0 gets expert 0's row and three of expert 1 from itself, one of each from rank 1; 2: no row.
    assert first.expert_NK.reshape(2, 6).tolist() == [[0, 1, 1, 1, 2, 2], [0, 1, 2, 2, 2, 2]]
    # Rank 1: two of expert 3 from rank 0; three of expert 2 and one of expert 3 from itself.
    assert second.expert_NK.reshape(2, 6).tolist() == [[1, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 2]]


HOP = [[0, 2], [2, 3], [3, 0], [1, 0]]  # ranks: 0 1, 1 1, 1 0, 0 0


@pytest.mark.parametrize(
    ("factor", "capacity", "slots", "lost"),
    [
        # Rank 0 is the first choice of tokens 0 and 3, the second of 2; rank 1 the first of 1 and 2, the second of 0.
        (0.3, 1, [[0, 2], [2, 1], [2, 2], [2, 2]], 5),
        (1e-9, 1, [[0, 2], [2, 1], [2, 2], [2, 2]], 5),
        (0.6, 2, [[0, 4], [4, 2], [4, 3], [1, 4]], 2),
        (0.9, 3, [[0, 5], [6, 3], [2, 4], [1, 6]], 0),
        (INF, 4, [[0, 4], [8, 5], [2, 6], [3, 8]], 0),  # a token's slot is its own number
    ],
)
def test_a_full_rank_keeps_first_choices_then_earlier_tokens(
    factor: float, capacity: int, slots: list[list[int]], lost: int
) -> None:
    """Dedup: a token takes one row of a rank, for one choice or for two."""
    exchange = make(4, (1, 2), factor, "dedup")
    (hop,) = exchange.hops(4, 2)
    assert hop.capacity == capacity  # ceil(f · 4 · (1 - C(2,2) / C(4,2))) = ceil(f · 10/3), at most T
    plan = plans(exchange, HOP * 2)[0]
    assert plan.routes[0].slot_TI.tolist() == slots
    assert plan.dropped == lost
    assert plan.counts_E.tolist() == [3, 1, 2, 2]


@pytest.mark.parametrize(("name", "places"), [("dedup", [5]), ("hierarchical", [2, 4]), ("gather", [])])
def test_a_row_has_no_more_places_and_columns_than_it_can_fill(name: str, places: list[int]) -> None:
    """Two machines of four ranks, two experts each, K = 5: what a row is moved by, and what its rank makes of it."""
    sizes, E, *_ = SHAPES["two machines"]
    plan = plans(make(E, sizes, INF, name), choices(SHAPES["two machines"], "uniform"))[0]
    assert [hop.slot_TI.shape[1] for hop in (plan.routes if places else [])] == places
    assert plan.expert_NK.shape[1] == 2


def test_hierarchical_hops() -> None:
    """Two machines of two ranks; a token goes to a machine once and there to each rank that it needs."""
    exchange = make(8, (2, 2), 1.0, "hierarchical")
    across, inside = exchange.hops(28, 2)
    assert (across.ranks, across.experts, across.wire.axis) == (2, 4, ("node",))
    assert (inside.ranks, inside.experts, inside.wire.axis) == (2, 2, ("expert",))
    assert across.capacity == 22  # 28 · (1 - C(4,2) / C(8,2)) = 28 · 22/28
    assert inside.capacity == 26  # 56 tokens of two machines · (1 - C(6,2) / C(8,2)) = 56 · 13/28
    assert cost(exchange, 28, 2)[:2] == ((26, 22), (26, 22))
    dropless = make(8, (2, 2), INF, "hierarchical").hops(28, 2)
    assert [hop.capacity for hop in dropless] == [28, 56]
    assert [len(make(8, sizes, INF, "hierarchical").hops(28, 2)) for sizes in ((1, 1), (2, 1), (1, 2))] == [0, 1, 1]


def test_expected_rows() -> None:
    """64 experts, K = 8, 8 ranks: 5.43 distinct ranks a token (paper.md); 4 machines: 3.66."""
    assert 8 * expected_rows(1000, 8, 64, 8) == pytest.approx(5430, abs=5)
    assert 4 * expected_rows(1000, 8, 64, 4) == pytest.approx(3660, abs=5)


SHAPES = {  # machines and their ranks, experts, T a rank, K
    "one token": ((1, 2), 4, 1, 2),
    "K = E": ((1, 2), 4, 5, 4),
    "one expert a rank": ((1, 4), 4, 7, 2),
    "one expert a rank, all chosen": ((2, 2), 4, 3, 4),
    "more rows than a block, and no multiple": ((1, 2), 4, 67, 2),
    "one rank": ((1, 1), 4, 70, 3),
    "two machines": ((2, 4), 16, 9, 5),
}
SKEWS = ("uniform", "one", "rank")


def choices(shape: tuple[Sizes, int, int, int], skew: str) -> np.ndarray:
    """[ranks · T, K] experts without repetition in a row: at random, all the same, or those of the last rank first."""
    sizes, E, T, K = shape
    ranks = math.prod(sizes)
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


def check_capacity_plan(exchange: AllToAll, plan: Plan, experts_TK: np.ndarray) -> np.ndarray:
    """Slots and choices are inverse, and a slot lies where its expert is; returns which choices were kept."""
    (T, K), slots = experts_TK.shape, plan.routes
    count = slots.choice_M.size
    kept = slots.slot_TK.reshape(-1) < count
    assert plan.dropped == (~kept).sum() == drops_by_hand(experts_TK, exchange.capacity(T, K))
    np.testing.assert_array_equal(slots.choice_M[slots.slot_TK.reshape(-1)[kept]], np.flatnonzero(kept))
    assert (slots.choice_M == T * K).sum() == count - kept.sum()
    destination = slots.slot_TK.reshape(-1)[kept] // (count // exchange.ranks)
    np.testing.assert_array_equal(destination, experts_TK.reshape(-1)[kept] // exchange.local_experts)
    return kept.reshape(T, K)


@functools.cache
def toy_layer(shape: tuple[Sizes, int, int, int], exchange: Strategy) -> Any:
    """Experts that multiply by a number, with gradients; compiled once for all skews."""

    def layer(plan: Plan, x_TR: jax.Array, gates_TK: jax.Array, a_e: jax.Array) -> jax.Array:
        rows_NR, gate_NK = exchange.dispatch(plan, x_TR, gates_TK)
        if plan.expert_NK is None:  # as many rows of each rank for each
            assert gate_NK is None
            return exchange.combine(plan, rows_NR * a_e.reshape(1, -1, 1, 1), gates_TK)
        weight_NK = jnp.append(a_e, 0)[plan.expert_NK]
        if gate_NK is not None:
            weight_NK = weight_NK * gate_NK
        return exchange.combine(plan, rows_NR * weight_NK.sum(1, keepdims=True), gates_TK)

    def with_gradients(experts_TK: jax.Array, dy_TR: jax.Array, *inputs: jax.Array) -> Any:
        plan = exchange.plan(experts_TK)
        y_TR, pull = jax.vjp(functools.partial(layer, plan), *inputs)
        return stack(plan), y_TR, pull(dy_TR)

    return on_ranks(shape[0], with_gradients)


CASES = [("all_to_all", 1.0), *((name, INF) for name in STRATEGIES)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("name", "factor"), CASES, ids=lambda v: str(v))
def test_dispatch_and_combine_are_an_inverse_pair(name: str, factor: float, shape: tuple[Sizes, int, int, int]) -> None:
    """y_t = Σ_k g_tk · a_e(t,k) · x_t over the choices kept, and its gradients, at every skew."""
    sizes, E, T, K = shape
    ranks, exchange = math.prod(sizes), make(E, sizes, factor, name)
    rng = np.random.default_rng(1)
    x, dy = (rng.standard_normal((ranks * T, 3)).astype(np.float32) for _ in range(2))
    gates, a_E = rng.random((ranks * T, K)).astype(np.float32), 1 + np.arange(E, dtype=np.float32)
    for skew in SKEWS:
        experts = choices(shape, skew)
        stacked, y, (dx, d_gates, d_a) = toy_layer(shape, exchange)(experts, dy, x, gates, a_E)
        kept = np.ones((ranks * T, K), bool)
        for s, plan in enumerate(unstack(stacked)):
            mine = slice(s * T, (s + 1) * T)
            assert plan.counts_E.tolist() == np.bincount(experts[mine].reshape(-1), minlength=E).tolist()
            if factor < INF:
                kept[mine] = check_capacity_plan(exchange, plan, experts[mine])
            assert plan.dropped == (~kept[mine]).sum()
        weight, dot = np.where(kept, gates * a_E[experts], 0), (x * dy).sum(1, keepdims=True)
        expected_d_a = np.bincount(experts.reshape(-1), np.where(kept, gates * dot, 0).reshape(-1), E)
        expected = {"y": weight.sum(1, keepdims=True) * x, "x": weight.sum(1, keepdims=True) * dy}
        expected |= {"gates": np.where(kept, a_E[experts] * dot, 0), "a": expected_d_a}
        assert_close({"y": y, "x": dx, "gates": d_gates, "a": d_a}, expected)


@pytest.mark.parametrize("name", ["dedup", "hierarchical"])
def test_dropped_rows_add_nothing(name: str) -> None:
    """With room for too few rows, y is the sum over the choices whose row arrived, for values and gradients."""
    shape = ((2, 2), 8, 13, 3)
    sizes, E, T, K = shape
    exchange = make(E, sizes, 0.6, name)
    rng = np.random.default_rng(2)
    x, dy = (rng.standard_normal((4 * T, 3)).astype(np.float32) for _ in range(2))
    gates, a_E = rng.random((4 * T, K)).astype(np.float32), np.ones(E, np.float32)
    experts = choices(shape, "uniform")
    stacked, y, (dx, d_gates, _) = toy_layer(shape, exchange)(experts, dy, x, gates, a_E)
    # A gate's gradient is x·dy where its row arrived, and zero where not: it says what was dropped.
    dot = (x * dy).sum(1, keepdims=True)
    kept = np.abs(d_gates) > 1e-6 * np.abs(dot)
    assert stacked.dropped.sum() == (~kept).sum()
    assert 0.1 < kept.mean() < 0.9
    # Rows are for ranks: of two choices on one rank both arrive or none.
    rank = experts // (E // 4)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        same = rank[:, a] == rank[:, b]
        assert same.any() and (kept[same, a] == kept[same, b]).all()
    weight = np.where(kept, gates, 0).sum(1, keepdims=True)
    assert_close({"y": y, "x": dx, "gates": d_gates}, {"y": weight * x, "x": weight * dy, "gates": kept * dot})


@pytest.mark.parametrize(
    "mesh", [(2, 1, 2), *(pytest.param(m, marks=pytest.mark.full) for m in ((1, 1, 1), (1, 2, 4)))], ids=str
)
def test_aux_reports_each_layers_drops(mesh: tuple[int, int, int]) -> None:
    """Layer 0 routes freely, layer 1 sends every token to experts 5, 2 and 7."""
    config = tiny(mesh, balance="bias", capacity_factor=0.8)
    bias = np.zeros((2, 8), np.float32)
    bias[1, [5, 2, 7]] = 30, 20, 10
    tokens = random_tokens(config)[:, :-1]
    with on_mesh(config):
        model = random_model(config, {"layers.mlp.router_bias_E": bias})
        values = leaves(model)
        run = jax.jit(lambda m, t, evaluating: m(t, evaluating=evaluating)[1], static_argnums=2)
        aux, free = (jax.tree.map(np.asarray, run(model, split_batch(tokens), freely)) for freely in (False, True))

    layers = reference(config.model, {name: jnp.asarray(value) for name, value in values.items()}, tokens)[1]
    capacity = {64: 20, 16: 5, 8: 3}[64 // math.prod(mesh)]  # ceil(0.8 · T · 3 / 8)
    experts_STK = np.asarray(layers[0].experts).reshape(math.prod(mesh), -1, 3)
    drops = sum(drops_by_hand(experts_TK, capacity) for experts_TK in experts_STK)
    assert 0 < drops < 96
    np.testing.assert_allclose(aux.drop_rate, [drops / 192, 1 - capacity * math.prod(mesh) / 64], rtol=1e-6)
    np.testing.assert_allclose(aux.load[1], np.isin(np.arange(8), [5, 2, 7]) / 3, rtol=1e-6)
    assert not free.drop_rate.any()
