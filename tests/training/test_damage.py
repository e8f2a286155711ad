"""A damaged checkpoint is named, kept aside and passed over; a full disk costs a checkpoint, not the run."""

import dataclasses
import errno
import logging
import math
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import tensorstore_utils

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.pipeline import open_stream
from bigmac_jax.data.tokenizer import load_tokenizer
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.run import loop
from bigmac_jax.run.loop import train
from bigmac_jax.runtime import storage
from bigmac_jax.training import checkpoint_arrays, manifest
from bigmac_jax.training.bad_steps import RunError
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.checkpoint_arrays import DamagedError, _describe_damage, find_nonfinite, write_checksums
from bigmac_jax.training.metrics import MetricsWriter
from bigmac_jax.training.step import TrainState
from bigmac_jax.training.workdir import read_config, write_config
from bigmac_jax.tuning import restore

from .test_checkpoint import trivial
from .tools import as_saved, leaves_of, read_records, small

INSTANCES = [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 20))]


def files(checkpoint: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in files(folder)}


def truncated(checkpoint: pathlib.Path, draw: random.Random) -> str:
    file = draw.choice(files(checkpoint))
    os.truncate(file, draw.randrange(file.stat().st_size))
    return file.name


def flipped(checkpoint: pathlib.Path, draw: random.Random) -> str:
    file = draw.choice(files(checkpoint))
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return file.name


def missing(checkpoint: pathlib.Path, draw: random.Random) -> str:
    file = draw.choice(files(checkpoint))
    file.unlink()
    return file.name


def missing_folder(checkpoint: pathlib.Path, draw: random.Random) -> str:
    folder = draw.choice([path for path in sorted(checkpoint.rglob("*")) if path.is_dir()])
    shutil.rmtree(folder)
    return folder.name


def empty(checkpoint: pathlib.Path, draw: random.Random) -> str:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    return "it is empty"


def half_written(checkpoint: pathlib.Path, draw: random.Random) -> str:
    """The files that a copy had not reached yet are not there; the manifest, the last of the names, may be."""
    for file in files(checkpoint)[draw.randrange(len(files(checkpoint))) :]:
        file.unlink()
    return "is missing"


DAMAGES: list[Callable[[pathlib.Path, random.Random], str]] = [
    truncated, flipped, missing, missing_folder, empty, half_written]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Checkpoints 1, 2 and 3; 2 is the best."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, keep=3)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        checkpoints.save(trivial(step), {"batches": step}, Config(), step, loss)
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 4 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(disk: pathlib.Path) -> pathlib.Path:
    """Leaves no byte free; returns the file that took them."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return disk / "filler"


@pytest.mark.parametrize("seed", INSTANCES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_next_newest_is_taken(
    workdir: pathlib.Path, caplog: pytest.LogCaptureFixture, damage: Any, seed: int
) -> None:
    named = damage(workdir / "checkpoints" / "3", random.Random(seed))
    if named == manifest.NAME:  # it may name a file by the name that it has now
        named = "manifest.json|is missing"
    before = contents(workdir / "checkpoints")

    reader = Checkpoints(workdir)
    assert reader.resolve("latest") == 2 and re.search(rf"checkpoints/3 is damaged: .*({named})", caplog.text)
    with pytest.raises(ConfigError, match=r"step=3 .* is damaged") as error:
        reader.resolve("3")
    assert "\n" not in str(error.value)
    reader.close()
    assert contents(workdir / "checkpoints") == before and not (workdir / "checkpoints-damaged").exists()

    caplog.clear()
    checkpoints = Checkpoints(workdir, keep=3)
    assert checkpoints.newest_intact() == checkpoints.latest() == 2
    (line,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert re.match(rf"checkpoint 3 is damaged: .*({named})", line) and "\n" not in line
    state, position = checkpoints.restore(2, trivial(0))
    chex.assert_trees_all_equal(state, trivial(2))
    assert position == {"batches": 2}
    kept = {name.removeprefix("3/"): data for name, data in before.items() if name.startswith("3/")}
    assert contents(workdir / "checkpoints-damaged" / "3") == kept
    checkpoints.save(trivial(3), {"batches": 3}, Config(), 3, None)
    checkpoints.wait()
    assert checkpoints.newest_intact() == 3
    checkpoints.close()


def test_every_byte_counts(workdir: pathlib.Path) -> None:
    """The first, last and middle byte of each file, the manifest included."""
    checkpoint = workdir / "checkpoints" / "3"
    assert manifest.find_damage(checkpoint) is None
    for file in files(checkpoint):
        data = file.read_bytes()
        for place in {0, len(data) // 2, len(data) - 1}:
            changed = bytearray(data)
            changed[place] ^= 1
            file.write_bytes(changed)
            assert manifest.find_damage(checkpoint, thorough=False), (file, place)  # all of them are small
        file.write_bytes(data)
    assert manifest.find_damage(checkpoint) is None
    (checkpoint / manifest.NAME).write_bytes((checkpoint / manifest.NAME).read_bytes()[:-1] + b" ")  # the same to JSON
    assert manifest.find_damage(checkpoint) == "manifest.json is truncated or changed"


def test_large_files_are_left_to_the_thorough_check(tmp_path: pathlib.Path) -> None:
    (tmp_path / "large").write_bytes(bytes(100_000))
    manifest.write(tmp_path)
    (tmp_path / "large").write_bytes(bytes(99_999) + b"x")
    assert manifest.find_damage(tmp_path, thorough=False) is None
    assert manifest.find_damage(tmp_path) == "large has changed (SHA-256)"
    (tmp_path / "large").write_bytes(bytes(99_999))
    assert manifest.find_damage(tmp_path, thorough=False) == "large has 99,999 bytes, not 100,000"


@pytest.mark.parametrize("size", [2**16, 2**16 + 1])
def test_up_to_64_kib_are_always_read(size: int, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_bytes(bytes(size))
    manifest.write(tmp_path)
    (tmp_path / "file").write_bytes(bytes(size - 1) + b"x")
    assert (manifest.find_damage(tmp_path, thorough=False) is None) == (size > 2**16)


def test_what_has_checksums_of_its_own_has_no_digest(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"model/ocdbt.process_0/d/1": 100_000, "model/ocdbt.process_1/d/2": 1_000, "model/_METADATA": 100_000}
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    digest, read = manifest._digest, []
    monkeypatch.setattr(manifest, "_digest", lambda path: (read.append(path.name), digest(path))[1])
    for check in (lambda: manifest.write(tmp_path), lambda: manifest.find_damage(tmp_path)):
        read.clear()
        assert check() is None
        assert sorted(read) == ["2", "_METADATA"]
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size - 1) + b"x")
        found = manifest.find_damage(tmp_path)
        assert found is None if name.endswith("/1") else found == f"{name} has changed (SHA-256)"
        (tmp_path / name).write_bytes(bytes(size - 1))
        assert manifest.find_damage(tmp_path) == f"{name} has {size - 1:,} bytes, not {size:,}"
        (tmp_path / name).write_bytes(bytes(size))


def test_processes_share_what_has_digests(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {f"model/{i}": 70_000 + 7_000 * i for i in range(9)} | {f"optimizer/{i}": 80_000 for i in range(9)}
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    manifest.write(tmp_path)
    digest, read = manifest._digest, []
    monkeypatch.setattr(
        manifest, "_digest", lambda path: (read.append(str(path.relative_to(tmp_path))), digest(path))[1]
    )
    shares = []
    for process in range(4):
        assert manifest.find_damage(tmp_path, share=(process, 4)) is None
        shares.append(sum(sizes[name] for name in read) - sum(shares))
    assert sorted(read) == sorted(sizes)
    assert max(shares) < 1.4 * min(shares), shares
    read.clear()
    assert manifest.find_damage(tmp_path, without="optimizer") is None
    assert sorted(read) == sorted(name for name in sizes if name.startswith("model"))
    (tmp_path / "model" / "8").write_bytes(bytes(sizes["model/8"] - 1) + b"x")
    found = [manifest.find_damage(tmp_path, share=(process, 4)) for process in range(4)]
    assert sorted(map(str, found)) == ["None"] * 3 + ["model/8 has changed (SHA-256)"]


def large(step: int) -> TrainState:
    """Arrays of many chunks' types, whose files are large enough to have no digest."""
    draw = np.random.default_rng(step)
    params, moments = (
        {
            "w": jnp.asarray(draw.standard_normal(50_000, np.float32)),
            "b": jnp.asarray(draw.random(40_000), jnp.bfloat16),
        }
        for _ in range(2)
    )
    return TrainState(jnp.asarray(step), params, {}, moments)


def large_file(workdir: pathlib.Path, step: int, item: str) -> pathlib.Path:
    (data,) = [f for f in files(workdir / "checkpoints" / str(step) / item) if f.stat().st_size > 100_000]
    return data


@pytest.fixture(scope="module")
def large_saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("large")
    checkpoints = Checkpoints(workdir, keep=2)
    for step in (1, 2):
        checkpoints.save(large(step), {"batches": step}, Config(), step, float(step))
    checkpoints.close()
    return workdir


@pytest.fixture
def large_run(large_saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(large_saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("instances", [20, pytest.param(1000, marks=pytest.mark.full)])
def test_a_flipped_bit_of_an_array_is_found_when_it_is_read(large_run: pathlib.Path, instances: int) -> None:
    """Or it changed nothing: a file holds a few bytes to which no tree leads any more."""
    draw, found = random.Random(instances), 0
    reader = Checkpoints(large_run)
    for _ in range(instances):
        data = large_file(large_run, 2, draw.choice(["model", "optimizer"]))
        content = data.read_bytes()
        place = draw.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        data.write_bytes(changed)
        try:
            chex.assert_trees_all_equal(reader.restore(2, large(0))[0], large(2))
        except DamagedError as error:
            found += 1
            told = str(error)
            assert re.fullmatch(r"(params|opt_state)\.[wb] has changed \(CRC-32C\)", told) or "cannot be read" in told
        data.write_bytes(content)
    assert found > 0.9 * instances
    reader.close()


def test_an_orbax_that_writes_no_checksums_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red without the patch: Orbax describes arrays by another function now, which `write_checksums` is to replace."""
    write_checksums()
    monkeypatch.setattr(tensorstore_utils, "_build_zarr_shard_and_chunk_metadata", lambda **_: ({}, "", None))
    with pytest.raises(RuntimeError, match=r"without checksums: .*_build_zarr3_metadata any more; install"):
        write_checksums()


def test_damaged_arrays_are_passed_over(large_run: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """A reader passes over, and does not read the optimizer, two thirds of a checkpoint; the run, resumed, does."""
    model, optimizer = (large_file(large_run, 2, item) for item in ("model", "optimizer"))

    def flip(file: pathlib.Path) -> None:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    def read(step: str) -> int:
        number, found = reader.restore_model(step, {"params": large(0).params, "rest": {}})
        chex.assert_trees_all_equal(found["params"], large(number).params)
        return number

    flip(optimizer)
    reader = Checkpoints(large_run)
    assert [read(step) for step in ("latest", "best", "2")] == [2, 1, 2]
    flip(model)
    assert [read(step) for step in ("latest", "best", "1")] == [1, 1, 1]
    assert re.search(r"checkpoints/2 is damaged: params\.[wb] has changed \(CRC-32C\); it is passed over", caplog.text)
    with pytest.raises(ConfigError, match=r"step=2 of .* is damaged: params.* use another one of \[1\]"):
        read("2")
    flip(model)
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    assert read("latest") == 1  # sizes are compared
    reader.close()
    optimizer.write_bytes(optimizer.read_bytes() + b"\0")

    caplog.clear()
    checkpoints = Checkpoints(large_run, keep=2)
    found = checkpoints.restore_newest(large(0))
    assert found is not None and found[0] == 1 and found[2] == {"batches": 1}
    chex.assert_trees_all_equal(found[1], large(1))
    (line,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert re.match(r"checkpoint 2 is damaged: opt_state\.[wb] has changed \(CRC-32C\); .*checkpoints-damaged/2$", line)
    flip(large_file(large_run, 1, "model"))
    with pytest.raises(ConfigError, match="no intact checkpoint is left"):
        checkpoints.restore_newest(large(0))
    checkpoints.close()


def test_arrays_are_read_once(large_run: pathlib.Path) -> None:
    """By the system's count of the bytes that this process has asked for."""

    def asked() -> int:
        return int(dict(line.split(": ") for line in pathlib.Path("/proc/self/io").read_text().splitlines())["rchar"])

    checkpoints = Checkpoints(large_run, keep=2)
    before = asked()
    assert checkpoints.restore_newest(large(0)) is not None
    read, size = asked() - before, sum(f.stat().st_size for f in files(large_run / "checkpoints" / "2"))
    assert size < read < 1.5 * size, (read, size)  # small files are read for their digests, too
    checkpoints.close()


def test_damaged_twice_at_the_same_step(workdir: pathlib.Path) -> None:
    for _ in range(3):
        (workdir / "checkpoints" / "3" / manifest.NAME).unlink()
        checkpoints = Checkpoints(workdir, keep=3)
        assert checkpoints.newest_intact() == 2
        checkpoints.save(trivial(3), {"batches": 3}, Config(), 3, None)
        checkpoints.close()
    assert {path.name for path in (workdir / "checkpoints-damaged").iterdir()} == {"3", "3-2", "3-3"}


def test_the_best_is_passed_over_too(workdir: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    for file in ("model/manifest.ocdbt", "metrics/metrics"):  # an array, and the loss itself
        (workdir / "checkpoints" / "2" / file).write_bytes(b"damage")
        caplog.clear()
        checkpoints = Checkpoints(workdir)
        assert checkpoints.resolve("best") == 3
        assert "checkpoints/2 is damaged" in caplog.text and file in caplog.text
        checkpoints.close()


def test_none_is_intact(workdir: pathlib.Path) -> None:
    """Starting from the beginning would be a quiet loss: it is refused, the second time as well."""
    for checkpoint in (workdir / "checkpoints").iterdir():
        (checkpoint / "model" / "_METADATA").unlink()
    reader = Checkpoints(workdir)
    with pytest.raises(ConfigError, match=r"no checkpoint of .* is intact"):
        reader.resolve("latest")
    reader.close()
    for _ in range(2):
        checkpoints = Checkpoints(workdir, keep=3)
        with pytest.raises(ConfigError, match=r"no intact checkpoint .*checkpoints-damaged; .* a new --workdir"):
            checkpoints.newest_intact()
        checkpoints.close()
    assert {path.name for path in (workdir / "checkpoints-damaged").iterdir()} == {"1", "2", "3"}


@pytest.mark.parametrize("part", ["params", "rest", "average"])
def test_a_model_that_holds_nan_is_passed_over(tmp_path: pathlib.Path, part: str, caplog: Any) -> None:
    """Its files are as they were written, and no step could go on from them; the same of a router's bias."""
    good = dataclasses.replace(trivial(1), average={"w": jnp.ones(3)})
    bad = dataclasses.replace(good, **{part: {"bias" if part == "rest" else "w": jnp.array([1.0, jnp.inf, jnp.nan])}})
    named = "bias" if part == "rest" else "w"
    writer = Checkpoints(tmp_path, keep=2)
    for step, state in enumerate((good, bad), 1):
        writer.save(state, {"batches": step}, Config(), step, None)
    writer.wait()
    if part != "params":  # what is evaluated is the average
        reader = Checkpoints(tmp_path)
        abstract = {"params": {"w": jnp.ones(3)}, "rest": {"bias": jnp.ones(3)}}
        assert reader.restore_model("latest", abstract)[0] == 1
        with pytest.raises(ConfigError, match=f"step=2 of .* is damaged: {named} holds NaN or infinity; use another"):
            reader.restore_model("2", abstract)
        shutil.rmtree(tmp_path / "checkpoints" / "1")
        shutil.copytree(tmp_path / "checkpoints" / "2", tmp_path / "alone" / "checkpoints" / "2")
        alone = Checkpoints(tmp_path / "alone")
        line = rf"no checkpoint of .* is intact, of \[2\] \(2: {named} holds NaN or infinity\); bring back"
        with pytest.raises(ConfigError, match=line):
            alone.restore_model("latest", abstract)
    else:
        assert writer.restore_newest(good)[0] == 1
        assert f"checkpoint 2 is damaged: {named} holds NaN or infinity; it is passed over" in caplog.text


def test_without_a_manifest(workdir: pathlib.Path) -> None:
    (workdir / "checkpoints" / "3" / manifest.NAME).unlink()
    assert manifest.find_damage(workdir / "checkpoints" / "3") == "manifest.json is missing"
    manifest.write(workdir / "checkpoints" / "3")
    checkpoints = Checkpoints(workdir, keep=3)
    assert checkpoints.newest_intact() == 3
    checkpoints.close()


def test_what_a_killed_run_left_is_removed(workdir: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """Killed while it wrote arrays, or just before the last rename; a save may follow at once."""
    for name in ("4.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-complete"):
        shutil.copytree(workdir / "checkpoints" / "3", workdir / "checkpoints" / name)
    checkpoints = Checkpoints(workdir, keep=9)
    assert checkpoints.newest_intact() == 3
    checkpoints.save(trivial(4), {"batches": 4}, Config(), 4, None)
    checkpoints.close()
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"1", "2", "3", "4"}
    assert "could not be written" not in caplog.text


def test_a_run_that_is_killed_while_it_removes_a_checkpoint(
    workdir: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Has no damaged one: it has another name by then. What is left is removed at the next start."""
    checkpoints, folder = Checkpoints(workdir, keep=1), workdir / "checkpoints"
    with monkeypatch.context() as killed:
        killed.setattr(storage, "remove_tree", lambda path: (path / "1" / "manifest.json").unlink(missing_ok=True))
        checkpoints.save(trivial(4), {"batches": 4}, Config(), 4, None)
        checkpoints.close()
    left = {path.name for path in folder.iterdir()}
    assert {"2", "4"} < left and "1" not in left  # 2 is the best
    Checkpoints(workdir, keep=1).close()
    assert {path.name for path in folder.iterdir()} == {"2", "4"} and not (workdir / "checkpoints-damaged").exists()
    assert "damaged" not in caplog.text


def test_a_full_disk_costs_a_checkpoint(small_disk: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(small_disk, keep=1)
    checkpoints.save(trivial(1), {"batches": 1}, Config(), 1, None)
    checkpoints.wait()
    filler = fill(small_disk)
    for step in (2, 3):
        caplog.clear()
        checkpoints.save(trivial(step), {"batches": step}, Config(), step, None)
        checkpoints.wait()
        (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
                   and record.name.startswith("bigmac_jax")]  # fmt: skip
        assert f"checkpoint of step {step} could not be written" in line and "No space left on device" in line
        assert not any(record.exc_info for record in caplog.records)
        assert checkpoints.latest() == checkpoints.newest_intact() == 1
    filler.unlink()
    (small_disk / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(exist_ok=True)  # by a thread that was still writing
    checkpoints.save(trivial(4), {"batches": 4}, Config(), 4, None)
    checkpoints.close()
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["4"]


@pytest.fixture
def saving(tmp_path: pathlib.Path) -> Iterator[Any]:
    """A run that saves into a workdir, and does nothing else."""
    of_run = mock.MagicMock(config=Config(), learned=None, bad_steps=0, best=math.inf, batches_ahead=0)
    of_run.data.get_state.return_value = {"batches": 1}
    of_run.checkpoints = Checkpoints(tmp_path, keep=2)
    yield of_run
    of_run.checkpoints.close()


@pytest.mark.parametrize("behind", [False, True], ids=["at once", "in the background"])
def test_a_best_save_that_fails_is_not_the_best(saving: Any, behind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(step: int, loss: float) -> float:
        loop._Run._save(saving, step, trivial(step), cast(Any, SimpleNamespace(loss=loss)))
        return saving.best

    def fail(*args: Any, **_: Any) -> None:
        if not behind or args[0].name.startswith("2"):
            raise OSError(28, "No space left on device")
        write(args[0])

    write = manifest.write
    assert save(1, 3.0) == 3.0 and saving.checkpoints.wait()
    monkeypatch.setattr(*((manifest, "write") if behind else (saving.checkpoints._manager, "save")), fail)
    assert save(2, 1.0) == (1.0 if behind else 3.0)  # nobody knows yet
    assert save(3, 2.0) == 2.0 and saving.checkpoints.wait()
    assert saving.checkpoints.best_loss() == 2.0 and saving.checkpoints.latest() == 3


def test_a_rewind_takes_the_best_loss_anew(saving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best save may have been damaged, and set aside."""
    saving.best = 1.0
    saving.checkpoints.save(trivial(1), {"batches": 1}, Config(), 1, 3.0)
    monkeypatch.setattr(loop, "restore_or_begin", lambda *_: (1, trivial(1), {"batches": 1}))
    loop._Run._rewind(saving, cast(Any, SimpleNamespace(step=2)))
    assert saving.best == 3.0


@pytest.mark.parametrize(
    ("message", "says"),
    [("Error writing [tensorstore_spec='{...}']", False), ("orbax: the save failed", False), ("a request's", True)],
)
def test_what_asyncio_logs_late_of_a_save(message: str, says: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Futures of a failed save log their error when memory is collected, in some later line of the run."""
    logging.getLogger("asyncio").error("Future exception was never retrieved", exc_info=ValueError(message))
    assert bool(caplog.records) == says


def waits_for_work(thread: threading.Thread) -> bool:
    """Whether it is one of a pool that has nothing to do, which the end of the process wakes up."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is None or frame.f_code.co_name == "_worker"


def test_a_directory_that_cannot_be_made(workdir: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """The save costs a line, and leaves no thread that the end of the process would wait for."""
    checkpoints = Checkpoints(workdir, keep=3)
    before = set(threading.enumerate())
    (workdir / "checkpoints").rename(workdir / "moved")
    (workdir / "checkpoints").write_text("")
    checkpoints.save(trivial(4), {"batches": 4}, Config(), 4, None)
    checkpoints.wait()
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("bigmac_jax")]
    assert "checkpoint of step 4 could not be written (" in line and "\n" not in line
    assert not any(record.exc_info for record in caplog.records)
    new = [t for t in threading.enumerate() if t not in before and not t.daemon]
    deadline = time.monotonic() + 30  # a pool's thread hands its result over before it waits again
    while (busy := [t for t in new if not waits_for_work(t)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert busy == []
    with pytest.raises(ConfigError, match=r"checkpoints cannot be made \(File exists\); remove what is there"):
        Checkpoints(workdir, keep=3)
    (workdir / "checkpoints").unlink()
    (workdir / "moved").rename(workdir / "checkpoints")
    checkpoints.save(trivial(5), {"batches": 5}, Config(), 5, None)
    checkpoints.close()
    assert manifest.find_damage(workdir / "checkpoints" / "5") is None


def test_directories_that_were_swapped(workdir: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each says which step it is of; the next one that is what it is called is taken."""
    folder = workdir / "checkpoints"
    for source, target in (("3", "x"), ("2", "3"), ("x", "2")):
        (folder / source).rename(folder / target)
    reader = Checkpoints(workdir)
    assert reader.resolve("latest") == 1
    with pytest.raises(ConfigError, match=r"step=3 .* is damaged: it is of step 2; use another one of"):
        reader.resolve("3")
    reader.close()
    caplog.clear()
    checkpoints = Checkpoints(workdir, keep=3)
    assert checkpoints.newest_intact() == 1
    checkpoints.close()
    lines = [record.getMessage() for record in caplog.records]
    assert any("checkpoint 3 is damaged: it is of step 2" in line for line in lines), lines
    assert {path.name for path in (workdir / "checkpoints-damaged").iterdir()} == {"2", "3"}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_start_on_a_full_disk(small_disk: pathlib.Path, tokenizer: str, tmp_path_factory: Any) -> None:
    """The cache's disk, and then the workdir's: one line each."""
    config = small(tmp_path_factory.mktemp("data"), f"data.tokenizer={tokenizer}", "model.vocab_size=320")
    full = dataclasses.replace(config, cache_dir=str(small_disk / "cache"))
    fill(small_disk)
    with pytest.raises(ConfigError, match=r"cannot be written.*the disk at .* is full; free some of it, or set"):
        open_stream(full, "train", load_tokenizer(full))
    with pytest.raises(ConfigError, match=r"config\.json cannot be written \(No space left on device\)"):
        write_config(config, small_disk / "run")


def test_metrics_wait_for_a_full_disk(small_disk: pathlib.Path) -> None:
    writer = MetricsWriter(small_disk, 0, 100)
    filler = fill(small_disk)
    for step in range(1, 100):
        writer.write({"step": step, "loss": 1.0, "note": "x" * 100})
    filler.unlink()
    writer.write({"step": 100, "loss": 1.0})
    assert [record["step"] for record in read_records(small_disk)] == list(range(1, 101))
    writer.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, pathlib.Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = small(folder, "train.keep_checkpoints=5")
    run(config, folder / "run")
    return config, folder / "run"


def run(config: Config, workdir: pathlib.Path) -> None:
    with jax.set_mesh(make_mesh(config)):
        assert train(config, workdir).finished


def arrays(config: Config, workdir: pathlib.Path) -> dict[str, np.ndarray]:
    return leaves_of(config, workdir, config.train.steps)


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_records(workdir) if "loss" in record]


def test_a_run_goes_on(undisturbed: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its newest two checkpoints are damaged: it goes on from the third, and ends as if nothing had been."""
    config, finished = undisturbed
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    flipped(workdir / "checkpoints" / "6", random.Random(0))
    truncated(workdir / "checkpoints" / "4", random.Random(0))
    with jax.set_mesh(make_mesh(config)):
        restore(workdir)  # of 3
    run(config, workdir)
    assert "resumed at step 3" in capsys.readouterr().out
    assert {path.name for path in (workdir / "checkpoints-damaged").iterdir()} == {"4", "6"}
    chex.assert_trees_all_equal(arrays(config, workdir), arrays(config, finished))
    assert losses(workdir) == losses(finished)


def test_without_its_config(undisturbed: Any, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint's is taken, and the check of what may change is on; config.json is written again."""
    config, finished = undisturbed
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    kept = (workdir / "config.json").read_text()
    (workdir / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"optimizer\.b1=0\.5 differs from 0\.9, which this workdir was"):
        run(small(tmp_path, "optimizer.b1=0.5"), workdir)
    assert "holds no config.json; the config of checkpoint 6 is taken" in caplog.text
    with jax.set_mesh(make_mesh(config)):
        assert restore(workdir)[0] == as_saved(config)
    run(config, workdir)
    assert (workdir / "config.json").read_text() == kept
    (workdir / "config.json").write_text(kept.replace('"top_k": 2', '"top_k": 3'))
    caplog.clear()
    assert read_config(workdir) == as_saved(config)
    assert "config.json has changed since the run wrote it; the config of checkpoint 6 is taken" in caplog.text
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no config\.json; give the workdir of a training run"):
        read_config(workdir)


@pytest.mark.full
def test_a_run_on_a_full_disk(
    undisturbed: Any, small_disk: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes on with what it has, says at the end that the last step is not saved, and can be repeated."""
    config, finished = undisturbed
    save = Checkpoints.save

    def save_to_a_full_disk(self: Checkpoints, state: Any, data: Any, config: Config, step: int, *more: Any) -> None:
        if step == 4:
            self.wait()
            fill(small_disk)
        save(self, state, data, config, step, *more)

    monkeypatch.setattr(Checkpoints, "save", save_to_a_full_disk)
    with pytest.raises(RunError, match=r"step 6 is not saved .* checkpoint of step 3 is kept; free space") as error:
        run(config, small_disk / "run")
    assert "\n" not in str(error.value)
    assert "checkpoint of step 4 could not be written" in caplog.text
    monkeypatch.undo()
    (small_disk / "filler").unlink()
    run(config, small_disk / "run")
    chex.assert_trees_all_equal(arrays(config, small_disk / "run"), arrays(config, finished))
    assert losses(small_disk / "run") == losses(finished)


def test_items_that_are_removed_are_no_longer_in_the_manifest(tmp_path: pathlib.Path) -> None:
    """A save of which the experts alone are left is stripped; of a damaged manifest nobody knows."""
    for name in ("model/a", "model/d/b", "optimizer/a", "experts/a"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    manifest.write(tmp_path)
    assert manifest.list_items(tmp_path) == {"model", "optimizer", "experts"} and not manifest.is_stripped(tmp_path)
    manifest.remove_items(tmp_path, ("model", "optimizer"))
    manifest.remove_items(tmp_path, ("model", "optimizer"))  # asked again
    assert manifest.list_items(tmp_path) == {"experts"} and manifest.is_stripped(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experts", "manifest.json"]
    assert manifest.find_damage(tmp_path) is None
    (tmp_path / "manifest.json").write_text("{")
    assert manifest.list_items(tmp_path) == set() and not manifest.is_stripped(tmp_path)


def test_small_files_are_read_up_to_64_kib(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of arrays have a digest up to there, and the quick check reads no larger one."""
    digest, read = manifest._digest, list[str]()
    monkeypatch.setattr(manifest, "_digest", lambda path: (read.append(path.name), digest(path))[1])
    (tmp_path / "d").mkdir()
    for name, size in {"d/1": 65_536, "d/2": 65_537, "3": 65_536, "4": 65_537}.items():
        (tmp_path / name).write_bytes(bytes(size))
    manifest.write(tmp_path)
    assert sorted(read) == ["1", "3", "4"]
    read.clear()
    assert manifest.find_damage(tmp_path, thorough=False) is None and sorted(read) == ["1", "3"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "Out of memory"),
        (MemoryError("allocate"), "allocate"),
        (ValueError("RESOURCE_EXHAUSTED: Failed to open [os_error_code='24']"), r"Errno 24.*checkpoints/2"),
    ],
)
def test_what_this_process_lacks_is_no_damage(
    large_run: pathlib.Path, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: str
) -> None:
    """Nothing is moved, by the run; a reader passes nothing over."""
    before = contents(large_run)
    monkeypatch.setattr(checkpoint_arrays.ocp.PyTreeCheckpointHandler, "restore", mock.Mock(side_effect=error))
    checkpoints, reader = Checkpoints(large_run, keep=2), Checkpoints(large_run)
    kind = OSError if "Errno" in raised else type(error)
    with pytest.raises(kind, match=raised):
        checkpoints.restore_newest(large(0))
    with pytest.raises(kind, match=raised):
        reader.restore_model("latest", {"params": large(0).params, "rest": {}})
    for one in (checkpoints, reader):
        one.close()
    assert contents(large_run) == before


@pytest.mark.parametrize("read", ["read_bytes", "stat", "open"])
@pytest.mark.parametrize(("code", "passes"), [(errno.EMFILE, True), (errno.ESTALE, True), (errno.EIO, False)])
def test_a_disk_that_does_not_answer_is_no_damage(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, read: str, code: int, passes: bool
) -> None:
    """Of the manifest, of a size and of a digest; one that cannot read a block has damage."""
    checkpoint, asked = workdir / "checkpoints" / "3", getattr(pathlib.Path, read)

    def refuse(path: pathlib.Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == ("_METADATA" if read != "read_bytes" else manifest.NAME):
            raise OSError(code, os.strerror(code), str(path))
        return asked(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, read, refuse)
    if passes:
        with pytest.raises(OSError, match=os.strerror(code)):
            manifest.find_damage(checkpoint)
    else:
        assert "cannot be read" in (manifest.find_damage(checkpoint) or "")


@pytest.mark.parametrize(
    ("message", "store", "expected"),
    [
        ("DATA_LOSS: Error reading \"params.w/c/0/1\": Digest mismatch", True, "params.w has changed (CRC-32C)"),
        ("NOT_FOUND: Error reading \"params.w/c\": gone", True, "params.w cannot be read (NOT_FOUND: "),
        ("UNAVAILABLE: Error reading \"params.w/c\"", False, "params.w cannot be read (UNAVAILABLE: "),
        ("UNAVAILABLE: Error reading \"params.w/c\"", True, ""),  # of the store, which may come back
        ("UNAVAILABLE: [os_error_code='5']", False, "an array cannot be read (UNAVAILABLE: "),  # EIO
        ("RESOURCE_EXHAUSTED: Failed to open: Too many open files [os_error_code='24']", False, ""),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.", False, ""),
        ("UNKNOWN: Failed to open [os_error_code='116']", False, ""),  # ESTALE
        ("DATA_LOSS: no name", False, "an array cannot be read (DATA_LOSS: no name)"),
        ("a DATA_LOSS: inside", False, ""), ("OS: too short", False, ""),
        ("DATA_LOSS: " + 300 * "x", False, f"an array cannot be read (DATA_LOSS: {189 * 'x'})"),
    ],
)  # fmt: skip
def test_what_a_read_says_of_damage(message: str, store: bool, expected: str) -> None:
    """By the error, or by one that it has come from, however deep."""
    error = ValueError(message)
    outer, outermost = RuntimeError("read failed"), KeyError("item")
    outer.__cause__, outermost.__context__ = error, outer
    for raised in (error, outer, outermost):
        found = _describe_damage(raised, store)
        assert found.startswith(expected) if expected.endswith(": ") else found == expected


def test_the_first_array_that_is_not_finite_is_named() -> None:
    tree = {"a": jnp.ones(2), "b": {"c": jnp.asarray([1.0, jnp.inf]), "d": jnp.asarray([jnp.nan, 1.0])}}
    assert find_nonfinite(tree) == "b.c" and find_nonfinite({"a": tree["a"]}) == ""


def test_of_an_array_in_host_memory_every_layer_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind those on the device, whatever their order."""
    monkeypatch.setattr(checkpoint_arrays, "in_host", lambda leaf: leaf.ndim == 2)
    monkeypatch.setattr(checkpoint_arrays, "take_layer", lambda leaf, layer: leaf[layer])
    good, last = jnp.ones((3, 2)), jnp.ones((3, 2)).at[2, 1].set(jnp.nan)
    assert find_nonfinite({"a": good, "b": last, "c": jnp.ones(2)}) == "b"
    assert find_nonfinite({"a": good, "b": last, "c": jnp.asarray([jnp.inf])}) == "c"
    assert find_nonfinite({"a": good, "c": jnp.ones(2)}) == ""
