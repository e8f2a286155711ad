"""NemotronH in any pattern of blocks, by an independent reading of the class; and what is not read."""

import dataclasses
import itertools
import json
import pathlib
import tracemalloc
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from model.tools import abstract_model, leaves, on_mesh, random_model, tiny
from safetensors.numpy import load_file

from bigmac_jax.config import Config, ConfigError, load_config
from bigmac_jax.interchange import choose_format, export_model, import_model, import_run, nemotron_h
from bigmac_jax.interchange.layout import stored_shapes
from bigmac_jax.interchange.tensor_files import Checkpoint, Index
from bigmac_jax.model.parameters import named_leaves

from .architectures import logits
from .test_errors import with_config, with_tensors
from .tools import HYBRID, HYBRIDS, our_logits, tokens_of


def hybrid(name: str, mesh: tuple[Any, ...] = (1, 1, 1)) -> Config:
    return tiny(mesh, batch=4, length=10, **HYBRID | HYBRIDS[name])


def test_a_shipped_model_is_the_published_one() -> None:
    """Fields of Nemotron 3 Nano's own config.json that say what is computed."""
    nano = nemotron_h.to_json(load_config("nemotron3_nano"), {})
    published = {
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "num_hidden_layers": 52,
        "vocab_size": 131072, "hidden_size": 2688, "num_attention_heads": 32, "num_key_value_heads": 2,
        "head_dim": 128, "attention_bias": False, "use_bias": False, "mlp_bias": False, "mamba_proj_bias": False,
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False, "mamba_num_heads": 64, "mamba_head_dim": 64,
        "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "use_conv_bias": True, "time_step_min": 0.001,
        "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856, "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 3712, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "n_group": 1, "topk_group": 1,
    }  # fmt: skip
    assert {name: nano[name] for name in published} == published


@pytest.mark.parametrize("name", ["all kinds", *(pytest.param(n, marks=pytest.mark.full) for n in list(HYBRIDS)[1:])])
def test_a_hybrid_computes_the_same_and_comes_back(name: str, tmp_path: pathlib.Path) -> None:
    """Logits of the class to 1e-4; the model that is read again is bit-equal, under our own names too."""
    config = hybrid(name)
    with on_mesh(config):
        model, tokens = random_model(config), tokens_of(config)
        assert export_model(config, model, tmp_path / "out", max_shard_size="10KB") == "nemotron_h"
        export_model(config, model, tmp_path / "plain", format="plain")
        ours = our_logits(model, tokens)
        np.testing.assert_allclose(logits(tmp_path / "out", tokens), ours, atol=1e-4, rtol=0)
        assert np.abs(ours).max() > 1
        for folder in ("out", "plain"):
            again, copy = import_model(tmp_path / folder)
            assert again.model.stacks == config.model.stacks
            for field in dataclasses.fields(config.model):
                if field.name.startswith("mamba"):
                    assert getattr(again.model, field.name) == getattr(config.model, field.name), field.name
            assert choose_format(again) == "nemotron_h"
            jax.tree.map(np.testing.assert_array_equal, leaves(copy), leaves(model))


def test_blocks_and_rows_by_hand() -> None:
    """Block 5 is the sixth letter, whatever layer it stands in; in_proj is [gate | x | B | C | dt]."""
    config = hybrid("all kinds")
    with on_mesh(config):
        shapes = named_leaves(abstract_model(config))
    tensors = list(nemotron_h.tensors(config.model, shapes))

    def of_block(number: int, name: str) -> list[tuple[str, int | None, slice | None]]:
        wanted = f"backbone.layers.{number}.{name}"
        return [(tensor.leaf, tensor.layer, tensor.rows) for tensor in tensors if tensor.name == wanted]

    assert [stack.blocks for stack in config.model.stacks] == ["MM*E", "-", "M"]
    assert of_block(1, "norm.weight") == [("layers0_0.mamba1_norm.scale_D", 0, None)]
    assert of_block(2, "mixer.q_proj.weight") == [("layers0_0.attention.query.w_DF", 0, None)]
    assert of_block(3, "mixer.experts.7.up_proj.weight") == [("layers0_0.mlp.experts.w_in_eRF", 0, None)]
    assert of_block(4, "mixer.up_proj.weight") == [("layers0_1.mlp.up.w_DF", 0, None)]
    names, bounds = ("gate", "inner", "b", "c", "time"), (0, 16, 32, 44, 56, 60)
    rows = [slice(*pair) for pair in itertools.pairwise(bounds)]
    for end, leaf in (("weight", "w_DF"), ("bias", "b_F")):
        expected = [(f"layers0_2.mamba.{name}.{leaf}", 0, of) for name, of in zip(names, rows, strict=True)]
        assert of_block(5, f"mixer.in_proj.{end}") == expected
    own = [slice(0, 16), slice(16, 28), slice(28, 40)]
    expected = [(f"layers0_2.mamba.conv_{name}_KF", 0, of) for name, of in zip(names[1:4], own, strict=True)]
    assert of_block(5, "mixer.conv1d.weight") == expected
    stored = stored_shapes(tensors, shapes)
    assert stored["backbone.layers.5.mixer.in_proj.weight"] == (60, 16)
    assert stored["backbone.layers.5.mixer.conv1d.weight"] == (40, 1, 4)
    assert stored["backbone.layers.5.mixer.conv1d.bias"] == (40,)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Any, pathlib.Path]:
    config, folder = hybrid("all kinds"), tmp_path_factory.mktemp("hybrid")
    with on_mesh(config):
        model = random_model(config)
        export_model(config, model, folder / "float32")
        export_model(config, model, folder / "bfloat16", dtype="bfloat16")
    return config, model, folder


def test_what_is_exact_stays_float32(exported: Any) -> None:
    config, model, folder = exported
    tensors = load_file(folder / "bfloat16/model.safetensors")
    exact = {name for name, value in tensors.items() if value.dtype == np.float32}
    ends = {name.partition("mixer.")[2] for name in exact}
    assert ends == {"A_log", "D", "dt_bias", "gate.weight", "gate.e_score_correction_bias"}
    with on_mesh(config):
        again, copy = import_model(folder / "bfloat16")
    for name, value in leaves(model).items():
        if name.endswith("_N"):
            np.testing.assert_array_equal(leaves(copy)[name], value)
    assert again.execution.dtype == "bfloat16"


def test_patterns_in_other_words(exported: Any, tmp_path: pathlib.Path) -> None:
    """With names of blocks, the pattern beside them or not; of older files, with other names of blocks and fields."""
    values = json.loads((exported[2] / "float32/config.json").read_text())
    assert values["hybrid_override_pattern"] == "MM*E-M" and "layers_block_type" not in values  # serving engines' words
    old = {"linear_attention": "mamba", "full_attention": "attention"}
    renamed = {"n_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv", "time_step_min": "mamba_dt_min"}
    older = {renamed.get(name, name): value for name, value in values.items() if name != "hybrid_override_pattern"}
    named = ({"layers_block_type": KINDS}, {"layer_types": [old.get(kind, kind) for kind in KINDS]})
    for number, other in enumerate((values | named[0], older | named[1])):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(exported[2] / "float32/model.safetensors")
        (folder / "config.json").write_text(json.dumps(other))
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").write_bytes((exported[2] / "float32/model.safetensors").read_bytes())
        with on_mesh(exported[0]):
            _, copy = import_model(folder)
        jax.tree.map(np.testing.assert_array_equal, leaves(copy), leaves(exported[1]))


@pytest.mark.parametrize(
    ("blocks", "fields"),
    [
        ("*E*E*E", ("", 3, 0)), ("*-*-", ("", 2, 0)), ("*-*E*E", ("", 3, 1)), ("*E*-", ("*E*-", 1, 0)),
        ("M-M-", ("M-M-", 1, 0)), ("*", ("*", 1, 0)), ("E", ("E", 1, 0)),
    ],
)  # fmt: skip
def test_a_pattern_becomes_a_model(blocks: str, fields: tuple[str, int, int]) -> None:
    """Plain ones have the fields that they had without patterns."""
    found = nemotron_h._of_pattern(blocks)
    assert (found.get("blocks", ""), found["num_layers"], found.get("first_dense_layers", 0)) == fields


def without(*names: str) -> Callable[[pathlib.Path], None]:
    return with_tensors(lambda tensors: [tensors.pop(name) for name in names])


IN, CONV = "backbone.layers.5.mixer.in_proj", "backbone.layers.0.mixer.conv1d"
KINDS = ["linear_attention", "linear_attention", "full_attention", "moe", "mlp", "linear_attention"]
BROKEN: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
    "another length": (with_config(num_hidden_layers=7), r"num_hidden_layers=7 must be 6, the number of blocks in MM"),
    "two patterns": (
        with_config(layers_block_type=KINDS, hybrid_override_pattern="MM*EM-"),
        r"=MM\*EM- must be MM\*E-M, as layers_block_type",
    ),
    "a letter": (with_config(hybrid_override_pattern="MM*E-X"), r"hybrid_override_pattern=MM\*E-X must be made of"),
    "a kind": (with_config(layers_block_type=[*KINDS[:5], "rwkv"]), "has rwkv, and may have full_att"),
    "no list": (with_config(layers_block_type=7), "config.json is not a config of nemotron_h"),
    "no pattern": (with_config(hybrid_override_pattern=None), "neither layers_block_type nor"),
    "an order that does not fit": (
        with_config(layers_block_type=[*KINDS[::-1]], hybrid_override_pattern="M-E*MM"),
        "backbone.layers.1",
    ),
    "too many": (
        with_config(layers_block_type=["moe"] * 600, hybrid_override_pattern=None, num_hidden_layers=600),
        "model.blocks has 600 branches",
    ),
    "biases of MLPs": (with_config(mlp_bias=True), "mlp_bias=True must be false"),
    "another activation": (with_config(mamba_hidden_act="gelu"), "mamba_hidden_act=gelu must be silu"),
    "groups": (with_config(n_groups=3), "model.mamba_heads=4 must be a multiple of model.mamba_groups=3"),
    "other groups": (with_config(n_groups=4), r"in_proj.weight of .* is \(60, 16\), its config.json says \(84, 16\)"),
    "other heads": (with_config(mamba_head_dim=5), r"in_proj.weight of .* is \(60, 16\), .* says \(68, 16\)"),
    "another width": (with_config(intermediate_size=24), r"4.mixer.up_proj.weight of .* is \(20, 16\), .* \(24, 16\)"),
    "other taps": (with_config(conv_kernel=3), r"conv1d.weight of .* is \(40, 1, 4\), its config.json says \(40, 1, 3"),
    "no bias": (without(f"{CONV}.bias"), f"lacks {CONV}.bias, which its config.json asks for"),
    "a bias": (with_config(use_bias=False), "holds backbone.layers.0.mixer.in_proj.bias and 5 more"),
    "a bias of convolutions": (with_config(use_conv_bias=False), "holds backbone.layers.0.mixer.conv1d.bias and 2 mo"),
    "a missing tensor": (without("backbone.layers.5.mixer.A_log"), "lacks backbone.layers.5.mixer.A_log"),
    "a stray block": (
        with_tensors(lambda t: t.update({"backbone.layers.6.mixer.D": t["backbone.layers.5.mixer.D"]})),
        "holds backbone.layers.6.mixer.D, which",
    ),
    "NaN in a part": (
        with_tensors(lambda t: t[f"{IN}.weight"].__setitem__((59, 3), np.nan)),
        f"{IN}.weight of .* holds NaN or infinity",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_hybrid(exported: Any, tmp_path: pathlib.Path, name: str) -> None:
    """One line, and nothing is written."""
    config, _, folder = exported
    (tmp_path / "broken").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "broken" / file).write_bytes((folder / "float32" / file).read_bytes())
    BROKEN[name][0](tmp_path / "broken")
    with on_mesh(config), pytest.raises(ConfigError, match=BROKEN[name][1]) as caught:
        import_run(tmp_path / "broken", tmp_path / "run", ["data.tokenizer=bytes"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_no_equivalent_names_the_field() -> None:
    config = tiny(**HYBRID | HYBRIDS["no experts"] | {"mamba_most_step": 2.0})
    with pytest.raises(ConfigError, match=r"--format=nemotron_h: model.mamba_most_step=2.0 must be inf; use --format"):
        choose_format(config, "nemotron_h")
    assert choose_format(config) == "bigmac_jax"


@pytest.mark.full
def test_a_rank_reads_its_own_part(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of each of the five matrices in in_proj, where heads are split in two; and values are right."""
    _, model, folder = exported
    read, found = Checkpoint.read, []

    def spy(self: Checkpoint, name: str, index: Index = ()) -> np.ndarray:
        found.append((name, index))
        return read(self, name, index)

    many = hybrid("all kinds", (2, 1, 2, 2, True, True))
    with on_mesh(many), monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read", spy)
        mesh = ("mesh.data=2", "mesh.expert=2", "mesh.tensor=2", "mesh.fsdp=True", "mesh.split_experts=True")
        _, copy = import_model(folder / "float32", mesh)
        expected = named_leaves(abstract_model(many))
        for leaf, value in named_leaves(copy).items():
            assert value.sharding.spec == expected[leaf].sharding.spec, leaf
        jax.tree.map(np.testing.assert_array_equal, leaves(copy), leaves(model))
    rows = {(index[0].start, index[0].stop) for name, index in found if name == f"{IN}.weight"}
    halves = ((0, 8, 16), (16, 24, 32), (32, 38, 44), (44, 50, 56), (56, 58, 60))
    assert rows == {pair for bounds in halves for pair in itertools.pairwise(bounds)}


@pytest.mark.full
def test_memory_of_an_import_is_that_of_a_tensor(tmp_path: pathlib.Path) -> None:
    """Beside the model itself, which JAX holds: NumPy's arrays and the bytes of files are counted."""
    fields = {"blocks": "MMMMM", "structure": "dense", "hidden_size": 128, "mamba_heads": 256, "mamba_head_dim": 8}
    config = tiny(batch=4, **HYBRID | fields)
    with on_mesh(config):
        export_model(config, random_model(config), tmp_path / "out")
        sizes = [value.nbytes for value in load_file(tmp_path / "out/model.safetensors").values()]
        import_model(tmp_path / "out")  # compiles
        tracemalloc.start()
        import_model(tmp_path / "out")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert sum(sizes) > 7 * max(sizes)
    assert most < 1.4 * max(sizes)  # a part of in_proj as it is stored, and transposed
