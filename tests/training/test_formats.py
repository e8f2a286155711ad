"""Eight-bit rows on the wire train as float32 rows do."""

import os
import pathlib
import subprocess
import sys

import pytest

from .tools import ROOT, read_records

pytestmark = pytest.mark.full  # about two minutes a run on two cores


def final_loss(workdir: pathlib.Path, *arguments: str) -> float:
    """Mean loss of the last 40 of 300 steps of configs/tiny.py on four simulated devices."""
    command = [sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={workdir}", "--cpu_devices=4"]
    fields = {
        "mesh.expert": 4,
        "train.steps": 300,
        "train.eval_every": 0,
        "train.checkpoint_every": 0,
        "train.log_every": 1,
    }
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    run = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ)
    assert run.returncode == 0, run.stderr[-3000:]
    losses = [record["loss"] for record in read_records(workdir)][-40:]
    assert len(losses) == 40
    return sum(losses) / 40


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> float:
    return final_loss(tmp_path_factory.mktemp("float32"))


@pytest.mark.parametrize("format", ["int8", "float8_e4m3"])
def test_the_loss_is_within_half_a_percent(format: str, float32: float, tmp_path: pathlib.Path) -> None:
    small = final_loss(tmp_path, f"--config.execution.wire_dtype={format}")
    assert small != float32
    assert abs(small - float32) <= 0.005 * float32, (small, float32)
