"""What `bigmac generate` and `bigmac serve` refuse before they read a model."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import pytest
from absl import flags
from training.tools import small

from bigmac_jax.config import ConfigError
from bigmac_jax.model.mesh import make_mesh


@pytest.fixture
def run(
    command: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, list[str], list[str]], None]:
    """Runs a command with flags and overrides on a run without a checkpoint, whose windows have 32 tokens."""
    config = small(tmp_path, "model.positions=learned", "data.sequence_length=32")
    (tmp_path / "config.json").write_text(config.to_json())

    def run(name: str, given: list[str], overrides: list[str]) -> None:
        program = command(name)
        monkeypatch.setattr(program.cli, "OVERRIDES", overrides)
        monkeypatch.setattr(program.cli, "agree", lambda *_: None)
        monkeypatch.setattr(program.cli, "enter_mesh", lambda *_, **__: jax.sharding.get_mesh())
        monkeypatch.setattr(program, "listen", lambda *_: None, raising=False)
        flags.FLAGS(["", f"--workdir={tmp_path}", *given])
        with jax.set_mesh(make_mesh(config)):
            program.main()

    return run


@pytest.mark.parametrize("name", ["generate", "serve"])
@pytest.mark.parametrize("field", ["exchange=gather", "overlap_chunks=4", "remat=layer"])
def test_what_only_training_reads(run: Any, name: str, field: str) -> None:
    with pytest.raises(ConfigError, match=f"^--config.execution.{field} is of training; completions take --exchange, "):
        run(name, [], [f"execution.{field}"])


COMMANDS = {"generate": ["--prompt=a", "--max_tokens=2"], "serve": []}
GATHER = ["--exchange=gather"], ["execution.buffer_factor=9"]


@pytest.mark.parametrize(
    ("name", "given", "overrides", "line"),
    [
        *(
            (name, ["--max_length=33"], [], "max_length=33 must be at most the 32 learned positions")
            for name in COMMANDS
        ),
        *((name, *GATHER, "execution.buffer_factor=9 needs an exchange that sends in rounds") for name in COMMANDS),
        ("generate", ["--max_tokens=32"], [], "prompt 1 has 1 tokens, which with max_tokens=32 are 33"),
        ("serve", ["--chat_template=none.jinja"], [], "--chat_template=none.jinja"),
        ("serve", ["--cache_tokens=16"], [], "the cache's 16 positions are 16 on"),
        *((name, [], [], "holds no checkpoint") for name in COMMANDS),
    ],
)
def test_what_needs_no_model(run: Any, name: str, given: list[str], overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        run(name, [*COMMANDS[name], *given], overrides)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_exchange_is_one_of_those_there_are(run: Any, name: str) -> None:
    with pytest.raises(flags.IllegalFlagValueError, match=r"--exchange=al_to_all: .*auto.all_to_all.dedup"):
        run(name, ["--exchange=al_to_all"], [])
