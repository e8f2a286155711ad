"""PEFT itself: with adapters in its layout, the exported model computes what ours does. Needs the extra `hf`."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from interchange.tools import HYBRID, HYBRIDS, MODELS, our_logits
from model.tools import abstract_model, on_mesh, random_model, random_tokens, tiny
from safetensors.numpy import load_file

from bigmac_jax.config import Config, ConfigError, TuningConfig
from bigmac_jax.interchange import choose_format, export_model
from bigmac_jax.model.adapters import attached, make_adapters, merged
from bigmac_jax.model.parameters import named_leaves
from bigmac_jax.training.restore import Restored
from bigmac_jax.training.step import split_model
from bigmac_jax.tuning.peft import _depth, _find_places, _Place, _settings, export_adapters

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")
peft = pytest.importorskip("peft", minversion="0.21")
pytestmark = pytest.mark.usefixtures("own_modules")

BIGMAC = {"num_layers": 2, "num_shared_experts": 1, "latent_norm": "gate"}
ALL = "attention,projections,shared,experts,router"
# The class that it is exported as, fields of the model, what is adapted, the mesh.
CASES = {
    "bigmac": ("bigmac", BIGMAC, ALL, (1, 1, 1)),
    "bigmac, gated, on a mesh": ("bigmac", BIGMAC | {"gated": True, "num_kv_heads": 2}, ALL, (2, 1, 2)),
    "nemotron": ("nemotron_h", MODELS["bigmac"] | {"balance_bias_rate": 0.0}, ALL, (1, 1, 1)),
    "hybrid": (
        "nemotron_h",
        HYBRID | HYBRIDS["all kinds"] | {"balance_bias_rate": 0.0},
        f"{ALL},mamba,mlp",
        (1, 1, 1),
    ),
    "qwen": ("qwen3_moe", MODELS["qwen"], "attention,experts,router", (1, 1, 1)),
    "qwen, on a mesh": ("qwen3_moe", MODELS["qwen"], "experts", (2, 1, 2)),
    "hyper": ("bigmac", BIGMAC | {"router": "hyper", "hyper_width": 6}, "attention,experts", (1, 1, 1)),
}
FULL = {"hybrid", "qwen, on a mesh"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * (n in FULL)) for n in CASES])
def test_adapters_in_its_layout(name: str, tmp_path: pathlib.Path) -> None:
    kind, fields, targets, mesh = CASES[name]
    plain: Config = tiny(mesh, **fields)
    assert choose_format(plain) == kind
    tuning = TuningConfig(lora_rank=2, lora_alpha=3.0, lora_targets=targets)
    train = dataclasses.replace(plain.train, init_from=str(tmp_path / "base"))
    config = dataclasses.replace(plain, tuning=tuning, train=train)
    tokens = random_tokens(config)
    with on_mesh(config):
        model = random_model(plain)
        before = our_logits(model, tokens)
        export_model(plain, model, tmp_path / "base")
        graphdef, base, rest = split_model(model)
        draw = np.random.default_rng(1).standard_normal
        adapters = jax.tree.map(
            lambda v: jax.device_put(0.3 * draw(v.shape).astype(np.float32), v.sharding),
            make_adapters(config, base, jax.random.key(0)),
        )
        run = Restored(config, graphdef, adapters, rest, base, 1, None)
        numbers = export_adapters(run, tmp_path / "adapters", plain, lambda: base)
        assert export_adapters(run, tmp_path / "half", plain, lambda: base, "bfloat16") == numbers
        ours = our_logits(nnx.merge(graphdef, merged(attached(config, base, adapters)), rest), tokens)
    assert numbers == sum(leaf.size for leaf in jax.tree.leaves(adapters))
    whole, half = (load_file(tmp_path / of / "adapter_model.safetensors") for of in ("adapters", "half"))
    for key, value in whole.items():
        exact = kind != "qwen3_moe" and (".gate." in key or ".router." in key)
        assert half[key].dtype == (np.float32 if exact else jax.numpy.bfloat16), key
        np.testing.assert_array_equal(half[key], value if exact else value.astype(jax.numpy.bfloat16), err_msg=key)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    tuned = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapters").eval()
    with torch.no_grad():
        found = tuned(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert np.abs(ours - before).max() > 0.1
    np.testing.assert_allclose(found, ours, atol=1e-5 * np.abs(ours).max(), rtol=0)


def test_what_has_no_place(tmp_path: pathlib.Path) -> None:
    """A model that no class of transformers is like, and a matrix that the class does not have. Nothing is written."""
    plain: Config = tiny(**HYBRID | {"blocks": "M*E", "latent_norm": "gate"})
    train = dataclasses.replace(plain.train, init_from="some")
    config = dataclasses.replace(plain, tuning=TuningConfig(lora_rank=2, lora_targets="attention"), train=train)
    with on_mesh(config):
        graphdef, base, rest = split_model(abstract_model(config))
        adapters = jax.eval_shape(lambda: make_adapters(config, base, jax.random.key(0)))
    run = Restored(config, graphdef, adapters, rest, base, 1, None)
    with pytest.raises(ConfigError, match="has no class for this model, which PEFT would adapt; export the whole mod"):
        export_adapters(run, tmp_path / "adapters", config, lambda: base)
    assert not list(tmp_path.iterdir())

    config = tiny(**HYBRID | HYBRIDS["all kinds"])
    with on_mesh(config):
        leaves = named_leaves(abstract_model(config))
    with pytest.raises(ConfigError, match=r"nemotron_h has no matrix for adapters of layers\.other\.w; "):
        _find_places(config, {"layers.other.w.a": None, "layers.other.w.b": None}, leaves)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"rope_theta": 5e5}, r"model\.rope_theta=500000\.0 differs from 10000\.0 of train\.init_from=some"),
        ({}, {"vocab_size": 512}, r"model\.vocab_size=512 differs from 264 of train\.init_from=some, by which PEFT"),
        ({}, {"balance": "bias", "balance_bias_rate": 0.0}, "bigmac is the class of the run, and qwen3_moe that of"),
    ],
)
def test_what_no_adapter_says(before: dict, now: dict, message: str, tmp_path: pathlib.Path) -> None:
    """PEFT would run them on another model than they were trained in. Nothing is written."""
    fields = MODELS["qwen"] if "qwen" in message else BIGMAC
    plain: Config = tiny(**fields | before)
    config = dataclasses.replace(
        tiny(**fields | now),
        tuning=TuningConfig(lora_rank=2, lora_targets="attention,router"),
        train=dataclasses.replace(plain.train, init_from="some"),
    )
    with on_mesh(config):
        graphdef, base, rest = split_model(abstract_model(config))
        adapters = jax.eval_shape(lambda: make_adapters(config, base, jax.random.key(0)))
    run = Restored(config, graphdef, adapters, rest, base, 1, None)
    with pytest.raises(ConfigError, match=rf"^--format=peft: {message}.*; export the whole model with --format=auto$"):
        export_adapters(run, tmp_path / "adapters", plain, lambda: base)
    assert not list(tmp_path.iterdir())


def place(module: str, parameter: str = "", whole: bool = False, parts: int = 1) -> Any:
    return _Place(module, parameter, whole, (None,) * parts)  # type: ignore[arg-type]


def test_parameters_of_one_module_are_wrapped_in_their_order() -> None:
    """The last in the class is outermost."""
    order = ["weight", "gate_up_proj", "up_proj", "gate_proj", "down_proj"]
    places = [place("a", name) for name in reversed(order)] + [place("b"), place("c", "down_proj")]
    assert [_depth(of, places) for of in places] == [0, 1, 2, 3, 4, 0, 0]


def test_adapter_config() -> None:
    config = tiny()
    tuning = dataclasses.replace(config.tuning, lora_rank=3, lora_alpha=6.0)
    config = dataclasses.replace(config, tuning=tuning, train=dataclasses.replace(config.train, init_from="base"))
    places = [place("m.q"), place("m.in", parts=5), place("m.experts", "up_proj", parts=2), place("m.out", whole=True)]
    found = _settings(config, places)
    assert (found["r"], found["lora_alpha"], found["base_model_name_or_path"]) == (3, 6.0, "base")
    assert found["rank_pattern"] == {r"m\.in": 15, r"m\.experts\.up_proj": 6}
    assert found["alpha_pattern"] == {r"m\.in": 30.0, r"m\.experts\.up_proj": 12.0}
    assert (found["target_modules"], found["target_parameters"]) == (["m.q", "m.in"], ["m.experts.up_proj"])
    assert (found["lora_dropout"], found["fan_in_fan_out"], found["inference_mode"]) == (0.0, False, True)
    assert found["modules_to_save"] == ["m.out"] and _settings(config, places[:3])["modules_to_save"] is None
