"""Weights & Biases beside TensorBoard: a run without a network holds every record, and a resume goes on with it."""

import json
import pathlib
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import pytest

from bigmac_jax.config import ConfigError, load_config
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.run.loop import train
from bigmac_jax.training.metrics import MetricsWriter
from bigmac_jax.training.tensorboard import TensorBoard

from .tools import read_records, small

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for hook in ("exit", "excepthook"):  # which wandb puts its own in the place of, for good
        monkeypatch.setattr(sys, hook, getattr(sys, hook))


def framed(content: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, in which a record may be in several parts."""
    place, parts = 7, []  # behind wandb's own header
    while place + 7 <= len(content):
        left = (1 << 15) - place % (1 << 15)
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        if kind == 0:
            return
        parts.append(content[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def logged(file: pathlib.Path) -> tuple[Any, list[dict[str, Any]]]:
    """The wandb run of a file, and its history."""
    from wandb.proto.wandb_internal_pb2 import Record

    run, history = None, []
    for part in framed(file.read_bytes()):
        record = Record()
        record.ParseFromString(part)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
        elif kind == "history":
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            history.append({name: json.loads(value) for name, value in items.items() if not name.startswith("_")})
    return run, history


def check(workdir: pathlib.Path, starts: int) -> list[dict[str, Any]]:
    """All starts are one wandb run, and hold what metrics.jsonl does; returns the runs' configs by name."""
    files = sorted(workdir.glob("wandb/offline-run-*/*.wandb"))
    runs, histories = zip(*map(logged, files), strict=True)
    assert len(runs) == starts and {run.run_id for run in runs} == {(workdir / "wandb" / "id").read_text()}
    assert {run.project for run in runs} == {"bigmac"}
    assert [record for history in histories for record in history] == read_records(workdir)
    return [{update.key: json.loads(update.value_json) for update in run.config.update} for run in runs]


@pytest.mark.full
def test_two_starts_hold_every_record(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text('{"model": {"top_k": 2}}')
    records = [
        {
            "step": 1,
            "loss": 2.5,
            "tokens": 1 << 40,
            "moe/load": [[0.5, 1.5], [1.0, 1.0]],
            "moe/drop_rate_by_layer": [0.1],
        },
        {"step": 1, "eval/loss": 2.0, "eval/bits_per_byte": 1.5},
        {"step": 2, "event": "skip", "bad/loss": None},
    ]
    for start in (0, 2):
        writer = MetricsWriter(tmp_path, start, 9, "bigmac")
        for record in records:
            writer.write(record | {"step": record["step"] + start})
        writer.close()
        time.sleep(1.1)  # wandb names the folders by the second
    assert [config["model"] for config in check(tmp_path, 2)] == [{"top_k": 2}] * 2


def test_of_a_copied_folder_no_line_is_left(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    """A workdir on a store is written to a folder that is gone afterwards: what is named is where it was copied to."""
    monkeypatch.setenv("WANDB_SILENT", "false")
    caplog.set_level("INFO", "bigmac_jax")
    workdir, folder = tmp_path / "run", tmp_path / "copied"
    for made in (workdir, folder):
        made.mkdir()
    (workdir / "config.json").write_text('{"model": {"top_k": 2}}')
    given, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **settings: given.append(settings["config"]) or init(**settings))
    writer = MetricsWriter(folder, 0, 1, "bigmac", workdir)
    writer.write({"step": 1, "loss": 1.0})
    writer.close()
    (made,) = folder.glob("wandb/offline-run-*")
    assert given == [{"model": {"top_k": 2}}]
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("bigmac_jax")]
    assert str(folder) not in "".join(capfd.readouterr())
    assert line == f"wandb was offline; copy {workdir}/wandb/{made.name} to a disk, then: wandb sync {made.name}"


@pytest.mark.full
def test_a_run_without_a_network_holds_every_record(tmp_path: pathlib.Path) -> None:
    config, workdir = small(tmp_path, "train.wandb=bigmac", "train.steps=3"), tmp_path / "run"
    more = load_config(tmp_path / "config.json", ("mesh.data=1", "train.wandb=bigmac", "train.steps=5"))
    for wanted in (config, more):
        with jax.set_mesh(make_mesh(wanted)):
            train(wanted, workdir)
    configs = check(workdir, 2)
    assert [found["train"]["steps"] for found in configs] == [3, 5]
    names = {name for record in read_records(workdir) for name in record}
    assert {"moe/load", "eval/loss", "memory/host_bytes"} <= names


def test_a_file_for_tensorboard_is_no_others(tmp_path: pathlib.Path) -> None:
    """A run that goes back opens its second one in the same second, maybe."""
    for first_step in (0, 3):
        TensorBoard(tmp_path, first_step).close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2 and all(file.stat().st_size for file in files)


def test_without_the_package_a_start_is_one_line(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = small(tmp_path, "train.wandb=bigmac")
    with (
        jax.set_mesh(make_mesh(config)),
        pytest.raises(ConfigError, match=r"train\.wandb=bigmac needs the package wandb; pip install 'bigmac_jax\[wa"),
    ):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_what_goes_wrong_in_wandb_costs_a_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    class Fails:
        def define_metric(self, *_: Any, **__: Any) -> None: ...

        def log(self, record: dict[str, Any]) -> None:
            if when == "log":
                raise RuntimeError("no network\nat all")

        def finish(self) -> None:
            if when == "finish":
                raise RuntimeError("no network\nat all")

    def init(**_: Any) -> Fails:
        if when == "init":
            raise RuntimeError("no network\nat all")
        return Fails()

    monkeypatch.setattr(wandb, "init", init)
    writer = MetricsWriter(tmp_path, 0, 2, "bigmac")
    for step in (1, 2):
        writer.write({"step": step, "loss": 1.0})
    writer.close()
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "wandb gets no more records (RuntimeError: no network at all); metrics.jsonl has all"


def test_every_start_asks_for_the_same_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the config of each, of which a resume may change some."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **given: asked.append(given) or mock.Mock())
    for seed in (1, 2):
        (tmp_path / "config.json").write_text(json.dumps({"seed": seed}))
        MetricsWriter(tmp_path, 0, 2, "bigmac").close()
    first, second = asked
    assert first["id"] == second["id"] == (tmp_path / "wandb" / "id").read_text() and len(first["id"]) == 8
    assert [given["config"] for given in asked] == [{"seed": 1}, {"seed": 2}]
    for given in asked:
        assert (given["project"], given["resume"], given["allow_val_change"]) == ("bigmac", "allow", True)
        assert given["settings"].console == "off"
