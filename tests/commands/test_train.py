"""What `bigmac train` says at the end, and which steps it traces."""

import pathlib
import shlex
from typing import Any
from unittest import mock

import pytest
from threads_as_processes import run_as_processes

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.run.loop import Result
from bigmac_jax.runtime import hosts


@pytest.mark.parametrize("devices", [0, 2])
def test_what_comes_next_can_be_pasted(
    command: Any, devices: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, workdir = command("train"), str(tmp_path / "a run")
    monkeypatch.setattr(program.cli, "CPU_DEVICES", type("Flag", (), {"value": devices}))
    monkeypatch.setattr(program, "_WORKDIR", type("Flag", (), {"value": workdir}))
    given = [f"--workdir={workdir}", *([f"--cpu_devices={devices}"] if devices else [])]
    for line in (program._done(6), program._finished(6, 6)):
        evaluate, generate = line.rpartition(": ")[2].split(", ")
        assert shlex.split(evaluate) == ["bigmac", "eval", *given]
        assert shlex.split(generate) == ["bigmac", "generate", *given, "--prompt=TEXT"]


@pytest.mark.parametrize("text", ["5", "3:2", "0:1", "²:3", "1:"])
def test_what_is_no_range_of_steps(command: Any, text: str) -> None:
    assert command("train")._steps("10:12") == (10, 12)
    with pytest.raises(ConfigError, match=f"--profile={text} must be START:STOP"):
        command("train")._steps(text)


def test_a_run_that_was_stopped_has_an_exit_code_of_its_own(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program, done = command("train"), Config().train.steps
    for name, value in {"_WORKDIR": "runs/none", "_PROFILE": "", "_STOPPED": 75}.items():
        monkeypatch.setattr(program, name, mock.Mock(value=value))
    monkeypatch.setattr(program, "cli", mock.MagicMock())
    monkeypatch.setattr(program, "_config", lambda _: (Config(), Config(), ""))
    monkeypatch.setattr(program, "notes", mock.Mock())
    for result, code in (
        (Result(3, False, None), 75),
        (Result(done, True, None), 0),
        (Result(done, True, None, done), 0),
    ):
        monkeypatch.setattr(program, "train", mock.Mock(return_value=result))
        monkeypatch.setattr(program, "_next", str)
        assert program.main() == code


@pytest.mark.parametrize(
    ("differs", "line"),
    [
        (False, ""),
        (True, "process 1 was started with --config=FILE, train.init_from=, process 0 with --config=none, train.init"),
    ],
)
def test_process_0_says_which_run_the_config_comes_from(
    command: Any, differs: bool, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Others may not see the folder, and enter alone what opens the model that a new run begins with."""
    program, saved = command("train"), Config.from_json(Config().to_json())
    monkeypatch.setattr(program.cli, "OVERRIDES", ["train.init_from=runs/other"])
    monkeypatch.setattr(program, "_CONFIG", mock.Mock(value="tiny"))
    present = mock.PropertyMock(side_effect=lambda: differs and not hosts.is_first())
    monkeypatch.setattr(program, "flags", mock.Mock(FLAGS={"config": type("Flag", (), {"present": present})()}))
    monkeypatch.setattr(program, "has_run", lambda _: hosts.is_first())
    monkeypatch.setattr(program, "read_config", lambda _: saved)
    monkeypatch.setattr(program, "read_run_json", lambda _: {"mesh": {"data": 3}})
    monkeypatch.setattr(program, "open_pretrained", lambda _: pytest.fail("opened"))
    found = run_as_processes(monkeypatch, 2, lambda _: program._config(tmp_path))
    if differs:
        assert all(isinstance(error, ConfigError) and line in str(error) for error in found), found
        return
    assert found[0] == found[1] and found[0][2] == str(tmp_path)
    told = run_as_processes(monkeypatch, 2, lambda _: program._read_saved(tmp_path))
    assert told == [(saved, {"data": 3})] * 2


def test_processes_compare_what_their_programs_are_compiled_by(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cli, told = command("train").cli, list[Any]()
    monkeypatch.setattr(cli, "_flags", lambda _: [])
    monkeypatch.setattr(cli, "flags", mock.MagicMock())
    monkeypatch.setattr(cli.hosts, "check_same", told.append)
    monkeypatch.setenv("BIGMAC_KEEP_ENV", "")
    cli.agree(None, "")
    monkeypatch.delenv("BIGMAC_KEEP_ENV")
    cli.agree(None, "")
    assert [fields["$BIGMAC_KEEP_ENV"] for fields in told] == ["set", "not set"]
