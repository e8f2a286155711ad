"""Whole runs on a store: killed and resumed, beside another job, over a network that fails."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import numpy as np
import pytest
from forks import ENVIRONMENT
from model.tools import on_mesh, random_model
from training.runs import LIMIT
from training.tools import ROOT, leaves_of, of_training, read_records, small, write_config

from benchmarks.stores import BUCKET, Proxy, Server, gcs
from bigmac_jax.config import Config, ConfigError, load_config
from bigmac_jax.data.pipeline import open_stream
from bigmac_jax.data.tokenizer import load_tokenizer
from bigmac_jax.interchange import export_model
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.run.loop import train
from bigmac_jax.runtime import storage
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.tuning import restore

from .conftest import entered

# A process that is killed holds the lease for 30 s; here for 5.
SHORT = """
import runpy, sys
from bigmac_jax.runtime import leases
leases.SECONDS, leases.AWAY = 5.0, 20.0
leases.Lease.__init__.__defaults__ = (5.0, *leases.Lease.__init__.__defaults__[1:])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def losses(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [kept for record in records if len(kept := of_training(record)) > 1]


def records_of(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_bytes().splitlines()]


# --- a smoke of each store ---


def test_a_run_on_gs(gs_server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workdir, cache and text are all there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "local"))
    small(tmp_path)
    text = storage.locate(f"gs://{BUCKET}/smoke/train.jsonl", "data.source")
    text.write_bytes((tmp_path / "train.jsonl").read_bytes())
    fields = (f"data.source={text}", f"cache_dir=gs://{BUCKET}/smoke/cache", "train.eval_every=0", "train.steps=4")
    config = small(tmp_path, *fields)
    workdir = storage.locate(f"gs://{BUCKET}/smoke/run", "workdir")
    with jax.set_mesh(make_mesh(config)):
        train(config, workdir)
        _, model = restore(str(workdir))
    assert jax.tree.leaves(model)
    assert [record["step"] for record in records_of(workdir) if "loss" in record] == [1, 2, 3, 4]
    assert {path.name for path in workdir.iterdir()} >= {"config.json", "run.json", "tb", "report.png", "checkpoints"}
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [2, 4]
    _unfinished_half_removed_and_damaged(workdir)


def _unfinished_half_removed_and_damaged(workdir: pathlib.Path) -> None:
    """What kills leave of a save and of a removal goes; what has changed is put aside."""
    kept = workdir / "checkpoints"
    storage.write_atomically(kept / "6" / "model" / "array", b"")
    next(path for path in storage.list_files(kept / "2") if path.parent.name == "config").unlink()
    Checkpoints(workdir, 2).close()
    assert [path.name for path in storage.list_folder(kept)] == ["4"]
    arrays = max((size, path) for path, size in storage.list_files(kept / "4").items())[1]
    arrays.write_bytes(arrays.read_bytes()[:-1] + b"?")
    with pytest.raises(ConfigError, match="no intact checkpoint is left"):
        Checkpoints(workdir, 2).newest_intact()
    assert [path.name for path in storage.list_folder(workdir / "checkpoints-damaged")] == ["4"]
    assert storage.list_folder(kept) == []


def test_data_cache_and_export_on_s3(
    s3_server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "local"))
    fields = ("data.tokenizer=bpe", "model.vocab_size=300")
    here = small(tmp_path, *fields)
    text = storage.locate(f"s3://{BUCKET}/smoke/train.jsonl", "data.source")
    text.write_bytes((tmp_path / "train.jsonl").read_bytes())
    there = small(tmp_path, *fields, f"data.source={text}", f"cache_dir=s3://{BUCKET}/smoke/cache")
    tokenizers = [load_tokenizer(config) for config in (here, there, there)]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == 1
    streams = [open_stream(config, "train", tokenizers[0]) for config in (here, there)]
    np.testing.assert_array_equal(*(stream.tokens(0, stream.num_tokens) for stream in streams))
    assert streams[0].text == streams[1].text  # a run may go on with the copy
    with on_mesh(here):
        model = random_model(here)
        for output in (tmp_path / "export", f"s3://{BUCKET}/smoke/export"):
            export_model(there, model, output, format="plain", tokenizer=tokenizers[0])
    exported = storage.locate(f"s3://{BUCKET}/smoke/export", "--output")
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()
    }


# --- commands ---


class Job:
    """A command with a store; `disk` is where the server keeps the workdir's objects. Ended with the block."""

    def __init__(self, log: pathlib.Path, environment: dict[str, str], *argv: str, short: bool = False):
        self._log = log
        with log.open("w") as file:
            command = [sys.executable, *(["-c", SHORT] if short else []), *argv]
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def until(self, due: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT
        while not due():
            assert self.process.poll() is None and time.monotonic() < end, self.output
            time.sleep(0.002)

    def wait(self, limit: float = LIMIT) -> int:
        return self.process.wait(limit)

    @property
    def output(self) -> str:
        return self._log.read_text()


class Bench:
    """A config, a server behind a proxy, and what was trained on a disk with the same config."""

    def __init__(self, folder: pathlib.Path, server: Server, proxy: Proxy):
        self.folder, self.server, self.proxy = folder, server, proxy
        self.disk = folder / "gs" / BUCKET
        self.environment = ENVIRONMENT | server.environment | {"XDG_CACHE_HOME": str(folder / "local")}
        self.file = write_config(folder)
        fields = ["train.steps=40", "train.checkpoint_every=4", "train.eval_every=20", "model.dropout=0.1",
                  "mesh.expert=2", "mesh.data=1"]  # fmt: skip
        self.flags = ["--cpu_devices=2", *(f"--config.{field}" for field in fields)]
        self.config: Config = load_config(self.file, fields)
        self._count = 0

    def job(self, *argv: str, short: bool = False) -> Job:
        self._count += 1
        return Job(self.folder / f"{self._count}.log", self.environment, *argv, short=short)

    def train(self, name: str, short: bool = True) -> Job:
        cache = f"--config.cache_dir=gs://{BUCKET}/cache"
        argv = ["train.py", f"--config={self.file}", f"--workdir=gs://{BUCKET}/{name}", cache, *self.flags]
        return self.job(*argv, short=short)

    def saved(self, name: str) -> int:
        """The newest whole checkpoint."""
        found = (self.disk / name / "checkpoints").glob("*/commit_success.txt")
        return max((int(path.parent.name) for path in found), default=0)

    def is_saving(self, name: str) -> bool:
        found = (path for path in (self.disk / name / "checkpoints").glob("*/_CHECKPOINT_METADATA"))
        return any(not path.with_name("commit_success.txt").exists() for path in found)

    def check(self, name: str) -> None:
        """The run is the one on the disk, state and records."""
        workdir = storage.locate(f"gs://{BUCKET}/{name}", "workdir")
        chex.assert_trees_all_equal(
            leaves_of(self.config, workdir, 40), leaves_of(self.config, self.folder / "run", 40)
        )
        assert losses(records_of(workdir)) == losses(read_records(self.folder / "run"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    with Proxy() as proxy, gcs(folder / "gs", proxy.port) as server, entered(server):
        proxy.target = server.port
        bench = Bench(folder, server, proxy)
        with bench.job("train.py", f"--config={bench.file}", f"--workdir={folder / 'run'}", *bench.flags) as alone:
            assert alone.wait() == 0, alone.output
        yield bench


@pytest.mark.full
def test_killed_and_resumed(bench: Bench) -> None:
    """Between steps and in the middle of a save; then everything that reads a run."""
    for step, saving in ((8, False), (20, True)):
        with bench.train("killed") as job:
            job.until(lambda step=step, saving=saving: bench.saved("killed") >= step and (  # type: ignore[misc]
                not saving or bench.is_saving("killed")))  # fmt: skip
            job.process.send_signal(signal.SIGKILL)
            assert job.wait() == -signal.SIGKILL
    with bench.train("killed") as job:
        assert job.wait() == 0, job.output
        assert "taken over" in job.output and "Traceback" not in job.output, job.output
    bench.check("killed")
    run, workdir = f"--workdir=gs://{BUCKET}/killed", bench.folder / "run"
    answers = {}
    for name, argv in {"eval.py": ("--json",), "generate.py": ("--prompt=the", "--max_tokens=8")}.items():
        for where in (run, f"--workdir={workdir}"):
            with bench.job(name, where, "--cpu_devices=2", *argv) as job:
                assert job.wait() == 0, job.output
                lines = [line for line in job.output.splitlines() if line[:1] in "{t"]
                answers.setdefault(name, []).append(lines[-1])
        assert answers[name][0] == answers[name][1], answers
    commands = [
        ["convert.py", "export", run, f"--output=gs://{BUCKET}/exported", "--cpu_devices=2"],
        [
            "convert.py",
            "import",
            f"--checkpoint=gs://{BUCKET}/exported",
            f"--workdir=gs://{BUCKET}/imported",
            "--cpu_devices=2",
        ],
        ["-m", "bigmac_jax.report", f"gs://{BUCKET}/killed", "-o", f"gs://{BUCKET}/report.html"],
    ]
    for command in commands:
        with bench.job(*command) as job:
            assert job.wait() == 0, job.output
    assert (bench.disk / "report.html").read_text().startswith("<!")
    assert (bench.disk / "imported" / "checkpoints" / "0" / "commit_success.txt").exists()


@pytest.mark.full
def test_two_jobs_on_one_workdir(bench: Bench) -> None:
    with bench.train("two") as first:
        first.until(lambda: bench.saved("two") >= 4)
        first.process.send_signal(signal.SIGSTOP)  # it must not finish before the second one looks
        first.process.send_signal(signal.SIGCONT)
        with bench.train("two") as second:
            code = second.wait()
        if first.process.poll() is None:
            assert code == 2 and f"gs://{BUCKET}/two is in use by process {first.process.pid} on " in second.output
        first.process.send_signal(signal.SIGKILL)
        first.wait()
    start = time.monotonic()
    with bench.train("two") as third:
        third.until(lambda: "taken over" in third.output)
        assert time.monotonic() - start < 30
        assert third.wait() == 0, third.output
    bench.check("two")


@pytest.mark.full
@pytest.mark.parametrize("mode", ["503", "reset"])
def test_ten_seconds_without_the_server(bench: Bench, mode: str) -> None:
    """In the middle of a save, and of the next start's reads."""
    name = f"disturbed-{mode}"

    def disturb() -> None:
        bench.proxy.refused = 0
        bench.proxy.disturb(mode)
        time.sleep(10)
        bench.proxy.disturb("pass")

    with bench.train(name, short=False) as job:
        job.until(lambda: bench.saved(name) >= 8 and bench.is_saving(name))
        disturb()
        assert bench.proxy.refused > 3
        job.until(lambda: bench.saved(name) >= 16)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 0, job.output
    with bench.train(name, short=False) as job:
        job.until(lambda: "parameters," in job.output)
        thread = threading.Thread(target=disturb)
        thread.start()
        code = job.wait()
        thread.join()
        assert code == 0, job.output
        assert "Traceback" not in job.output, job.output
    bench.check(name)


@pytest.mark.full
def test_a_server_that_stays_away(bench: Bench) -> None:
    with bench.train("away") as job:
        job.until(lambda: bench.saved("away") >= 8)
        bench.proxy.disturb("reset")
        try:
            assert job.wait() in (1, 3), job.output
        finally:
            bench.proxy.disturb("pass")
        errors = [line for line in job.output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in job.output, job.output
    with bench.train("away") as job:
        assert job.wait() == 0, job.output
    bench.check("away")
    assert os.environ["STORAGE_EMULATOR_HOST"] == bench.server.environment["STORAGE_EMULATOR_HOST"]
