"""NemotronH of transformers in many patterns of blocks, both ways: logits, greedy text and every tensor.

Needs the extra `hf`. Text is generated without a cache: with one, the class does not clamp Mamba's step from below.
"""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from model.tools import on_mesh, random_model, tiny
from safetensors.numpy import load_file

from bigmac_jax.config import ConfigError
from bigmac_jax.interchange import export_model, import_model

from .nemotron import KINDS, their_model
from .tools import HYBRID, HYBRIDS, NEXT, config_of, our_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")
pytestmark = pytest.mark.usefixtures("one_thread")

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("M*E", {"n_groups": 1, "moe_latent_size": 8}),
    # As the published ones: Nemotron-H, Nemotron 3 Nano, and Super, whose runs are of several lengths.
    "nemotron h": ("M-M-M-M*-M-M-", {}),
    "nano": ("MEMEM*EMEMEM*EME", {"routed_scaling_factor": 2.5}),
    "super": ("MEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEME", {"moe_latent_size": 8, "routed_scaling_factor": 5.0}),
    "experts first and last": ("EM*ME", {"moe_latent_size": 8, "n_groups": 2}),
    "experts last": ("MM*ME", {"n_groups": 1, "norm_topk_prob": False}),
    "all kinds and biases": ("EM-*M", {"use_bias": True, "moe_latent_size": 12}),
    "no biases at all": ("MM-", {"use_conv_bias": False, "n_groups": 1}),
    "biases of projections alone": ("ME-M", {"use_bias": True, "use_conv_bias": False, "n_groups": 4}),
    "odd sizes": ("MMM*M-E", {"mamba_num_heads": 6, "mamba_head_dim": 5, "n_groups": 3, "ssm_state_size": 7,
                              "conv_kernel": 3, "head_dim": 6, "chunk_size": 11}),
    "nothing but Mamba": ("MMM", {"n_groups": 2}),
    "mixers at the end": ("M-*M", {"n_groups": 1, "time_step_min": 1e-6}),
    "two experts in turn": ("*EEM", {"moe_latent_size": 8, "n_group": 4, "topk_group": 2}),
    "one expert": ("MEME", {"num_experts_per_tok": 1, "norm_topk_prob": False, "conv_kernel": 2}),
    "dense": ("*-*-", {}),
    "dense first": ("*-*-*E*E", {"moe_latent_size": 8}),
}  # fmt: skip


def greedy(model: Any, prompt_BL: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompt with the `count` tokens that transformers writes behind it, and its logits at all of them."""
    tokens = model.generate(
        torch.tensor(prompt_BL, dtype=torch.long), max_new_tokens=count, do_sample=False, use_cache=False,
        eos_token_id=-1, pad_token_id=0, attention_mask=torch.ones(prompt_BL.shape, dtype=torch.long),
    )  # fmt: skip
    assert tokens.shape[1] == prompt_BL.shape[1] + count
    with torch.no_grad():
        return tokens.numpy().astype(np.int32), model(tokens, use_cache=False).logits.numpy()


def stored(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, those of experts one by one."""
    tensors: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        for name, value in load_file(file).items():
            name = name.replace("model.", "backbone.", 1) if name.startswith("model.") else name
            if ".experts." in name and value.ndim == 3:
                module, _, part = name.rpartition(".")
                tensors |= {f"{module}.{e}.{part}.weight": matrix for e, matrix in enumerate(value)}
            else:
                tensors[name] = value
    return tensors


def check_greedy(model: Any, tokens_BL: np.ndarray, theirs: np.ndarray, start: int) -> None:
    """Our logits are theirs, and our best tokens what they wrote: then it is what we would have written."""
    ours = our_logits(model, tokens_BL)
    assert np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(ours[:, start - 1 : -1].argmax(-1), tokens_BL[:, start:])


@pytest.mark.parametrize("name", ["small", *(pytest.param(n, marks=pytest.mark.full) for n in list(MODELS)[1:])])
def test_both_ways(name: str, tmp_path: pathlib.Path) -> None:
    """A model of theirs, imported: logits to 1e-4 and 100 greedy tokens; exported again, every tensor is bit-equal. And
    one of ours, exported: no tensor is missing or left over, logits and text are the same."""
    count, prompt = (100 if name != "small" else 20), np.random.default_rng(0).integers(3, 257, (1, 37))
    pattern, fields = MODELS[name]
    theirs = their_model(pattern, **fields)
    theirs.save_pretrained(tmp_path / "theirs")
    with on_mesh(config_of("bigmac")):
        config, model = import_model(tmp_path / "theirs", ["execution.mamba_chunk=8", "mesh.data=1"])
        tokens, expected = greedy(theirs, prompt, count)
        check_greedy(model, tokens, expected, prompt.shape[1])
        export_model(config, model, tmp_path / "again")
        before, after = stored(tmp_path / "theirs"), stored(tmp_path / "again")
        assert before.keys() == after.keys()
        for tensor, value in before.items():
            np.testing.assert_array_equal(after[tensor], value, err_msg=tensor)
        values = json.loads((tmp_path / "again/config.json").read_text())
        assert values["hybrid_override_pattern"] == pattern

        other = random_model(config)
        export_model(config, other, tmp_path / "ours", max_shard_size="100KB")
        read, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert type(read).__name__ == "NemotronHForCausalLM"
        assert not any(report.values()), report
        check_greedy(other, *greedy(read.eval(), prompt, count), prompt.shape[1])


@pytest.mark.full
def test_a_step_without_a_limit(tmp_path: pathlib.Path) -> None:
    """Our default, of which the class cannot take the logarithm to draw parameters; it loads, and computes the same."""
    config = tiny(batch=4, **HYBRID | HYBRIDS["no experts"] | {"mamba_least_step": 0.0})
    prompt = np.random.default_rng(0).integers(3, 257, (1, 20))
    with on_mesh(config):
        model = random_model(config)
        export_model(config, model, tmp_path / "out")
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert read.config.time_step_min == 0
        check_greedy(model, *greedy(read.eval(), prompt, 20), prompt.shape[1])


@pytest.mark.full
@pytest.mark.parametrize("name", ["two with Mamba", "published"])
def test_next_token_modules_are_there_and_ignored(name: str, tmp_path: pathlib.Path) -> None:
    """No tensor is left over, and the logits are the model's own. What transformers saves again has a config.json with
    modules and no tensor of them, which a line says."""
    config = tiny(batch=4, **HYBRID | NEXT[name])
    prompt = np.random.default_rng(0).integers(3, 257, (1, 20))
    with on_mesh(config):
        model = random_model(config)
        export_model(config, model, tmp_path / "out")
        read, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(report.values()), report
        modules, blocks = config.model.mtp_modules, config.model.mtp_stack.blocks
        assert read.config.num_nextn_predict_layers == modules
        assert read.config.mtp_layers_block_type == [KINDS[letter] for letter in blocks]
        check_greedy(model, *greedy(read.eval(), prompt, 20), prompt.shape[1])
        read.save_pretrained(tmp_path / "again")
        with pytest.raises(ConfigError, match=f"={modules} asks for {modules * len(blocks)} blocks, and 0 tensors"):
            import_model(tmp_path / "again")
