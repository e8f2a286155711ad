"""Every strategy, with the tokens in one part or several, gives the reference's layer and gradients on every mesh."""

import itertools
import math
import re

import jax
import numpy as np
import pytest

from bigmac_jax.config import Config
from bigmac_jax.model.choose_exchange import choose_exchange, make_exchange, predict_seconds
from bigmac_jax.model.exchange import STRATEGIES
from bigmac_jax.model.exchange.costs import cost, seconds, wire_bytes
from bigmac_jax.model.mesh import EXPERT_GROUP, ExpertGroup, make_mesh, placed, ranks
from bigmac_jax.model.traffic import tokens_at_a_time
from bigmac_jax.training.metrics import describe_auto

from .test_expert_parallel import name
from .tools import (
    PAPER,
    PRESENT,
    abstract_layer,
    assert_close,
    expected_layer_and_gradients,
    layer_and_gradients,
    on_mesh,
    pairwise,
    some,
    split_tokens,
    tiny,
)

MESHES = ((1, 1, 4), (1, 1, 8), (2, 1, 4), (1, 2, 2), (1, 2, 4))  # data, node, expert
CHUNKS = (1, 2, 4)
MODELS = {
    "bigmac": PRESENT | {"structure": "bigmac", "num_shared_experts": 1},
    "fine_grained": PAPER | {"structure": "fine_grained"},
    "gated": PRESENT | {"structure": "bigmac", "activation": "silu", "gated": True, "use_bias": True},
}
MATMULS = ("batched", "blocks")
COVERING = pairwise(STRATEGIES, MESHES, CHUNKS, MODELS, MATMULS)[::4]  # `make test` takes a quarter of the pairs
REST = sorted(set(itertools.product(STRATEGIES, MESHES, CHUNKS, MODELS, MATMULS)) - set(COVERING))
FIELDS = ("exchange", "mesh", "chunks", "model", "matmul")

Case = tuple[str, tuple[int, int, int], int, str, str]


def run(exchange: str, mesh: tuple[int, int, int], chunks: int, model: str, matmul: str) -> None:
    check(tiny(mesh, exchange=exchange, overlap_chunks=chunks, grouped_matmul=matmul, **MODELS[model]))


def check(config: Config, given: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """Compares with the reference; returns the load."""
    actual, expected = layer_and_gradients(config, given), expected_layer_and_gradients(config, given)
    for bias in actual.keys() & {"router_bias_E"}:  # chooses, and is never differentiated
        assert not actual.pop(bias).any() and not expected.pop(bias).any()
    # A single number, what is left of terms of both signs: off by 1.4e-5 where many rounds add them up.
    alone = actual.keys() & {"skip_1"}
    assert_close({name: actual.pop(name) for name in alone}, {name: expected.pop(name) for name in alone}, 3e-5)
    assert_close(actual, expected)
    return actual["load"]


@pytest.mark.parametrize(FIELDS, some(COVERING, every=4), ids=name)
def test_equals_the_reference(exchange: str, mesh: tuple, chunks: int, model: str, matmul: str) -> None:
    run(exchange, mesh, chunks, model, matmul)


@pytest.mark.full
@pytest.mark.parametrize(FIELDS, REST, ids=name)
def test_equals_the_reference_everywhere(exchange: str, mesh: tuple, chunks: int, model: str, matmul: str) -> None:
    run(exchange, mesh, chunks, model, matmul)


@pytest.mark.parametrize("exchange", STRATEGIES)
def test_every_token_may_choose_the_same_experts(exchange: str) -> None:
    """The worst skew: all rows of all ranks go to one rank."""
    config = tiny((1, 2, 2), exchange=exchange, top_k=2, balance="bias", router_renormalize=False, overlap_chunks=2)
    favourites = np.where((np.arange(8) >= 4) & (np.arange(8) < 6), 100.0, 0.0).astype(np.float32)
    load_E = check(config, {"router_bias_E": favourites})
    np.testing.assert_allclose(load_E, favourites / favourites.sum())


@pytest.mark.parametrize(
    ("sizes", "top_k", "factor", "tokens", "expected"),
    [
        # Rows a token to others, dropless: all_to_all's worst case is 7 · 8, dedup's and gather's 7; gather's metadata
        # has more bytes.
        ((1, 8), 8, math.inf, 1280, "dedup"),
        ((1, 8), 1, 1.1, 1280, "all_to_all"),  # as many rows for both, but dedup's carry experts and gates as well
        ((1, 8), 8, 1.1, 1280, "dedup"),
        ((4, 8), 8, math.inf, 1280, "hierarchical"),  # across machines 3 rows, where dedup and gather send 24
        ((1, 8), 8, math.inf, 2, "all_to_all"),  # of so few rows the collectives count: 3, not 4
        ((4, 8), 8, math.inf, 2, "dedup"),  # and not hierarchical's 8
    ],
)
def test_auto_takes_the_fewest_seconds(
    sizes: tuple[int, int], top_k: int, factor: float, tokens: int, expected: str
) -> None:
    strategies = {name: STRATEGIES[name](64, sizes, factor, EXPERT_GROUP) for name in STRATEGIES if name != "ragged"}
    predicted = {name: seconds(strategy, tokens, top_k, 512) for name, strategy in strategies.items()}
    assert min(predicted, key=predicted.__getitem__) == expected


@pytest.mark.parametrize(
    ("exchange", "factor", "buffer"),
    [
        *((exchange, 1.0, math.inf) for exchange in ("all_to_all", "dedup", "hierarchical", "gather")),
        *((exchange, math.inf, 1.0) for exchange in ("all_to_all", "dedup", "hierarchical")),
        ("all_to_all", math.inf, math.inf),
    ],
)
def test_collectives_that_are_counted_are_those_of_the_program(exchange: str, factor: float, buffer: float) -> None:
    """Not ragged's: on CPU its movements are emulated with others. In rounds, those of the first one."""
    config = tiny((1, 2, 2), exchange=exchange, capacity_factor=factor, buffer_factor=buffer, length=4)
    with on_mesh(config):
        x_BLD = jax.ShapeDtypeStruct((8, 4, 16), np.float32, sharding=split_tokens(np.zeros((8, 4, 16))).sharding)
        layer = placed(abstract_layer(config), make_mesh(config))
        text = str(jax.make_jaxpr(lambda layer, x: layer(x)[0])(layer, x_BLD))
        strategy = choose_exchange(config, factor, 8)
    counted, rounds = cost(strategy, 8, 3).collectives, strategy.most_rounds(8, 3)
    first, *further = text.split(" pmax[")  # whether there is a second round
    assert len(re.findall(r" (?:all_to_all|all_gather|reduce_scatter)\[", first)) == counted > 0
    assert bool(further) == (rounds > 1)


def test_auto_gives_the_reference_and_says_why() -> None:
    config = tiny((1, 1, 4), exchange="auto")
    check(config)
    with on_mesh(config):
        line = describe_auto(config)
        chosen = choose_exchange(config, math.inf, tokens_at_a_time(config, ranks()))
    assert line.startswith("exchange=auto took all_to_all; ") and "dedup" in line and "ragged" not in line
    assert isinstance(chosen, STRATEGIES["all_to_all"])


@pytest.mark.parametrize(
    ("mesh", "fields"),
    [((1, 1, 4), {"exchange": "gather"}), ((2, 1, 1), {"exchange": "auto"}), ((2, 1, 1), {"structure": "dense"})],
)
def test_where_there_is_nothing_to_choose_auto_says_nothing(mesh: tuple[int, ...], fields: dict[str, str]) -> None:
    config = tiny(mesh, **fields)
    with on_mesh(config):
        assert describe_auto(config) == ""


@pytest.mark.parametrize("sizes", [(1, 1), (1, 8), (2, 4)])
def test_auto_takes_what_reads_a_finite_factor(sizes: tuple[int, int]) -> None:
    """As a config says of each strategy, and of `auto`, whether anything is dropped; an evaluation drops nothing."""
    group, wanted = ExpertGroup(sizes, "gpu", ""), set[str]()
    for exchange in STRATEGIES:
        config = tiny((1, *sizes), exchange=exchange, capacity_factor=1.0)
        assert make_exchange(exchange, config, 1.0, group).dropless == config.dropless
        wanted |= set() if config.dropless else {exchange}
    config = tiny((1, *sizes), exchange="auto", capacity_factor=1.0)
    assert predict_seconds(config, 1.0, 4096, group).keys() == wanted and not config.dropless
    assert predict_seconds(config, math.inf, 4096, group).keys() == STRATEGIES.keys()


# Of 64 tokens with two choices each among 16 experts, on two machines of four ranks: fast links lead to three ranks and
# slow ones to four. Expected rows: a rank's two experts are among a token's two with 1 - C(14, 2) / C(16, 2) = 29/120,
# a machine's eight with 1 - C(8, 2) / C(16, 2) = 92/120.
COSTS = [
    # exchange, capacity factor, buffer factor; dispatch, useful, metadata, its gradient, collectives
    ("all_to_all", 1.5, math.inf, (72, 96), (48, 64), (0, 0), (0, 0), 2),  # 12 rows an expert
    ("all_to_all", math.inf, math.inf, (384, 512), (48, 64), (24, 32), (0, 0), 3),
    ("all_to_all", math.inf, 8.0, (384, 512), (48, 64), (24, 32), (0, 0), 3),  # room for all: nobody asks
    ("all_to_all", math.inf, 4.0, (192, 256), (48, 64), (24, 32), (0, 0), 4),  # two rounds at most
    ("all_to_all", math.inf, 2.0, (96, 128), (48, 64), (24, 32), (0, 0), 4),
    ("ragged", math.inf, math.inf, (48, 64), (48, 64), (192, 256), (0, 0), 3),
    ("gather", math.inf, math.inf, (192, 256), (46.4, 4 * 64 * 29 / 120), (3072, 4096), (1536, 2048), 4),
    ("dedup", math.inf, math.inf, (192, 256), (46.4, 4 * 64 * 29 / 120), (1920, 2560), (1536, 2048), 4),
    ("dedup", 1.25, math.inf, (60, 80), (46.4, 4 * 64 * 29 / 120), (600, 800), (480, 640), 4),
    # 64 rows to the other machine, and in it twice as many to each of three ranks.
    ("hierarchical", math.inf, math.inf, (384, 64), (92.8, 64 * 92 / 120), (3840, 640), (3072, 512), 8),
    # Room for 62 of 128 rows, and two bytes of each row that the first hop brought are told.
    ("hierarchical", math.inf, 2.0, (186, 64), (92.8, 64 * 92 / 120), (1860, 640 + 128), (1488, 512), 10),
]  # fmt: skip


@pytest.mark.parametrize(("exchange", "factor", "buffer", "rows", "useful", "metadata", "gradient", "calls"), COSTS)
def test_costs_by_hand(
    exchange: str,
    factor: float,
    buffer: float,
    rows: tuple,
    useful: tuple,
    metadata: tuple,
    gradient: tuple,
    calls: int,
) -> None:
    strategy = STRATEGIES[exchange](16, (2, 4), factor, EXPERT_GROUP, "bfloat16", "float32", buffer_factor=buffer)
    spent = cost(strategy, 64, 2)
    assert spent.dispatch == spent.combine == rows and spent.useful == pytest.approx(useful)
    assert (spent.metadata, spent.metadata_gradient, spent.collectives) == (metadata, gradient, calls)
    # Rows of 32 numbers, there and back: in the forward pass's format, or in the one that is asked for.
    assert wire_bytes(strategy, 64, 2, 32, format="") == 2 * sum(rows) * 64
    assert wire_bytes(strategy, 64, 2, 32, format="int8") == 2 * sum(rows) * 36
    # Links of 200 and 12.5 GB/s, and 10 µs a collective.
    fast, slow = (2 * count * 64 + beside for count, beside in zip(rows, metadata, strict=True))
    assert seconds(strategy, 64, 2, 32) == pytest.approx(fast / 200e9 + slow / 12.5e9 + calls * 10e-6)


@pytest.mark.parametrize(("experts", "of_an_expert"), [(127, 1), (128, 2)])
def test_experts_are_told_in_a_byte_where_there_are_few(experts: int, of_an_expert: int) -> None:
    """A byte holds the number of a rank's experts too, which stands for none."""
    strategy = STRATEGIES["dedup"](2 * experts, (1, 2), math.inf, EXPERT_GROUP)
    assert cost(strategy, 10, 3).metadata == (10 * 3 * (of_an_expert + 4), 0)
    assert cost(strategy, 10, 3).metadata_gradient == (10 * 3 * 4, 0)


@pytest.mark.parametrize(
    ("fields", "formats"),
    [
        ({"dtype": "bfloat16"}, ("bfloat16", "bfloat16")),
        ({"dtype": "bfloat16", "wire_dtype": "int8"}, ("int8", "int8")),
        ({"wire_dtype": "int8", "wire_dtype_backward": "bfloat16"}, ("int8", "bfloat16")),
    ],
)
def test_an_exchange_has_the_configs_formats_and_room(fields: dict[str, str], formats: tuple[str, str]) -> None:
    group, config = ExpertGroup((2, 4), "gpu", ""), tiny((1, 2, 4), buffer_factor=1.75, **fields)
    for exchange in STRATEGIES:
        made = make_exchange(exchange, config, 1.5, group)
        assert isinstance(made, STRATEGIES[exchange]) and (made.forward, made.backward) == formats
        assert (made.num_experts, made.sizes, made.capacity_factor, made.axis) == (8, (2, 4), 1.5, EXPERT_GROUP)
        assert made.buffer_factor == 1.75


@pytest.mark.parametrize(
    ("platform", "kind", "has_ragged"),
    [("tpu", "TPU v5", True), ("tpu", "TPU v5 lite", False), ("gpu", "", True), ("cpu", "", False)],
)
def test_seconds_are_predicted_of_what_the_devices_have(platform: str, kind: str, has_ragged: bool) -> None:
    config, group = tiny((1, 2, 4), exchange="auto"), ExpertGroup((2, 4), platform, kind)
    predicted = predict_seconds(config, math.inf, 64, group)
    assert predicted.keys() == STRATEGIES.keys() - (set() if has_ragged else {"ragged"})
    for exchange, predicted_seconds in predicted.items():
        expected = STRATEGIES[exchange](8, (2, 4), math.inf, EXPERT_GROUP, "float32", "float32")
        # A row is four numbers: a quarter of 16.
        assert predicted_seconds == pytest.approx(seconds(expected, 64, 3, config.model.wire_size))
