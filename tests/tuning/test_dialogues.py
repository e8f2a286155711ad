"""Whose chat template, and which special tokens' names, a run is tuned, resumed, served and exported with."""

import dataclasses
import datetime
import json
import logging
import pathlib
import shutil
from typing import Any

import jax
import pytest

from bigmac_jax.config import Config, ConfigError, DataConfig, ModelConfig, TuningConfig
from bigmac_jax.data import documents
from bigmac_jax.data.chat_files import NO_CHAT, TEMPLATE_FILE, read_chat_folder
from bigmac_jax.data.conversations import Conversations
from bigmac_jax.data.pipeline import open_stream
from bigmac_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, train_bpe
from bigmac_jax.interchange.tokenizer_files import end_ids, keep_tokenizer, read_tokenizer, write_tokenizer
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.run import start
from bigmac_jax.runtime import hosts
from bigmac_jax.serving.dialogue import load_dialogue
from bigmac_jax.training.run_data import (
    chat_files,
    check_rows,
    check_template,
    fingerprint_rows,
    open_run_stream,
    rows_of_run,
)
from bigmac_jax.training.workdir import use_saved_template, write_run
from bigmac_jax.tuning.pretrained import Pretrained, with_pretrained_chat

TURNS = [{"role": "user", "content": "four?"}, {"role": "assistant", "content": "two and two"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def bpe() -> JsonTokenizer:
    values = json.loads(train_bpe(["the answer is two and four"] * 4, 270))
    vocabulary = len(values["model"]["vocab"])
    for number, name in enumerate(("<|begin|>", "<|im_end|>"), vocabulary):
        values["added_tokens"].append(values["added_tokens"][0] | {"id": number, "content": name})
    return JsonTokenizer(json.dumps(values))


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder as Hugging Face has them, but for the model."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(bpe().json_text)
    names = {"bos_token": "<|begin|>", "eos_token": {"content": "<|im_end|>"}, "unk_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": TEMPLATE}))
    return folder


def config_of(folder: pathlib.Path, tokenizer: str = "bpe", **tuning: Any) -> Config:
    file = folder / "rows.jsonl"
    file.write_text(json.dumps({"messages": TURNS}) + "\n")
    data = DataConfig(source=str(file), validation_source=str(file), test_source=str(file), tokenizer=tokenizer)
    fields = TuningConfig(**{"objective": "sft"} | tuning)
    return Config(model=ModelConfig(vocab_size=512), data=data, tuning=fields, cache_dir=str(folder / "cache"))


def origin_at(place: pathlib.Path, tokenizer: str, step: str = "") -> Pretrained:
    return Pretrained(str(place), step, "digest", Config(data=DataConfig(tokenizer=tokenizer)))


def begun(config: Config, read: Config, tokenizer: Tokenizer, workdir: pathlib.Path) -> Conversations:
    """As a start does."""
    stream = open_stream(read, "train", tokenizer)
    assert isinstance(stream, Conversations)
    check_template(workdir, chat_files(read, stream))
    rows = fingerprint_rows({"train": stream, "validation": None})
    check_rows(workdir, rows)
    write_run(
        workdir,
        config,
        rows | {"tokenizer": tokenizer.fingerprint},
        {},
        tokenizer,
        chat_files(read, stream),
        history=None,
        parts=0,
    )
    return stream


def text_of(stream: Conversations, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(stream.sequences[0][0])


def test_a_model_is_tuned_resumed_and_served_with_its_own(
    model: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, tokenizer, workdir = config_of(tmp_path), bpe(), tmp_path / "run"
    origin = origin_at(model, str(model / "tokenizer.json"))
    with caplog.at_level(logging.INFO):
        stream = begun(config, with_pretrained_chat(origin, config), tokenizer, workdir)
    assert f"messages go through the chat template of {model / 'tokenizer_config.json'}" in caplog.text
    expected = "<|begin|><user>four?<|im_end|><assistant>two and two"
    assert text_of(stream, tokenizer) == expected
    shutil.rmtree(model)
    again = begun(config, use_saved_template(workdir, config), tokenizer, workdir)
    assert text_of(again, tokenizer) == expected
    dialogue = load_dialogue(tokenizer, "", str(workdir / "tokenizer.json"), workdir)
    assert tokenizer.decode(dialogue.prompt(TURNS[:1])) == "<|begin|><user>four?<|im_end|><assistant>"
    assert dialogue.stop == ("<|im_end|>",)
    later = with_pretrained_chat(
        origin_at(workdir, str(workdir / "tokenizer.json"), "5"), config
    )  # a run that begins with it
    assert text_of(begun(config, later, tokenizer, tmp_path / "later"), tokenizer) == expected


TEXTS = {"prompt": "four?", "completion": "two and two", "chosen": "two and two", "rejected": "five"}


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_rows_of_text_keep_no_template_of_ours(
    objective: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a line say that messages go through it; beside a row of messages, both."""
    monkeypatch.setattr(documents, "_logged", set())
    config = config_of(tmp_path, "bytes")
    train = dataclasses.replace(config.train, init_from="some")
    config = dataclasses.replace(config, train=train, tuning=TuningConfig(objective=objective))
    dialogue = TEXTS | {"prompt": TURNS[:1], "chosen": TURNS[1:], "completion": TURNS[1:]}
    with caplog.at_level(logging.INFO):
        for rows, kept in ([TEXTS], False), ([TEXTS, dialogue], True):
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            begun(config, config, ByteTokenizer(), tmp_path / f"run {kept}")
            assert (tmp_path / f"run {kept}" / TEMPLATE_FILE).is_file() == kept
            assert ("messages go through the chat template" in caplog.text) == kept
    begun(config, use_saved_template(tmp_path / "run True", config), ByteTokenizer(), tmp_path / "run True")


def test_a_template_that_was_given_is_kept_of_rows_of_text(tmp_path: pathlib.Path) -> None:
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    config = config_of(tmp_path, "bytes", chat_template=str(tmp_path / "own.jinja"))
    (tmp_path / "rows.jsonl").write_text(json.dumps(TEXTS) + "\n")
    begun(config, config, ByteTokenizer(), tmp_path / "run")
    assert (tmp_path / "run" / TEMPLATE_FILE).read_text() == TEMPLATE


def test_names_are_kept_of_a_template_of_ones_own(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    own = tmp_path / "own" / "t.jinja"
    own.parent.mkdir()
    own.write_text("-" + TEMPLATE)
    config, tokenizer, workdir = config_of(tmp_path, chat_template=str(own)), bpe(), tmp_path / "run"
    begun(config, with_pretrained_chat(origin_at(model, str(model / "tokenizer.json")), config), tokenizer, workdir)
    shutil.rmtree(model)
    shutil.rmtree(own.parent)
    stream = begun(config, use_saved_template(workdir, config), tokenizer, workdir)
    assert text_of(stream, tokenizer) == "-<|begin|><user>four?<|im_end|><assistant>two and two"
    assert stream.chat.template == "-" + TEMPLATE


def test_names_that_change_beside_the_tokenizer_change_nothing(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config, tokenizer, workdir = config_of(tmp_path, str(model / "tokenizer.json")), bpe(), tmp_path / "run"
    first = text_of(begun(config, config, tokenizer, workdir), tokenizer)
    settings = (model / "tokenizer_config.json").read_text()
    (model / "tokenizer_config.json").write_text(settings.replace("<|im_end|>", "<|begin|>"))
    assert text_of(begun(config, use_saved_template(workdir, config), tokenizer, workdir), tokenizer) == first


def test_of_a_tokenizer_without_a_file_the_template_is_that_of_the_run(tmp_path: pathlib.Path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    first = config_of(tmp_path, "bytes", chat_template=str(tmp_path / "t.jinja"))
    begun(first, first, ByteTokenizer(), tmp_path / "run")
    second = config_of(tmp_path, "bytes")
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "5"):
        read = with_pretrained_chat(origin_at(place, "bytes", "5"), second)
        stream = open_stream(read, "train", ByteTokenizer())
        assert isinstance(stream, Conversations) and stream.chat.template == TEMPLATE
    (tmp_path / "other.jinja").write_text("other")
    other = config_of(tmp_path, "bytes", chat_template=str(tmp_path / "other.jinja"))
    read = use_saved_template(tmp_path / "run", other)
    files = read_chat_folder(tmp_path / "run")._replace(template="other")
    assert read == other
    with pytest.raises(ConfigError, match=r"tuning\.chat_template is not .*, which this workdir was started with"):
        check_template(tmp_path / "run", files)
    (tmp_path / "moved.jinja").write_text(TEMPLATE)
    moved = use_saved_template(
        tmp_path / "run", config_of(tmp_path, "bytes", chat_template=str(tmp_path / "moved.jinja"))
    )
    assert moved.tuning.chat_template == str(tmp_path / "run" / "chat_template.jinja")


class Later(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls(2031, 2, 3)


def test_the_rows_of_a_run_have_the_date_of_its_first_start(
    model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + TEMPLATE)
    config = config_of(tmp_path, "bytes", chat_template=str(tmp_path / "t.jinja"))
    tokenizer, workdir = ByteTokenizer(), tmp_path / "run"
    first = begun(config, config, tokenizer, workdir)
    monkeypatch.setattr(datetime, "datetime", Later)
    again = begun(config, use_saved_template(workdir, config), tokenizer, workdir)
    assert text_of(again, tokenizer) == text_of(first, tokenizer) and "2031" not in text_of(first, tokenizer)
    assert b"03 Feb 2031" in bytes(load_dialogue(tokenizer, "", "bytes", workdir).prompt(TURNS[:1])[:11])
    for read in (
        config,
        with_pretrained_chat(origin_at(workdir, "bytes", "5"), config_of(tmp_path, "bytes")),
    ):  # other runs
        stream = open_stream(read, "train", tokenizer)
        assert isinstance(stream, Conversations) and text_of(stream, tokenizer).startswith("03 Feb 2031")
    with pytest.raises(ConfigError, match="the train rows are other tokens than this workdir was started with"):
        check_rows(workdir, fingerprint_rows({"train": stream}))


def test_another_template_is_refused_before_anything_compiles(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And by all processes: the first alone would leave the others waiting."""
    for name in ("first", "second"):
        (tmp_path / name).write_text(name + TEMPLATE)
    first, second = (config_of(tmp_path, "bytes", chat_template=str(tmp_path / name)) for name in ("first", "second"))
    begun(first, first, ByteTokenizer(), tmp_path / "run")
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    monkeypatch.setattr(hosts, "run_on_first", lambda find: find())  # what process 0 finds
    monkeypatch.setattr(start, "make_trainer", lambda *_: pytest.fail("it goes on"))
    with (
        jax.set_mesh(make_mesh(first)),
        pytest.raises(ConfigError, match=r"tuning\.chat_template is not .*/run/chat_t"),
    ):
        start.start(second, tmp_path / "run")


def test_rows_that_a_run_has_learned_from_are_not_to_be_mended(tmp_path: pathlib.Path) -> None:
    """An earlier version read rows that this one refuses: what a new run would be told to do does not help."""
    config, workdir = config_of(tmp_path, "bytes"), tmp_path / "run"
    begun(config, config, ByteTokenizer(), workdir)
    row = {"messages": [{**TURNS[0], "weight": 1}, {**TURNS[1], "thinking": "Hm."}]}
    pathlib.Path(config.data.source).write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=r"use a new --workdir$") as told, rows_of_run(workdir):
        open_stream(config, "train", ByteTokenizer())
    assert "'thinking'" in str(told.value) and f"the version of {workdir}/run.json" in str(told.value)
    assert "mend" not in str(told.value) and "bad_rows" not in str(told.value)


def test_bad_rows_of_a_split_that_a_run_has_never_read_are_left_out(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a line: nobody can have mended them, and the text of the split may not change."""
    config, workdir = config_of(tmp_path, "bytes"), tmp_path / "run"
    begun(config, config, ByteTokenizer(), workdir)
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in (TURNS, TURNS[:1])))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, test_source=str(test)))
    with pytest.raises(ConfigError), rows_of_run(workdir):
        open_stream(config, "test", ByteTokenizer())
    with caplog.at_level("INFO"):
        found = open_run_stream(workdir, config, "test", ByteTokenizer())
    assert isinstance(found, Conversations) and len(found.sequences) == 1
    assert f"1 rows left out: 1 without an answer ({test} line 2)" in caplog.text


def test_imports_and_exports_take_them_along(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "out").mkdir()
    config = config_of(tmp_path)
    data = dataclasses.replace(config.data, tokenizer=str(model / "tokenizer.json"))
    kept = keep_tokenizer(tmp_path / "run", config, *read_tokenizer(dataclasses.replace(config, data=data)))
    assert kept.data.tokenizer == str(tmp_path / "run" / "tokenizer.json")
    chat = read_chat_folder(tmp_path / "run")
    assert (chat.template, chat.special) == (TEMPLATE, {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"})
    tokenizer = bpe()
    write_tokenizer(tmp_path / "out", config_of(tmp_path), tokenizer, chat)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<|begin|>", "<|im_end|>")
    assert end_ids(tokenizer, chat, 512) == [tokenizer.eos_id, tokenizer.vocab_size - 1]
    assert end_ids(tokenizer, NO_CHAT, 512) == tokenizer.eos_id
    assert "split_special_tokens" not in settings


def test_a_name_that_the_tokenizer_does_not_have_is_told(
    model: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path, "bytes", chat_template=str(model))
    stream = open_stream(config, "train", ByteTokenizer())
    assert isinstance(stream, Conversations)
    assert text_of(stream, ByteTokenizer()) == "<user>four?<|endoftext|><assistant>two and two"
    assert "bos_token='<|begin|>' is no special token of data.tokenizer; chat templates lack it" in caplog.text
    empty = dataclasses.replace(config, tuning=dataclasses.replace(config.tuning, chat_template=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"holds neither chat_template\.jinja nor a tokenizer_config\.json with"):
        open_stream(empty, "train", ByteTokenizer())


SPLITS: dict[str, tuple[dict[str, Any] | None, bool]] = {  # the tokenizer_config.json of a source, and what is exported
    "no file": (None, True),
    "no key": ({}, False),
    "false": ({"split_special_tokens": False}, False),
    "true": ({"split_special_tokens": True}, True),
    "true, and a template": ({"split_special_tokens": True, "chat_template": TEMPLATE}, False),
}


@pytest.mark.parametrize("case", SPLITS)
def test_special_tokens_are_cut_only_where_the_source_does_and_no_template_writes_them(
    case: str, tmp_path: pathlib.Path
) -> None:
    """From import to export, and where the workdir is a source itself."""
    settings, splits = SPLITS[case]
    (tmp_path / "tokenizer.json").write_text(bpe().json_text)
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config, folder = config_of(tmp_path), tmp_path
    for name in ("run", "again"):
        data = dataclasses.replace(config.data, tokenizer=str(folder / "tokenizer.json"))
        folder = tmp_path / name
        folder.mkdir()
        keep_tokenizer(folder, config, *read_tokenizer(dataclasses.replace(config, data=data)))
        (folder / "out").mkdir()
        write_tokenizer(folder / "out", config, bpe(), read_chat_folder(folder))
        written = json.loads((folder / "out" / "tokenizer_config.json").read_text())
        assert written.get("split_special_tokens") == (True if splits else None)


def test_generation_ends_where_the_server_ends_an_answer(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Also where no eos_token names the token, but the template writes it."""
    tokenizer = bpe()
    (model / "tokenizer_config.json").write_text("{}")
    (model / "chat_template.jinja").write_text(TEMPLATE.replace("{{ eos_token }}", "<|im_end|>"))
    config = config_of(tmp_path, str(model / "tokenizer.json"))
    begun(config, config, tokenizer, tmp_path / "run")
    dialogue = load_dialogue(tokenizer, "", str(tmp_path / "run" / "tokenizer.json"), tmp_path / "run")
    assert dialogue.stop == ("<|im_end|>",)
    assert end_ids(tokenizer, read_chat_folder(tmp_path / "run"), 512) == [tokenizer.eos_id, tokenizer.vocab_size - 1]


@pytest.mark.parametrize("kept", [(7, [7]), ([7, 9], [7, 9]), (None, []), (-1, []), ("7", []), ([True, 600], [])])
def test_an_imported_eos_token_id_is_exported(kept: Any, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """By an import, and by a run that begins with the folder; 512 tokens is what the model has."""
    given, expected = kept
    (model / "config.json").write_text(json.dumps({"eos_token_id": given}))
    tokenizer, workdir = bpe(), tmp_path / "run"
    config = config_of(tmp_path, str(model / "tokenizer.json"))
    begun(config, config, tokenizer, workdir)
    imported = tmp_path / "imported"
    imported.mkdir()
    keep_tokenizer(imported, config, *read_tokenizer(config))
    for folder in (workdir, imported):
        ends = end_ids(tokenizer, read_chat_folder(folder), 512)
        assert ends == [tokenizer.eos_id, tokenizer.vocab_size - 1, *expected]
