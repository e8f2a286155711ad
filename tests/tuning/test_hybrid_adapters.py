"""A NemotronH of transformers is imported, tuned by adapters and exported: transformers and PEFT compute what we do.

Needs the extra `hf`.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from interchange.nemotron import their_model
from interchange.tools import our_logits
from safetensors.numpy import load_file
from training.tools import small

from bigmac_jax.config import Config, TuningConfig
from bigmac_jax.interchange import export_model, import_model
from bigmac_jax.model.adapters import attached, merged
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.run import loop
from bigmac_jax.training.restore import Restored, restore_parts
from bigmac_jax.training.step import split_model
from bigmac_jax.tuning import restore
from bigmac_jax.tuning.peft import export_adapters
from bigmac_jax.tuning.pretrained import open_pretrained, read_base

from .test_adapters import random_adapters

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")
pytestmark = pytest.mark.usefixtures("one_thread")
peft = pytest.importorskip("peft", minversion="0.21")

ALL = "attention,projections,shared,experts,mlp,mamba,router"
LATENT, NONE, EVEN = {"moe_latent_size": 8}, {"moe_latent_size": None}, {"vocab_size": 264}
# Blocks, fields of their config, what is adapted, the mesh.
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, int]]] = {
    "latent": ("ME*-", LATENT, ALL, {}),
    "no latent": ("ME*-", NONE, ALL, {}),
    "biases": ("M-*EM", LATENT | {"use_bias": True}, ALL, {}),
    "runs": ("MEMEM*EMEMEM*E-", NONE, ALL, {}),
    "by default": ("ME*-", LATENT, TuningConfig.lora_targets, {}),
    "on a mesh": ("ME*-", LATENT | EVEN, ALL, {"data": 2, "expert": 2, "tensor": 2}),
    "no latent, on a mesh": ("EM-*", NONE | EVEN | {"n_groups": 4}, ALL, {"expert": 4, "tensor": 2}),
} | {f"{target} alone": ("ME*-", LATENT, target, {}) for target in ALL.split(",")}  # fmt: skip


def tuning_of(folder: pathlib.Path, base: pathlib.Path, targets: str, mesh: dict[str, int]) -> Config:
    """The config of a few steps on the model in `base`."""
    config = small(folder, "train.steps=3", "train.eval_every=0", "train.checkpoint_every=3")
    model = dataclasses.replace(open_pretrained(str(base)).config.model, balance_bias_rate=0.0)
    return dataclasses.replace(
        config,
        model=model,
        mesh=dataclasses.replace(config.mesh, **mesh),
        execution=dataclasses.replace(config.execution, mamba_chunk=8),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=0.1),
        train=dataclasses.replace(config.train, init_from=str(base)),
        tuning=TuningConfig(lora_rank=2, lora_alpha=5.0, lora_targets=targets),
    )


def logits_of(model: Any, tokens_BL: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor(tokens_BL, dtype=torch.long), use_cache=False).logits.numpy()
        return logits


def test_adapters_of_an_imported_hybrid(tmp_path: pathlib.Path) -> None:
    """Drawn ones on every kind of block, over the folder that was imported: logits to 1e-4."""
    base = tmp_path / "theirs"
    their_model("ME*-", **LATENT).save_pretrained(base)
    config = tuning_of(tmp_path, base, ALL, {})
    tokens = np.random.default_rng(0).integers(3, 257, (8, 16)).astype(np.int32)
    with jax.set_mesh(make_mesh(config)):
        graphdef, params, rest = split_model(import_model(base, ["execution.mamba_chunk=8", "mesh.data=1"])[1])
        adapters = random_adapters(config, params)
        run = Restored(config, graphdef, adapters, rest, params, 1, None)
        export_adapters(run, tmp_path / "out", config, lambda: params)
        ours = our_logits(nnx.merge(graphdef, merged(attached(config, params, adapters)), rest), tokens)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    assert np.abs(ours - logits_of(plain, tokens)).max() > 0.1
    tuned = peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    np.testing.assert_allclose(logits_of(tuned, tokens), ours, atol=1e-4, rtol=0)


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_tuned_and_exported(name: str, tmp_path: pathlib.Path) -> None:
    """Some steps of training; then the merged model, and the adapters alone over the folder that was imported: logits
    to 1e-4."""
    pattern, fields, targets, mesh = CASES[name]
    theirs, base = their_model(pattern, **fields), tmp_path / "theirs"
    theirs.save_pretrained(base)
    config = tuning_of(tmp_path, base, targets, mesh)
    tokens = np.random.default_rng(0).integers(3, 257, (8, 16)).astype(np.int32)
    with jax.set_mesh(make_mesh(config)):
        loop.train(config, tmp_path / "run")
        saved, model = restore(tmp_path / "run", config=config)
        ours = our_logits(model, tokens)
        assert export_model(saved, model, tmp_path / "whole") == "nemotron_h"
        parts = restore_parts(tmp_path / "run", "latest", config)
        read = functools.partial(read_base, tmp_path / "run", parts.config)
        numbers = export_adapters(parts, tmp_path / "adapters", open_pretrained(str(base)).config, read)
    assert np.abs(ours - logits_of(theirs, tokens)).max() > 1e-3  # training is felt
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    np.testing.assert_allclose(logits_of(whole, tokens), ours, atol=1e-4, rtol=0)

    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    tuned = peft.PeftModel.from_pretrained(plain, tmp_path / "adapters").eval()
    np.testing.assert_allclose(logits_of(tuned, tokens), ours, atol=1e-4, rtol=0)
    with tuned.disable_adapter():
        np.testing.assert_array_equal(logits_of(tuned, tokens), logits_of(theirs, tokens))
    np.testing.assert_allclose(logits_of(tuned.merge_and_unload(), tokens), ours, atol=1e-4, rtol=0)
    # Whole are Mamba's output projections alone; the rest is of the adapters' rank.
    files = load_file(tmp_path / "adapters/adapter_model.safetensors")
    kept = json.loads((tmp_path / "adapters/adapter_config.json").read_text())["modules_to_save"] or []
    assert len(kept) == (pattern.count("M") if "mamba" in targets else 0)
    assert all(module.endswith("mixer.out_proj") for module in kept)
    assert numbers > 0 and {name for name in files if ".lora_" not in name} == {
        f"base_model.model.{module}.{part}"
        for module in kept
        for part in ("weight", "bias")
        if part == "weight" or fields.get("use_bias")
    }
