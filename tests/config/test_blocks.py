"""Patterns of residual branches: which loops compute them, and what their parameters are called."""

import random

import pytest

from bigmac_jax.config import Config, ConfigError, ModelConfig
from bigmac_jax.config.blocks import Loop, find_loops, make_stacks, name_branches, split_layers

SUPER = "MEMEMEM*E" * 3 + "MEMEMEMEM*E" * 4 + "MEMEMEM*E" + "MEMEMEME"


def test_a_layer_ends_with_what_takes_each_token_by_itself() -> None:
    assert split_layers("MM*EM-E*") == ("MM*E", "M-", "E", "*")
    assert name_branches("MM*E") == ["mamba0", "mamba1", "attention", "mlp"]
    assert name_branches("*-") == ["attention", "mlp"]


@pytest.mark.parametrize(
    ("pattern", "loops"),
    [
        ("*E*E*E", [(("*E",), 3)]),
        ("*-*-*E*E*E", [(("*-",), 2), (("*E",), 3)]),
        ("MEM*E" * 8, [(("ME", "M*E"), 8)]),
        ("M-M-M-MM-M*-", [(("M-",), 3), (("MM-", "M*-"), 1)]),
        ("E*", [(("E", "*"), 1)]),
    ],
)
def test_loops(pattern: str, loops: list[tuple[tuple[str, ...], int]]) -> None:
    assert find_loops(pattern) == tuple(Loop(*loop) for loop in loops)


def test_as_few_layers_as_can_be_are_compiled() -> None:
    """Against all ways to cut short patterns; published ones by their numbers."""

    def fewest(layers: tuple[str, ...]) -> int:
        if not layers:
            return 0
        found = []
        for size in range(1, len(layers) + 1):
            trips = 1
            while layers[: size * trips] == layers[:size] * trips and size * trips <= len(layers):
                found.append(size + fewest(layers[size * trips :]))
                trips += 1
        return min(found)

    draw = random.Random(0)
    for _ in range(200):
        pattern = "".join(draw.choice(("ME", "M*E", "*-")) for _ in range(draw.randint(1, 8)))
        loops = find_loops(pattern)
        assert sum(len(loop.layers) for loop in loops) == fewest(split_layers(pattern)), pattern
    assert sum(len(loop.layers) for loop in find_loops(SUPER)) == 12  # of 40


def test_stacks_have_every_layer_once() -> None:
    draw = random.Random(0)
    for _ in range(100):
        pattern = "".join(draw.choice("*ME-") for _ in range(draw.randint(1, 24)))
        layers = split_layers(pattern)
        stacks = [stack for loop in make_stacks(find_loops(pattern)) for stack in loop]
        assert len({stack.name for stack in stacks}) == len(stacks)
        numbers = {number: stack.blocks for stack in stacks for number in stack.layers}
        assert [numbers[i] for i in range(len(layers))] == list(layers), pattern
        with_experts = [i for i, layer in enumerate(layers) if "E" in layer]
        found = {number: stack.layers[i] for stack in stacks for i, number in enumerate(stack.experts)}
        assert [found[i] for i in range(len(with_experts))] == with_experts, pattern


def test_names_of_parameters() -> None:
    """Those of models without a pattern are what they have always been."""

    def names(**model: object) -> list[str]:
        return [stack.name for stack in ModelConfig(**model).stacks]  # type: ignore[arg-type]

    assert names() == names(blocks="*E") == names(structure="dense", latent_norm="none") == ["layers"]
    assert names(first_dense_layers=1) == ["first", "layers"]
    assert names(blocks="ME*E", num_layers=3) == ["layers0_0", "layers0_1"]
    assert names(blocks="MEMEM*EM*E*E*E", num_layers=1) == ["layers0_0", "layers1_0", "layers2_0"]


def test_counts() -> None:
    model = ModelConfig(blocks="MM*E-ME", num_layers=3)
    assert [model.count_branches(letter) for letter in "*ME-"] == [3, 9, 6, 3]
    assert (model.depth, model.moe_layers, model.mlp_layers, model.mamba_layers) == (9, 6, 3, 9)
    dense = ModelConfig("dense", blocks="ME*E", num_layers=2, latent_norm="none")  # one field changes the structure
    assert (dense.moe_layers, dense.mlp_layers, dense.mamba_layers) == (0, 4, 2)
    model = ModelConfig(num_layers=2**31 - 1)  # no pattern is written out
    assert model.moe_layers == model.depth == 2**31 - 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocks": "MX*E"}, r"model\.blocks=MX\*E may have the letters \* M E - .*; use \*E"),
        ({"blocks": "*E" * 300}, r"model\.blocks has 600 branches, which must be at most 512; use a shorter one"),
        ({"blocks": "*-"}, r"model\.blocks=\*- has no experts \(E\), and model\.structure=bigmac has; use structure=d"),
        (
            {"blocks": "*E", "first_dense_layers": 1},
            r"use first_dense_layers=0, or no blocks",
        ),
    ],
)
def test_patterns_that_are_none(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(ModelConfig(**fields))  # type: ignore[arg-type]
