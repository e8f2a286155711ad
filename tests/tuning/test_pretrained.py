"""Runs that begin with a trained model: the same loss on any mesh and from any form, and what is refused."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from model.tools import leaves, on_mesh, random_model, tiny
from safetensors.numpy import save_file
from threads_as_processes import run_as_processes
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from training.tools import read_records, small

from bigmac_jax.config import Config, ConfigError, TrainConfig, TuningConfig, check_resume, load_config, with_overrides
from bigmac_jax.config.reading import retrained
from bigmac_jax.data import files
from bigmac_jax.data.chat_files import NO_CHAT
from bigmac_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, load_tokenizer, train_bpe
from bigmac_jax.interchange import export_model, qwen3_moe
from bigmac_jax.interchange.importing import find_tokenizer
from bigmac_jax.interchange.layout import common_json, describe_config
from bigmac_jax.interchange.tensor_files import Checkpoint
from bigmac_jax.interchange.tokenizer_files import write_tokenizer
from bigmac_jax.model.adapters import make_adapters
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.run import loop
from bigmac_jax.runtime import hosts, storage
from bigmac_jax.training.restore import Restored
from bigmac_jax.training.step import split_model
from bigmac_jax.training.workdir import load_run_tokenizer, read_history, write_run
from bigmac_jax.tuning import pretrained as pretrained_module
from bigmac_jax.tuning import restore, restore_step
from bigmac_jax.tuning.conversion.converted_run import new_run_config
from bigmac_jax.tuning.pretrained import (
    INIT_FROM,
    Pretrained,
    choose_tokenizer,
    compare_models,
    inherit_config,
    load_parameters,
    open_init_from,
    open_pretrained,
    read_model,
    with_absolute_places,
)
from bigmac_jax.tuning.teacher import open_teacher


def with_fields(config: Config, **sections: dict[str, Any]) -> Config:
    made = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **made)


def run(config: Config, workdir: pathlib.Path) -> list[dict[str, Any]]:
    with jax.set_mesh(make_mesh(config)):
        loop.train(config, workdir)
    return read_records(workdir)


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> tuple[Config, pathlib.Path]:
    """A run of four steps, and its export."""
    folder = tmp_path_factory.mktemp("base")
    config = small(folder, "train.steps=4", "train.eval_every=4", "model.num_shared_experts=1")
    run(config, folder / "run")
    with jax.set_mesh(make_mesh(config)):
        saved, model = restore(folder / "run")
        export_model(saved, model, folder / "export", tokenizer=load_run_tokenizer(folder / "run", config))
    return config, folder


def tuned(base: tuple[Config, pathlib.Path], place: str = "run", **sections: dict[str, Any]) -> Config:
    config, folder = base
    train = {"init_from": str(folder / place), "steps": 2, "eval_every": 1, "checkpoint_every": 1}
    rates = {"learning_rate": 0.0, "final_learning_rate": 0.0}
    sections["train"] = train | sections.get("train", {})
    return with_fields(config, optimizer=rates, **sections)


HISTORY = "`run`: 4 steps on 512 tokens of train.jsonl"
MESHES: list[Any] = [
    ("run", {}),
    pytest.param("run", {"expert": 4, "tensor": 2}, marks=pytest.mark.full),
    pytest.param("run", {"data": 2, "expert": 2, "fsdp": True}, marks=pytest.mark.full),
    pytest.param("export", {"expert": 8}, marks=pytest.mark.full),
    pytest.param("export", {"expert": 2, "tensor": 2}, marks=pytest.mark.full),
    pytest.param("run/checkpoints/4", {}, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("place", "mesh"), MESHES)
def test_a_run_begins_where_the_other_ended(
    base: tuple[Config, pathlib.Path], tmp_path: pathlib.Path, place: str, mesh: dict[str, Any]
) -> None:
    """With a learning rate of zero the loss stays that of the model it begins with."""
    ended = next(r["eval/loss"] for r in read_records(base[1] / "run") if "eval/loss" in r)
    # An export's tokenizer is a file of its own; bpe takes it.
    data = {"tokenizer": "bpe"} if place == "export" else {}
    records = run(tuned(base, place, mesh=mesh, data=data), tmp_path / "tuned")
    losses = [record["eval/loss"] for record in records if "eval/loss" in record]
    assert len(losses) == 2
    np.testing.assert_allclose(losses, ended, rtol=1e-5)
    before = "`export`, of whose training its own card tells"
    assert read_history(tmp_path / "tuned") == [HISTORY if place.startswith("run") else before]
    assert read_history(base[1] / "run") == []


@pytest.mark.full
def test_it_resumes_bit_for_bit_without_the_other(base: tuple[Config, pathlib.Path], tmp_path: pathlib.Path) -> None:
    config = with_fields(tuned(base), optimizer={"learning_rate": 1e-2}, train={"steps": 4})
    run(config, tmp_path / "whole")
    run(with_fields(config, train={"steps": 2}), tmp_path / "halves")
    run(config, tmp_path / "halves")
    losses = [
        [record["loss"] for record in read_records(tmp_path / name) if "loss" in record] for name in ("whole", "halves")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize(("rows", "tensor"), [(10, 2), (4, 2), (7, 1)])
def test_a_table_gets_more_rows_or_fewer(rows: int, tensor: int) -> None:
    """The new ones are the mean of the old; the others stay, split over the ranks as they are to be."""
    table = np.arange(48, dtype=np.float32).reshape(6, 8) ** 2
    with on_mesh(tiny((1, 1, 1, tensor))):
        split = NamedSharding(jax.sharding.get_mesh(), P("tensor", None))
        like = jax.ShapeDtypeStruct((rows, 8), np.float32, sharding=split)
        found = pretrained_module._resize(jax.device_put(table, split), like)
    expected = [*table, *[table.mean(0)] * 4][:rows]
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-6)
    assert found.sharding.shard_shape(found.shape) == (rows // tensor, 8)


@pytest.mark.full
def test_a_larger_vocabulary(base: tuple[Config, pathlib.Path]) -> None:
    """The old tokens' logits stay; the new ones' are those of the mean row."""
    config = tuned(base, model={"vocab_size": 272}, mesh={"expert": 2, "tensor": 2})
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    origin = open_pretrained(config.train.init_from)
    assert compare_models(origin, config) == ["model.vocab_size 264 → 272"]
    with jax.set_mesh(make_mesh(config)):
        params, _ = load_parameters(origin, config)
        table = leaves(params)["embedding_VD"]
    with jax.set_mesh(make_mesh(base[0])):
        old = leaves(restore(base[1] / "run")[1])["embedding_VD"]
    assert (table[:264] == old).all() and tokens.any()
    np.testing.assert_allclose(table[264:], np.broadcast_to(old.mean(0), (8, 16)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"top_k": 4}}, r"model\.top_k=4 differs from 2 of train\.init_from="),
        ({"model": {"hidden_size": 32}}, r"model\.hidden_size=32 differs from 16"),
        ({"model": {"vocab_size": 260}}, r"model\.vocab_size=260 must be at least the 264"),
    ],
)
def test_differences_that_are_refused(
    base: tuple[Config, pathlib.Path], sections: dict[str, Any], message: str
) -> None:
    config = tuned(base, **sections)
    with pytest.raises(ConfigError, match=message):
        compare_models(open_pretrained(config.train.init_from), config)


def test_differences_that_are_told(base: tuple[Config, pathlib.Path]) -> None:
    model = {"rope_theta": 5e5, "dropout": 0.1, "projection_init": "random", "balance": "none"}
    config = tuned(base, model=model, data={"sequence_length": 32})
    told = compare_models(open_pretrained(config.train.init_from), config)
    assert told == [
        "model.rope_theta 10000.0 → 500000.0",
        "model.balance aux_loss → none",
        "data.sequence_length 16 → 32",
        "optimizer.projection_rate 0.125 → 1",
    ]


def test_a_routers_bias_stays() -> None:
    """Whatever moves it: the fix that adapters name for model.balance=quantile is no other model."""
    before = load_config("tiny", ["model.balance=quantile"])
    adapters = ["train.init_from=there", "tuning.lora_rank=4"]
    with pytest.raises(ConfigError, match="leaves that alone; use balance=bias with balance_bias_rate=0"):
        with_overrides(before, adapters)
    now = with_overrides(before, [*adapters, "model.balance=bias", "model.balance_bias_rate=0"])
    origin = Pretrained("there", "4", "", before)
    assert compare_models(origin, now) == ["model.balance quantile → bias"]
    assert compare_models(Pretrained("there", "4", "", now), before) == ["model.balance bias → quantile"]
    with pytest.raises(ConfigError, match=r"=none would lose .* or use balance=bias with balance_bias_rate=0, which"):
        compare_models(origin, with_overrides(before, ["model.balance=none"]))
    dense = ["model.structure=dense", "model.latent_norm=none"]
    origin = Pretrained("there", "4", "", with_overrides(before, dense))
    assert compare_models(origin, with_overrides(before, [*dense, *adapters])) == []  # it has no router
    assert compare_models(origin, with_overrides(before, [*dense, "model.balance=none"])) == []


# config.json of the published Qwen3-30B-A3B, without what is a class's default.
QWEN3_30B = {
    "head_dim": 128, "hidden_size": 2048, "max_position_embeddings": 40960, "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "rope_theta": 1000000.0, "vocab_size": 151936,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_the_shipped_shapes_are_the_published_ones(tmp_path: pathlib.Path) -> None:
    """A run with them begins with that checkpoint, and its tokenizer. What neither config reads may differ."""
    save_file({}, tmp_path / "model.safetensors")
    published = qwen3_moe.from_json(QWEN3_30B, Checkpoint(tmp_path, qwen3_moe.split_stored))
    config = load_config("qwen3_30b", ["train.init_from=there"])
    assert compare_models(Pretrained("there", "", "", published), config) == ["model.context_length 40960 → 4096"]
    assert config.data.tokenizer == "bpe" and config.model.down_ratio != published.model.down_ratio
    wide = with_fields(config, model={"expert_hidden_size": 0, "down_ratio": 0.5})
    with pytest.raises(ConfigError, match=r"model\.down_ratio=0\.5 differs from 0\.375 of"):
        compare_models(Pretrained("there", "", "", published), wide)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_shorter_windows_leave_the_context_as_it_is(positions: str, tmp_path: pathlib.Path) -> None:
    """In what exports say, and in a table of learned positions, which keeps all of its rows."""
    there = tiny(length=16, positions=positions)
    with on_mesh(there):
        written = random_model(there)
        export_model(there, written, tmp_path / "there", format="plain")
    origin = open_pretrained(str(tmp_path / "there"))
    given = ["data.sequence_length=8", "data.source=sotu"]
    config = retrained(inherit_config(origin, dict(field.split("=") for field in given)), given)
    assert (config.context_length, config.data.sequence_length) == (16, 8)
    assert compare_models(origin, config) == ["data.sequence_length 16 → 8"]
    assert new_run_config(there, given[:1]).context_length == 16  # what `bigmac convert` writes
    assert common_json(config)["max_position_embeddings"] == 16
    fewer = with_fields(config, model={"context_length": 0})  # of a config that says nothing of it
    assert compare_models(origin, fewer) == ["data.sequence_length 16 → 8"]
    told = compare_models(origin, with_fields(config, model={"context_length": 12}))
    assert told == ["data.sequence_length 16 → 8", "model.context_length 16 → 12"]
    if positions == "rope":
        longer = with_fields(config, model={"context_length": 64})
        assert compare_models(origin, longer)[-1] == "model.context_length 16 → 64"
        return
    for fields, name in (({"sequence_length": 32}, "data.sequence_length"), ({}, "model.context_length")):
        with pytest.raises(ConfigError, match=rf"{name}=32 must be at most the 16 learned positions .*; use 16"):
            compare_models(origin, with_fields(config, model={"context_length": 32}, data=fields))
    with on_mesh(config):
        positions_LD = leaves(load_parameters(origin, config)[0])["positions_LD"]
    np.testing.assert_array_equal(positions_LD, leaves(written)["positions_LD"])
    with on_mesh(config):
        export_model(config, random_model(config), tmp_path / "tuned", format="plain")
    pupil = with_fields(config, tuning={"teacher": str(tmp_path / "tuned")}, data={"sequence_length": 12})
    assert open_teacher(tmp_path, pupil).config.data.sequence_length == 12  # more than it was tuned on, not than it has
    with pytest.raises(ConfigError, match=r"data\.sequence_length=17 must be at most the 16 that tuning\.teacher="):
        open_teacher(tmp_path, with_fields(pupil, data={"sequence_length": 17}))


@pytest.mark.parametrize("place", ["nothing", "run/checkpoints/3", "export/hf"])
def test_no_model_there(base: tuple[Config, pathlib.Path], place: str) -> None:
    with pytest.raises(ConfigError, match=r"holds no model; give the workdir|step=3 is not a checkpoint"):
        open_pretrained(str(base[1] / place))


def test_the_config_of_a_run_that_names_none(base: tuple[Config, pathlib.Path]) -> None:
    """The other's, but what was held out of its data goes with them, and it is not tuned as that was."""
    config = inherit_config(open_pretrained(str(base[1] / "run")), {"data.source": "sotu"})
    assert config.model == base[0].resolved.model and config.train.init_from == str(base[1] / "run")
    assert config.data.validation_source == "" and config.tuning == TuningConfig()
    of_export = inherit_config(open_pretrained(str(base[1] / "export")), {"data.source": "sotu"})
    grown = with_fields(base[0], model={"top_k": 4}, train={"choices_from": 2, "choices_steps": 3})
    train = inherit_config(Pretrained("there", "4", "", grown), {}).train
    assert (train.choices_from, train.choices_steps) == (0, 0)  # its choices have grown
    assert of_export.model == base[0].resolved.model and of_export.data.tokenizer.endswith("export/tokenizer.json")


@pytest.mark.parametrize(
    ("before", "given", "expected"),
    [
        ({"mixture": "a=1,b=2", "curriculum": "5:a=1"}, ["data.source=c"], {"source": "c"}),
        ({"mixture": "a=1,b=2", "validation_source": "v"}, ["data.mixture=c=1"], {"mixture": "c=1"}),
        ({"source": "a", "validation_source": "v", "test_source": "t"}, ["data.mixture=c=1"], {"mixture": "c=1"}),
        ({"mixture": "a=1,b=2"}, ["data.curriculum=5:a=1"], {"mixture": "a=1,b=2", "curriculum": "5:a=1"}),
        ({"source": "a", "test_source": "t"}, ["data.mixture="], {"source": "a", "test_source": "t"}),
    ],
)
def test_data_of_its_own(
    tmp_path: pathlib.Path, before: dict[str, str], given: list[str], expected: dict[str, str]
) -> None:
    """They replace all of the other's: a source its mixture, a mixture its source."""
    there = with_fields(small(tmp_path), data={"source": "sotu", "validation_source": "", "test_source": ""} | before)
    made = inherit_config(Pretrained("there", "4", "", there), dict(field.split("=", 1) for field in given))
    data = with_overrides(made, given).data
    fields = ("source", "mixture", "curriculum", "validation_source", "test_source")
    found = {name: getattr(data, name) for name in fields}
    assert found == {"source": "sotu"} | dict.fromkeys(fields[1:], "") | expected


def test_a_tokenizer_may_only_grow(base: tuple[Config, pathlib.Path], tmp_path: pathlib.Path) -> None:
    text = train_bpe(["some words that are here, and here"] * 3, 270)
    (tmp_path / "tokenizer.json").write_text(text)
    origin = open_pretrained(str(base[1] / "export"))
    own = origin._replace(config=with_fields(origin.config, data={"tokenizer": str(tmp_path / "tokenizer.json")}))
    config = with_fields(base[0], model={"vocab_size": 300}, data={"tokenizer": "bpe"})
    own = own._replace(config=with_fields(own.config, model={"vocab_size": 300}))
    assert choose_tokenizer(own, config).fingerprint == JsonTokenizer(text).fingerprint  # bpe: not trained anew
    values = json.loads(text)
    new = {"id": 280, "content": "<|call|>", "single_word": False, "lstrip": False, "rstrip": False}
    values["added_tokens"].append(new | {"normalized": False, "special": True})
    (tmp_path / "grown.json").write_text(json.dumps(values))
    grown = with_fields(config, data={"tokenizer": str(tmp_path / "grown.json")})
    assert choose_tokenizer(own, grown).vocab_size == JsonTokenizer(text).vocab_size + 1
    assert isinstance(load_tokenizer(base[0]), ByteTokenizer)
    with pytest.raises(ConfigError, match=r"data\.tokenizer=bytes gives other ids"):
        choose_tokenizer(own, with_fields(config, data={"tokenizer": "bytes"}))


def test_a_tokenizer_of_more_ids_than_its_table_has_rows(tmp_path: pathlib.Path) -> None:
    """A run that begins with the folder grows the table. An import, which can't, says so; pasting either fix works."""
    file = tmp_path / "tokenizer.json"
    file.write_text(train_bpe(["some words that are here, and here"] * 3, 265))
    there = with_fields(tiny(), model={"vocab_size": 264}, data={"tokenizer": str(file)})
    origin = Pretrained(str(tmp_path), "", "", there)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=264 must be at least the 265 of .*; use 384$"):
        choose_tokenizer(origin, with_fields(there, data={"tokenizer": "bpe"}))
    with pytest.raises(ConfigError) as error:
        find_tokenizer(tmp_path, there, [])
    fix = f"give bigmac train --config.train.init_from={tmp_path} --config.model.vocab_size=384 instead"
    assert str(error.value).endswith(f"; an import keeps its table: {fix}")
    grown = with_fields(there, model={"vocab_size": 384})
    assert choose_tokenizer(origin, with_fields(grown, data={"tokenizer": "bpe"})).vocab_size == 265
    assert choose_tokenizer(origin, grown).vocab_size == 265


def test_tokens_that_transformers_adds_to_every_text_are_told(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By an import and by a run that begins with a folder of others, once."""
    whole = Tokenizer.from_str(train_bpe(["some words that are here, and here"] * 3, 264))
    (tmp_path / "tokenizer.json").write_text(whole.to_str())
    there = with_fields(tiny(), model={"vocab_size": 264}, data={"tokenizer": str(tmp_path / "tokenizer.json")})
    origin = Pretrained(str(tmp_path), "", "", there)
    choose_tokenizer(origin, there)
    whole.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    (tmp_path / "tokenizer.json").write_text(whole.to_str())
    choose_tokenizer(origin._replace(step="4"), there)
    assert not caplog.messages
    choose_tokenizer(origin, there)
    find_tokenizer(tmp_path, there, [])
    line = f"{tmp_path}: its tokenizer adds <|endoftext|> to every text; here, and in exports, only a chat template"
    assert [message.startswith(line) for message in caplog.messages] == [True, True]


def test_adapters_are_merged_into_the_model_that_they_are_of(
    base: tuple[Config, pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W + a b · alpha / rank, of the run that train.init_from names."""
    config = tuned(base, tuning={"lora_rank": 2, "lora_alpha": 8.0})
    with jax.set_mesh(make_mesh(config)):
        graphdef, plain, rest = split_model(restore(base[1] / "run")[1])
        made = make_adapters(config, plain, jax.random.key(0))
        adapters = jax.tree.map(lambda w: w + 0.1, made)
        found = Restored(config, graphdef, adapters, rest, plain, 7, 1.5)
        others = pretrained_module.restore_parts
        monkeypatch.setattr(
            pretrained_module,
            "restore_parts",
            lambda place, *more: found if place == tmp_path else others(place, *more),
        )
        same, model, step, loss = restore_step(tmp_path, step="latest", config=None)
        before, after = leaves(plain), leaves(split_model(model)[1])
        parts = leaves(adapters)
    assert (same, step, loss) == (config, 7, 1.5) and before.keys() == after.keys()
    changed = 0
    for name, value in before.items():
        if f"{name}.a" in parts:
            changed += 1
            value = value + 4 * parts[f"{name}.a"] @ parts[f"{name}.b"]
        np.testing.assert_allclose(after[name], value, atol=1e-5, err_msg=name)
    assert 2 * changed == len(parts) > 4


@pytest.mark.full
def test_adapters_are_kept_alone_and_found_again(base: tuple[Config, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """Trained on one mesh, resumed on another, merged for whoever reads the run; another base is refused."""
    tuning = {"lora_rank": 2}
    config = with_fields(tuned(base, tuning=tuning), optimizer={"learning_rate": 1e-2}, train={"steps": 4})
    whole = run(config, tmp_path / "whole")
    run(with_fields(config, train={"steps": 2}, mesh={"expert": 2, "tensor": 2}), tmp_path / "halves")
    halves = run(config, tmp_path / "halves")
    losses = [[r["eval/loss"] for r in records if "eval/loss" in r] for records in (whole, halves)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert losses[0][-1] < losses[0][0]

    def size(folder: pathlib.Path) -> int:
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    for item in ("model", "optimizer"):
        kept, full = (size(path / "checkpoints" / "4" / item) for path in (tmp_path / "whole", base[1] / "run"))
        assert kept < 0.8 * full, (item, kept, full)
    with jax.set_mesh(make_mesh(with_fields(config, mesh={"expert": 8}))):
        _, model = restore(tmp_path / "whole")
    with jax.set_mesh(make_mesh(base[0])):
        before = leaves(restore(base[1] / "run")[1])
    after = leaves(model)
    moved = {name for name in before if (after[name] != before[name]).any()}
    assert moved and all(("attention" in n or "mlp" in n) and "norm" not in n and "router" not in n for n in moved)
    other = tmp_path / "other"
    run(with_fields(base[0], train={"steps": 1, "seed": 7}), other)
    with pytest.raises(
        ConfigError, match=r"is not the model that this run was started from|step=4 is not a checkpoint"
    ):
        run(with_fields(config, train={"init_from": str(other), "steps": 5}), tmp_path / "whole")


@pytest.mark.full
def test_adapters_live_on_when_their_model_moves(
    base: tuple[Config, pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base[1] / "run", tmp_path / "old")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    config = with_fields(tuned(base, tuning={"lora_rank": 2}), train={"init_from": "old"})
    run(config, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with jax.set_mesh(make_mesh(config)):
        before = leaves(restore(tmp_path / "run")[1])
        (tmp_path / "old").rename(tmp_path / "new")
        with pytest.raises(ConfigError, match=r"resume once with --config\.train\.init_from=PLACE"):
            restore(tmp_path / "run")
    run(with_fields(config, train={"init_from": "../new"}), tmp_path / "run")  # of its steps none is left
    with jax.set_mesh(make_mesh(config)):
        after = leaves(restore(tmp_path / "run")[1])
    assert all((after[name] == before[name]).all() for name in before)


def test_where_the_model_lies_may_change_and_whether_there_is_one_may_not(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = Config(train=TrainConfig(init_from="base"), tuning=TuningConfig(teacher="gs://bucket/teacher"))
    whole = with_absolute_places(here)
    assert (whole.train.init_from, whole.tuning.teacher) == (str(tmp_path / "base"), "gs://bucket/teacher")
    assert with_absolute_places(Config()) == Config() and with_absolute_places(whole) == whole
    check_resume(here, whole)
    for before, after, name in ((Config(), here, "train"), (here, Config(), "train")):
        with pytest.raises(ConfigError, match=rf"{name}\.init_from=.* differs from"):
            check_resume(before, after)
    weighed = with_fields(here, tuning={"teacher_weight": 0.25})
    with pytest.raises(ConfigError, match=r"tuning\.teacher_weight=0\.25 differs from"):
        check_resume(here, weighed)
    write_run(tmp_path / "run", whole, {INIT_FROM: "4:abc"}, {}, ByteTokenizer(), chat=NO_CHAT, history=None, parts=0)
    message = (
        rf"holds no model; .* \({tmp_path / 'run'} needs train\.init_from={tmp_path / 'base'} as it was, with its "
        rf"checkpoint 4; if that was moved, resume once with --config\.train\.init_from=PLACE\)"
    )
    with pytest.raises(ConfigError, match=message):
        open_init_from(tmp_path / "run", whole)


def test_a_folder_is_fetched_by_all_or_none(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that fails for one process ends them all, before they read tensors together."""
    entered: list[str] = []

    @contextlib.contextmanager
    def together() -> Iterator[None]:
        entered.append("together")
        try:
            yield
        finally:
            entered.append("apart")

    @contextlib.contextmanager
    def fetched(path: pathlib.Path) -> Iterator[pathlib.Path]:
        entered.append("fetch")
        yield path
        entered.append("removed")

    monkeypatch.setattr(hosts, "raise_together", together)
    monkeypatch.setattr(storage, "local_folder", fetched)
    monkeypatch.setattr(
        pretrained_module, "import_model", lambda directory, overrides: (directory, entered.append("read"))
    )
    read_model(Pretrained(str(tmp_path), "", "digest", Config()), Config())
    assert entered == ["together", "fetch", "apart", "read", "removed"]


def write_export(folder: pathlib.Path) -> None:
    """Of tensors that nobody reads."""
    config = with_fields(tiny(), model={"vocab_size": 264}, data={"tokenizer": "tokenizer.json"})
    values = {"model_type": "bigmac_jax", "config": describe_config(config)}
    (folder / "config.json").write_text(json.dumps(values))
    save_file({f"a{i}": np.zeros(8000, np.float32) for i in range(40)}, folder / "model.safetensors")
    write_tokenizer(folder, config, ByteTokenizer(), chat=NO_CHAT)


def test_a_folder_of_a_store_keeps_its_tokenizer(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose copy is gone by the time that the tokenizer is read; and it is the same model whenever it is fetched."""
    place = tmp_path / "export"
    place.mkdir()
    write_export(place)

    @contextlib.contextmanager
    def fetched(path: pathlib.Path) -> Iterator[pathlib.Path]:
        copy = pathlib.Path(tempfile.mkdtemp(dir=tmp_path)) / path.name
        yield shutil.copytree(path, copy, copy_function=shutil.copyfile)  # with new times
        shutil.rmtree(copy)

    for name in ("_WHOLE", "_BLOCK"):  # as if it were large
        monkeypatch.setattr(files, name, 100)
    monkeypatch.setattr(storage, "local_folder", fetched)
    origin = open_pretrained(str(place))
    assert origin == open_pretrained(str(place), origin.identity)
    assert origin.config.data.tokenizer == str(place / "tokenizer.json")
    bpe = with_fields(origin.config, data={"tokenizer": "bpe"})
    assert choose_tokenizer(origin, bpe).vocab_size == choose_tokenizer(origin, origin.config).vocab_size == 257
    os.utime(place / "model.safetensors", (0, 0))
    assert open_pretrained(str(place)).identity != origin.identity


def test_processes_that_see_other_models_are_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before some of them look for a run's checkpoint together."""
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
    write_export(tmp_path / "0")
    write_run(tmp_path / "1", tiny(), {}, {}, ByteTokenizer(), chat=NO_CHAT, history=None, parts=0)
    seen = threading.local()
    monkeypatch.setattr(storage, "locate", lambda *_: tmp_path / seen.process)
    monkeypatch.setattr(pretrained_module, "find_checkpoint", lambda *_: pytest.fail("goes on"))

    def work(process: int) -> None:
        seen.process = str(process)
        open_pretrained("there")

    told = run_as_processes(monkeypatch, 2, work)
    line = "process 1 was started with the model of train.init_from=there=a run, process 0 with the model of "
    assert all(isinstance(error, ConfigError) and line in str(error) for error in told), told


def test_the_command_line_takes_an_origin(base: tuple[Config, pathlib.Path]) -> None:
    with pytest.raises(ConfigError, match=r"tuning\.lora_rank=4 adapts a model; say which: train\.init_from"):
        load_config("tiny", ["tuning.lora_rank=4"])
    with pytest.raises(ConfigError, match=r"tuning\.lora_targets=heads must be some of attention, "):
        load_config("tiny", ["tuning.lora_rank=4", "train.init_from=x", "tuning.lora_targets=heads"])
    with pytest.raises(ConfigError, match=r"balance_bias_rate=0\.001 moves the router's bias"):
        load_config("tiny", ["tuning.train_router=false", "model.balance=bias"])


@pytest.mark.parametrize("in_host", [False, True])
def test_what_a_model_is_restored_from(in_host: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    class AskedError(Exception):
        pass

    def restore_parts(*given: Any) -> Any:
        raise AskedError(*given)

    monkeypatch.setattr(pretrained_module, "restore_parts", restore_parts)
    with pytest.raises(AskedError) as error:
        restore(tmp_path, "best", load_config("tiny"), in_host)
    assert error.value.args == (tmp_path, "best", load_config("tiny"), in_host)
