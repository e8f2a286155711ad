"""What a start reads of the model that its run begins with, and what processes learn of each other."""

import dataclasses
import errno
import json
import pathlib
from typing import Any
from unittest import mock

import jax
import pytest
from threads_as_processes import run_as_processes

from bigmac_jax.config import Config, ConfigError, TrainConfig
from bigmac_jax.data.chat_files import NO_CHAT
from bigmac_jax.data.conversations import Conversations
from bigmac_jax.data.token_cache import TokenStream
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.run import start
from bigmac_jax.run.start import _looks_back
from bigmac_jax.runtime import hosts, storage


@pytest.mark.parametrize(
    ("now", "tuning", "saves", "expected"),
    [
        ("/base", {}, [], True),
        ("/base", {}, [["model", "experts"]], False),
        ("/base", {}, [["experts"]], True),
        ("/base", {}, [["model"], ["experts"]], False),
        ("/base", {}, [["experts"], ["model"]], False),
        ("/elsewhere", {}, [["model"]], True),
        ("/base", {"lora_rank": 2}, [["model"]], True),
        ("/base", {"objective": "dpo"}, [["model"]], True),
        ("/base", {"objective": "sft"}, [["model"]], False),
    ],
)
def test_who_opens_the_model_that_a_run_begins_with(
    now: str, tuning: dict[str, Any], saves: list[list[str]], expected: bool, tmp_path: pathlib.Path
) -> None:
    """Not who goes on from a checkpoint of all parameters, unless a step reads it, or it is said to lie elsewhere."""
    for step, items in enumerate(saves, 1):
        folder = tmp_path / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({f"{item}/a": {"size": 1} for item in items}))
    saved = Config()
    saved = dataclasses.replace(saved, train=dataclasses.replace(saved.train, init_from="/base"))
    config = dataclasses.replace(saved, train=dataclasses.replace(saved.train, init_from=now))
    object.__setattr__(config, "tuning", dataclasses.replace(config.tuning))
    for name, value in tuning.items():
        object.__setattr__(config.tuning, name, value)
    assert _looks_back(config, saved, tmp_path) == expected


def test_what_process_0_cannot_write_ends_all(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("check_shared", "make_trainer", "_score_reference", "_describe"):
        monkeypatch.setattr(start, name, mock.Mock())
    monkeypatch.setattr(start, "_open_models", lambda *_: (False, start.Models(None, None)))
    inputs = mock.Mock(fingerprints={}, tokenizer=ByteTokenizer(), chat=NO_CHAT)
    monkeypatch.setattr(start, "_open_inputs", lambda *_: inputs)
    monkeypatch.setattr(start, "Checkpoints", lambda *_: mock.Mock(latest=lambda: Config().train.steps))
    monkeypatch.setattr(start, "restore_or_begin", lambda *_: (Config().train.steps, mock.Mock(), {}))
    monkeypatch.setattr(storage.os, "fsync", mock.Mock(side_effect=OSError(errno.EIO, "a disk that fails")))
    told = run_as_processes(monkeypatch, 2, lambda _: start.start(Config(), tmp_path))
    assert [type(error) for error in told] == [ConfigError, ConfigError], told
    assert all(f"{tmp_path / 'config.json'} cannot be written" in str(error) for error in told)


@pytest.mark.parametrize("told", ["dpo", "dpo of nothing", "dpo with adapters", "sft", "texts"])
def test_pairs_know_what_the_model_before_them_says(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model that the run begins with; where there is none, or a step has it, nothing is scored."""
    pairs = mock.Mock(spec=TokenStream if told == "texts" else Conversations)
    pairs.pack = mock.Mock()
    tuning = mock.Mock(objective="sft" if told == "sft" else "dpo", lora_rank=2 if "adapters" in told else 0)
    config = mock.Mock(tuning=tuning, data=mock.Mock(sequence_length=24))
    origin = None if told == "dpo of nothing" else mock.Mock()
    load, score, merge = mock.Mock(return_value=("params", "rest")), mock.Mock(), mock.Mock()
    monkeypatch.setattr(start.pretrained, "load_parameters", load)
    monkeypatch.setattr(start, "reference_nll", score)
    monkeypatch.setattr(start, "evaluation_rows", lambda config: 8)
    monkeypatch.setattr(start.nnx, "merge", merge)
    start._score_reference(config, mock.Mock(graphdef="graph"), mock.Mock(train=pairs), origin)
    assert load.called == score.called == (told == "dpo")
    if told == "dpo":
        load.assert_called_once_with(origin, config)
        merge.assert_called_once_with("graph", "params", "rest")
        pairs.pack.assert_called_once_with(24)
        score.assert_called_once_with(merge.return_value, pairs.pack.return_value, 8, False)
        assert pairs.pack.return_value.reference is score.return_value


def test_all_processes_and_splits_have_one_date(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or rows that a chat template dates would be others on a machine elsewhere, and after midnight."""
    dates: list[str] = []

    def open_stream(_: Config, split: str, *__: Any, date: str) -> None:
        dates.append(date)
        if split == "validation":
            raise ConfigError("enough")

    monkeypatch.setattr(start, "open_stream", open_stream)
    monkeypatch.setattr(start, "load_tokenizer", lambda _: ByteTokenizer())
    config, none = Config(train=TrainConfig(eval_every=1)), start.Models(None, None)
    told = run_as_processes(monkeypatch, 2, lambda _: start._open_inputs(config, tmp_path, False, none))
    assert [str(error) for error in told] == ["enough"] * 2
    assert len(dates) == 4 and len(set(dates)) == 1 and dates[0]


def test_process_0_says_whether_the_run_has_begun(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may see the folder later."""
    monkeypatch.setattr(start, "has_run", lambda _: hosts.is_first())
    monkeypatch.setattr(start, "read_config", lambda _: Config())
    told = run_as_processes(monkeypatch, 2, lambda _: start._open_models(Config(), tmp_path))
    assert [resumed for resumed, _ in told] == [True, True]


@pytest.mark.parametrize(
    ("platform", "devices", "process", "expected"),
    [
        ("cpu", 2, 0, ["a line on the step: its text"]),
        ("cpu", 1, 0, []),  # has nobody to mix anything up with
        ("cpu", 2, 1, []),  # the first has said it
        ("tpu", 2, 0, []),
    ],
)
def test_a_step_whose_collectives_may_be_mixed_up_is_named(
    platform: str,
    devices: int,
    process: int,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiled = mock.Mock(**{"as_text.return_value": "its text"})
    program = mock.Mock(**{"lower.return_value.compile.return_value": compiled})
    monkeypatch.setattr(start, "step_program", lambda *_: program)
    monkeypatch.setattr(start, "platform", lambda: platform)
    monkeypatch.setattr(start.collective_order, "note", lambda name, text: f"a line on the {name}: {text}")
    monkeypatch.setattr(hosts, "is_first", lambda: process == 0)
    with jax.set_mesh(jax.make_mesh((devices,), ("data",))):
        assert start._compile(mock.Mock(), Config()).result()[0] is compiled
    assert [record.getMessage() for record in caplog.records] == expected
