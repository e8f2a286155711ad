"""Real processes that watch each other: what may take long, what ends them, and what they must share."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from forks import ENVIRONMENT

from .runs import LIMIT, Job
from .tools import ROOT, write_config

SHORT = ("--cpu_devices=1", "--config.mesh.expert=2", "--config.train.steps=6", "--config.train.eval_every=0",
         "--config.train.checkpoint_every=2")  # fmt: skip
pytestmark = pytest.mark.full


def slowed(tmp_path: pathlib.Path, phases: str, *more: str) -> Job:
    script = ("tests/training/slow_phases.py", phases)
    return Job(2, write_config(tmp_path), tmp_path / "run", "--peer_timeout=2", *SHORT, *more, script=script)


def test_long_phases_end_no_job(tmp_path: pathlib.Path) -> None:
    with slowed(tmp_path, "tokenise=60,compile=60") as job:
        assert job.wait(300) == [0, 0], job.outputs
    with slowed(tmp_path, "restore=30", "--config.train.steps=8") as job:
        assert job.wait(200) == [0, 0], job.outputs
        assert "resumed at step 6" in job.outputs[0]


@pytest.mark.parametrize("phase", ["tokenise", "compile", "restore"])
def test_a_process_that_is_stopped_in_a_long_phase_is_named(tmp_path: pathlib.Path, phase: str) -> None:
    if phase == "restore":
        with slowed(tmp_path, "none=0") as job:
            assert job.wait() == [0, 0], job.outputs
    with slowed(tmp_path, f"{phase}=60", "--config.train.steps=8") as job:
        end = time.monotonic() + LIMIT
        while not (found := [i for i in (1, 0) if f"in {phase}" in job.outputs[i]]):
            assert time.monotonic() < end, job.outputs
            time.sleep(0.05)
        victim = found[0]  # one process tokenises, and the other waits for it
        time.sleep(2)
        job.processes[victim].send_signal(signal.SIGSTOP)
        start = time.monotonic()
        assert job.processes[1 - victim].wait(60) == 3, "\n".join(job.outputs)
        assert time.monotonic() - start < 15, "five seconds, two beats, and the end of the other"
        line = rf"error: process {victim} \(\d+ on \S+, .*\) has given no sign of life for \d s\n"
        assert re.search(line, job.outputs[1 - victim]), job.outputs


@pytest.mark.parametrize("doing", ["step", "save", "evaluate"])
@pytest.mark.parametrize("victim", [0, 1])
def test_of_a_killed_process_the_others_say_one_line(tmp_path: pathlib.Path, victim: int, doing: str) -> None:
    """Whatever breaks in them."""
    flags = {"save": "checkpoint_every=1", "evaluate": "eval_every=1"}
    more = [f"--config.train.{flags[doing]}"] if doing in flags else []
    with Job(2, write_config(tmp_path), tmp_path / "run", "--peer_timeout=10", *SHORT, "--config.train.steps=100000",
             "--config.train.checkpoint_every=0", *more) as job:  # fmt: skip
        job.until(5)
        before = len(job.outputs[1 - victim])
        job.processes[victim].kill()
        assert job.wait()[1 - victim] == 3
        said = job.outputs[1 - victim][before:].splitlines()
    told = [line for line in said if not re.match(r"step \d+", line)]  # what process 0 logs of its steps
    assert len(told) == 1 and re.match(rf"error: process {victim} \(\d+ on \S+, .*\) has died$", told[0]), said


def test_a_workdir_that_is_not_shared_is_refused(tmp_path: pathlib.Path) -> None:
    script = ("tests/training/elsewhere.py", str(tmp_path))
    with Job(2, write_config(tmp_path), tmp_path / "run", *SHORT, script=script) as job:
        assert job.wait() == [2, 2], job.outputs
    assert job.outputs[0].splitlines()[-1] == (
        "error: process 1 does not see what process 0 writes into --workdir=run; give one that all of them share"
    )


def test_256_processes_watch_each_other_cheaply() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.watchers", "--counts=256", "--seconds=15", "--peer_timeout=20"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    record = json.loads(run.stdout)
    assert record["requests_a_second"] <= 2 and record["process_0_requests_a_second"] <= 2.1
    assert record["process_0_share_of_a_core"] < 0.05
    assert 0 < record["seconds_to_line"] <= 20 and "process 255 (" in record["line"]
