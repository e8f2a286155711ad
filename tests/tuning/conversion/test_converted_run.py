"""convert.py latent, upcycle and widen: a run becomes another run, which is evaluated and trained further."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from model.tools import abstract_model, on_mesh, random_model, tiny
from training.tools import ROOT, small, write_config

from bigmac_jax.config import Config, ConfigError, TrainConfig, TuningConfig
from bigmac_jax.data.batch import NO_TARGET, PADDING, Batch, batch_from_windows
from bigmac_jax.data.encoding import Counts
from bigmac_jax.data.token_cache import MemoryStream
from bigmac_jax.model.mesh import batch_spec, place
from bigmac_jax.runtime import storage
from bigmac_jax.training import programs
from bigmac_jax.training.new_run import write_new_run
from bigmac_jax.training.workdir import write_config as write_run_config
from bigmac_jax.tuning import conversion, restore_step
from bigmac_jax.tuning.conversion import converted_run
from bigmac_jax.tuning.conversion.converted_run import measure, new_run_config, sample_windows


def command(*argv: str, code: int = 0) -> str:
    ended = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    if not code:
        return ended.stdout
    lines = [line for line in ended.stderr.splitlines() if " split is read from data." not in line]
    assert len(lines) == 1, ended.stderr
    return lines[0]


def trained(folder: pathlib.Path, *overrides: str) -> str:
    command("train.py", f"--config={write_config(folder)}", f"--workdir={folder / 'run'}", *overrides)
    return f"--workdir={folder / 'run'}"


def loss(workdir: pathlib.Path) -> float:
    return json.loads(command("eval.py", f"--workdir={workdir}", "--split=validation", "--json"))["loss"]


@pytest.mark.full
def test_latent(tmp_path: pathlib.Path) -> None:
    run, new = trained(tmp_path, "--config.model.structure=fine_grained"), tmp_path / "new"
    command("convert.py", "latent", run, f"--output={new}", "--ratio=0.5", "--tokens=2000", "--config.train.steps=4")
    report = json.loads((new / "conversion.json").read_text())
    assert len(report["layers"]) == 1 and 0 < report["layers"][0]["total"] < 1
    assert report["experts"][1] == report["experts"][0] // 2
    before, made = json.loads((new / "run.json").read_text())["history"]
    assert before.startswith("`run`: ") and made == "`bigmac convert latent`"
    assert (new / "conversion.png").stat().st_size > 10_000
    assert loss(new) == pytest.approx(report["loss_after"], abs=0.3)  # of all of the split, not of its windows
    out = command("train.py", f"--config={new / 'config.json'}", f"--workdir={new}")
    assert "step 4: validation perplexity" in out
    command("convert.py", "export", f"--workdir={new}", f"--output={tmp_path / 'exported'}")


@pytest.mark.full
def test_upcycle_and_widen(tmp_path: pathlib.Path) -> None:
    run, sparse, wide = trained(tmp_path, "--config.model.structure=dense"), tmp_path / "sparse", tmp_path / "wide"
    command("convert.py", "upcycle", run, f"--output={sparse}", "--experts=4", "--top_k=2")
    assert loss(sparse) == pytest.approx(loss(tmp_path / "run"), abs=1e-5)
    command("convert.py", "widen", f"--workdir={sparse}", f"--output={wide}", "--copies=2", "--noise=0")
    assert loss(wide) == pytest.approx(loss(sparse), abs=1e-5)
    out = command("train.py", f"--config={wide / 'config.json'}", f"--workdir={wide}")
    assert "fine_grained: 8 experts" in out


@pytest.mark.full
def test_refusals(tmp_path: pathlib.Path) -> None:
    run = trained(tmp_path)
    assert "can't be given a narrow exchange" in command(
        "convert.py", "latent", run, f"--output={tmp_path / 'a'}", code=2
    )
    assert "holds a run" in command("convert.py", "latent", run, f"--output={tmp_path / 'run'}", code=2)
    for override, why in (
        ("model.top_k=1", "the model says what it is"),
        ("train.init_from=x", "give it to train.py"),
        ("train.step=1", "did you mean train.steps?"),
    ):
        argv = ("convert.py", "widen", run, f"--output={tmp_path / 'a'}", f"--config.{override}")
        assert why in command(*argv, code=2)
    assert "--output=NEW" in command("convert.py", "latent", run, code=2)
    assert not (tmp_path / "a").exists()


@pytest.mark.full
def test_a_qwen3_moe(tmp_path: pathlib.Path) -> None:
    """From a folder in its layout to a narrow one that trains and is exported."""
    qwen = ("structure=fine_grained", "gated=true", "activation=silu", "num_shared_experts=0")
    run = trained(tmp_path, *(f"--config.model.{field}" for field in qwen), "--config.train.steps=1")
    theirs, ours, narrow = tmp_path / "qwen3", tmp_path / "imported", tmp_path / "narrow"
    command("convert.py", "export", run, f"--output={theirs}", "--format=qwen3_moe")
    data = [f"--config.data.source={tmp_path / 'train'}.jsonl"]
    data += [f"--config.data.{split}_source={tmp_path / split}.jsonl" for split in ("validation", "test")]
    sizes = ("data.sequence_length=16", "data.batch_size=8", f"cache_dir={tmp_path / 'cache'}", "train.steps=2")
    own = [*data, *(f"--config.{size}" for size in sizes)]
    command("convert.py", "import", f"--checkpoint={theirs}", f"--workdir={ours}", *own)
    teacher = (f"--config.tuning.teacher={ours}", "--config.tuning.hidden_weight=1", "--config.train.steps=2")
    command("convert.py", "latent", f"--workdir={ours}", f"--output={narrow}", "--tokens=500", *teacher)
    out = command("train.py", f"--config={narrow / 'config.json'}", f"--workdir={narrow}", "--config.train.log_every=1")
    assert "bigmac: 8 experts" in out and "rows of 4 numbers instead of 16" in out
    records = [json.loads(line) for line in (narrow / "metrics.jsonl").read_text().splitlines()]
    assert [r["teacher/divergence"] > 0 and r["teacher/hidden"] > 0 for r in records if "loss" in r] == [True, True]
    command("convert.py", "export", f"--workdir={narrow}", f"--output={tmp_path / 'exported'}")
    command("train.py", f"--config={narrow / 'config.json'}", f"--workdir={narrow}", "--config.train.steps=3")


@pytest.mark.full
def test_another_teacher_is_refused(tmp_path: pathlib.Path) -> None:
    trained(tmp_path, "--config.train.steps=1")
    own = [f"--config={tmp_path / 'config.json'}", f"--workdir={tmp_path / 'pupil'}"]
    for field, why in (
        ("model.vocab_size=300", "model.vocab_size=300 must be the 264 of tuning.teacher"),
        ("model.num_layers=2", "model.num_layers=2 must be the 1 of tuning.teacher"),
    ):
        teacher = f"--config.tuning.teacher={tmp_path / 'run'}"
        assert why in command("train.py", *own, teacher, f"--config.{field}", code=2)
    assert "holds no model" in command("train.py", *own, "--config.tuning.teacher=nowhere", code=2)


def memory_stream(count: int, eos_id: int = -1) -> MemoryStream:
    return MemoryStream(np.arange(count), Counts(tokens=count), eos_id)


def test_windows_are_spread_evenly_over_the_text() -> None:
    """Of 97 tokens 24 windows of four; in batches of three that are padded to the two ranks."""
    config = tiny((2, 1, 1), batch=2, length=4)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=4))
    with on_mesh(config):
        object.__setattr__(config.data, "batch_size", 3)
        batches = sample_windows(config, memory_stream(97), 17)
        assert [len(batch.inputs_BL) for batch in batches] == [4, 4]
        inputs, targets = (np.concatenate(of) for of in list(zip(*batches, strict=True))[:2])
        assert inputs[:5, 0].tolist() == [0, 4 * 6, 4 * 12, 4 * 17, 4 * 23] and (np.diff(inputs[:5]) == 1).all()
        assert (targets[:5] == inputs[:5] + 1).all() and (targets[5:] == NO_TARGET).all()
        assert sum(len(batch.inputs_BL) for batch in sample_windows(config, memory_stream(97), 16)) == 4
        (few,) = sample_windows(config, memory_stream(16), 10**6)  # three windows, and a rest
        assert few.inputs_BL[:, 0].tolist() == [0, 4, 8, 0] and few.segments_BL is None
        with pytest.raises(ConfigError, match=r"has fewer tokens than a window of 4; use more text"):
            sample_windows(config, memory_stream(4), 4)
        object.__setattr__(config.data, "documents", "masked")
        (masked,) = sample_windows(config, memory_stream(5, eos_id=2), 4)
        assert masked.inputs_BL[0].tolist() == [0, 1, 2, 3]
        assert masked.segments_BL is not None and masked.segments_BL[:2].tolist() == [[0, 0, 1, 1], [PADDING] * 4]


def test_a_new_run_has_a_config_of_its_own() -> None:
    """It begins with what is written, and is not tuned as the old one was."""
    train = TrainConfig(
        init_from="x", tasks="arithmetic", tasks_every=5, steps=7, seed=3, choices_from=2, choices_steps=5
    )
    tuning = TuningConfig(lora_rank=2, teacher="y")
    old = Config(model=tiny().model, train=train, tuning=tuning)
    new = new_run_config(old, ["train.steps=9", "optimizer.learning_rate=0.5"])
    assert new.train == TrainConfig(steps=9, seed=3) and new.tuning == TuningConfig()
    assert new.optimizer == dataclasses.replace(old.optimizer, learning_rate=0.5)
    assert (new.model, new.data) == (old.model, old.data)
    for override, why in (
        ("model.top_k=1", r"--config\.model\.top_k=1: the model says what it is"),
        ("data.tokenizer=bytes", r"--config\.data\.tokenizer=bytes: a model keeps the tokenizer"),
        ("train.init_from=x", r"give it to train\.py"),
    ):
        with pytest.raises(ConfigError, match=why):
            new_run_config(old, ["train.steps=9", override])


def test_a_report_measures_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over all targets of all batches, and the parameters of routed experts, or of a dense model's MLPs."""
    with on_mesh(tiny()):
        sparse, dense = (abstract_model(tiny(num_shared_experts=1, structure=of)) for of in ("bigmac", "dense"))
    targets = np.array([[5, NO_TARGET], [7, 9]], np.int32)
    batches = [Batch(targets, targets), Batch(targets[:1], targets[:1])]

    def evaluate(model: Any, batch: Batch) -> Any:
        factor = {id(dense): 1.0, id(sparse): 0.5}[id(model)]
        return SimpleNamespace(nll_BL=factor * np.where(batch.targets_BL == NO_TARGET, 1000.0, batch.targets_BL))

    monkeypatch.setattr(converted_run, "place", lambda batch, spec: batch)
    monkeypatch.setattr(programs, "evaluate", evaluate)
    layers = [conversion.LayerError(3, 0.5, 0.25, 0.125)]
    report = measure("latent", dense, sparse, layers, batches)
    # Dense: two layers of two matrices 16 × 64; bigmac: eight experts of two matrices 4 × 16 in each of two layers.
    assert report == ("latent", (5 + 7 + 9 + 5) / 4, (5 + 7 + 9 + 5) / 8, (2 * 2 * 16 * 64, 2 * 8 * 2 * 4 * 16), layers)
    assert report.lines()[0].startswith("layer 3: 50.0% of what the experts put out is lost (25.0% of their hidden")
    assert report.lines()[1:] == [
        "experts' parameters 4,096 → 2,048 (0.5 of them)",
        "validation loss 6.5000 → 3.2500 nats a token, untrained",
    ]


def test_the_picture_shows_the_errors_of_each_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    saved: dict[pathlib.Path, Any] = {}
    monkeypatch.setattr(storage, "save_figure", lambda figure, file: saved.update({file: figure}))
    layers = [conversion.LayerError(1, 0.5, 0.25, 0.125), conversion.LayerError(3, 0.9, 0.8, 0.7)]
    converted_run._draw(converted_run.Report("latent", 1.0, 2.0, (4, 2), layers), tmp_path / "a.png")
    (axis,) = saved[tmp_path / "a.png"].axes
    assert [line.get_xydata().tolist() for line in axis.lines] == [
        [[1, 0.5], [3, 0.9]], [[1, 0.25], [3, 0.8]], [[1, 0.125], [3, 0.7]]
    ]  # fmt: skip
    assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > 0.9
    assert all(tick == int(tick) for tick in axis.get_xticks())


@pytest.fixture
def convert(command: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Converts a random model of one layer, which stands in `run`, to `new`; returns what there is to read."""

    def converted(action: str, *fields: str, **flags: Any) -> Any:
        config = small(tmp_path, *fields)
        program, run, new = command("convert"), tmp_path / "run", tmp_path / "new"
        overrides = ["train.steps=9", "train.experts_per_checkpoint=0", f"cache_dir={config.cache_dir}"]
        monkeypatch.setattr(program.cli, "enter_mesh", lambda *_, **__: None)
        monkeypatch.setattr(program.cli, "OVERRIDES", overrides)
        for name, value in ({"STEP": "latest", "TOKENS": 128} | flags).items():
            monkeypatch.setattr(program, f"_{name}", SimpleNamespace(value=value))
        write_new_run(run, config, random_model(config), ["before"])
        program._convert(action, run, new)
        report = json.loads((new / "conversion.json").read_text())
        return config, random_model(config), restore_step(new, "latest", None), report, new

    with on_mesh(small(tmp_path)):
        yield converted


def eight_windows(config: Config, split: str) -> np.ndarray:
    """Spread evenly over a split's bytes, which begin with an end of text."""
    rows = (pathlib.Path(config.data.source).parent / f"{split}.jsonl").read_text().splitlines()
    tokens = [256, *(token for row in rows for token in [*json.loads(row)["text"].encode(), 256])]
    starts = np.linspace(0, (len(tokens) - 1) // 16 - 1, 8).round().astype(int) * 16
    return np.array([tokens[start : start + 17] for start in starts], np.int32)


def loss_of(model: Any, windows: np.ndarray) -> float:
    batch = place(batch_from_windows(windows), batch_spec(2))
    return float(np.asarray(programs.evaluate(model, batch).nll_BL, np.float64).mean())


def test_upcycle_by_the_command(convert: Any) -> None:
    """A field that does not fit the experts is another one in the new run."""
    fields = ("model.structure=dense", "train.experts_per_checkpoint=4")
    config, before, (new, after, step, _), report, folder = convert("upcycle", *fields, EXPERTS=4, TOP_K=2)
    losses = [loss_of(model, eight_windows(config, "validation")) for model in (before, after)]
    assert [report["loss_before"], report["loss_after"]] == pytest.approx(losses, rel=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and (report["action"], report["layers"]) == ("upcycle", [])
    assert report["experts"] == [2 * 16 * 64, 4 * 2 * 16 * 64]
    assert (new.model.structure, new.model.num_experts, new.model.top_k, new.train.steps) == ("fine_grained", 4, 2, 9)
    assert step == 0 and not (folder / "conversion.png").exists()
    assert json.loads((folder / "run.json").read_text())["history"] == ["before", "`bigmac convert upcycle`"]


@pytest.mark.full
def test_latent_by_the_command(convert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """W↓ and W↑ are fitted to the training split, and the losses are those of the other one."""
    given, narrow = [], conversion.narrow
    monkeypatch.setattr(conversion, "narrow", lambda *of: (given.append(of), narrow(*of))[1])
    flags = {"RATIO": 0.5, "LATENT_NORM": "pre_dispatch"}
    config, before, (new, after, _, _), report, folder = convert("latent", "model.structure=fine_grained", **flags)
    ((_, _, (batch,), *rest),) = given
    assert rest == [0.5, "pre_dispatch"]
    np.testing.assert_array_equal(batch.inputs_BL, eight_windows(config, "train")[:, :-1])
    losses = [loss_of(model, eight_windows(config, "validation")) for model in (before, after)]
    assert [report["loss_before"], report["loss_after"]] == pytest.approx(losses, rel=1e-6)
    assert report["experts"] == [8 * 2 * 16 * 4, 8 * 2 * 8 * 4] and abs(losses[0] - losses[1]) > 1e-4
    ((layer, total, inputs, outputs),) = (tuple(of.values()) for of in report["layers"])
    assert layer == 0 and inputs > 0 and 0 < outputs < total < 1
    assert (new.model.structure, new.model.down_ratio, new.model.latent_norm) == ("bigmac", 0.5, "pre_dispatch")
    assert (folder / "conversion.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("action", "fields", "overrides", "refused"),
    [
        ("upcycle", ("structure=dense", "mtp_modules=1"), ["tuning.teacher=x"], ""),  # not trained beside one, but gone
        ("latent", ("structure=fine_grained",), [], ""),  # with adapters of a larger rank than it is wide
        ("upcycle", ("structure=dense",), ["train.experts_per_checkpoint=8"], "=8 must be below --experts=8"),
        ("latent", ("structure=bigmac",), [], "can't be given a narrow exchange"),
        ("widen", ("router=hyper",), [], "model.router=hyper can't be widened"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_read(
    command: Any, tmp_path: pathlib.Path, action: str, fields: tuple[str, ...], overrides: list[str], refused: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What the result does not keep of the old run is no hindrance."""
    adapters = ("train.init_from=base", "tuning.lora_rank=8") if not refused else ()
    config = small(tmp_path, *(f"model.{field}" for field in fields), *adapters)
    write_run_config(config, tmp_path)
    program = command("convert")

    def read(*_: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(program, "load_run_tokenizer", read)
    monkeypatch.setattr(program.cli, "OVERRIDES", overrides)
    for name, value in {"RATIO": 0.25, "LATENT_NORM": "none", "EXPERTS": 8, "TOP_K": 2, "COPIES": 2}.items():
        monkeypatch.setattr(program, f"_{name}", SimpleNamespace(value=value))
    with pytest.raises(ConfigError if refused else InterruptedError, match=refused or None):
        program._convert(action, tmp_path, tmp_path / "new")
