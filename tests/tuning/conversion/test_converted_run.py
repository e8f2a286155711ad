"""convert.py latent, upcycle and widen: a run becomes another run, which is evaluated and trained further."""

import json
import pathlib
import subprocess
import sys

import pytest
from training.tools import ROOT, write_config

pytestmark = pytest.mark.full


def command(*argv: str, code: int = 0) -> str:
    ended = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    assert code == 0 or ended.stderr.count("\n") == 1, ended.stderr
    return ended.stdout if code == 0 else ended.stderr


def trained(folder: pathlib.Path, *overrides: str) -> str:
    command("train.py", f"--config={write_config(folder)}", f"--workdir={folder / 'run'}", *overrides)
    return f"--workdir={folder / 'run'}"


def loss(workdir: pathlib.Path) -> float:
    return json.loads(command("eval.py", f"--workdir={workdir}", "--split=validation", "--json"))["loss"]


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


def test_upcycle_and_widen(tmp_path: pathlib.Path) -> None:
    run, sparse, wide = trained(tmp_path, "--config.model.structure=dense"), tmp_path / "sparse", tmp_path / "wide"
    command("convert.py", "upcycle", run, f"--output={sparse}", "--experts=4", "--top_k=2")
    assert loss(sparse) == pytest.approx(loss(tmp_path / "run"), abs=1e-5)
    command("convert.py", "widen", f"--workdir={sparse}", f"--output={wide}", "--copies=2", "--noise=0")
    assert loss(wide) == pytest.approx(loss(sparse), abs=1e-5)
    out = command("train.py", f"--config={wide / 'config.json'}", f"--workdir={wide}")
    assert "fine_grained: 8 experts" in out


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
