"""What one forward pass sends: two payload exchanges a layer, of width r·h for bigmac and h for the others."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from bigmac_jax.model.exchange import AllToAll, Plan

from .program import all_to_alls, collectives, compiled_all_to_alls, forward, layer, payloads
from .tools import on_mesh, tiny

LAYERS = 3
WIDTHS = {"bigmac": 4, "fine_grained": 16, "vanilla": 16}  # r·h and h
LAYOUTS = {"dropless": math.inf, "capacity": 1.25}


def program(structure: str, mesh: tuple[int, int, int] = (2, 1, 4), **model: Any) -> Any:
    experts = 128 if structure == "vanilla" else 8
    return forward(tiny(mesh, structure=structure, num_layers=LAYERS, num_experts=experts, **model))


@pytest.mark.parametrize("factor", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("mesh", [(1, 1, 2), (2, 1, 4), (1, 2, 4)], ids=str)
@pytest.mark.parametrize(("structure", "width"), WIDTHS.items())
def test_two_exchanges_a_layer(structure: str, width: int, mesh: tuple[int, int, int], factor: float) -> None:
    sent = all_to_alls(program(structure, mesh, capacity_factor=factor).jaxpr.jaxpr)
    assert [shape[-1] for _, shape in payloads(sent)] == [width] * 2 * LAYERS
    # A dropless plan says which expert each block is for: one integer a block.
    assert len(sent) - len(payloads(sent)) == (LAYERS if factor == math.inf else 0)


@pytest.mark.parametrize(("structure", "width"), WIDTHS.items())
def test_the_compiled_program_agrees(structure: str, width: int) -> None:
    """The layers are a loop: its body stands in the HLO once."""
    sent = [payloads(parts) for parts in compiled_all_to_alls(program(structure))]
    assert [{shape[-1] for _, shape in parts} for parts in sent if parts] == [{width}] * 2


@pytest.mark.parametrize("groups", [1, 4])
def test_a_layer_has_no_other_collective(groups: int) -> None:
    """The router chooses on each rank: left to itself, XLA gathers the scores of all ranks for a top-k."""
    grouped = {"num_expert_groups": groups, "top_groups": (groups + 1) // 2}
    found = collectives(layer(tiny((1, 2, 2), capacity_factor=1.25, balance="none", **grouped)))
    assert [(c.kind, c.ranks) for c in found] == [("all-to-all", 4)] * 2


def test_dense_sends_nothing() -> None:
    traced = program("dense")
    assert all_to_alls(traced.jaxpr.jaxpr) == []
    assert compiled_all_to_alls(traced) == []


def test_shared_experts_and_latent_norms_send_nothing() -> None:
    sent = all_to_alls(program("bigmac", num_shared_experts=2, latent_norm="pre_dispatch").jaxpr.jaxpr)
    assert len(payloads(sent)) == 2 * LAYERS


def test_one_exchange_more_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch = AllToAll.dispatch

    def twice(self: AllToAll, plan: Plan, x_TR: jax.Array, gates_TK: jax.Array) -> Any:
        blocks, _ = dispatch(self, plan, x_TR, gates_TK)
        return dispatch(self, plan, blocks[0], gates_TK)

    monkeypatch.setattr(AllToAll, "dispatch", twice)
    traced = program("bigmac", capacity_factor=8.0)  # C = T, which the second dispatch needs
    assert len(payloads(all_to_alls(traced.jaxpr.jaxpr))) == 3 * LAYERS
    assert len(compiled_all_to_alls(traced)) == 3


def test_the_counter_walks_into_every_kind_of_function() -> None:
    def swap(x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)

    @jax.custom_vjp
    def custom(x: jax.Array) -> jax.Array:
        return swap(x)

    custom.defvjp(lambda x: (custom(x), None), lambda _, dy: (dy,))

    def on_rank(x: jax.Array) -> jax.Array:
        x = jax.jit(swap)(jax.checkpoint(swap)(custom(x)))
        return jax.lax.scan(
            lambda x, _: (jax.lax.scan(lambda x, _: (swap(x), None), x, length=2)[0], None), x, length=5
        )[0]

    with on_mesh(tiny((1, 1, 4))):
        x = jax.device_put(jnp.zeros((16, 3)), P("expert"))
        jaxpr = jax.make_jaxpr(jax.shard_map(on_rank, in_specs=P("expert"), out_specs=P("expert")))(x).jaxpr
    assert all_to_alls(jaxpr) == [("float32", (4, 3))] * (1 + 1 + 1 + 2 * 5)
