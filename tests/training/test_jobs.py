"""Jobs of several processes as a user starts them: another mesh, a launcher, kills at random moments."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from forks import ENVIRONMENT

from bigmac_jax.config import load_config
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.run.loop import train
from bigmac_jax.training.workdir import read_config

from .runs import LIMIT, Job, last_step
from .tools import ROOT, read_records, write_config


@pytest.mark.full
def test_two_processes_go_on_from_one_that_was_fully_sharded(tmp_path: pathlib.Path) -> None:
    """Eight ranks in one process, then two times two: the next losses, and so the documents, are those of the first."""
    file = write_config(tmp_path)
    steps = ("train.eval_every=0", "train.checkpoint_every=3")
    alone, resumed = tmp_path / "alone", tmp_path / "resumed"
    config = load_config(file, ("mesh.data=1", "mesh.expert=8", "mesh.fsdp=True", *steps))
    with jax.set_mesh(make_mesh(config)):
        train(config, alone)
    shutil.copytree(alone, resumed, ignore=shutil.ignore_patterns("6", "metrics.jsonl", "tb"))
    flags = [f"--config.{field}" for field in ("mesh.data=1", "mesh.node=2", "mesh.expert=2", *steps)]
    with Job(2, file, resumed, "--cpu_devices=2", *flags) as run:
        assert run.wait() == [0, 0], run.outputs
    assert "resumed at step 3" in run.outputs[0] and "2 processes" in run.outputs[0]
    expected, found = ([r["loss"] for r in read_records(run) if "loss" in r] for run in (alone, resumed))
    expected = expected[3:]
    assert len(found) == len(expected) == 3
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.full
def test_a_slice_that_dies_is_named_and_the_others_go_on(tmp_path: pathlib.Path) -> None:
    """Two replicas of two processes each; then one of them, with the batch in twice the parts: the losses of a run that
    nobody disturbed, to rounding, and a line that says so."""
    file, steps = write_config(tmp_path), 40
    fields = ("mesh.replica=2", "mesh.data=1", "mesh.expert=2", "mesh.fsdp=True", f"train.steps={steps}",
              "train.eval_every=0", "train.checkpoint_every=5")  # fmt: skip
    flags = ["--cpu_devices=1", "--peer_timeout=10", *(f"--config.{field}" for field in fields)]
    with Job(4, file, tmp_path / "calm", *flags) as run:
        assert run.wait() == [0] * 4, run.outputs
    with Job(4, file, tmp_path / "run", *flags) as run:
        run.until(12)
        run.processes[3].kill()
        assert run.wait()[:3] == [3] * 3, run.outputs
        for output in run.outputs[:3]:
            assert re.search(r"error: process 3 \(\d+ on \S+, replica 1, .*\) has died", output), output
    with Job(2, file, tmp_path / "run", *flags) as run:
        assert run.wait() == [0, 0], run.outputs
    said = "the run goes on with them, its batch of 8 in 2 parts instead of 1"
    assert f"1 of mesh.replica=2 replicas are here: {said}" in run.outputs[0]
    assert read_config(tmp_path / "run").mesh.replica == 2  # as it was asked: the same command goes on with both again
    losses = [{r["step"]: r["loss"] for r in read_records(tmp_path / name) if "loss" in r} for name in ("calm", "run")]
    assert len(losses[0]) == len(losses[1]) == steps
    np.testing.assert_allclose(*([of[step] for step in sorted(of)] for of in losses), rtol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize(("top_k", "code"), [("2", 0), ("99", 2)])
def test_launch_local(top_k: str, code: int, tmp_path: pathlib.Path) -> None:
    config = "configs/tiny.py" if code else write_config(tmp_path)  # a file of Python is no program to start
    arguments = [f"--config={config}", f"--workdir={tmp_path / 'run'}", "--cpu_devices=1",
                 "--config.train.steps=2", "--config.train.eval_every=0", f"--config.model.top_k={top_k}"]  # fmt: skip
    run = subprocess.run(
        ["scripts/launch_local.sh", "2", *arguments],
        cwd=ROOT, env=ENVIRONMENT | {"PYTHON": sys.executable}, capture_output=True, timeout=LIMIT,
    )  # fmt: skip
    assert run.returncode == code, run
    lines = [line for line in run.stdout.decode().rstrip("\n").split("\n") if "Gloo" not in line]
    assert all(line.startswith(("[0] ", "[1] ")) for line in lines), lines
    if code:
        assert lines == ["[0] error: model.top_k=99 must be at most model.num_experts=32; use 32"]
    else:
        assert last_step(tmp_path / "run") == 2


@pytest.mark.full
@pytest.mark.parametrize(("second", "code"), [(0.05, 0), (2.5, 137)])
def test_a_group_that_is_signalled_saves(second: float, code: int, tmp_path: pathlib.Path) -> None:
    """As by `timeout`, which signals the launcher and then all of its group; a later signal is of who is impatient."""
    (tmp_path / "job.py").write_text(f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from bigmac_jax.runtime import signals
signals.install()
with signals.stop_signals() as stopped:
    print("ready", flush=True)
    while not stopped:
        time.sleep(0.01)
    time.sleep(1.2 if {code} == 0 else 60)
    print("saved", stopped, flush=True)
""")
    run = subprocess.Popen(
        ["scripts/launch_local.sh", "2", os.path.relpath(tmp_path / "job.py", ROOT)], cwd=ROOT, text=True,
        env=ENVIRONMENT | {"PYTHON": sys.executable}, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert run.stdout and {run.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
    run.send_signal(signal.SIGTERM)
    os.killpg(run.pid, signal.SIGTERM)
    time.sleep(second)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=LIMIT)
    assert run.returncode == code, said
    assert set(said.splitlines()) == (set() if code else {"[0] saved [15]", "[1] saved [15]"})


@pytest.mark.full
@pytest.mark.parametrize("flags", [(), ("--replicas",)], ids=["one", "replicas"])
def test_soak(flags: Sequence[str]) -> None:
    rounds = 3
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", f"--rounds={rounds}", *flags],
        cwd=ROOT, env=ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run
    summary = json.loads(run.stdout.splitlines()[-1])
    assert (summary["killed"], summary["hung"], summary["bit_equal"]) == (rounds, 0, True)
