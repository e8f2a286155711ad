"""What an export computes, by an independent reading of the class it names, and what comes back from it."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from model.tools import abstract_model, leaves, on_mesh, random_model, tiny
from safetensors.numpy import load_file, save_file
from training.tools import text

from bigmac_jax.config import ConfigError, ModelConfig
from bigmac_jax.data.chat_files import NO_CHAT, ChatFiles, read_chat
from bigmac_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, train_bpe
from bigmac_jax.interchange import (
    Trained,
    bigmac,
    choose_format,
    export_model,
    import_model,
    layout,
    nemotron_h,
    open_checkpoint,
    plain,
    qwen3_moe,
)
from bigmac_jax.interchange.tensor_files import Checkpoint
from bigmac_jax.interchange.tokenizer_files import read_tokenizer, write_tokenizer
from bigmac_jax.model.parameters import named_leaves

from .architectures import logits
from .tools import (
    CLASSES,
    MODELS,
    NEMOTRON,
    OWN,
    QWEN,
    config_of,
    of_model,
    our_logits,
    sentencepiece_model,
    tokens_of,
    with_special_tokens,
)


@pytest.mark.parametrize("name", MODELS)
def test_an_export_computes_the_same_and_comes_back(name: str, tmp_path: pathlib.Path) -> None:
    """Logits of the class to 1e-4, in shards; the model that is read again is bit-equal."""
    config, out = config_of(name), tmp_path / "out"
    with on_mesh(config):
        model, tokens = random_model(config), tokens_of(config)
        assert export_model(config, model, out, max_shard_size="20KB") == CLASSES.get(name, "nemotron_h")
        assert len(list(out.glob("*.safetensors"))) > 2
        ours = our_logits(model, tokens)
        np.testing.assert_allclose(logits(out, tokens), ours, atol=1e-4, rtol=0)
        again, copy = import_model(out)
        before, after = leaves(model), leaves(copy)
        if config.model.scale_embedding:  # √D is part of the embedding now, which is no longer the output's
            assert not again.model.scale_embedding and not again.model.tie_embeddings
            np.testing.assert_array_equal(after.pop("unembedding_VD"), before["embedding_VD"])
            np.testing.assert_array_equal(after.pop("embedding_VD"), before.pop("embedding_VD") * np.float32(4))
            # XLA compiles another program, whose sums may run in another order.
            np.testing.assert_allclose(our_logits(copy, tokens), ours, atol=2e-6, rtol=0)
    assert before.keys() == after.keys()
    for leaf, value in before.items():
        np.testing.assert_array_equal(after[leaf], value, err_msg=leaf)
    if not config.model.scale_embedding:
        for field in ("structure", "tie_embeddings", "head_size", "expert_width", "shared_width", "latent_size",
                      "choices", "balance", "norm_eps", "router_scale", "num_expert_groups", "top_groups"):  # fmt: skip
            assert getattr(again.model, field) == getattr(config.model, field), field


EVERY_TENSOR = ("tiny", "tiny untied", "paper", "biased", "normed", "affine")
PLAIN = {"positions": "learned", "norm": "layernorm", "activation": "gelu", "use_bias": True, "gated": True}


def test_plain_is_bit_equal_and_says_what_it_holds(tmp_path: pathlib.Path) -> None:
    config = tiny(
        (1, 1, 2),
        batch=4,
        latent_norm="pre_dispatch",
        balance="quantile",
        num_shared_experts=1,
        num_layers=3,
        first_dense_layers=1,
        **PLAIN,
    )
    with on_mesh(config):
        model = random_model(config)
        assert export_model(config, model, tmp_path / "out", format="plain") == "bigmac_jax"
        again, copy = import_model(tmp_path / "out")
    assert of_model(again) == of_model(config)
    jax.tree.map(np.testing.assert_array_equal, leaves(copy), leaves(model))
    schema = json.loads((tmp_path / "out/config.json").read_text())
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {name: tuple(entry["shape"]) for name, entry in schema["tensors"].items()} == {
        name: value.shape for name, value in tensors.items()
    }
    assert schema["tensors"]["layers.1.mlp.experts.w_in_eRF"] == {"dims": "eRF", "shape": [8, 4, 16]}
    assert all(set(entry["dims"]) <= set(schema["dimensions"]) for entry in schema["tensors"].values())
    for leaf, value in leaves(model).items():
        stack, _, name = leaf.partition(".")
        layers = {"first": [0], "layers": [1, 2]}.get(stack)
        own = {leaf: value} if layers is None else {f"layers.{n}.{name}": v for n, v in zip(layers, value, strict=True)}
        for stored, expected in own.items():
            np.testing.assert_array_equal(tensors.pop(stored), expected, err_msg=stored)
    assert not tensors


@pytest.mark.parametrize(
    ("name", "model", "kind"),
    [("auto", QWEN, "qwen3_moe"), ("auto", NEMOTRON, "nemotron_h"), ("auto", {"positions": "learned"}, "bigmac"),
     ("plain", {"positions": "learned"}, "bigmac_jax"), ("plain", {}, "bigmac_jax")],
)  # fmt: skip
def test_the_context_length_is_carried(name: str, model: dict[str, Any], kind: str, tmp_path: pathlib.Path) -> None:
    """It does not shrink to the windows of training, neither by an export nor by an import with shorter ones."""
    config = tiny(length=8, context_length=0 if "learned" in model.values() else 40960, **model)
    longest, first, second = config.context_length, tmp_path / "first", tmp_path / "second"
    with on_mesh(config):
        written = random_model(config)
        assert export_model(config, written, first, format=name, tokenizer=ByteTokenizer()) == kind
        again, copy = import_model(first, ["data.sequence_length=4"])
        export_model(again, copy, second, format=name, tokenizer=ByteTokenizer())
        if "positions_LD" in leaves(written):
            np.testing.assert_array_equal(leaves(copy)["positions_LD"], leaves(written)["positions_LD"])
    assert (again.context_length, again.data.sequence_length) == (longest, 4)
    for folder in (first, second):
        values = json.loads((folder / "config.json").read_text())
        assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == longest
        assert values.get("max_position_embeddings", longest) == longest
        assert ("max_position_embeddings" in values) == (kind != "bigmac_jax")
    imported, _, _ = open_checkpoint(second)
    assert imported.context_length == longest
    assert imported.data.sequence_length == (min(longest, 4096) if kind in ("qwen3_moe", "nemotron_h") else 4)


def test_any_mesh_writes_the_same_and_reads_onto_its_shards(tmp_path: pathlib.Path) -> None:
    one, many = config_of("bigmac"), config_of("bigmac", (2, 1, 2, 2, True, True))
    for name, config in (("one", one), ("many", many)):
        with on_mesh(config):
            export_model(config, random_model(config), tmp_path / name / "out", max_shard_size="20KB")
    files = sorted(path.name for path in (tmp_path / "one/out").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "many/out").iterdir())
    for name in files:
        assert (tmp_path / "one/out" / name).read_bytes() == (tmp_path / "many/out" / name).read_bytes(), name
    with on_mesh(many):
        mesh = ("mesh.data=2", "mesh.expert=2", "mesh.tensor=2", "mesh.fsdp=True", "mesh.split_experts=True")
        _, model = import_model(tmp_path / "one/out", mesh)
        expected = named_leaves(abstract_model(many))
        for leaf, value in named_leaves(model).items():
            assert value.sharding.spec == expected[leaf].sharding.spec, leaf
        jax.tree.map(np.testing.assert_array_equal, leaves(model), leaves(random_model(many)))


def test_half_the_size(tmp_path: pathlib.Path) -> None:
    """bfloat16, but for the router; what is read again is rounded, and computes in bfloat16."""
    config = config_of("bigmac")
    with on_mesh(config):
        model = random_model(config)
        export_model(config, model, tmp_path / "out", dtype="bfloat16")
        again, copy = import_model(tmp_path / "out")
    before, after = leaves(model), leaves(copy)
    assert again.execution.dtype == "bfloat16"
    for leaf, value in before.items():
        exact = "router" in leaf
        expected = value if exact else value.astype(jax.numpy.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(after[leaf], expected, err_msg=leaf)


def test_fused_experts_are_read(tmp_path: pathlib.Path) -> None:
    """transformers may store all experts as one tensor, and calls the backbone `model`."""
    for name, config in (("n", config_of("bigmac")), ("q", config_of("qwen tied"))):
        with on_mesh(config):
            model = random_model(config)
            export_model(config, model, tmp_path / name)
            file = tmp_path / name / "model.safetensors"
            stored = {key.replace("backbone.", "model."): value for key, value in load_file(file).items()}
            for prefix in {key.partition(".experts.")[0] + ".experts" for key in stored if ".experts.0." in key}:
                matrices = {
                    part: np.stack([stored.pop(f"{prefix}.{e}.{part}.weight") for e in range(8)])
                    for part in ("gate_proj", "up_proj", "down_proj")
                    if f"{prefix}.0.{part}.weight" in stored
                }
                if "gate_proj" in matrices:
                    both = [matrices.pop("gate_proj"), matrices.pop("up_proj")]
                    matrices["gate_up_proj"] = np.concatenate(both, axis=1)
                stored |= {f"{prefix}.{part}": value for part, value in matrices.items()}
            save_file(stored, file)
            values = json.loads((tmp_path / name / "config.json").read_text())
            if values.pop("rope_theta", None):  # transformers 5 writes other names than published checkpoints have
                values["num_local_experts"] = values.pop("num_experts")
            else:
                kinds = {"*": "full_attention", "E": "moe"}
                values["layer_types"] = [kinds[letter] for letter in values.pop("hybrid_override_pattern")]
            (tmp_path / name / "config.json").write_text(json.dumps(values))
            again, copy = import_model(tmp_path / name)
            assert again.model.rope_theta == config.model.rope_theta
        jax.tree.map(np.testing.assert_array_equal, leaves(copy), leaves(model))


@pytest.mark.parametrize(
    ("form", "name"),
    [(nemotron_h, "bigmac"), (qwen3_moe, "qwen"), (bigmac, "tiny"), (bigmac, "dense"), (plain, "tiny")],
)
def test_fields_of_config_json_that_nothing_reads(
    form: Any, name: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are named in a line, but for what stands in any file; those that would change numbers are refused."""
    save_file({}, tmp_path / "model.safetensors")
    checkpoint, values = Checkpoint(tmp_path, form.split_stored), form.to_json(config_of(name), {})
    silent = {"torch_dtype": None, "eos_token_id": [1], "transformers_version": "5", "_name_or_path": "x", "tau": None}
    form.from_json(values | silent, checkpoint)
    assert not caplog.messages
    form.from_json(values | {"zeta": 1, "alpha": False, "final_logit_softcapping": None}, checkpoint)
    line = f"{tmp_path / 'config.json'}: nothing is known of alpha, zeta; no such field is read"
    assert caplog.messages == [line]
    for field in ({"final_logit_softcapping": 30}, {"attention_multiplier": 1}, {"quantization_config": {"bits": 8}}):
        ((key, value),) = field.items()
        with pytest.raises(ConfigError, match=f"config.json: {key}={value} changes what a model computes"):
            form.from_json(values | field, checkpoint)


@pytest.mark.parametrize(("form", "name"), [(qwen3_moe, "qwen tied"), (bigmac, "tiny")])
def test_a_tied_table_may_stand_in_a_file_twice(form: Any, name: str, tmp_path: pathlib.Path) -> None:
    """Two tables are another model."""
    values, table = form.to_json(config_of(name), {}), np.arange(6, dtype=np.float32).reshape(3, 2)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    for other in (table, table + 1, table[:2]):
        save_file(dict(zip(names, (table, other), strict=True)), tmp_path / "model.safetensors")
        checkpoint = Checkpoint(tmp_path, form.split_stored)
        if other is table:
            assert form.from_json(values, checkpoint).model.tie_embeddings
            assert checkpoint.left_out == ["lm_head.weight"] and checkpoint.names() == {names[0]}
            continue
        with pytest.raises(
            ConfigError, match=f"tie_word_embeddings=True, and {names[1]} of the tensors is not {names[0]}"
        ):
            form.from_json(values, checkpoint)
    if form is qwen3_moe:  # pasting the fix works
        assert not form.from_json(values | {"tie_word_embeddings": False}, checkpoint).model.tie_embeddings
        assert not checkpoint.left_out


NEMOTRON_HAS_NO = {
    "structure=vanilla": {"structure": "vanilla", "num_experts": 128},
    "positions=rope": {"positions": "rope"},
    "positions=learned": {"positions": "learned"},
    "norm=layernorm": {"norm": "layernorm"},
    "activation=gelu": {"activation": "gelu"},
    "gated=True": {"gated": True},
    "use_bias=True": {"use_bias": True},
    "qk_norm=True": {"qk_norm": True},
    "latent_norm=pre_dispatch": {"latent_norm": "pre_dispatch"},
    "latent_norm=auto": {"latent_norm": "auto"},  # which is skip
    "router_scores=softmax": {"router_scores": "softmax"},
    "group_scores=top_k": {"num_expert_groups": 2, "top_groups": 1},  # judged by three experts, not by two
    "router=affine": {"router": "affine"},
}
QWEN_HAS_NO = {
    "latent_norm=post_combine": {"latent_norm": "post_combine"},
    "router_scale=2": {"router_scale": 2.0},
    "balance=bias": {"balance": "bias"},
    "num_shared_experts=1": {"num_shared_experts": 1},
    "gated=False": {"gated": False},
    "router_scores=sigmoid": {"router_scores": "sigmoid"},
    "positions=none": {"positions": "none"},
    "qk_norm=False": {"qk_norm": False},
    "balance=quantile": {"balance": "quantile"},
    "router=hyper": {"router": "hyper"},
    "top_groups=1": {"num_expert_groups": 2, "top_groups": 1},
}


@pytest.mark.parametrize(
    ("name", "field", "model"),
    [("nemotron_h", field, NEMOTRON | model) for field, model in NEMOTRON_HAS_NO.items()]
    + [("qwen3_moe", field, QWEN | model) for field, model in QWEN_HAS_NO.items()],
)
def test_no_equivalent_names_the_field(name: str, field: str, model: dict[str, Any]) -> None:
    config = tiny(**model)
    assert choose_format(config) == "bigmac"
    with pytest.raises(ConfigError, match=f"--format={name}: model.{field}.*; use --format=auto") as caught:
        choose_format(config, name)
    assert str(caught.value).count(" must be ") == 1  # and no other field


@pytest.mark.parametrize(
    "name", [name if name in EVERY_TENSOR else pytest.param(name, marks=pytest.mark.full) for name in OWN]
)
def test_our_own_class_computes_the_same_and_comes_back(name: str, tmp_path: pathlib.Path) -> None:
    """Logits of the class to 1e-4; what is read again is bit-equal, what its config says of the model too. The class's
    code lies beside it."""
    config, out = config_of(name), tmp_path / "out"
    with on_mesh(config):
        model, tokens = random_model(config), tokens_of(config)
        assert export_model(config, model, out) == "bigmac"
        np.testing.assert_allclose(logits(out, tokens), our_logits(model, tokens), atol=1e-4, rtol=0)
        again, copy = import_model(out)
    assert of_model(again) == of_model(config)
    jax.tree.map(np.testing.assert_array_equal, leaves(copy), leaves(model))
    for entry in json.loads((out / "config.json").read_text())["auto_map"].values():
        module, name = entry.split(".")
        assert f"class {name}(" in (out / f"{module}.py").read_text()


@pytest.mark.parametrize("kind", ["bigmac", pytest.param("plain", marks=pytest.mark.full)])
def test_a_hyper_router_is_exported_as_the_matrix_that_it_makes(kind: str, tmp_path: pathlib.Path) -> None:
    """Logits of the class to 1e-4. What is read again is an affine router, and no network."""
    config, out = tiny(batch=4, router="hyper", hyper_width=6), tmp_path / "out"
    with on_mesh(config):
        model, tokens = random_model(config), tokens_of(config)
        export_model(config, model, out, format=kind)
        ours = our_logits(model, tokens)
        if kind == "bigmac":
            np.testing.assert_allclose(logits(out, tokens), ours, atol=1e-4, rtol=0)
        again, copy = import_model(out)
        # Another program, which makes no matrix: it rounds otherwise.
        np.testing.assert_allclose(our_logits(copy, tokens), ours, atol=5e-6, rtol=0)
    model_now = dataclasses.replace(config.resolved.model, router="affine")
    assert again.model == model_now and not [name for name in leaves(copy) if "hyper" in name]
    tensors = load_file(out / "model.safetensors")
    assert [name for name in tensors if "hyper" in name] == []
    values = json.loads((out / "config.json").read_text())
    (values["bigmac_jax"] if kind == "bigmac" else values["config"])["model"]["router"] = "hyper"
    (out / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="router=hyper must be affine" if kind == "bigmac" else "lacks layers"):
        import_model(out)


def test_a_frozen_router_has_a_class_of_its_own_no_more_than_a_linear_one(tmp_path: pathlib.Path) -> None:
    """transformers' class has no word for it: what is read again is linear, and would be trained."""
    config = tiny(batch=4, **QWEN, router="frozen")
    with on_mesh(config):
        model = random_model(config)
        assert export_model(config, model, tmp_path / "out") == "qwen3_moe"
        again, copy = import_model(tmp_path / "out")
    assert again.model.router == "linear"
    np.testing.assert_array_equal(leaves(copy)["layers.mlp.router_DE"], leaves(model)["layers.mlp.router_DE"])


@pytest.mark.parametrize(("balance", "expected"), [("aux_loss", 0.25), ("bias", 0.0), ("none", 0.0)])
def test_the_balance_loss_presses_as_hard(balance: str, expected: float) -> None:
    """transformers' is K where loads are even, over all layers at once; ours is 1 for each of them."""
    config = tiny(batch=4, **QWEN | {"balance": balance, "balance_coefficient": 0.125, "num_layers": 4, "top_k": 2})
    assert qwen3_moe.to_json(config, {})["router_aux_loss_coef"] == expected


def test_models_that_have_every_tensor() -> None:
    """Those of which `make test` judges the values: together they hold each tensor that the class may have."""
    found = set()
    for name in EVERY_TENSOR:
        config = config_of(name)
        with on_mesh(config):
            found |= {tensor.name for tensor in bigmac.tensors(config.model, named_leaves(abstract_model(config)))}
    of_layer = {name.partition(".layers.")[2].partition(".")[2] for name in found}
    mlps = {f"{mlp}.{name}" for mlp in ("mlp", "mlp.shared_experts") for name in bigmac._MLP.values()}
    moes = {f"mlp.{name}" for name in bigmac._MOE.values() if not name.startswith("shared_experts.")}
    assert set(bigmac._ENDS.values()) <= found
    assert of_layer - {""} == {*bigmac._LAYER.values(), *moes, *mlps}


# What the class computes with, and what it needs not know: how a model is trained.
EXPRESSED = {
    "structure", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "norm", "norm_eps",
    "positions", "rope_theta", "context_length", "activation", "gated", "use_bias", "qk_norm", "tie_embeddings",
    "scale_embedding", "num_experts", "top_k", "down_ratio", "expert_hidden_size", "num_shared_experts",
    "shared_expert_hidden_size", "latent_norm", "router_scores", "router_renormalize", "router_scale", "balance",
    "num_expert_groups", "top_groups", "group_scores", "first_dense_layers", "dense_hidden_size", "router",
}  # fmt: skip
TRAINING = {
    "dropout", "capacity_factor", "overflow", "overflow_tries", "balance_coefficient", "balance_step", "balance_scope",
    "balance_bias_rate", "z_loss_coefficient", "projection_init", "hyper_width", "mtp_modules", "mtp_blocks",
}  # fmt: skip
REFUSED = {
    "blocks", "mamba_heads", "mamba_head_dim", "mamba_groups", "mamba_state", "mamba_conv", "mamba_conv_bias",
    "mamba_bias", "mamba_least_step", "mamba_most_step",
}  # fmt: skip


def test_every_field_of_a_model_is_known() -> None:
    """A new one is either computed by the class, or has nothing to do with what it computes, and is named here; or
    `bigmac.find_obstacles` refuses it."""
    assert not EXPRESSED & TRAINING and not REFUSED & (EXPRESSED | TRAINING)
    assert {field.name for field in dataclasses.fields(ModelConfig)} == EXPRESSED | TRAINING | REFUSED
    hybrid = tiny(structure="dense", blocks="M-", mamba_head_dim=16).model
    assert bigmac.find_obstacles(hybrid)


def test_own_models_cover_every_value() -> None:
    """Those that transformers' judgement of our class rests on (test_modeling.py)."""
    models = [config_of(name).model for name in OWN]
    computed = (
        "structure", "norm", "positions", "activation", "gated", "use_bias", "qk_norm", "tie_embeddings", "latent_norm",
        "scale_embedding", "router", "router_scores", "router_renormalize", "balance", "group_scores",
    )  # fmt: skip
    found = {name: {getattr(model, name) for model in models} for name in computed}
    assert {name: len(values) for name, values in found.items()} == {
        "structure": 4, "norm": 2, "positions": 3, "activation": 3, "latent_norm": 5, "balance": 4, "router_scores": 2,
        "group_scores": 2, "router": 3,
        **dict.fromkeys(("gated", "use_bias", "qk_norm", "tie_embeddings", "scale_embedding", "router_renormalize"), 2),
    }  # fmt: skip


def test_card(tmp_path: pathlib.Path) -> None:
    """What is known of the run, and no more; how each format is loaded."""
    config = config_of("tiny")
    with on_mesh(config):
        model = random_model(config)
        total = sum(leaf.size for leaf in leaves(model).values())
        export_model(config, model, tmp_path / "a", trained=Trained(50, 2.0, ()), tokenizer=ByteTokenizer())
        export_model(config, model, tmp_path / "b")
        export_model(
            config, model, tmp_path / "c", format="plain", trained=Trained(0, None, [os.fsdecode(b"`run\xff`")])
        )
    known, unknown, plain = ((tmp_path / name / "README.md").read_text() for name in "abc")
    assert "| trained | 50 steps on 1,600 tokens of sotu |" in known
    assert "| validation loss | 2.0000 nats a token (perplexity 7.39) |" in known
    # Two layers of eight experts of two matrices 4 x 16, of which a token meets three.
    idle = 2 * 5 * 2 * 4 * 16
    assert f"| parameters | {total:,}, of which a token meets {total - idle:,} |" in known
    assert 'pipeline("text-generation", "a", trust_remote_code=True)' in known
    assert 'AutoModelForCausalLM.from_pretrained("b", trust_remote_code=True)' in unknown
    assert "| began with | `run?` |" in plain  # whose name is no UTF-8
    assert 'bigmac_jax.import_model("c")' in plain and "transformers" not in plain
    for card in (unknown, plain):
        assert "trained |" not in card and "loss" not in card


def test_tokenizers(tmp_path: pathlib.Path) -> None:
    """tokenizer.json of bytes and of a BPE encodes what ours does; special tokens' names in text are text."""
    words = text(20, seed=3)
    config = config_of("tied")
    with on_mesh(config):
        model = random_model(config)
        ours = {"bytes": ByteTokenizer(), "bpe": JsonTokenizer(train_bpe(words, 300))}
        for name, tokenizer in ours.items():
            export_model(config, model, tmp_path / name, tokenizer=tokenizer)
            theirs = tokenizers.Tokenizer.from_file(str(tmp_path / name / "tokenizer.json"))
            settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
            generation = json.loads((tmp_path / name / "generation_config.json").read_text())
            assert settings["split_special_tokens"] and settings["eos_token"] == "<|endoftext|>"
            theirs.encode_special_tokens = True
            for sample in (words[0], "naïve 東京\t\0 <|endoftext|>\n"):
                ids = tokenizer.encode(sample)
                assert theirs.encode(sample).ids == ids
                assert theirs.decode(ids, skip_special_tokens=False) == sample
            assert theirs.token_to_id(settings["eos_token"]) == tokenizer.eos_id == generation["eos_token_id"]
            assert json.loads((tmp_path / name / "config.json").read_text())["eos_token_id"] == tokenizer.eos_id
            again, _ = import_model(tmp_path / name)
            assert again.data.tokenizer == str(tmp_path / name / "tokenizer.json")


def test_settings_beside_a_sentencepiece_model(tmp_path: pathlib.Path) -> None:
    """Without them transformers would ask the model's class for a tokenizer (test_transformers.py)."""
    tokenizer, config = sentencepiece_model(tmp_path, text(20, seed=3)), config_of("tied")
    data = dataclasses.replace(config.data, tokenizer=str(tmp_path / "tokenizer.model"))
    special = {"bos_token": "<s>", "unk_token": "<nowhere>"}
    for chat, bos in ((NO_CHAT, None), (ChatFiles(CHATML, special, splits=False), "<s>")):
        write_tokenizer(tmp_path, config, tokenizer, chat)
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert settings["model_max_length"] == config.context_length
        assert (settings["eos_token"], settings["pad_token"], settings["bos_token"]) == ("<eos>", "<eos>", bos)
        assert settings.get("split_special_tokens") == (chat.splits or None) and "unk_token" not in settings
        again, found = read_tokenizer(dataclasses.replace(config, data=data))
        assert again.fingerprint == tokenizer.fingerprint and found.splits == chat.splits


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("name", ["tiny", "tied", "qwen"])
def test_a_chat_template_has_whole_special_tokens_and_ends(name: str, tmp_path: pathlib.Path) -> None:
    """In all files; and what is imported knows the ends again."""
    tokenizer = with_special_tokens(JsonTokenizer(train_bpe(text(20, seed=3), 260)), "<|im_start|>", "<|im_end|>")
    config, out = config_of(name), tmp_path / "out"
    with on_mesh(config):
        chat = ChatFiles(CHATML, ends=(7, config.model.vocab_size))
        export_model(config, random_model(config), out, tokenizer=tokenizer, chat=chat)
        assert "split_special_tokens" not in json.loads((out / "tokenizer_config.json").read_text())
        expected = [tokenizer.eos_id, tokenizer.vocab_size - 1, 7]
        for file in ("config.json", "generation_config.json"):
            assert json.loads((out / file).read_text())["eos_token_id"] == expected
        again, _ = import_model(out)
    assert read_chat("", again.data.tokenizer, "data.tokenizer").ends == tuple(expected)


def test_defaults_of_published_classes() -> None:
    """test_transformers.py compares all of them with the classes, where these are installed."""
    nemotron, qwen = (layout.fill_json({}, of._DEFAULTS, {}) for of in (nemotron_h, qwen3_moe))
    sizes = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_experts_per_tok")
    assert [nemotron[name] for name in sizes] == [131072, 4096, 32, 8, 2]
    assert [qwen[name] for name in sizes] == [151936, 2048, 32, 4, 8]
    given = [layout.fill_json({"vocab_size": 9}, of._DEFAULTS, {}) for of in (nemotron_h, qwen3_moe)]
    assert given == [nemotron | {"vocab_size": 9}, qwen | {"vocab_size": 9}]
    sizes = ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel", "intermediate_size")
    assert [nemotron[name] for name in sizes] == [128, 64, 8, 128, 4, 21504]
    flags = ("use_conv_bias", "use_bias", "mlp_bias", "tie_word_embeddings", "num_nextn_predict_layers")
    assert [nemotron[name] for name in flags] == [True, False, False, False, 0]
    rates = ("layer_norm_epsilon", "time_step_min", "routed_scaling_factor")
    assert [nemotron[name] for name in rates] == [1e-5, 1e-3, 1]
    assert (nemotron["n_group"], nemotron["topk_group"], nemotron["moe_latent_size"]) == (1, 1, None)
    assert nemotron["moe_shared_expert_intermediate_size"] == 7688 and nemotron["sliding_window"] is None
    flags = ("tie_word_embeddings", "attention_bias", "use_sliding_window")
    assert not any(qwen[name] for name in flags) and (qwen["decoder_sparse_step"], qwen["mlp_only_layers"]) == (1, [])
    assert (qwen["rms_norm_eps"], qwen["rope_theta"], qwen["head_dim"]) == (1e-6, 1e4, 0)
    assert (nemotron["n_routed_experts"], nemotron["moe_intermediate_size"], nemotron["head_dim"]) == (8, 7688, 128)
    assert (qwen["num_experts"], qwen["moe_intermediate_size"], qwen["num_hidden_layers"]) == (128, 768, 24)
    assert (nemotron["max_position_embeddings"], qwen["max_position_embeddings"]) == (4096, 32768)
    assert nemotron["norm_topk_prob"] and not qwen["norm_topk_prob"]


def test_a_field_under_both_its_names() -> None:
    """test_transformers.py compares with the classes, where these are installed."""
    values = {"mamba_dt_min": 0.1, "time_step_min": 0.2, "torch_dtype": "float32", "dtype": "bfloat16"}
    for given in (values, dict(reversed(values.items()))):
        found = layout.fill_json(given, nemotron_h._DEFAULTS, nemotron_h._OTHER_NAMES)
        assert (found["time_step_min"], found["dtype"]) == (0.1, "bfloat16")
    found = layout.fill_json({"torch_dtype": "bfloat16", "time_step_min": 0.2}, nemotron_h._DEFAULTS, {})
    assert (found["time_step_min"], found["dtype"]) == (0.2, "bfloat16")
