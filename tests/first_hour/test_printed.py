"""Every line that the quick start prints stands on docs/printed.md."""

import logging
import os
import pathlib
import subprocess
import sys

import pytest

from bigmac_jax.commands.cli import LineFormatter
from first_hour.pages import ROOT
from first_hour.printed import unexplained

SMALL = (
    "--config.model.vocab_size=512", "--config.model.hidden_size=32", "--config.model.num_layers=1",
    "--config.model.num_experts=8", "--config.model.shared_expert_hidden_size=64", "--config.data.sequence_length=64",
    "--config.train.steps=20", "--config.train.eval_every=20", "--config.train.log_every=10",
)  # fmt: skip


def test_what_a_line_is_compared_with() -> None:
    lines = "step 20 of 40: loss 7.1, 9 tokens/s\nW1129 05:37:40.23 cli.py:106] set\nsomething else\n"
    assert unexplained(lines) == ["W1129 05:37:40.23 cli.py:106] set", "something else"]


def test_log_lines_are_plain() -> None:
    """A library's have its name, so that nobody looks for them here."""

    def line(name: str, level: int) -> str:
        return LineFormatter().format(logging.LogRecord(name, level, "a.py", 1, "%s is %d", ("x", 2), None))

    assert line("bigmac_jax.data.datasets", logging.INFO) == "x is 2"
    assert line("bigmac_jax.commands.cli", logging.WARNING) == "warning: x is 2"
    assert line("orbax", logging.ERROR) == "error: orbax: x is 2"


@pytest.mark.full
def test_the_quick_start(tmp_path: pathlib.Path) -> None:
    def printed(command: str, *arguments: str) -> str:
        run = subprocess.run(
            [
                sys.executable,
                "-m",
                "bigmac_jax",
                command,
                f"--workdir={tmp_path / 'run'}",
                "--cpu_devices=1",
                *arguments,
            ],
            env=os.environ | {"BIGMAC_CACHE_DIR": str(tmp_path / "cache"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr
        return run.stderr if command == "generate" else run.stdout + run.stderr

    said = [printed("train", *SMALL), printed("train", *SMALL)]
    said += [printed("train", *SMALL, "--config.train.steps=30", "--config.optimizer.learning_rate=1e-3")]
    said += [printed("eval"), printed("generate", "--prompt=The state", "--max_tokens=4")]
    assert unexplained("".join(said)) == []
    for part in ("training a BPE of 512", "preparing in", "start: ", "trained to step 20", "is finished", "warning: "):
        assert part in "".join(said)
