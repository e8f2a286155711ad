"""What routers cost, by hand: numbers that are kept, that are trained, and FLOPs of a step."""

import dataclasses

import pytest
from model.tools import tiny

from bigmac_jax.config import Config, MeshConfig, OptimizerConfig, TrainConfig, TuningConfig, load_config
from bigmac_jax.config.reads import notes
from bigmac_jax.model.counts import (
    adapted_parts,
    counts_loads,
    flops,
    forward_passes,
    parameters,
    passes_to_logits,
)
from bigmac_jax.model.memory import checkpoint_bytes, state_memory
from bigmac_jax.planning.cost import _shared_numbers
from bigmac_jax.planning.structures import of_equal_size


def of(router: str) -> Config:
    """Two layers, 16 × 8 of a router's matrix, a network of 6."""
    return tiny(router=router, hyper_width=6)


# 16 numbers of a vector, and a network 16 → 6 → 8 · 17 without biases.
NETWORK = 16 * 6 + 6 * 8 * 17


@pytest.mark.parametrize(
    ("router", "kept", "trained", "computed"),
    [("linear", 128, 128, 128), ("affine", 136, 136, 136), ("hyper", 16 + NETWORK, 16, 136), ("frozen", 128, 0, 128)],
)
def test_numbers(router: str, kept: int, trained: int, computed: int) -> None:
    config, linear = of(router), parameters(of("linear"), {})
    count = parameters(config, {})
    assert count.parts["router"] == 2 * kept and count.total - linear.total == 2 * (kept - 128)
    # Ranks gather the matrix and sum its gradient, not the network; and a token meets that.
    assert count.active - linear.active == count.computed - linear.total == 2 * (computed - 128)
    assert _shared_numbers(config, count)[0] - _shared_numbers(of("linear"), linear)[0] == 2 * (computed - 128)
    assert count.of_a_rank == count.total and count.trained_of_a_rank == count.total - 2 * (kept - trained)
    assert count.moments_of_a_rank == 2 * count.trained_of_a_rank == 2 * count.updated_of_a_rank
    memory = state_memory(config, count, 1, "tpu")
    assert memory["parameters"] == 4 * count.total
    averaged = dataclasses.replace(config, optimizer=OptimizerConfig(average_decay=0.9))
    assert checkpoint_bytes(config) == memory["parameters"] + memory["optimizer"]
    assert checkpoint_bytes(averaged) == checkpoint_bytes(config) + memory["gradients"]
    assert memory["gradients"] == 4 * count.trained_of_a_rank == memory["optimizer"] / 2
    assert (
        "router" in adapted_parts(dataclasses.replace(config, tuning=TuningConfig(lora_targets="attention,router")))
    ) == (trained >= 128)


def test_a_rank_has_a_part_of_the_network() -> None:
    """The vector, what leads to the hidden units and the bias are on all four; the rest is split."""
    config = dataclasses.replace(of("hyper"), mesh=MeshConfig(fsdp=True))
    linear = dataclasses.replace(of("linear"), mesh=MeshConfig(fsdp=True))
    whole = parameters(linear, {"data": 4}).of_a_rank - 2 * 128 // 4
    assert parameters(config, {"data": 4}).of_a_rank == whole + 2 * (16 + 16 * 6 + 6 * 8 + 16 * 6 * 8 // 4)


@pytest.mark.parametrize("parts", [1, 4])
def test_flops(parts: int) -> None:
    """Of a batch of 8 × 8 tokens: 6 a token and entry of the matrix; and in each part twice 2 a weight of the network,
    forward and back to the vector."""
    train = TrainConfig(accumulate_steps=parts)
    linear, hyper = (flops(dataclasses.replace(of(router), train=train))["router"] for router in ("linear", "hyper"))
    assert linear == 6 * 64 * 2 * 128
    assert hyper - linear == 2 * parts * 4 * NETWORK


def test_other_structures_are_planned_without_overflow():
    """Of two experts with one choice, there would be one left for the two tries."""
    config = load_config("tiny", ("model.capacity_factor=1.25", "model.overflow=next"))
    assert of_equal_size(config, "vanilla", "none").model.overflow == "drop"


def test_choices_that_do_not_reach_top_k_are_told():
    grown = ("train.choices_from=2", "train.choices_steps=100", "model.top_k=4", "train.steps={}")
    (line,) = notes(load_config("tiny", [field.format(60) for field in (*grown, "optimizer.warmup_steps=1")]))
    assert line == "train.choices_steps=100 of train.steps=60: choices reach 3, and evaluation takes model.top_k=4"
    assert not notes(load_config("tiny", [field.format(100) for field in (*grown, "optimizer.warmup_steps=1")]))


def test_flops_of_every_part() -> None:
    """A model with all kinds of branches and two next-token modules of two: three of attention, four of experts."""
    config = tiny(
        num_layers=1, blocks="ME*-E", mtp_modules=2, mtp_blocks="*E", structure="bigmac", num_kv_heads=2, gated=True,
        activation="silu", expert_hidden_size=10, num_shared_experts=2, shared_expert_hidden_size=5, mamba_chunk=8,
        dense_hidden_size=20, mamba_heads=4, mamba_head_dim=4, mamba_groups=2, mamba_state=6, latent_norm="gate",
    )  # fmt: skip
    tokens, entries = 8 * 8, {
        "attention": 3 * (2 * 16 * 16 + 2 * 16 * 8) + 2 * 2 * 16 * 16,  # queries and outputs, keys and values; modules
        "output": 3 * 16 * 264,
        "router": 4 * 16 * 8,
        "experts": 4 * 3 * 3 * 4 * 10,  # three matrices of three experts, on rows of four
        "shared": 4 * 3 * 16 * 10,
        "projections": 4 * (2 * 16 * 4 + 16 * 16),
        "mlp": 3 * 16 * 20,
        "mamba": 16 * (3 * 16 + 2 * 12 + 4),
    }  # fmt: skip
    # Products of activations with each other: of scores and values, and of a chunk with itself and with states.
    between = {"attention": 3 * 2 * 8 * 16, "mamba": 8 * (12 + 16) + 2 * 6 * 16}
    expected = {part: 6 * tokens * (count + between.get(part, 0)) for part, count in entries.items()}
    assert flops(config) == expected
    causal = flops(config, causal=True)
    assert causal.pop("attention") == expected["attention"] - 6 * tokens * between["attention"] / 2
    assert causal == {part: count for part, count in expected.items() if part != "attention"}
    # A router that is not trained has no product for its gradient; beside adapters nothing has that is not adapted.
    assert flops(dataclasses.replace(config, tuning=TuningConfig(train_router=False))) == expected | {
        "router": 4 * tokens * entries["router"]
    }
    assert flops(tiny(router="frozen"))["router"] == 4 * tokens * 2 * 16 * 8


def test_passes_and_loads_that_are_counted_first() -> None:
    """A step's load is counted before the first of several parts, and DPO's reference beside adapters is a pass."""
    whole, parts = TrainConfig(), TrainConfig(accumulate_steps=2)
    dpo = TuningConfig(objective="dpo", lora_rank=2, lora_targets="attention")
    for config, train, tuning, loads, to_logits in (
        (tiny(), whole, TuningConfig(), False, 1),
        (tiny(), parts, TuningConfig(), True, 1),
        (tiny(balance_scope="part"), parts, TuningConfig(), False, 1),
        (tiny(balance="bias"), parts, TuningConfig(), False, 1),
        (tiny(structure="dense"), parts, TuningConfig(), False, 1),
        (tiny(), parts, dpo, True, 2),
        (tiny(), whole, dataclasses.replace(dpo, objective="sft"), False, 1),
        (tiny(), whole, TuningConfig(objective="dpo"), False, 1),
    ):
        config = dataclasses.replace(config, train=dataclasses.replace(train, init_from="some"), tuning=tuning)
        assert (counts_loads(config), passes_to_logits(config)) == (loads, to_logits)
        assert forward_passes(config) == to_logits + loads
