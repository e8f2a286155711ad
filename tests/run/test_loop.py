"""What a run leaves in its workdir, how it ends, and what may change when it is resumed."""

import errno
import json
import math
import pathlib
import shutil
import struct
import types
from typing import Any
from unittest import mock

import jax
import matplotlib.image
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from training.tools import as_saved, read_records, small

from bigmac_jax.config import Config, ConfigError, load_config
from bigmac_jax.data.tokenizer import load_tokenizer
from bigmac_jax.model.counts import flops
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.run.loop import Result, _Run, train, unused_profile
from bigmac_jax.runtime.clock import clock
from bigmac_jax.runtime.workdir_lock import lock_workdir
from bigmac_jax.training import metrics, metrics_file
from bigmac_jax.training.bad_steps import RunError
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.metrics import MetricsWriter
from bigmac_jax.training.metrics_file import drop_records
from bigmac_jax.training.workdir import load_run_tokenizer, read_config
from bigmac_jax.tuning import restore

TRAINING = {"step", "tokens", "loss", "perplexity", "learning_rate", "grad_norm", "step_time_s", "tokens_per_s",
            "mfu", "mfu_causal"}  # fmt: skip
MOE = {"moe/balance_loss", "moe/z_loss", "moe/drop_rate", "moe/load_cv", "moe/max_load", "moe/router_entropy",
       "moe/wire_bytes"}  # fmt: skip
EVALUATION = {"step", "eval/loss", "eval/perplexity", "eval/bits_per_byte"}


def run(config: Config, workdir: pathlib.Path, profile: tuple[int, int] | None = None) -> Result:
    with jax.set_mesh(make_mesh(config)):
        return train(config, workdir, profile)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, pathlib.Path, Result]:
    """Six steps of bigmac, with evaluations and checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    config = small(folder, "model.capacity_factor=1.0", "mesh.expert=2")
    return config, folder / "run", run(config, folder / "run")


@pytest.fixture
def copied(finished: Any, tmp_path: pathlib.Path) -> tuple[Config, pathlib.Path]:
    config, workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    return config, tmp_path / "run"


def overridden(config: Config, folder: pathlib.Path, *overrides: str) -> Config:
    (folder / "changed.json").write_text(config.to_json())
    return load_config(folder / "changed.json", (f"cache_dir={config.cache_dir}", *overrides))


def test_result_and_config(finished: Any) -> None:
    config, workdir, result = finished
    assert (result.step, result.finished) == (6, True)
    assert read_config(workdir) == as_saved(config)
    last = [record for record in read_records(workdir) if "eval/loss" in record][-1]
    assert last == {"step": 6, "eval/loss": result.score.loss, "eval/perplexity": result.score.perplexity,
                    "eval/bits_per_byte": result.score.bits_per_byte}  # fmt: skip


def test_metrics_keep_the_contract(finished: Any) -> None:
    config, workdir, _ = finished
    assert (workdir / "metrics.jsonl").read_text().endswith("}\n")
    training = [record for record in read_records(workdir) if "loss" in record]
    evaluations = [record for record in read_records(workdir) if "eval/loss" in record]
    assert [record["step"] for record in training] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in evaluations] == [3, 6]
    for record in training:
        assert record.keys() >= TRAINING | MOE
        assert record["tokens"] == record["step"] * 8 * 16
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
        assert record["tokens_per_s"] == pytest.approx(8 * 16 / record["step_time_s"])
        assert record["mfu"] > 0 and record["grad_norm"] > 0
        scores = 6 * 8 * 16 * config.model.num_layers * 2 * 16 * config.model.num_heads * config.model.head_size
        half_less = 1 - scores / 2 / sum(flops(config).values())
        assert record["mfu_causal"] == pytest.approx(half_less * record["mfu"])
        assert 0 < record["moe/drop_rate"] < 1 and 0 < record["moe/router_entropy"] <= math.log(8)
        assert record["moe/max_load"] >= 1 and record["moe/balance_loss"] >= 0.99
        load_YE = np.asarray(record["moe/load"])
        np.testing.assert_allclose(load_YE.mean(1), 1, atol=1e-3)
        assert record["moe/load_cv"] == pytest.approx(load_YE.std(1).mean(), abs=1e-3)
        assert record["moe/max_load"] == pytest.approx(load_YE.max(1).mean(), abs=1e-3)
        # Two exchanges in each direction; 2 ranks × 8 experts × capacity ⌈1 · 64 · 2 / 8⌉ = 16 rows of 4 float32.
        assert record["moe/wire_bytes"] % (16 * 4 * 4) == 0
    assert [record["learning_rate"] for record in training[:2]] == pytest.approx([0.01 / 3, 0.02 / 3])
    assert all(record.keys() == EVALUATION for record in evaluations)


@pytest.mark.full
def test_moves_are_counted_wherever_a_step_is_split(tmp_path: pathlib.Path) -> None:
    """In every replica, rank, part and chunk: what a first step would drop it moves or drops; loads count both."""
    fields = ("model.capacity_factor=1.0", "mesh.expert=2", "mesh.data=2", "mesh.replica=2", "mesh.fsdp=True",
              "train.accumulate_steps=2", "data.batch_size=16", "execution.overlap_chunks=2",
              "train.steps=1")  # fmt: skip
    rates = {}
    for overflow in ("drop", "next"):
        run(small(tmp_path, *fields, f"model.overflow={overflow}"), tmp_path / overflow)
        record = next(record for record in read_records(tmp_path / overflow) if "loss" in record)
        rates[overflow] = record["moe/drop_rate"], record.get("moe/moved_rate", 0.0)
        np.testing.assert_allclose(np.asarray(record["moe/load"]).mean(1), 1, atol=1e-3)
    assert 0 < rates["next"][1] < 1 and sum(rates["next"]) == pytest.approx(rates["drop"][0], rel=1e-5)


def test_tensorboard_holds_the_scalars(finished: Any) -> None:
    _, workdir, _ = finished
    (file,) = (workdir / "tb").glob("events.out.tfevents.*")
    data, scalars = file.read_bytes(), {}
    while data:  # a record: length, its checksum, an event, its checksum
        (size,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + size :]
    for record in read_records(workdir):
        for name in (TRAINING | MOE | EVALUATION) & record.keys() - {"step"}:
            assert scalars[name, record["step"]] == pytest.approx(record[name], rel=1e-6), name


def test_checkpoints_and_report(finished: Any) -> None:
    _, workdir, _ = finished
    kept = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    assert {4, 6} <= kept <= {3, 4, 6}  # two newest, and the best evaluation (3 or 6)
    assert matplotlib.image.imread(workdir / "report.png").std() > 0
    checkpoints = Checkpoints(workdir)
    losses = [record["eval/loss"] for record in read_records(workdir) if "eval/loss" in record]
    assert checkpoints.best_loss() == min(losses)
    assert checkpoints.resolve("best") == (3, 6)[int(np.argmin(losses))]
    checkpoints.close()


@pytest.mark.full
def test_the_last_checkpoint_has_the_loss_of_its_evaluation(
    copied: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is not the best, and no other save was due."""
    config, workdir = copied
    monkeypatch.setattr(Checkpoints, "best_loss", lambda _: -math.inf)
    changes = ("train.steps=8", "train.eval_every=100", "train.checkpoint_every=100")
    score = run(overridden(config, tmp_path, *changes), workdir).score
    checkpoints = Checkpoints(workdir)
    assert score and checkpoints.latest() == 8 and checkpoints.loss(8) == score.loss
    checkpoints.close()


def test_changed_moments_are_refused(copied: Any, tmp_path: pathlib.Path) -> None:
    config, workdir = copied
    before = (workdir / "config.json").read_text()
    with pytest.raises(ConfigError, match=r"optimizer\.b1=0\.5 differs from 0\.9") as error:
        run(overridden(config, tmp_path, "optimizer.b1=0.5", "train.steps=8"), workdir)
    assert "\n" not in str(error.value)
    assert (workdir / "config.json").read_text() == before


@pytest.mark.full
def test_another_learning_rate_goes_on_with_a_line(copied: Any, tmp_path: pathlib.Path, caplog: Any) -> None:
    config, workdir = copied
    changes = ("optimizer.learning_rate=0.02", "optimizer.final_learning_rate=0.02", "optimizer.clip_norm=0.5")
    changed = overridden(config, tmp_path, *changes, "train.steps=8")
    assert run(changed, workdir, profile=(2, 6)).step == 8
    (said,) = [record.message for record in caplog.records if "learning_rate" in record.message]
    assert said == (
        "optimizer.learning_rate 0.01 → 0.02, optimizer.final_learning_rate 0.001 → 0.02, optimizer.clip_norm 1.0 → "
        "0.5, train.steps 6 → 8: step 7 has the learning rate 0.02, not 0.001"
    )
    rates = {record["step"]: record["learning_rate"] for record in read_records(workdir) if "loss" in record}
    assert rates[6] == pytest.approx(0.01 * 0.1 + 0.009 * (1 + math.cos(0.75 * math.pi)) / 2)
    assert [rates[step] for step in (7, 8)] == [pytest.approx(0.02)] * 2
    assert "--profile=2:6 traces nothing" in caplog.text and not (workdir / "profile").exists()
    assert read_config(workdir) == as_saved(changed)


def test_another_mesh_and_more_steps_go_on(copied: Any, tmp_path: pathlib.Path) -> None:
    config, workdir = copied
    before = read_records(workdir)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 99.0}\n{"step": 8, "lo')  # of a run that was killed after its checkpoint
    changes = ["mesh.data=2", "mesh.expert=1", "train.steps=8", "train.eval_every=8", "train.keep_checkpoints=1"]
    changed = overridden(config, tmp_path, *changes)
    assert run(changed, workdir, profile=(6, 7)).step == 8  # of a trace of steps 6 and 7, step 7 is left
    assert sum(path.stat().st_size for path in (workdir / "profile").rglob("*.xplane.pb")) > 1000
    assert read_config(workdir) == as_saved(changed)
    records = read_records(workdir)
    assert records[: len(before)] == before
    assert [record["step"] for record in records[len(before) :]] == [6, 7, 8, 8, 8]  # its start, …, its end
    assert records[-3]["tokens"] == 8 * 8 * 16
    assert run(changed, workdir)[:3] == (8, True, None)  # and once more there is nothing to do
    assert read_records(workdir) == records


@pytest.mark.full
def test_execution_and_where_data_lies_may_change(copied: Any, tmp_path: pathlib.Path, caplog: Any) -> None:
    """Another attention, exchange, remat, chunks, parts and workers, and the corpus in another folder."""
    config, workdir = copied
    moved = tmp_path / "moved"
    moved.mkdir()
    for split in ("train", "validation", "test"):
        shutil.copy(pathlib.Path(config.data.source).with_name(f"{split}.jsonl"), moved)
    changes = ["execution.remat=layer", "execution.attention=xla", "execution.exchange=dedup",
               "execution.overlap_chunks=2", "train.accumulate_steps=2", "data.num_workers=0", "train.steps=8",
               "execution.grouped_matmul=blocks", f"data.source={moved / 'train.jsonl'}",
               f"data.validation_source={moved / 'validation.jsonl'}"]  # fmt: skip
    changed = overridden(config, tmp_path, *changes)
    assert run(changed, workdir).step == 8
    (said,) = [record.message for record in caplog.records if "which choices" in record.message]
    for part in ("train.accumulate_steps 1 → 2", "execution.exchange all_to_all → dedup", "capacity_factor=1"):
        assert part in said
    assert read_config(workdir) == as_saved(changed)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_data_is_refused_wherever_it_lies(copied: Any, tmp_path: pathlib.Path, split: str) -> None:
    config, workdir = copied
    other = tmp_path / f"{split}.jsonl"
    other.write_text(pathlib.Path(config.data.source).with_name(f"{split}.jsonl").read_text() + '{"text": "more"}\n')
    field = {"train": "data.source", "validation": "data.validation_source"}[split]
    with pytest.raises(ConfigError, match=f"{field}=.* holds other data than this workdir was started with"):
        run(overridden(config, tmp_path, f"{field}={other}", "train.steps=8"), workdir)
    (workdir / "run.json").unlink()  # of a run that the first edition started
    with pytest.raises(ConfigError, match=f"{field}=.* differs from .* nothing to compare"):
        run(overridden(config, tmp_path, f"{field}={other}", "train.steps=8"), workdir)


def test_a_failed_start_leaves_the_workdir_free(tmp_path: pathlib.Path) -> None:
    """After a wrong data.source the corrected command is not told that the workdir is of another run."""
    config = small(tmp_path)
    for source in ("missing.txt", "wrong.txt"):
        with pytest.raises(ConfigError, match=rf"data\.source='{source}' is not there"):
            run(overridden(config, tmp_path, f"data.source={source}"), tmp_path / "run")


@pytest.mark.parametrize(
    ("profile", "last", "nothing"),
    [
        (None, 8, False),
        ((2, 7), 8, False),
        ((8, 20), 8, False),
        ((2, 6), 8, True),
        ((9, 9), 8, True),
        (None, 7, False),  # a start that takes one step
        ((2, 7), 7, False),
        ((8, 20), 7, True),
        ((2, 6), 7, True),
        ((9, 9), 7, True),
    ],
)
def test_a_profile_of_steps_that_are_not_taken_is_a_line(
    profile: tuple[int, int] | None, last: int, nothing: bool
) -> None:
    first, end = profile or (0, 0)
    line = f"--profile={first}:{end} traces nothing: this start takes steps 7 to {last}; give it some of these"
    assert unused_profile(profile, 7, last) == (line if nothing else "")
    assert unused_profile(profile, 9, 8) == ""  # of a finished run, which says so


@pytest.mark.parametrize("use", ["move", "remove", "make another"])
def test_a_folder_that_was_moved_or_removed_is_no_longer_held(use: str, tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    with lock_workdir(workdir) as is_held:
        (tmp_path / "link").symlink_to(workdir)
        assert is_held()
        workdir.rename(tmp_path / "elsewhere")
        if use == "remove":
            shutil.rmtree(tmp_path / "elsewhere")
        if use == "make another":
            with lock_workdir(workdir) as other_holds:  # another job is let in
                assert other_holds()
        assert not is_held()
        if use == "move":  # and linked from where it was
            workdir.symlink_to(tmp_path / "elsewhere")
            assert is_held()


@pytest.mark.parametrize("call", ["_save", "_score_tasks", "_rewind"])
def test_a_run_without_its_workdir_writes_nothing_more(call: str, tmp_path: pathlib.Path) -> None:
    run = object.__new__(_Run)
    run.workdir, run.is_held, run.tracing = tmp_path / "run", lambda: False, False
    run.writer = run.mirror = types.SimpleNamespace(close=lambda: None)
    closed: list[bool] = []
    run.checkpoints = types.SimpleNamespace(close=closed.append)
    bad = types.SimpleNamespace(step=7)
    with pytest.raises(RunError, match=r"--workdir=.*/run was moved or removed while it trained, and step 7 is not"):
        {"_save": lambda: run._save(7, None, None), "_score_tasks": lambda: run._score_tasks(7, None),
         "_rewind": lambda: run._rewind(bad)}[call]()  # fmt: skip
    run.close()
    assert closed == [True] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("newest", [None, 0, 3])
def test_the_checkpoint_that_is_kept_may_be_that_of_step_0(newest: int | None) -> None:
    """That of a model that was converted or imported."""
    run = object.__new__(_Run)
    run.checkpoints = types.SimpleNamespace(latest=lambda: newest)
    kept = "no checkpoint had been written" if newest is None else f"the checkpoint of step {newest} is kept"
    assert run._kept() == kept


@pytest.mark.full
def test_a_run_whose_workdir_is_moved_ends(
    copied: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, workdir = copied
    begin = clock.start_step

    def move_first(step: int) -> None:
        if step == 7:
            workdir.rename(tmp_path / "elsewhere")
        begin(step)

    monkeypatch.setattr(clock, "start_step", move_first)
    with pytest.raises(RunError, match="was moved or removed while it trained"):
        run(overridden(config, tmp_path, "train.steps=8", "train.tasks_every=0"), workdir)
    assert not workdir.exists() and Checkpoints(tmp_path / "elsewhere").latest() == 6


def test_records_after_the_restored_step_are_dropped(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    drop_records(tmp_path, 3)
    assert not path.exists()
    kept = [{"step": 1, "loss": 5.0}, {"step": 3, "loss": 4.0}, {"step": 3, "eval/loss": 4.5}]
    lost = [{"step": 4, "loss": 3.0}, {"step": 6, "eval/loss": 2.0}]
    text = "".join(json.dumps(record) + "\n" for record in [*kept, *lost])
    path.write_text(text + '{"step": 2, "los')
    drop_records(tmp_path, 3)
    assert read_records(tmp_path) == kept
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_dropping_the_files_end_takes_no_room(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, full = tmp_path / "metrics.jsonl", OSError(errno.ENOSPC, "No space left on device")
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(9)) + '{"st')
    monkeypatch.setattr(metrics_file, "write_atomically", mock.Mock(side_effect=full))
    for step in (8, 8, 3):
        drop_records(tmp_path, step)
        assert [record["step"] for record in read_records(tmp_path)] == list(range(step + 1))
        assert path.read_bytes().endswith(b"}\n")
    path.write_text('{"step": 5}\n{"step": 1}\n')
    with pytest.raises(ConfigError, match=f"^{path} cannot be written .No space left on device.; free space, or move"):
        MetricsWriter(tmp_path, 3, 9)


@pytest.mark.parametrize("most", [1 << 20, 300])
def test_records_wait_for_a_full_disk(
    most: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All of them, up to some bytes, also those that the disk's last bytes have cut; a line says so once."""
    monkeypatch.setattr(metrics, "_MOST", most)
    writer, left = MetricsWriter(tmp_path, 0, 99), 60
    take = writer._file.write

    def write(data: bytes) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= (taken := take(data[:left]))
        return taken

    monkeypatch.setattr(writer, "_file", mock.Mock(write=write, close=writer._file.close))
    for step in range(50):
        writer.write({"step": step, "loss": 1.0})
    assert [record["step"] for record in metrics_file.read_records(tmp_path)] == [0, 1]
    left = 1 << 20
    writer.write({"step": 50})
    writer.close()
    steps = [record["step"] for record in metrics_file.read_records(tmp_path)]
    assert steps[-1] == 50 and steps[:-1] == list(range(len(steps) - 1))
    assert len(steps) == 51 if most > 300 else 10 < len(steps) < 20
    assert len([r for r in caplog.records if "No space left on device" in r.getMessage()]) == 1


def test_lines_that_are_no_records_are_left_out(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    path, kept = tmp_path / "metrics.jsonl", [{"step": 1, "loss": 5.0}, {"step": 3, "loss": 4.0}]
    bad = [b"\xff\xfe", b"[" * 100_000, b'{"step": "2"}', b"[1]", b'{"step": ' + b"9" * 5000 + b"}", b"{}", b"7"]
    path.write_bytes(b"\n".join([json.dumps(kept[0]).encode(), *bad, json.dumps(kept[1]).encode(), b'{"st']))
    drop_records(tmp_path, 3)
    assert read_records(tmp_path) == kept
    assert [record.getMessage() for record in caplog.records] == [f"{path}: 7 lines that are no records were left out"]


@pytest.mark.parametrize("content", [b"\xff{}", b"[" * 100_000, b'{"train": ' + b"9" * 5000 + b"}", b"[]", b"7"])
def test_a_config_that_is_none_is_one_line(content: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_lines_are_flushed_and_strict_json(tmp_path: pathlib.Path) -> None:
    writer = MetricsWriter(tmp_path, 0, 10)
    for step in (1, 2):
        writer.write({"step": step, "loss": math.inf, "eval/loss": math.nan, "rate": 0.5})
        line = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
        record = json.loads(line, parse_constant=pytest.fail)
        assert record == {"step": step, "loss": None, "eval/loss": None, "rate": 0.5}
    writer.close()


@pytest.mark.full
def test_a_run_keeps_its_tokenizer(tmp_path: pathlib.Path) -> None:
    """Whatever becomes of the text that it was trained on, and of the cache; a copy that changed is refused."""
    fields = "data.tokenizer=bpe", "model.vocab_size=320", "train.steps=1", "train.eval_every=0"
    config, workdir = small(tmp_path, *fields), tmp_path / "run"
    run(config, workdir)
    text = "the state of the nation, and its government"
    tokens, copy = load_tokenizer(config).encode(text), workdir / "tokenizer.json"

    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(40 * (json.dumps({"text": "zebras quietly juxtapose quartz, zebras quietly"}) + "\n"))
    shutil.rmtree(tmp_path / "cache")
    assert load_tokenizer(config).encode(text) != tokens  # what it would be made of now
    with jax.set_mesh(make_mesh(config)):
        restored, _ = restore(workdir)
    assert load_tokenizer(restored).encode(text) == load_run_tokenizer(workdir, config).encode(text) == tokens
    with pytest.raises(ConfigError, match=r"data\.source=.* holds other data than this workdir was started"):
        run(overridden(config, tmp_path, "train.steps=2"), workdir)

    kept = copy.read_bytes()
    copy.write_bytes(kept.replace(b"the", b"eht"))
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not the tokenizer that the run was trained with; bring"):
        load_run_tokenizer(workdir, config)
    copy.unlink()
    with pytest.raises(ConfigError, match=r"run holds no tokenizer\.json .* is not looked for elsewhere; copy"):
        load_run_tokenizer(workdir, config)
