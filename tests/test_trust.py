"""What a folder, a workdir or a saved config from somebody else may decide: what the model is, and nothing besides."""

import contextlib
import ctypes
import dataclasses
import json
import logging
import os
import pathlib
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import forks
import pytest
from model.tools import on_mesh, random_model, tiny
from training.tools import ROOT, write_config

from bigmac_jax.config import Config, ConfigError, load_config, reading
from bigmac_jax.data.datasets import open_dataset
from bigmac_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, train_bpe
from bigmac_jax.interchange import export_model, import_run, importing, open_checkpoint
from bigmac_jax.training.run_data import say_data_place
from bigmac_jax.training.workdir import load_run_tokenizer, use_saved_template, use_saved_tokenizer
from bigmac_jax.training.workdir import write_config as write_config_of_run
from bigmac_jax.tuning.pretrained import open_pretrained

# As serve.py, but for the network: it ends where requests would be answered.
SERVE = """
import bigmac_jax.commands.serve as command
from bigmac_jax.commands import cli

async def served(*_):
    return 0

command.serve = served
cli.run(command.main, distributed=True)
"""
# Rewrites a workdir, whose run.json would tell.
SPOIL = """
import json, pathlib, sys
from bigmac_jax.training import manifest
workdir, spoilt = map(pathlib.Path, sys.argv[1:])
for file in (workdir / "config.json", *workdir.glob("checkpoints/*/config/metadata")):
    values = json.loads(file.read_text())
    for name, value in json.loads(spoilt.read_text()).items():
        values[name] = values.get(name, {}) | value if isinstance(value, dict) else value
    file.write_text(json.dumps(values))
(workdir / "run.json").unlink()
(workdir / "checkpoints" / "0" / "manifest.json").unlink()
manifest.write(workdir / "checkpoints" / "0")
"""


class Watch:
    """Tells which files of a folder are opened, by whatever process and in whatever language (inotify)."""

    _OPENED, _MADE, _MODIFIED = 0x20, 0x100, 0x2

    def __init__(self, folder: pathlib.Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self._file, self._folders = libc.inotify_init1(os.O_NONBLOCK), {}
        for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            mask = self._OPENED | self._MADE | self._MODIFIED
            self._folders[libc.inotify_add_watch(self._file, os.fsencode(path), mask)] = path

    def opened(self) -> set[str]:
        found = set()
        with contextlib.suppress(BlockingIOError):
            while events := os.read(self._file, 1 << 16):
                while events:
                    number, _, _, length = struct.unpack("iIII", events[:16])
                    found.add(str(self._folders[number] / events[16 : 16 + length].rstrip(b"\0").decode()))
                    events = events[16 + length :]
        return found


@pytest.fixture
def traps(tmp_path: pathlib.Path) -> pathlib.Path:
    """Files and folders that nobody should look into, each as good as it may be."""
    folder = tmp_path / "traps"
    for name in ("cache/programs", "teacher", "base"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl"):
        (folder / name).write_text('{"text": "the state of the union"}\n')
    for name in ("template.jinja", "tokenizer.json", "task.toml", "elsewhere"):
        (folder / name).write_text("{}")
    return folder


def naming(traps: pathlib.Path) -> dict[str, Any]:
    """A saved config whose every path is a trap."""
    return {
        "cache_dir": str(traps / "cache"),
        "data": {
            "source": str(traps / "train.jsonl"),
            "validation_source": str(traps / "validation.jsonl"),
            "test_source": str(traps / "test.jsonl"),
            "tokenizer": str(traps / "tokenizer.json"),
        },
        "train": {"init_from": str(traps / "base"), "wandb": "spy", "tasks": str(traps / "task.toml")},
        "tuning": {"teacher": str(traps / "teacher"), "chat_template": str(traps / "template.jinja")},
    }


@pytest.fixture
def hostile(tmp_path: pathlib.Path, traps: pathlib.Path) -> pathlib.Path:
    """An export in our own class, as somebody could have changed it."""
    folder, config = tmp_path / "hostile", tiny(num_layers=1)
    with on_mesh(config):
        export_model(config, random_model(config), folder, format="bigmac", tokenizer=ByteTokenizer())
    values = json.loads((folder / "config.json").read_text())
    for name, value in naming(traps).items():
        section = values["bigmac_jax"]
        section[name] = section.get(name, {}) | value if isinstance(value, dict) else value
    values["auto_map"] = dict.fromkeys(values["auto_map"], "modeling_trap.Trap")
    (folder / "config.json").write_text(json.dumps(values))
    for name in ("modeling_trap.py", "pytorch_model.bin", "generation_config.json", "vocab.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(traps / "elsewhere")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_no_trap_is_opened(tmp_path: pathlib.Path, traps: pathlib.Path, hostile: pathlib.Path) -> None:
    """By import, and by what reads the run: a workdir whose every path is a trap, too."""
    run = tmp_path / "run"
    (tmp_path / "serve.py").write_text(SERVE)
    (tmp_path / "spoil.py").write_text(SPOIL)
    (tmp_path / "spoilt.json").write_text(json.dumps(naming(traps)))
    (tmp_path / "some.txt").write_text("the state of the union")
    of_run = f"--workdir={run}", "--cpu_devices=1"
    commands = {
        "import": ("convert.py", "import", f"--checkpoint={hostile}", *of_run),
        "spoil": (str(tmp_path / "spoil.py"), str(run), str(tmp_path / "spoilt.json")),
        "generate": ("generate.py", *of_run, "--prompt=a", "--max_tokens=2", "--batch_size=1"),
        "eval": ("eval.py", *of_run, f"--text_file={tmp_path / 'some.txt'}"),
        "export": ("convert.py", "export", *of_run, f"--output={tmp_path / 'exported'}"),
        "serve": (str(tmp_path / "serve.py"), *of_run, "--port=0", "--max_length=8", "--batch_size=1", "--chunk=1"),
    }
    watch = Watch(traps)
    for name, argv in commands.items():
        log = tmp_path / f"{name}.log"
        own = {"BIGMAC_CACHE_DIR": str(tmp_path / "cache"), "JAX_COMPILATION_CACHE_DIR": ""}
        ended = forks.start(argv, log, environment=own)
        assert ended.wait() == 0, (name, log.read_text())
    assert watch.opened() == set()
    assert any((tmp_path / "cache" / "programs").iterdir())
    assert str(traps) not in "".join(p.read_text() for p in (tmp_path / "exported").glob("*.json"))
    (traps / "elsewhere").read_text()
    assert watch.opened() == {str(traps / "elsewhere")}  # it would have told


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An export in shards, with a tokenizer and a chat template."""
    folder, config = tmp_path_factory.mktemp("exported") / "one", tiny(num_layers=1)
    with on_mesh(config):
        model = random_model(config)
        export_model(config, model, folder, format="bigmac", tokenizer=ByteTokenizer(), max_shard_size="20KB")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


def linked(folder: pathlib.Path, elsewhere: pathlib.Path, name: str) -> None:
    """Makes a file of a folder a link to where it lies from now on."""
    elsewhere.mkdir(parents=True)
    (folder / name).rename(elsewhere / name)
    (folder / name).symlink_to(os.path.relpath(elsewhere / name, folder))


FILES = (
    "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_no_link_leads_out_of_a_folder(exported: pathlib.Path, tmp_path: pathlib.Path, name: str) -> None:
    """But for the folders of the hub's cache, whose files are links to its blobs."""
    folder, hub = tmp_path / "folder", tmp_path / "models--one" / "snapshots" / "abc"
    for copy, elsewhere in ((folder, tmp_path / "elsewhere"), (hub, tmp_path / "models--one" / "blobs")):
        shutil.copytree(exported, copy)
        linked(copy, elsewhere, name)
    with pytest.raises(ConfigError, match=f"{name} is a link to {tmp_path}/elsewhere/{name}, outside of its folder"):
        read(folder)
    read(hub)


def read(folder: pathlib.Path) -> None:
    """All that an import reads but the tensors' values."""
    config, _, _ = open_checkpoint(folder)
    importing.find_tokenizer(folder, config, [])


def test_an_index_names_files_of_its_folder(exported: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(exported, tmp_path / "folder")
    index = tmp_path / "folder" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    shutil.copy(exported / FILES[2], tmp_path)
    with pytest.raises(ConfigError, match=f"lacks ../{FILES[2]}"):
        open_checkpoint(tmp_path / "folder")


def test_a_folder_says_what_the_model_is(hostile: pathlib.Path) -> None:
    """And nothing that a run with it would read, run or send."""
    default = Config()
    data = dataclasses.replace(default.data, sequence_length=8, tokenizer=str(hostile / "tokenizer.json"))
    expected = dataclasses.replace(default, model=tiny(num_layers=1).resolved.model, data=data)
    assert open_pretrained(str(hostile)).config == expected


def test_a_saved_config_says_what_is_trained_and_on_what(
    tmp_path: pathlib.Path, traps: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What else it names is told, and taken from the command line alone."""
    file = write_config(tmp_path)
    values = json.loads(file.read_text())
    for name, value in naming(traps).items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(values))
    config = load_config(file, ("train.wandb=mine",))
    assert (config.cache_dir, config.train.wandb, config.train.tasks) == (Config().cache_dir, "mine", "")
    assert config.tuning.chat_template == "" and config.tuning.teacher == str(traps / "teacher")
    said = [record.getMessage().partition("only you may say: ")[2] for record in caplog.records]
    assert said == [
        f"give --config.tuning.chat_template={traps}/template.jinja",
        f"give --config.train.tasks={traps}/task.toml",
    ]
    assert reading.saved_places(config, ["data.source=/mine"]) == [
        f"data.validation_source={traps}/validation.jsonl",
        f"data.test_source={traps}/test.jsonl",
        f"data.tokenizer={traps}/tokenizer.json",
        f"train.init_from={traps}/base",
        f"tuning.teacher={traps}/teacher",
    ]


def test_where_caches_lie_is_said_by_the_environment(tmp_path: pathlib.Path) -> None:
    program = "from bigmac_jax.config import Config; print(Config().cache_dir)"
    environment = os.environ | {"BIGMAC_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path}\n"
    assert "cache_dir" not in json.loads(Config(cache_dir="/mine").to_json())


def run_of_texts(folder: pathlib.Path, **fields: str) -> tuple[pathlib.Path, Config]:
    """A workdir as a first start leaves it, but that its config has these fields of data."""
    config = load_config(write_config(folder), (f"cache_dir={folder / 'cache'}",))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))
    write_config_of_run(config, folder / "run")
    return folder / "run", config


def test_data_is_read_with_a_line(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    workdir, config = run_of_texts(tmp_path)
    with caplog.at_level(logging.INFO, "bigmac_jax"):
        for split in ("train", "validation"):
            say_data_place(workdir, config, split)
    assert [record.getMessage() for record in caplog.records] == [
        f"the train split is read from data.source={tmp_path}/train.jsonl, which the config of {workdir} names",
        f"the validation split is read from data.validation_source={tmp_path}/validation.jsonl, which the config of "
        f"{workdir} names",
    ]


def test_tokenizer_and_template_are_those_in_the_workdir(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = tmp_path / "elsewhere" / "tokenizer.json"
    elsewhere.parent.mkdir()
    elsewhere.write_text(train_bpe(["some words, and some more"] * 3, 260))
    workdir, config = run_of_texts(tmp_path, tokenizer=str(elsewhere))
    with pytest.raises(ConfigError, match=rf"data\.tokenizer={elsewhere} of its config is not looked for"):
        load_run_tokenizer(workdir, config)
    assert use_saved_tokenizer(workdir, config).data.tokenizer == str(workdir / "tokenizer.json")  # for who needs none
    (workdir / "tokenizer.json").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="is a link to"):
        load_run_tokenizer(workdir, config)
    (workdir / "tokenizer.json").unlink()
    shutil.copy(elsewhere, workdir)
    assert isinstance(load_run_tokenizer(workdir, config), JsonTokenizer)
    # Nor what stands beside the place that the config names: the copy has no template beside it.
    elsewhere.with_name("chat_template.jinja").write_text("{{ 'of somebody' }}")
    assert use_saved_template(workdir, config).data.tokenizer == str(workdir / "tokenizer.json")

    template = elsewhere.with_name("template.jinja")
    template.write_text("{{ 1 }}")
    named = dataclasses.replace(config, tuning=dataclasses.replace(config.tuning, chat_template=str(template)))
    assert use_saved_template(workdir, named).tuning.chat_template == ""
    assert f"tuning.chat_template={template} of the config of {workdir} is not read" in caplog.text
    (workdir / "chat_template.jinja").symlink_to(template)
    with pytest.raises(ConfigError, match="is a link to"):
        use_saved_template(workdir, config)


def test_code_of_others_is_no_data_set(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="runs code of others for the namespace huggingface"):
        open_dataset("huggingface:somebody", str(tmp_path), "data.source=tfds:huggingface:somebody")


def writing(name: str, content: str | bytes) -> Callable[[pathlib.Path], object]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def a_sentencepiece_model(folder: pathlib.Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
WITHOUT_USE: dict[str, tuple[Callable[[pathlib.Path], object], str]] = {
    "cut short": (writing(TOKENIZER, "{"), "tokenizer.json' is not a tokenizer.json"),
    "of more words": (
        writing(TOKENIZER, train_bpe([" ".join(map(str, range(99)))], 270)),
        "model.vocab_size=264 must be at least the 270 of data.tokenizer=",
    ),
    "no end of text": (
        writing(TOKENIZER, train_bpe(["a"], 258).replace("<|endoftext|>", "<|nothing|>")),
        "no end-of-text token",
    ),
    "no SentencePiece": (a_sentencepiece_model, "tokenizer.model is not a SentencePiece model"),
    "settings cut short": (writing(SETTINGS, "{"), "tokenizer_config.json cannot be read .*; mend it, or remove it"),
    "settings that are a list": (writing(SETTINGS, "[]"), "tokenizer_config.json holds no JSON object"),
    "settings too deep": (writing(SETTINGS, "[" * 99_999), "tokenizer_config.json cannot be read .*; mend it, or"),
    "no template": (writing(TEMPLATE, "{% if %}"), "chat_template.jinja: the chat template is not Jinja"),
    "a template that is no text": (writing(TEMPLATE, b"\xff"), "chat_template.jinja cannot be read"),
}


@pytest.mark.parametrize("name", WITHOUT_USE)
def test_an_import_reads_the_tokenizer_that_it_takes(exported: pathlib.Path, tmp_path: pathlib.Path, name: str) -> None:
    shutil.copytree(exported, tmp_path / "folder")
    WITHOUT_USE[name][0](tmp_path / "folder")
    line = f"{tmp_path}/folder can't be imported with its tokenizer: .*{WITHOUT_USE[name][1]}"
    with on_mesh(tiny(num_layers=1)), pytest.raises(ConfigError, match=line) as caught:
        import_run(tmp_path / "folder", tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_an_import_keeps_the_tokenizer_that_it_is_given(exported: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """What lies beside the model may be of no use then."""
    shutil.copytree(exported, tmp_path / "folder")
    (tmp_path / "folder" / TOKENIZER).write_text("{")
    mine = tmp_path / "mine.json"
    mine.write_text(train_bpe(["some words, and some more"] * 3, 260))
    with on_mesh(tiny(num_layers=1)):
        config = import_run(tmp_path / "folder", tmp_path / "run", [f"data.tokenizer={mine}"])
    mine.unlink()
    assert config.data.tokenizer == str(tmp_path / "run" / TOKENIZER)
    assert isinstance(load_run_tokenizer(tmp_path / "run", config), JsonTokenizer)
