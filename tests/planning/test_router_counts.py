"""What routers cost, by hand: numbers that are kept, that are trained, and FLOPs of a step."""

import dataclasses

import pytest
from model.tools import tiny

from bigmac_jax.config import Config, MeshConfig, OptimizerConfig, TrainConfig, TuningConfig, load_config
from bigmac_jax.config.reads import notes
from bigmac_jax.model.counts import adapted_parts, flops, parameters
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
