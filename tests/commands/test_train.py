"""What `bigmac train` says at the end, and which steps it traces."""

import pathlib
import shlex
from typing import Any

import pytest

from bigmac_jax.config import ConfigError


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
