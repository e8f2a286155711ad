"""transformers' own classes: what they compute from an export on real text, and what is imported from them.

Needs the extra `hf`.
"""

import copy
import json
import pathlib
import types
from typing import Any

import numpy as np
import pytest
from model.tools import on_mesh, random_model

from bigmac_jax.config import ConfigError, DataConfig
from bigmac_jax.data.chat_files import NO_CHAT
from bigmac_jax.data.chat_template import Chat
from bigmac_jax.data.corpus import open_documents
from bigmac_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, train_bpe
from bigmac_jax.interchange import export_model, import_model, layout, nemotron_h, qwen3_moe
from bigmac_jax.interchange.tokenizer_files import write_tokenizer

from .test_formats import CHATML
from .tools import CLASSES, MODELS, config_of, our_logits, sentencepiece_model, with_special_tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")

NEMOTRON = {"vocab_size": 257, "hidden_size": 32, "layers_block_type": ["full_attention", "moe"] * 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "n_routed_experts": 8, "num_experts_per_tok": 4,
            "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 20}  # fmt: skip
QWEN = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 24}  # fmt: skip
RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "bigmac": ("NemotronH", NEMOTRON | {"moe_latent_size": 8, "routed_scaling_factor": 2.5}),  # heads 128 wide
    "groups": ("NemotronH", NEMOTRON | {"moe_latent_size": 8, "head_dim": 8, "n_group": 4, "topk_group": 2}),
    "fine_grained": ("NemotronH", NEMOTRON | {"head_dim": 10, "norm_topk_prob": False}),
    "qwen": ("Qwen3Moe", QWEN | {"norm_topk_prob": True, "head_dim": 10}),
    "qwen tied": (
        "Qwen3Moe",
        QWEN | {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
}


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A State of the Union address."""
    return next(iter(open_documents(DataConfig(), "test", str(tmp_path_factory.mktemp("cache")))))


@pytest.fixture(scope="module")
def tokens(speech: str) -> np.ndarray:
    return np.asarray(ByteTokenizer().encode(speech)[: 4 * 128], np.int32).reshape(4, 128)


def their_logits(model: Any, tokens_BL: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens_BL, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("name", MODELS)
def test_an_export_loads_and_computes_the_same(name: str, tokens: np.ndarray, tmp_path: pathlib.Path) -> None:
    """No tensor is missing or left over; logits to 1e-4."""
    config = config_of(name)
    with on_mesh(config):
        model = random_model(config)
        export_model(config, model, tmp_path / "out", max_shard_size="20KB")
        ours = our_logits(model, tokens)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    expected = {"nemotron_h": "NemotronHForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
    assert type(theirs).__name__ == expected[CLASSES.get(name, "nemotron_h")]
    assert not any(report.values()), report
    np.testing.assert_allclose(their_logits(theirs, tokens), ours, atol=1e-4, rtol=0)
    assert np.abs(ours).max() > 1


@pytest.mark.parametrize("name", RANDOM)
def test_an_import_computes_the_same_and_goes_back(name: str, tokens: np.ndarray, tmp_path: pathlib.Path) -> None:
    """Of a model that transformers initialised, with biases that change the choice; written again it is bit-equal."""
    kind, fields = RANDOM[name]
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**fields))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1.1)  # logits of the size that trained ones have
        for buffer, value in theirs.named_buffers():
            if "correction_bias" in buffer:
                value.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    with on_mesh(config_of("bigmac")):
        config, model = import_model(tmp_path / "theirs")
        ours = our_logits(model, tokens)
        export_model(config, model, tmp_path / "again")
    before = their_logits(theirs, tokens)
    assert np.abs(before).max() > 0.5
    np.testing.assert_allclose(ours, before, atol=1e-4, rtol=0)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    for parameter, value in theirs.state_dict().items():
        assert torch.equal(again[parameter], value), parameter


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokenizers(kind: str, speech: str, tmp_path: pathlib.Path) -> None:
    tokenizer: Tokenizer = ByteTokenizer() if kind == "bytes" else JsonTokenizer(train_bpe([speech], 300))
    config = config_of("tied")
    with on_mesh(config):
        export_model(config, random_model(config), tmp_path / "out", tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert isinstance(theirs, transformers.PreTrainedTokenizerFast)
    for text in (speech, "naïve 東京\t <|endoftext|>\n"):
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.eos_id
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == tokenizer.eos_id
    out = model.generate(
        **theirs("We", return_tensors="pt", return_token_type_ids=False), max_new_tokens=4, do_sample=False
    )
    assert 2 < out.shape[1] <= 7


@pytest.mark.full
@pytest.mark.parametrize("kind", ["nemotron_h", "qwen3_moe"])
def test_a_sentencepiece_model_has_its_own_ids(kind: str, speech: str, tmp_path: pathlib.Path) -> None:
    """Whatever tokenizer transformers has for the model's class."""
    tokenizer, config = sentencepiece_model(tmp_path, [speech]), config_of("tied")
    write_tokenizer(tmp_path, config, tokenizer, chat=NO_CHAT)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (speech, "naïve 東京\t x  y\n", "", " a"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.eos_id and theirs.bos_token is None
    assert theirs.model_max_length == config.context_length


@pytest.mark.full
def test_a_chat_has_the_ids_of_training_and_ends_where_the_server_ends_it(speech: str, tmp_path: pathlib.Path) -> None:
    tokenizer = with_special_tokens(JsonTokenizer(train_bpe([speech], 260)), "<|im_start|>", "<|im_end|>")
    config, chat = config_of("tied"), Chat(tokenizer, CHATML)
    with on_mesh(config):
        export_model(config, random_model(config), tmp_path / "out", tokenizer=tokenizer, chat=chat.files)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [("system", "Be brief."), ("user", "Who? <b>"), ("assistant", "I."), ("user", "naïve 東京\n?")]
    for n in (1, 2, 4):
        messages = [{"role": role, "content": content} for role, content in turns[:n]]
        found = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert list(found["input_ids"]) == chat.prompt(messages)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    (stop,) = chat.stop
    ends = [tokenizer.eos_id, theirs.convert_tokens_to_ids(stop)]
    assert model.config.eos_token_id == ends == model.generation_config.eos_token_id
    with torch.no_grad():  # a head that writes nothing else
        prompt = theirs("We", return_tensors="pt", return_token_type_ids=False)
        bias = {(ends[1],): 1e4}
        out = model.generate(**prompt, max_new_tokens=4, do_sample=False, sequence_bias=bias)
    assert out[0, prompt["input_ids"].shape[1] :].tolist() == [ends[1]]


# A file has one of both, or neither: then the blocks of a module are those below.
OF_MODULES = {"mtp_layers_block_type", "mtp_hybrid_override_pattern"}


def test_blocks_of_a_module_that_a_config_leaves_out_are_those_of_the_class() -> None:
    assert transformers.NemotronHConfig().mtp_hybrid_override_pattern == nemotron_h._MTP_BLOCKS


@pytest.mark.parametrize(
    ("ours", "theirs", "others"),
    [
        (nemotron_h, "NemotronHConfig", {"layers_block_type", "hybrid_override_pattern", "dtype"} | OF_MODULES),
        (qwen3_moe, "Qwen3MoeConfig", {"head_dim", "rope_theta", "dtype"}),  # told otherwise, or not at all
    ],
)
def test_fields_that_a_config_leaves_out_are_as_in_the_class(
    ours: Any, theirs: str, others: set[str], tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And all that the class has are known."""
    config, checkpoint = getattr(transformers, theirs)(), types.SimpleNamespace(directory=tmp_path)
    layout.check_known(checkpoint, config.to_dict(), ours._DEFAULTS, ours._OTHER_NAMES, ours._UNREAD)
    assert not caplog.messages
    assert {name: getattr(config, name) for name in ours._DEFAULTS.keys() - others} == {
        name: value for name, value in ours._DEFAULTS.items() if name not in others
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (qwen3_moe, "Qwen3MoeConfig", {"num_local_experts": 4, "num_experts": 8}),
        (nemotron_h, "NemotronHConfig", {"num_local_experts": 4, "n_routed_experts": 8}),
        (nemotron_h, "NemotronHConfig", {"layer_types": ["moe"], "layers_block_type": ["mlp"]}),
        (nemotron_h, "NemotronHConfig", {"mamba_n_groups": 2, "n_groups": 4}),
        (nemotron_h, "NemotronHConfig", {"mamba_d_conv": 2, "conv_kernel": 3}),
        (nemotron_h, "NemotronHConfig", {"mamba_conv_bias": False, "use_conv_bias": True}),
        (nemotron_h, "NemotronHConfig", {"mamba_dt_min": 0.1, "time_step_min": 0.2}),
        (nemotron_h, "NemotronHConfig", {"torch_dtype": "float32", "dtype": "bfloat16"}),
    ],
)
def test_a_field_under_both_its_names_is_as_in_the_class(ours: Any, theirs: str, values: dict[str, Any]) -> None:
    name = list(values)[1]
    for given in (values, dict(reversed(values.items()))):
        expected = getattr(getattr(transformers, theirs).from_dict(dict(given)), name)
        found = layout.fill_json(given, ours._DEFAULTS, ours._OTHER_NAMES)[name]
        assert found == (str(expected).removeprefix("torch.") if name == "dtype" else expected)


PLAIN = {"rope_type": "default", "rope_theta": 7.0}


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": PLAIN, "rope_theta": 9.0},
        {"rope_parameters": PLAIN, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": PLAIN, "rope_scaling": {"type": "default"}},
        {"rope_parameters": PLAIN, "rope_scaling": {"type": "default"}, "rope_theta": 9.0},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "rope_scaling": {"type": "default"}},
        {"rope_parameters": PLAIN, "rope_scaling": {}, "rope_theta": 9.0},
        {"rope_scaling": {"type": "yarn", "rope_type": "default"}},
        {"rope_theta": 9.0},
    ],
)
def test_rotary_positions_are_those_of_the_class(values: dict[str, Any], tmp_path: pathlib.Path) -> None:
    theirs = transformers.Qwen3MoeConfig.from_dict(copy.deepcopy(values)).rope_parameters
    checkpoint: Any = types.SimpleNamespace(directory=tmp_path)
    if theirs["rope_type"] != "default":
        with pytest.raises(ConfigError, match=f"rope_type={theirs['rope_type']} must be default"):
            qwen3_moe.from_json(values, checkpoint)
    else:
        assert qwen3_moe.from_json(values, checkpoint).model.rope_theta == theirs["rope_theta"]
