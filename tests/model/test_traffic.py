"""Bytes that cross, read from the compiled program: of each strategy, and of one against another.

64 experts, K = 8; buffers are static, so what is sent is what is allocated.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config, TrainConfig
from bigmac_jax.model.exchange import STRATEGIES, Hierarchical
from bigmac_jax.model.exchange.costs import cost, wire_bytes
from bigmac_jax.model.mesh import ExpertGroup, current_group, make_mesh
from bigmac_jax.model.traffic import computed_rows, exchange_traffic, exchanged_bytes, received_rows, tensor_bytes
from bigmac_jax.training.programs import step_program
from bigmac_jax.training.step import make_trainer

from .program import Collective, all_to_alls, collectives, layer, payloads
from .tools import on_mesh, some, tiny

TESTS = pathlib.Path(__file__).parents[1]
TOKENS = 64  # of a rank
RANKS = 8
WIDTH = {"bigmac": 128, "fine_grained": 512}


def config(name: str, structure: str = "bigmac", sizes: tuple[int, int] = (1, 8), **model: object) -> Config:
    fields = {"structure": structure, "exchange": name, "hidden_size": 512, "num_experts": 64, "top_k": 8}
    ranks = sizes[0] * sizes[1]
    return tiny((1, *sizes), batch=ranks, length=TOKENS, **(fields | model))


def sent(found: list[Collective]) -> tuple[int, int]:
    """(payload, metadata) bytes that a rank of `RANKS` sends to others: rows, and all the rest."""
    widths = {width + scale for width in WIDTH.values() for scale in (0, 4)}
    payload, metadata = 0, 0
    for c in found:
        # Of a gather the result stands in the program, of a reduction what a rank keeps.
        size = {"all-to-all": c.bytes, "all-gather": c.bytes, "reduce-scatter": c.bytes * RANKS}[c.kind]
        share = size * (RANKS - 1) // RANKS
        if c.operands[0][1][-1] in widths:
            payload += share
        else:
            metadata += share
    return payload, metadata


def of(name: str, structure: str = "bigmac", **model: object) -> tuple[int, int]:
    return sent(collectives(layer(config(name, structure, **model))))


FACTORS = {"all_to_all": 1.1, "dedup": 1.1, "hierarchical": float("inf"), "gather": float("inf")}


@pytest.mark.parametrize("name", some(FACTORS))
def test_bigmac_sends_r_times_the_rows_of_fine_grained(name: str) -> None:
    bigmac, fine = (of(name, structure, capacity_factor=FACTORS[name]) for structure in ("bigmac", "fine_grained"))
    assert bigmac[0] * 4 == fine[0] > 0
    assert bigmac[1] == fine[1]


@pytest.mark.parametrize("factor", [1.1, float("inf")])
@pytest.mark.parametrize("name", [n for n in STRATEGIES if n != "ragged"])
def test_wire_bytes_are_the_programs(name: str, factor: float) -> None:
    c = config(name, capacity_factor=factor)
    strategy = STRATEGIES[name](64, (1, 8), factor, ("node", "expert"))
    payload, metadata = sent(collectives(layer(c)))
    assert payload == wire_bytes(strategy, TOKENS, 8, 128, format="")
    assert metadata == sum(cost(strategy, TOKENS, 8).metadata)
    assert wire_bytes(STRATEGIES[name](64, (1, 1), factor, ("node", "expert")), TOKENS, 8, 128, format="") == 0


def test_what_found_no_room_is_told_in_bytes_that_are_counted() -> None:
    """Over two hops, in rounds: which of a row's choices the second hop had no room for goes back over the first."""
    sizes, factor = (2, 4), float("inf")
    rows, choices = 512, 8
    told, untold = (Hierarchical(64, sizes, factor, ("node", "expert"), buffer_factor=f) for f in (1.5, float("inf")))

    def metadata(exchange: Hierarchical) -> int:
        """Bytes that a rank sends beside rows, in the traced plan and dispatch."""
        x, experts, gates = jnp.zeros((rows, 16)), jnp.zeros((rows, choices), jnp.int32), jnp.zeros((rows, choices))

        def there(*given: jax.Array) -> jax.Array:
            x_TR, expert_TK, gate_TK = given
            plan = exchange.plan(expert_TK)
            return exchange.dispatch(plan, x_TR, gate_TK)[0] + (0 if plan.left_TK is None else plan.left_TK.sum())

        over = P(("node", "expert"))
        with jax.set_mesh(jax.make_mesh(sizes, ("node", "expert"), axis_types=(AxisType.Explicit,) * 2)):
            given = [jax.device_put(v, over) for v in (x, experts, gates)]
            operands = all_to_alls(jax.make_jaxpr(jax.shard_map(there, out_specs=over))(*given).jaxpr)
        # One operand a collective, whose first dimension is of the ranks that it goes to.
        return sum(
            (shape[0] - 1) * math.prod(shape[1:]) * jnp.dtype(dtype).itemsize
            for dtype, shape in operands
            if shape[-1] != 16
        )

    for exchange in (told, untold):
        assert metadata(exchange) == sum(cost(exchange, rows // 8, choices).metadata)
    assert untold.dropless and not untold.in_rounds and told.in_rounds


@pytest.mark.parametrize(
    ("model", "parts"),
    some(
        [
            ({"remat": "layer"}, 2),
            ({}, 1),
            ({}, 2),
            ({"remat": "layer"}, 1),
            ({"balance": "none", "overlap_chunks": 2}, 2),
            ({"remat": "exchange"}, 2),
            ({"balance_scope": "part", "remat": "layer"}, 2),
        ],
        every=4,
    ),
)
def test_logged_bytes_are_the_training_steps(model: dict, parts: int) -> None:
    """The pass that counts loads for an accumulated balance loss, and rematerialisation, included."""
    c = replace(tiny((1, 1, 4), capacity_factor=1.25, **model), train=TrainConfig(accumulate_steps=parts))
    with on_mesh(c):
        mesh = make_mesh(c)
        trainer = make_trainer(c, mesh)
        step = step_program(c, mesh, trainer)
        operands = all_to_alls(trainer.step.trace(*step.arguments).jaxpr.jaxpr)
        received = sum(jnp.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in payloads(operands))
        # Of four ranks, each from three others.
        assert received * (4 - 1) == sum(exchange_traffic(c, 4, current_group()).padded) > 0


def test_dedup_sends_at_most_three_quarters() -> None:
    """At equal slack over the expected rows, its experts and gates included."""
    dedup, paper = (sum(of(name, capacity_factor=1.1)) for name in ("dedup", "all_to_all"))
    assert dedup <= 0.75 * paper


def test_int8_with_its_scales_is_a_quarter() -> None:
    small, full = (of("all_to_all", capacity_factor=1.1, wire_dtype=f)[0] for f in ("int8", "float32"))
    assert small <= 0.27 * full


@pytest.mark.full
def test_hierarchical_halves_the_slow_link() -> None:
    """Four machines of eight ranks, dropless: T rows a pair of machines, against all_to_all at f = 1.1."""
    run = subprocess.run(
        [sys.executable, "-m", "model.slow_link"],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    slow = json.loads(run.stdout.splitlines()[-1])
    assert 0 < slow["hierarchical"] <= 0.5 * slow["all_to_all"]
    assert slow["hierarchical payload"] == 2 * 3 * TOKENS * 128 * 4  # out and back, to three machines


def of_traffic(exchange: str, mesh: tuple[int, ...] = (1, 2, 4), **fields: Any) -> tuple[Config, ExpertGroup]:
    """Eight ranks with 64 tokens each, 16 experts of width 16 or 4, two choices."""
    c = tiny(mesh, batch=64, length=8, num_experts=16, top_k=2, dtype="bfloat16", exchange=exchange, **fields)
    return c, ExpertGroup((mesh[1], mesh[2]), "gpu", "")


@pytest.mark.parametrize(
    ("exchange", "factor", "buffer", "sizes", "received", "computed"),
    [
        ("all_to_all", 1.5, math.inf, (2, 4), 8 * 24, 3),  # of 12 rows an expert
        ("all_to_all", 1.5, math.inf, (1, 1), 16 * 12, 3),
        ("all_to_all", math.inf, math.inf, (1, 1), 64, 2),
        ("all_to_all", math.inf, 2.0, (2, 4), 8 * 32, 2),
        ("ragged", math.inf, math.inf, (2, 4), 8 * 64 * 2, 2),
        ("ragged", math.inf, 1.25, (2, 4), 160, 2),
        ("dedup", 1.25, math.inf, (2, 4), 8 * 20, 2),
        ("gather", math.inf, math.inf, (2, 4), 8 * 64, 2),
    ],
)
def test_rows_that_arrive_and_are_computed(
    exchange: str, factor: float, buffer: float, sizes: tuple[int, int], received: int, computed: int
) -> None:
    """Of a rank's 64 tokens, with those that it keeps."""
    strategy = STRATEGIES[exchange](16, sizes, factor, ("node", "expert"), buffer_factor=buffer)
    assert received_rows(strategy, 64, 2) == pytest.approx(received)
    assert computed_rows(strategy, 64, 2) == computed


@pytest.mark.parametrize(
    ("structure", "exchange", "fields", "ways"),
    [
        ("bigmac", "dedup", {}, 2),  # W↑ needs what came back
        ("fine_grained", "dedup", {}, 1),  # summed at the experts
        ("fine_grained", "dedup", {"latent_norm": "post_combine"}, 2),
        ("fine_grained", "all_to_all", {}, 2),  # gates need it
    ],
)
def test_bytes_of_exchanges_that_are_kept_and_made_again(
    structure: str, exchange: str, fields: dict, ways: int
) -> None:
    c, group = of_traffic(exchange, structure=structure, capacity_factor=1.25, **fields)
    rows, width = 8 * 20, 4 if structure == "bigmac" else 16  # both have 20 of a pair of ranks
    assert exchanged_bytes(c, 8, group) == ways * rows * width * 2
    assert exchanged_bytes(c, 8, ExpertGroup((1, 1), "gpu", "")) == 0
    two = exchanged_bytes(replace(c, execution=replace(c.execution, overlap_chunks=2)), 8, group)
    assert two == exchanged_bytes(c, 8, group)
    # There and back, and the gradients of both; what is made again comes back a second time if it is needed.
    for remat, again in (("none", 0), ("exchange", 0), ("layer", 1), ("offload", 1)):
        traffic = exchange_traffic(replace(c, execution=replace(c.execution, remat=remat)), 8, group)
        crossings, layers = 4 + (again and ways), 2
        assert traffic.exchanges == crossings * layers
        assert traffic.padded == tuple(crossings * layers * 8 * n * 20 * width * 2 for n in (3, 4))
        expected = 16 if exchange == "all_to_all" else 64 * 29 / 120
        assert traffic.payload == pytest.approx([n / 20 * expected for n in traffic.padded])
        beside = 20 * (10 * (1 + again) + 8) if exchange == "dedup" else 0  # experts, and gates with a gradient
        assert traffic.metadata == tuple(layers * 8 * n * beside for n in (3, 4))


@pytest.mark.parametrize(
    ("structure", "remat", "again", "repeated"),
    [
        ("bigmac", "none", 0, 0),
        ("bigmac", "exchange", 1, 1),
        ("bigmac", "layer", 1, 2),  # the sums that an exchange brings back are needed again, too
        ("fine_grained", "layer", 1, 1),
    ],
)
def test_bytes_over_tensor_by_hand(structure: str, remat: str, again: int, repeated: int) -> None:
    """Four tensor ranks of four groups have 64 tokens each, in two parts: two branches of attention and one of Mamba,
    a dense MLP and two of experts, next-token modules included, in two forward passes."""
    c, group = of_traffic("dedup", (1, 1, 4, 4, False, True), structure=structure, capacity_factor=1.25, remat=remat,
                          num_layers=1, blocks="*-ME", mamba_heads=4, mamba_groups=4,
                          mtp_modules=1, mtp_blocks="*E")  # fmt: skip
    c = replace(c, train=TrainConfig(accumulate_steps=2), data=replace(c.data, batch_size=128))
    sequences = 64 * 16 * (3 * (6 + 2 * again) + 6 + again)
    # Of 32 tokens at a time 14.4 are expected on each of four ranks, and 18 have room.
    rows = 2 * 2 * 4 * 18 * (4 if structure == "bigmac" else 16) * (6 + repeated)
    tables, ids = 64 * 16 * 5 * 2, 4 * 64 * 3 * 2
    sizes = {"expert": 4, "tensor": 4}
    assert tensor_bytes(c, sizes, group) == pytest.approx(3 * (2 * (sequences + rows + tables) + ids))
    whole = replace(c, mesh=replace(c.mesh, split_experts=False))
    assert tensor_bytes(whole, sizes, group) == pytest.approx(3 * (2 * (sequences + tables) + ids))
    assert tensor_bytes(c, {"expert": 16}, group) == 0
