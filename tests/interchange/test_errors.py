"""What cannot be read or written is one line; what fails half-way leaves nothing behind."""

import collections
import errno
import json
import os
import pathlib
import shutil
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from model.tools import leaves, on_mesh, random_model
from safetensors.numpy import load_file, save_file
from threads_as_processes import run_as_processes

from bigmac_jax.config import ConfigError, load_config
from bigmac_jax.data.chat_files import NO_CHAT
from bigmac_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, train_bpe
from bigmac_jax.interchange import (
    export_model,
    exporting,
    import_model,
    import_run,
    importing,
    open_checkpoint,
    tensor_files,
)
from bigmac_jax.interchange.importing import find_tokenizer
from bigmac_jax.interchange.tensor_files import Spec, parse_size, split_shards, whole_or_nothing, write_shards
from bigmac_jax.interchange.tokenizer_files import write_tokenizer
from bigmac_jax.training.workdir import write_config
from bigmac_jax.tuning import restore
from bigmac_jax.tuning.conversion.converted_run import new_run_config

from .tools import config_of

Model = tuple[Any, pathlib.Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, pathlib.Path]:
    folder, config = tmp_path_factory.mktemp("exported"), config_of("bigmac")
    with on_mesh(config):
        model = random_model(config)
        export_model(config, model, folder / "one")
        export_model(config, model, folder / "shards", max_shard_size="20KB")
    return config, model, folder


def with_config(**fields: Any) -> Callable[[pathlib.Path], None]:
    def change(folder: pathlib.Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def with_tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[pathlib.Path], None]:
    def on_file(folder: pathlib.Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return on_file


def cut(folder: pathlib.Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def spoilt(name: str, value: float) -> Callable[[pathlib.Path], None]:
    """With one such number in a tensor."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].flat[-1] = value

    return with_tensors(change)


NORM = "backbone.norm_f.weight"
EXPERT, BIAS = (
    "backbone.layers.3.mixer.experts.5.up_proj.weight",
    "backbone.layers.1.mixer.gate.e_score_correction_bias",
)
FUSED = "backbone.layers.1.mixer.experts.gate_up_proj"
BROKEN: dict[str, tuple[Callable[[pathlib.Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "config that is not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "config that is no object": (lambda f: (f / "config.json").write_text("[]"), "cannot be read .it is a JSON list"),
    "a class that is no name": (with_config(model_type=["bigmac"]), "model_type=.'bigmac'. must be one of"),
    "another class": (with_config(model_type="llama"), "model_type=llama must be one of nemotron_h, qwen3_moe, bigmac"),
    "wrong type": (with_config(hidden_size="many"), "config.json is not a config of nemotron_h"),
    "other blocks": (
        with_config(layers_block_type=["rwkv", "moe"]),
        "layers_block_type has rwkv, and may have full_att",
    ),
    "no layers": (with_config(layers_block_type=[], hybrid_override_pattern=""), "layers_block_type"),
    "biases": (with_config(mlp_bias=True), "mlp_bias=True must be false"),
    "groups": (with_config(n_group=5, topk_group=1), "n_group=5 must be at most half of n_routed_experts"),
    "one gate": (with_config(num_experts_per_tok=1, n_group=1, topk_group=1), "norm_topk_prob=True must be false"),
    "another shape": (with_config(head_dim=4), r"q_proj.weight of .* is \(24, 16\), its config.json says \(16, 16\)"),
    "more layers": (
        with_config(
            layers_block_type=["full_attention", "moe"] * 3, hybrid_override_pattern="*E" * 3, num_hidden_layers=6
        ),
        "lacks backbone.layers.4.norm.weight",
    ),
    "fewer experts": (
        with_config(n_routed_experts=4, n_group=2, topk_group=2),
        r"gate.weight of .* is \(8, 16\), its config.json",
    ),
    "no file": (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "cut short": (cut, "model.safetensors is not a whole safetensors file"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "is not a whole safetensors file"),
    "missing tensor": (with_tensors(lambda t: t.pop(NORM)), f"lacks {NORM}"),
    "stray tensor": (with_tensors(lambda t: t.update(stray=t[NORM])), "holds stray, which"),
    "fused experts without dimensions": (with_tensors(lambda t: t.update({FUSED: t[NORM]})), f"holds {FUSED}, which"),
    "fused experts without end": (
        with_tensors(lambda t: t.update({FUSED: np.zeros((10**12, 0, 1), np.float32)})),
        f"holds {FUSED}, which",
    ),
    "integers": (with_tensors(lambda t: t.update({NORM: t[NORM].astype(np.int32)})), f"{NORM} is I32; only F32"),
    "NaN": (spoilt(NORM, np.nan), f"{NORM} of .* holds NaN or infinity"),
    "NaN in an expert": (spoilt(EXPERT, np.nan), f"{EXPERT} of .* holds NaN or infinity"),
    "infinity in a router": (spoilt(BIAS, -np.inf), f"{BIAS} of .* holds NaN or infinity"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint(exported: Any, tmp_path: pathlib.Path, name: str) -> None:
    config, _, folder = exported
    shutil.copytree(folder / "one", tmp_path / "broken")
    BROKEN[name][0](tmp_path / "broken")
    with on_mesh(config), pytest.raises(ConfigError, match=BROKEN[name][1]) as caught:
        import_model(tmp_path / "broken")
    assert "\n" not in str(caught.value)


def test_two_truths_of_one_model(tmp_path: pathlib.Path) -> None:
    """config.json has what the class computes and the config that it came from; if they differ, which one is true?"""
    config = config_of("tiny")
    with on_mesh(config):
        export_model(config, random_model(config), tmp_path / "out")
        with_config(num_experts_per_tok=2)(tmp_path / "out")
        with pytest.raises(ConfigError, match="num_experts_per_tok=2 must be 3, as its bigmac_jax section"):
            import_model(tmp_path / "out")
        values = json.loads((tmp_path / "out/config.json").read_text())
        del values["bigmac_jax"]
        (tmp_path / "out/config.json").write_text(json.dumps(values))
        with pytest.raises(ConfigError, match="is not a config of bigmac"):
            import_model(tmp_path / "out")


def test_a_broken_index(exported: Any, tmp_path: pathlib.Path) -> None:
    config, _, folder = exported
    shutil.copytree(folder / "shards", tmp_path / "broken")
    first = min((tmp_path / "broken").glob("*.safetensors"))
    first.unlink()
    with on_mesh(config), pytest.raises(ConfigError, match=f"lacks {first.name}, which model.safetensors.index.json"):
        import_model(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with on_mesh(config), pytest.raises(ConfigError, match="has no weight_map"):
        import_model(tmp_path / "broken")


@pytest.mark.parametrize("shards", ["there", "gone"])
def test_an_index_beside_the_file_that_transformers_takes(exported: Any, tmp_path: pathlib.Path, shards: str) -> None:
    """Transformers, which saves to the folder that it read, removes old shards, and never the index."""
    shutil.copytree(exported[2] / "shards", tmp_path / "in")
    for shard in (tmp_path / "in").glob("*.safetensors") if shards == "gone" else ():
        shard.unlink()
    tuned = load_file(exported[2] / "one/model.safetensors")
    tuned[NORM] = tuned[NORM] + 1
    save_file(tuned, tmp_path / "in/model.safetensors")
    _, _, checkpoint = open_checkpoint(tmp_path / "in")
    np.testing.assert_array_equal(checkpoint.read(NORM), tuned[NORM])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model.top_k=2"], "config.model.top_k=2: the checkpoint says what the model is"),
        (["model.norm=layernorm"], "config.model.norm=layernorm: the checkpoint says"),
        (["train.step=2"], "'train.step' is not a field"),
        (["data.sequence_length=0"], "data.sequence_length=0 must be at least 1"),
    ],
)
def test_overrides(exported: Any, overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        import_model(exported[2] / "one", overrides)


def test_a_run_of_it(exported: Any, tmp_path: pathlib.Path) -> None:
    """`restore` takes the workdir; a second import does not overwrite it."""
    config, model, folder = exported
    changes = ["train.steps=7", "data.tokenizer=bytes", "data.batch_size=4"]
    with on_mesh(config):
        import_run(folder / "one", tmp_path / "run", changes)
        again, copy = restore(tmp_path / "run")
        assert (again.train.steps, again.data.tokenizer, again.model.head_dim) == (7, "bytes", 6)
        jax.tree.map(np.testing.assert_array_equal, leaves(copy), leaves(model))
        with pytest.raises(ConfigError, match="holds a run; give another one"):
            import_run(folder / "one", tmp_path / "run")


def test_processes_that_import_other_files_are_refused(exported: Any, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    """Before any tensor is read: each reads its own part of them."""
    config, _, folder = exported
    monkeypatch.setattr(importing, "import_model", lambda *_: pytest.fail("is read"))
    for what, name in (("files", "model.safetensors"), ("tokenizer", "tokenizer.json")):
        for process in range(2):
            place = shutil.copytree(folder / "one", tmp_path / what / str(process))
            write_tokenizer(place, config, ByteTokenizer(), chat=NO_CHAT)
            content = (place / name).read_bytes()
            other = content[:-1] + b"x" if what == "files" else content + b"\n"
            (place / name).write_bytes(other if process else content)
        told = run_as_processes(
            monkeypatch, 2, lambda process, what=what: import_run(tmp_path / what / str(process), tmp_path / "run")
        )
        line = f"process 1 was started with the {what} of --checkpoint="
        assert all(isinstance(error, ConfigError) and str(error).startswith(line) for error in told), told


def test_an_import_keeps_the_tokenizer(exported: Any, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another one is refused, and one that only adds tokens is taken. Of bytes an export writes a tokenizer.json."""
    config, _, folder = exported
    text = train_bpe(["some words that are here, and here"] * 3, 263)
    for name, tokenizer in (("bpe", JsonTokenizer(text)), ("bytes", ByteTokenizer())):
        shutil.copytree(folder / "one", tmp_path / name)
        write_tokenizer(tmp_path / name, config, tokenizer, chat=NO_CHAT)
    values = json.loads(text)
    new = {"id": 263, "content": "<|call|>", "single_word": False, "lstrip": False, "rstrip": False}
    values["added_tokens"].append(new | {"normalized": False, "special": True})
    (tmp_path / "grown").mkdir()
    (tmp_path / "grown/tokenizer.json").write_text(json.dumps(values))
    (tmp_path / "bpe/chat_template.jinja").write_text("{{ messages }}")
    grown = f"data.tokenizer={tmp_path / 'grown/tokenizer.json'}"
    with on_mesh(config):
        for given in ("data.tokenizer=bytes", f"data.tokenizer={tmp_path / 'bytes/tokenizer.json'}"):
            with pytest.raises(ConfigError, match=rf"{given} gives other ids than the tokenizer of .*bpe; drop it to"):
                import_run(tmp_path / "bpe", tmp_path / "refused", [given])
        assert not (tmp_path / "refused").exists()
        import_run(tmp_path / "bpe", tmp_path / "run", ["data.tokenizer=bpe"])
    assert JsonTokenizer((tmp_path / "run/tokenizer.json").read_text()).vocab_size == 263
    found = [
        find_tokenizer(tmp_path / name, open_checkpoint(tmp_path / name)[0], [given])
        for name, given in (("bpe", grown), ("bytes", "data.tokenizer=bytes"))
    ]
    assert [of and of[0].vocab_size for of in found] == [264, 257] and not caplog.messages
    assert found[0] and found[0][1].template == "{{ messages }}"  # the new tokenizer has none
    (tmp_path / "bpe/tokenizer.json").write_text("{")
    read = find_tokenizer(tmp_path / "bpe", open_checkpoint(tmp_path / "bpe")[0], ["data.tokenizer=bytes"])
    assert read and isinstance(read[0], ByteTokenizer)
    assert "can't be imported with its tokenizer" in caplog.text and "; data.tokenizer=bytes is taken" in caplog.text
    with pytest.raises(ConfigError, match=r"--config\.data\.tokenizer=bytes: a model keeps the tokenizer that"):
        new_run_config(config, ["data.tokenizer=bytes"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"dtype": "int8"}, "--dtype=int8 must be one of float32"),
        ({"max_shard_size": "5 apples"}, "--max_shard_size=5 apples must be a size such as 5GB"),
        ({"max_shard_size": "0"}, "--max_shard_size=0 must be a size"),
        ({"format": "gguf"}, "--format=gguf must be one of auto"),
        ({"format": "qwen3_moe"}, "model.structure=bigmac must be fine_grained"),
    ],
)
def test_bad_arguments(exported: Any, tmp_path: pathlib.Path, arguments: dict[str, str], line: str) -> None:
    config, model, _ = exported
    with on_mesh(config), pytest.raises(ConfigError, match=line):
        export_model(config, model, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"DTYPE": "int8"}, "--dtype=int8 must be one of float32"),
        ({"MAX_SHARD_SIZE": "0"}, "--max_shard_size=0 must be a size"),
        ({"MAX_SHARD_SIZE": "1MB", "FORMAT": "peft"}, "--max_shard_size: PEFT reads adapters from one file; drop it"),
    ],
)
def test_the_command_reads_nothing_for_bad_arguments(
    command: Any, tmp_path: pathlib.Path, flags: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = command("convert")
    write_config(config_of("bigmac"), tmp_path)
    values = {"FORMAT": "auto", "DTYPE": "bfloat16", "MAX_SHARD_SIZE": "5GB"} | flags
    for name, value in values.items():
        monkeypatch.setattr(program, f"_{name}", types.SimpleNamespace(value=value, default="5GB"))
    monkeypatch.setattr(program, "load_run_tokenizer", lambda *_: pytest.fail("is read"))
    with pytest.raises(ConfigError, match=line):
        program._export(tmp_path)


def test_an_export_is_whole_or_nothing(exported: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model, folder = exported
    with monkeypatch.context() as patch, on_mesh(config), pytest.raises(ConfigError, match="is there already"):
        patch.delattr(exporting, "declared_leaves")  # processes gather from there on: all must have heard of it by then
        export_model(config, model, folder / "one")
    with monkeypatch.context() as patch, on_mesh(config):
        (tmp_path / "here").mkdir()
        patch.chdir(tmp_path / "here")
        export_model(config, model, ".")
    assert (tmp_path / "here" / "config.json").is_file()
    shutil.rmtree(tmp_path / "here")
    (tmp_path / "file").write_text("")
    with on_mesh(config), pytest.raises(ConfigError, match="cannot be written"):
        export_model(config, model, tmp_path / "file" / "out")
    with pytest.raises(KeyError), whole_or_nothing(tmp_path / "out") as directory:
        (directory / "part").write_text("")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_process_0_cannot_write_ends_all(exported: Any, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    """After all have gathered every layer: none waits for one that has ended."""
    config, model, _ = exported
    gathered = collections.Counter[str]()

    def gather_layer(leaf: Any, layer: int | None) -> np.ndarray:
        gathered[threading.current_thread().name] += 1
        return exporting_gathers(leaf, layer)

    def work(process: int) -> None:
        with on_mesh(config):
            export_model(config, model, tmp_path / "out", max_shard_size="20KB")

    exporting_gathers, full = exporting.gather_layer, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(exporting, "gather_layer", gather_layer)
    monkeypatch.setattr(tensor_files, "save_file", mock.Mock(side_effect=full))  # of the first shard
    told = run_as_processes(monkeypatch, 2, work)
    assert [type(error) for error in told] == [ConfigError, ConfigError]
    assert {str(error) for error in told} == {
        f"--output={tmp_path / 'out'} cannot be written (No space left on device); give another one"
    }
    assert len(gathered) == 2 and len(set(gathered.values())) == 1
    assert not any(tmp_path.iterdir())


def test_shards_by_hand() -> None:
    def spec(name: str, size: int) -> Spec:
        return Spec(name, (size,), np.dtype(np.float32))

    specs = [spec("a", 2), spec("b", 2), spec("c", 1), spec("d", 9), spec("e", 1)]
    assert [[s.name for s in shard] for shard in split_shards(specs, 16)] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [parse_size(size) for size in ("5GB", "1.5 kb", "7")] == [5 * 10**9, 1500, 7]


def test_a_shard_at_a_time_is_in_memory(tmp_path: pathlib.Path) -> None:
    """Tensors are asked for when their shard is written, and let go behind it."""
    specs = [Spec(f"t{i}", (100,), np.dtype(np.float32)) for i in range(20)]
    alive, most = 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def tensors() -> Iterator[np.ndarray]:
        nonlocal alive, most
        for i in range(20):
            value = np.full(100, i, np.float32)
            weakref.finalize(value, gone)
            alive += 1
            most = max(most, alive)
            yield value

    write_shards(tmp_path, split_shards(specs, 1600), tensors())
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    assert 4 <= most <= 5  # a shard is four; one more is in the hands of whoever makes it


def test_a_tokenizer_without_files_is_the_checkpoints_own(tmp_path: pathlib.Path) -> None:
    """Its config names it. Another one is refused, as it gives other ids."""
    config = load_config("tiny", ["data.tokenizer=bytes", "model.vocab_size=50304"])
    found = find_tokenizer(tmp_path, config, [])
    assert found and isinstance(found[0], ByteTokenizer)
    with pytest.raises(ConfigError, match=r"data\.tokenizer=gpt2 gives other ids than the tokenizer of "):
        find_tokenizer(tmp_path, config, ["data.tokenizer=gpt2"])
