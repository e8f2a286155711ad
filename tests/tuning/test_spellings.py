"""The same model in two spellings: a run may begin with it, and computes what it did. Another model is refused, and so
is the same one where its parameters are stacked otherwise."""

import itertools
import pathlib
from typing import Any

import numpy as np
import pytest
from flax import nnx
from interchange.tools import our_logits
from model.tools import abstract_model, on_mesh, random_model, random_tokens, some, tiny

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.interchange import export_model
from bigmac_jax.model.parameters import named_leaves
from bigmac_jax.training.step import split_model
from bigmac_jax.tuning.pretrained import Pretrained, compare_models, load_parameters, open_pretrained

MAMBA = {"mamba_heads": 4, "mamba_head_dim": 8, "mamba_groups": 2, "mamba_state": 6}
Fields = dict[str, Any]
# Of a model: what all spellings have, and what says the same.
SAME: dict[str, tuple[Fields, list[Fields]]] = {
    "a pattern": (MAMBA, [{"blocks": "MEME*EMEME*E", "num_layers": 1}, {"blocks": "MEME*E", "num_layers": 2}]),
    "the default": ({}, [{"num_layers": 3}, {"blocks": "*E", "num_layers": 3}, {"blocks": "*E*E*E", "num_layers": 1}]),
    "dense": ({"structure": "dense"}, [{"num_layers": 2}, {"blocks": "*-", "num_layers": 2},
                                       {"blocks": "*E", "num_layers": 2}, {"blocks": "*-*-", "num_layers": 1}]),
    "MLPs first": ({"dense_hidden_size": 20}, [{"num_layers": 3, "first_dense_layers": 1},
                                               {"blocks": "*-*E*E", "num_layers": 1}]),
    "modules": ({"mtp_modules": 2, "num_layers": 2}, [{}, {"mtp_blocks": "*E"}, {"blocks": "*E", "mtp_blocks": "*E"}]),
    "modules of a pattern": (MAMBA | {"mtp_modules": 1, "blocks": "*EME", "num_layers": 1},
                             [{}, {"mtp_blocks": "ME"}]),
    "heads": ({"num_layers": 1}, [{}, {"num_kv_heads": 4}, {"head_dim": 4}, {"num_kv_heads": 4, "head_dim": 4}]),
    "widths": ({"num_layers": 2, "first_dense_layers": 1, "num_shared_experts": 2},
               [{}, {"dense_hidden_size": 64, "expert_hidden_size": 16, "shared_expert_hidden_size": 4},
                {"num_shared_experts": 1, "shared_expert_hidden_size": 8}]),
    "vanilla": ({"structure": "vanilla", "num_layers": 1}, [{"num_experts": 64, "down_ratio": 0.25},
                                                            {"num_experts": 128, "down_ratio": 0.125}]),
    "a ratio": ({"structure": "fine_grained", "num_layers": 1}, [{"down_ratio": 0.5}, {"expert_hidden_size": 8}]),
    "groups": ({"num_expert_groups": 4, "top_groups": 2, "top_k": 4, "num_layers": 1},
               [{"group_scores": "top_k"}, {"group_scores": "top_2"}]),
    "Mamba's heads": (MAMBA | {"blocks": "ME", "num_layers": 1}, [{"mamba_heads": 0}, {"mamba_heads": 4}]),
    "no attention": (MAMBA | {"blocks": "ME", "num_layers": 1}, [{"positions": "rope"}, {"positions": "none"}]),
}  # fmt: skip
OTHERS: dict[str, tuple[Fields, Fields, str]] = {
    "other blocks": (MAMBA | {"blocks": "ME*E"}, MAMBA | {"blocks": "*EME"}, "model.blocks='*EME' differs from 'ME*E'"),
    "more layers": ({"blocks": "*E*E", "num_layers": 1}, {"num_layers": 3}, "model.num_layers=3 differs from 1 of"),
    "other modules": ({"mtp_modules": 1}, {"mtp_modules": 1, "mtp_blocks": "**E"}, "model.mtp_blocks='**E' differs"),
    "other heads": ({}, {"num_kv_heads": 2}, "model.num_kv_heads=2 differs from 0"),
    "other loops": (
        MAMBA | {"blocks": "MEME", "num_layers": 2},
        MAMBA | {"blocks": "MEMEMEME", "num_layers": 1},
        "model.blocks=MEMEMEME with model.num_layers=1 and model.first_dense_layers=0 gives the layers of "
        "train.init_from=there in other loops, by which its parameters are stacked; use model.blocks=MEME with "
        "model.num_layers=2 and model.first_dense_layers=0",
    ),
}  # fmt: skip


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    with on_mesh(config):
        return {name: leaf.shape for name, leaf in named_leaves(abstract_model(config)).items()}


@pytest.mark.parametrize("name", SAME)
def test_no_difference(name: str) -> None:
    """Whichever of the spellings comes first."""
    common, spellings = SAME[name]
    configs = [tiny(**common | spelling) for spelling in spellings]
    assert len({repr(config.model) for config in configs}) == len(spellings)
    for before, now in itertools.permutations(configs, 2):
        assert compare_models(Pretrained("there", "", "", before), now) == []


@pytest.mark.parametrize("name", some(SAME, every=len(SAME)))
def test_equal_trees_of_parameters(name: str) -> None:
    common, spellings = SAME[name]
    trees = [shapes(tiny(**common | spelling)) for spelling in spellings]
    assert all(tree == trees[0] for tree in trees)


@pytest.mark.parametrize("name", OTHERS)
def test_another_model(name: str) -> None:
    before, now, message = OTHERS[name]
    configs = [tiny(**{"num_layers": 1} | fields) for fields in (before, now)]
    with pytest.raises(ConfigError) as raised:
        compare_models(Pretrained("there", "", "", configs[0]), configs[1])
    assert message in str(raised.value)


@pytest.mark.full
@pytest.mark.parametrize("name", OTHERS)
def test_other_trees_of_parameters(name: str) -> None:
    trees = [shapes(tiny(**{"num_layers": 1} | fields)) for fields in OTHERS[name][:2]]
    assert trees[0] != trees[1]


@pytest.mark.full
@pytest.mark.parametrize("name", SAME)
def test_it_computes_the_same(name: str, tmp_path: pathlib.Path) -> None:
    """A run in each spelling begins with the model of the first."""
    common, spellings = SAME[name]
    first = tiny(**common | spellings[0])
    with on_mesh(first):
        model = random_model(first)
        tokens = random_tokens(first)[:, :-1]
        expected = our_logits(model, tokens)
        export_model(first, model, tmp_path / "there", format="plain")
        for spelling in spellings:
            config = tiny(**common | spelling)
            graphdef = split_model(abstract_model(config))[0]
            params, rest = load_parameters(open_pretrained(str(tmp_path / "there")), config)
            np.testing.assert_array_equal(our_logits(nnx.merge(graphdef, params, rest), tokens), expected)
