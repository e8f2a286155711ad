"""PEFT itself: with adapters in its layout, the exported model computes what ours does; and its files, without it.
What runs PEFT needs the extra `hf`."""

import dataclasses
import json
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
def test_adapters_in_its_layout(name: str, tmp_path: pathlib.Path, request: pytest.FixtureRequest) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.24")
    peft = pytest.importorskip("peft", minversion="0.21")
    request.getfixturevalue("own_modules")
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


def _exported(plain: Config, folder: pathlib.Path, targets: str, dtype: str = "float32") -> tuple[Any, ...]:
    """Random adapters → how much each adds to its matrix, the base's leaves, and what PEFT is given."""
    tuning = TuningConfig(lora_rank=2, lora_alpha=3.0, lora_targets=targets)
    config = dataclasses.replace(plain, tuning=tuning, train=dataclasses.replace(plain.train, init_from="some"))
    draw = np.random.default_rng(1).standard_normal
    with on_mesh(config):
        graphdef, shapes, rest = split_model(abstract_model(config))
        both = shapes, jax.eval_shape(lambda: make_adapters(config, shapes, jax.random.key(0)))
        base, adapters = jax.tree.map(lambda leaf: jax.device_put(draw(leaf.shape).astype(np.float32)), both)
        count = export_adapters(Restored(config, graphdef, adapters, rest, shapes, 1, None), folder, plain,
                                lambda: base, dtype)  # fmt: skip
    values = {name: np.asarray(leaf) for name, leaf in named_leaves(adapters).items()}
    assert count == sum(value.size for value in values.values())
    names = [name.removesuffix(".a") for name in values if name.endswith(".a")]
    added = {name: 1.5 * values[f"{name}.a"] @ values[f"{name}.b"] for name in names}
    settings = json.loads((folder / "adapter_config.json").read_text())
    return added, named_leaves(base), settings, load_file(folder / "adapter_model.safetensors")


def _added_by_peft(settings: dict[str, Any], found: dict[str, np.ndarray], name: str, key: str) -> np.ndarray:
    """What PEFT adds to a Linear's weight, [outputs, inputs], or to a parameter of experts, [E, outputs, inputs]."""
    a, b = (found.pop(f"base_model.model.{key}.lora_{of}.weight") for of in "AB")
    pattern = name.replace(".", r"\.")
    rank = settings["rank_pattern"].get(pattern, settings["r"])
    scale = settings["alpha_pattern"].get(pattern, settings["lora_alpha"]) / rank
    experts = a.shape[0] // rank
    parts = a.reshape(experts, rank, -1), b.reshape(b.shape[0], rank, experts)
    return scale * np.einsum("ore,erx->eox", parts[1], parts[0])


def test_numbers_of_a_hybrids_adapters(tmp_path: pathlib.Path) -> None:
    """Mamba's five projections are one Linear, of five times the rank; its out_proj goes whole, with its bias. Experts
    are turned, and each of their parameters is wrapped around the one before."""
    plain = tiny(**HYBRID | HYBRIDS["all kinds"] | {"balance_bias_rate": 0.0})
    added, base, settings, found = _exported(plain, tmp_path / "adapters", f"{ALL},mamba,mlp")
    first, second, third = (stack.name for stack in plain.model.stacks)
    whole, linear, parameters = [], [], []
    for number, branch in {0: f"{first}.mamba0", 1: f"{first}.mamba1", 5: f"{third}.mamba"}.items():
        at = f"model.layers.{number}.mixer"
        parts = [added.pop(f"{branch}.{name}.w_DF")[0] for name in ("gate", "inner", "b", "c", "time")]
        delta = _added_by_peft(settings, found, f"{at}.in_proj", f"{at}.in_proj")
        np.testing.assert_allclose(delta[0], np.concatenate(parts, axis=1).T, rtol=1e-4, atol=1e-5)
        kept = np.asarray(base[f"{branch}.out.w_DF"][0]) + added.pop(f"{branch}.out.w_DF")[0]
        np.testing.assert_allclose(found.pop(f"base_model.model.{at}.out_proj.weight"), kept.T, rtol=1e-5, atol=1e-5)
        bias = found.pop(f"base_model.model.{at}.out_proj.bias")
        np.testing.assert_array_equal(bias, np.asarray(base[f"{branch}.out.b_F"])[0])
        whole.append(f"{at}.out_proj")
        linear.append(f"{at}.in_proj")
    moe = "model.layers.3.mixer"
    places = {f"model.layers.2.mixer.{n[0]}_proj": f"{first}.attention.{n}.w_DF" for n in ("query", "key", "value")}
    places |= {"model.layers.2.mixer.o_proj": f"{first}.attention.out.w_DF"}
    places |= {f"{moe}.fc1_latent_proj": f"{first}.mlp.down.w_DF", f"{moe}.fc2_latent_proj": f"{first}.mlp.up.w_DF"}
    for way in ("up", "down"):
        places |= {f"{moe}.shared_experts.{way}_proj": f"{first}.mlp.shared.{way}.w_DF"}
        places |= {f"model.layers.4.mixer.{way}_proj": f"{second}.mlp.{way}.w_DF"}
    for name, leaf in places.items():
        delta = _added_by_peft(settings, found, name, name)
        np.testing.assert_allclose(delta[0], added.pop(leaf)[0].T, rtol=1e-4, atol=1e-5, err_msg=name)
        linear.append(name)
    for name, key, leaf in (
        ("gate.weight", "gate", "router_DE"),
        ("experts.up_proj", "experts.base_layer", "experts.w_in_eRF"),
        ("experts.down_proj", "experts", "experts.w_out_eFR"),
    ):
        delta = _added_by_peft(settings, found, f"{moe}.{name}", f"{moe}.{key}")
        expected = added.pop(f"{first}.mlp.{leaf}")[0]
        expected = expected.reshape(-1, *expected.shape[-2:]).swapaxes(1, 2)
        np.testing.assert_allclose(delta, expected, rtol=1e-4, atol=1e-5, err_msg=name)
        parameters.append(f"{moe}.{name}")
    assert not added and not found
    assert sorted(settings["target_modules"]) == sorted(linear)
    assert sorted(settings["target_parameters"]) == sorted(parameters)
    assert sorted(settings["modules_to_save"]) == sorted(whole)


def test_numbers_of_our_class_adapters(tmp_path: pathlib.Path) -> None:
    """Its experts are [E, inputs, outputs], so that A is of the outputs; the router stays float32 beside bfloat16."""
    plain = tiny(**BIGMAC | {"gated": True, "mtp_modules": 1})  # which gets no adapters
    added, _, settings, found = _exported(plain, tmp_path / "adapters", "experts,router", "bfloat16")
    bfloat16 = jax.numpy.bfloat16
    for layer in range(2):
        at = f"model.layers.{layer}.mlp"
        for name, key, leaf in (
            ("experts.up_proj", "experts.base_layer.base_layer", "experts.w_in_eRF"),
            ("experts.gate_proj", "experts.base_layer", "experts.w_gate_eRF"),
            ("experts.down_proj", "experts", "experts.w_out_eFR"),
            ("router.weight", "router", "router_DE"),
        ):
            stored = found[f"base_model.model.{at}.{key}.lora_A.weight"].dtype
            assert stored == (np.float32 if "router" in name else bfloat16)
            values = {k: v.astype(np.float32) if at in k else v for k, v in found.items()}
            delta = _added_by_peft(settings, values, f"{at}.{name}", f"{at}.{key}")
            found = {k: v for k, v in found.items() if k in values}
            expected = added[f"layers.mlp.{leaf}"][layer]
            expected = expected.T[None] if "router" in name else expected
            np.testing.assert_allclose(delta, expected, rtol=0.05, atol=0.15, err_msg=name)
    assert not found and settings["modules_to_save"] is None and settings["target_modules"] == []
    assert len(settings["target_parameters"]) == 8 and settings["rank_pattern"] == settings["alpha_pattern"] == {}


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
