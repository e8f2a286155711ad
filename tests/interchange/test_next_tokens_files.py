"""Next-token modules in NemotronH's files, mtp.*: what they compute, by an independent reading; what is not read."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tools import leaves, on_mesh, random_model, split_tokens, tiny
from safetensors.numpy import load_file, save_file

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.interchange import export_model, import_model, import_run
from bigmac_jax.model.router import Padding

from .architectures import nemotron_next
from .test_errors import with_config, with_tensors
from .tools import HYBRID, NEXT, tokens_of

L = 10


def with_modules(name: str, mesh: tuple[Any, ...] = (1, 1, 1)) -> Config:
    return tiny(mesh, batch=4, length=L, **HYBRID | NEXT[name])


def our_next(config: Config, model: Any, tokens_BL: np.ndarray) -> list[np.ndarray]:
    """Logits of module k = 1, 2, … at each position that has a token k behind it: [B, L - k, V] each."""

    def compute(model: Any, tokens_BL: jax.Array) -> list[jax.Array]:
        x_BLD, logits = model.features(tokens_BL, evaluating=True)[0], []
        for number in range(config.model.mtp_modules):
            nobody_BL = jnp.broadcast_to(jnp.arange(L) >= L - number - 1, tokens_BL.shape)
            ahead_BL, padding = jnp.roll(tokens_BL, -number - 1, axis=1), Padding.of(nobody_BL)
            x_BLD, _ = model.next_features(
                number, x_BLD, ahead_BL, None, dropout_key=None, padding=padding, choices=None
            )
            logits.append(model.logits(x_BLD))
        return logits

    found = jax.jit(compute)(model, split_tokens(tokens_BL))
    return [np.asarray(logits)[:, : L - k] for k, logits in enumerate(found, 1)]


@pytest.mark.full
@pytest.mark.parametrize("name", NEXT)
def test_modules_compute_the_same_and_come_back(name: str, tmp_path: pathlib.Path) -> None:
    """Logits of each module to 1e-4; every parameter of what is read again is bit-equal."""
    config = with_modules(name)
    with on_mesh(config):
        model, tokens = random_model(config), tokens_of(config)
        assert export_model(config, model, tmp_path / "out", max_shard_size="10KB") == "nemotron_h"
        ours = our_next(config, model, tokens)
        rows = [nemotron_next(tmp_path / "out", tokens_L) for tokens_L in tokens]
        assert len(ours) == config.model.mtp_modules
        for logits, theirs in zip(ours, zip(*rows, strict=True), strict=True):
            np.testing.assert_allclose(np.stack(theirs), logits, atol=1e-4, rtol=0)
            assert np.abs(logits).max() > 1
        again, copy = import_model(tmp_path / "out")
        assert again.model.trained_stacks == config.model.trained_stacks
        before, after = leaves(model), leaves(copy)
        if config.model.scale_embedding:  # multiplied into the table
            before.pop("embedding_VD"), after.pop("embedding_VD")
        jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Any, pathlib.Path]:
    config, folder = (
        tiny(batch=4, **HYBRID | NEXT["published"] | {"blocks": ""}),
        tmp_path_factory.mktemp("next") / "out",
    )
    with on_mesh(config):
        model = random_model(config)
        export_model(config, model, folder)
    return config, model, folder


def test_names_are_those_of_published_files(exported: Any) -> None:
    """As vLLM, SGLang and Megatron-Bridge read them."""
    folder = exported[2]
    shapes = {name: value.shape for name, value in load_file(folder / "model.safetensors").items() if "mtp" in name}
    ends = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "norm.weight"}
    first = ends | {f"mixer.{name}_proj.weight" for name in "qkvo"}
    moe = {"gate.weight", "gate.e_score_correction_bias", "fc1_latent_proj.weight", "fc2_latent_proj.weight"}
    moe |= {f"{of}.{name}_proj.weight" for of in ("shared_experts", *(f"experts.{e}" for e in range(8)))
            for name in ("up", "down")}  # fmt: skip
    second = {"norm.weight", "final_layernorm.weight"} | {f"mixer.{name}" for name in moe}
    assert set(shapes) == {f"mtp.layers.0.{name}" for name in first} | {f"mtp.layers.1.{name}" for name in second}
    assert shapes["mtp.layers.0.eh_proj.weight"] == (16, 32)
    values = json.loads((folder / "config.json").read_text())
    assert values["num_nextn_predict_layers"] == 1
    assert values["mtp_hybrid_override_pattern"] == "*E" and "mtp_layers_block_type" not in values


def copied(folder: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    to.mkdir()
    for file in ("config.json", "model.safetensors"):
        (to / file).write_bytes((folder / file).read_bytes())
    return to


@pytest.mark.parametrize(
    "fields",
    [
        {"mtp_layers_block_type": ["full_attention", "moe"]},
        {"mtp_layers_block_type": ["attention", "moe"], "mtp_hybrid_override_pattern": None},
        {"mtp_hybrid_override_pattern": None},
    ],
)
def test_blocks_in_other_words(exported: Any, tmp_path: pathlib.Path, fields: dict[str, Any]) -> None:
    """Names beside the pattern, older names alone, and the class's default."""
    config, model, folder = exported
    with_config(**fields)(copied(folder, tmp_path / "in"))
    with on_mesh(config):
        again, copy = import_model(tmp_path / "in")
    assert again.model.trained_stacks == config.model.trained_stacks
    jax.tree.map(np.testing.assert_array_equal, leaves(copy), leaves(model))


def test_without_a_promise_they_are_left_out_in_so_many_words(
    exported: Any, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stored tensors are counted: all experts' matrices are one here."""
    config, model, folder = exported
    with_config(num_nextn_predict_layers=None)(copied(folder, tmp_path / "in"))
    tensors = load_file(folder / "model.safetensors")
    ups = [tensors.pop(f"mtp.layers.1.mixer.experts.{e}.up_proj.weight") for e in range(8)]
    tensors["mtp.layers.1.mixer.experts.up_proj"] = np.stack(ups)
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with on_mesh(config), caplog.at_level(logging.WARNING):
        again, copy = import_model(tmp_path / "in")
    count = sum(name.startswith("mtp.") for name in tensors)
    (line,) = [line for line in caplog.messages if "left out" in line]
    assert line.startswith(f"{count} tensors of {tmp_path / 'in'} are left out (mtp.layers.0.")
    assert again.model.mtp_modules == 0
    expected = {name: value for name, value in leaves(model).items() if not name.startswith("mtp.")}
    jax.tree.map(np.testing.assert_array_equal, leaves(copy), expected)


def test_a_bias_of_theirs_alone_is_felt(exported: Any, tmp_path: pathlib.Path) -> None:
    """A router's bias that is zero everywhere is none; here the model's are zero, and the module's is not."""
    config, model, folder = exported

    def clear(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            if name.startswith("backbone") and name.endswith("e_score_correction_bias"):
                tensors[name] = np.zeros_like(tensors[name])

    with_tensors(clear)(copied(folder, tmp_path / "in"))
    with on_mesh(config):
        _, copy = import_model(tmp_path / "in")
    name = "mtp.layers.mlp.router_bias_E"
    np.testing.assert_array_equal(leaves(copy)[name], leaves(model)[name])


def without(*ends: str) -> Callable[[pathlib.Path], None]:
    return with_tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(ends)])


def stray(name: str) -> Callable[[pathlib.Path], None]:
    return with_tensors(lambda tensors: tensors.update({name: tensors["mtp.layers.0.enorm.weight"]}))


EH, GATE = "mtp.layers.0.eh_proj.weight", "mtp.layers.1.mixer.gate.weight"
BROKEN: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
    "none of them": (without("mtp."), r"=1 asks for 2 blocks, and 0 tensors mtp\.\* are there; .*, or set it to 0"),
    "no eh_proj": (without(EH), f"lacks {EH}, which its config.json asks for"),
    "no expert": (without("mtp.layers.1.mixer.experts.7.up"), r"lacks mtp.layers.1.mixer.experts.7.up_proj.weight"),
    "a stray one": (stray("mtp.layers.1.enorm.weight"), "holds mtp.layers.1.enorm.weight, which a model of its config"),
    "a stray block": (stray("mtp.layers.2.norm.weight"), "holds mtp.layers.2.norm.weight, which a model of its config"),
    "halves": (with_tensors(lambda t: t.update({EH: t[EH][:, :16].copy()})), r"is \(16, 16\), .* says \(16, 32\)"),
    "NaN": (with_tensors(lambda t: t[GATE].__setitem__((3, 3), np.nan)), f"{GATE} of .* holds NaN or infinity"),
    "more modules": (with_config(num_nextn_predict_layers=2), "lacks mtp.layers.2.enorm.weight"),
    "a million": (with_config(num_nextn_predict_layers=10**12), "asks for 2000000000000 blocks, and 32 tensors"),
    "less than none": (with_config(num_nextn_predict_layers=-1), "model.mtp_modules=-1 must be"),
    "no number": (with_config(num_nextn_predict_layers="one"), "config.json is not a config of nemotron_h"),
    "two patterns": (
        with_config(mtp_layers_block_type=["attention", "moe"], mtp_hybrid_override_pattern="ME"),
        r"=ME must be \*E, as mtp_layers_block_type has",
    ),
    "a kind": (with_config(mtp_layers_block_type=["rwkv"]), "mtp_layers_block_type has rwkv, and may have full_att"),
    "two layers": (
        with_config(mtp_hybrid_override_pattern="*E*E"),
        r"mtp_hybrid_override_pattern=\*E\*E must be one layer, which ends in its experts or its MLP; bigmac_jax",
    ),
    "experts of a dense model": (
        with_config(layers_block_type=["mlp"], hybrid_override_pattern="-", num_hidden_layers=1),
        r"mtp_hybrid_override_pattern=\*E must be without experts, as - is; bigmac_jax has no such model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_modules(exported: Any, tmp_path: pathlib.Path, name: str) -> None:
    """One line, and nothing is written."""
    config, _, folder = exported
    BROKEN[name][0](copied(folder, tmp_path / "broken"))
    with on_mesh(config), pytest.raises(ConfigError, match=BROKEN[name][1]) as caught:
        import_run(tmp_path / "broken", tmp_path / "run", ["data.tokenizer=bytes"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_ranks_read_their_own_parts(tmp_path: pathlib.Path) -> None:
    """Experts over two ranks, their matrices and heads in halves."""
    config = with_modules("two with Mamba")
    with on_mesh(config):
        model = random_model(config)
        export_model(config, model, tmp_path / "out")
        before = leaves(model)
    many = with_modules("two with Mamba", (2, 1, 2, 2, True, True))
    mesh = ("mesh.data=2", "mesh.expert=2", "mesh.tensor=2", "mesh.fsdp=True", "mesh.split_experts=True")
    with on_mesh(many):
        again, copy = import_model(tmp_path / "out", mesh)
        jax.tree.map(np.testing.assert_array_equal, leaves(copy), before)
        export_model(again, copy, tmp_path / "again")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "again")]
    jax.tree.map(np.testing.assert_array_equal, *files)


def test_a_class_without_a_place_gets_the_model_alone(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same files as of the model that has none, and a line."""
    config: Config = tiny(num_layers=1, mtp_modules=1, latent_norm="gate")
    alone = dataclasses.replace(config, model=dataclasses.replace(config.model, mtp_modules=0))
    with on_mesh(config), caplog.at_level(logging.WARNING):
        model = random_model(config)
        kept = leaves(random_model(alone)).keys()
        export_model(config, model, tmp_path / "out", format="bigmac")
        again, copy = import_model(tmp_path / "out")
    assert [line for line in caplog.messages if "has no place for next-token modules (model.mtp_modules=1)" in line]
    found, own = leaves(copy), leaves(model)
    assert again.model.mtp_modules == 0 and found.keys() == kept
    for name, value in found.items():
        np.testing.assert_array_equal(value, own[name], err_msg=name)
