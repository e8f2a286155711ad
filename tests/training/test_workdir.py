"""A run holds what it needs, and says of what data, code and packages it is."""

import contextlib
import importlib.metadata
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from bigmac_jax.config import Config, ConfigError, DataConfig, seal
from bigmac_jax.data import documents
from bigmac_jax.data.chat_files import NO_CHAT
from bigmac_jax.data.corpus import open_documents
from bigmac_jax.data.pipeline import text_stream
from bigmac_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from bigmac_jax.evaluation.perplexity import evaluate
from bigmac_jax.inference import Generator
from bigmac_jax.interchange import export_model
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.run.loop import train
from bigmac_jax.runtime import hosts
from bigmac_jax.runtime.environment import software_versions
from bigmac_jax.training import workdir as workdir_module
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.run_data import check_data, fingerprint_held_out, open_run_stream
from bigmac_jax.training.workdir import (
    load_run_tokenizer,
    locate_workdir,
    read_config,
    read_run_json,
    write_config,
    write_run,
)
from bigmac_jax.tuning import restore

from .tools import small


def run(config: Config, workdir: pathlib.Path) -> None:
    with jax.set_mesh(make_mesh(config)):
        train(config, workdir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, pathlib.Path]:
    folder = tmp_path_factory.mktemp("workdir")
    config = small(folder, "train.steps=2", "train.eval_every=0", "train.checkpoint_every=1")
    run(config, folder / "run")
    return config, folder / "run"


@pytest.fixture
def copied(finished: Any, tmp_path: pathlib.Path) -> Iterator[tuple[Config, pathlib.Path]]:
    config, workdir = finished
    shutil.copytree(workdir.parent, tmp_path / "all")
    moved = Config.from_json(config.to_json().replace(str(workdir.parent), str(tmp_path / "all")))
    write_config(moved, tmp_path / "all" / "run")
    with jax.set_mesh(make_mesh(moved)):
        yield moved, tmp_path / "all" / "run"


@pytest.mark.full
def test_a_run_and_its_checkpoints_name_their_data_code_and_packages(finished: Any) -> None:
    _, workdir = finished
    found = read_run_json(workdir)
    assert found["edition"] == software_versions() and {"jax", "Python", "bigmac_jax's code"} <= found["edition"].keys()
    assert found["data"].keys() == {"tokenizer", "train", "validation", "test"}
    for step in (1, 2):
        item = workdir / "checkpoints" / str(step) / "run" / "metadata"
        assert json.loads(item.read_text()) == found | {"step": step}


@pytest.mark.full
def test_other_code_or_packages_are_a_line(copied: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    config, workdir = copied
    restore(workdir)
    assert not caplog.records

    now = software_versions() | {"jax": "9.9.9", "bigmac_jax's code": "0" * 12}
    monkeypatch.setattr(workdir_module, "software_versions", lambda: now)
    line = f"{workdir} was trained with other software (jax {jax.__version__} → 9.9.9, bigmac_jax's code "
    for use in (lambda: restore(workdir), lambda: train(config, workdir)):
        caplog.clear()
        use()
        (said,) = [record.getMessage() for record in caplog.records if "other software" in record.getMessage()]
        assert said.startswith(line) and said.endswith("numbers may differ")
    assert read_run_json(workdir)["edition"] == now  # what goes on with it
    caplog.clear()
    restore(workdir)
    assert not caplog.records

    (workdir / "run.json").unlink()
    restore(workdir)
    assert not caplog.records


@pytest.mark.parametrize("values", [seal({"data": [], "mesh": {"data": "x"}, "edition": 7}), None])
def test_what_run_json_does_not_say_is_not_known(values: dict[str, Any] | None, tmp_path: pathlib.Path) -> None:
    if values is not None:
        (tmp_path / "run.json").write_text(json.dumps(values))
    assert read_run_json(tmp_path) == {"data": {}, "mesh": {}, "edition": {}}


@pytest.mark.full
def test_a_checkpoint_under_another_name_is_passed_over(copied: Any, caplog: Any) -> None:
    """Two directories that were swapped."""
    _, workdir = copied
    folder = workdir / "checkpoints"
    for old, new in (("1", "other"), ("2", "1"), ("other", "2")):
        (folder / old).rename(folder / new)
    reader = Checkpoints(workdir)
    with pytest.raises(ConfigError, match=r"no checkpoint of .* is intact, of \[1, 2\]"):
        reader.resolve("latest")
    assert "checkpoints/2 is damaged: it is of step 1" in caplog.text
    with pytest.raises(ConfigError, match=r"step=1 of .* is damaged: it is of step 2; use"):
        reader.resolve("1")
    reader.close()


def test_a_path_that_no_disk_takes_is_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"^--workdir=a{300} cannot be used \(File name too long\); give another one$"
    ):
        locate_workdir("a" * 300)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_evaluation_refuses_data_that_changed(copied: Any, split: str) -> None:
    config, workdir = copied
    source = {"train": config.data.source}.get(split) or getattr(config.data, f"{split}_source")
    before = open_run_stream(workdir, config, split, ByteTokenizer()).num_tokens
    with open(source, "a") as file:
        file.write('{"text": "a line more"}\n')
    field = "data.source" if split == "train" else f"data.{split}_source"
    with pytest.raises(ConfigError, match=f"{field}={source} holds other data than .* was trained with") as error:
        open_run_stream(workdir, config, split, ByteTokenizer())
    assert "\n" not in str(error.value) and "--text_file" in str(error.value)
    for other in {"train", "validation", "test"} - {split}:
        open_run_stream(workdir, config, other, ByteTokenizer())
    (workdir / "run.json").unlink()  # there is nothing to compare with
    assert open_run_stream(workdir, config, split, ByteTokenizer()).num_tokens > before


def test_a_later_start_takes_no_other_held_out_text(tmp_path: pathlib.Path) -> None:
    """Evaluation refuses it as before."""
    files = {split: tmp_path / f"{split}.txt" for split in ("train", "validation", "test")}
    for split, file in files.items():
        file.write_text(f"The state of {split}. " * 99)
    places = {"validation_source": str(files["validation"]), "test_source": str(files["test"])}
    data = DataConfig(source=str(files["train"]), tokenizer="bytes", **places)
    config, workdir = Config(data=data, cache_dir=str(tmp_path / "cache")), tmp_path / "run"
    for text in ("", "more"):  # of the first start, and of a later one
        for split in ("validation", "test"):
            files[split].write_text(files[split].read_text() + text)
        held_out = fingerprint_held_out(workdir, config)
        write_run(workdir, config, held_out, {"data": 1}, ByteTokenizer(), chat=NO_CHAT, history=None, parts=0)
    for split in ("validation", "test"):
        with pytest.raises(ConfigError, match=f"data.{split}_source=.* holds other data than"):
            open_run_stream(workdir, config, split, ByteTokenizer())


def test_evaluation_refuses_another_text_that_splits_are_held_out_of(tmp_path: pathlib.Path) -> None:
    """The test split of data.source, of which the run knows the training split."""
    (tmp_path / "all").mkdir()
    for i in range(100):
        (tmp_path / "all" / f"{i:02}.txt").write_text(f"The state of the union, number {i}. " * 9)
    fields = DataConfig(source=str(tmp_path / "all"), tokenizer="bytes")
    config = Config(data=fields, cache_dir=str(tmp_path / "cache"))
    trained_on = {"train": open_documents(config.data, "train", config.cache_dir).fingerprint}
    write_run(tmp_path / "run", config, trained_on, {"data": 1}, ByteTokenizer(), chat=NO_CHAT, history=None, parts=0)
    assert read_run_json(tmp_path / "run")["data"] == trained_on
    open_run_stream(tmp_path / "run", config, "test", ByteTokenizer())
    (tmp_path / "all" / "more.txt").write_text("more")
    with pytest.raises(ConfigError, match=r"data\.source=.* holds other data than .*, so its test split is another"):
        open_run_stream(tmp_path / "run", config, "test", ByteTokenizer())


@pytest.mark.parametrize(("mixed", "rule"), [(False, "text-1"), (True, "text-1"), (False, "text-2")])
def test_a_run_begun_by_an_earlier_rule_of_what_is_held_out_goes_on(
    mixed: bool, rule: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is told; other text is refused as ever."""
    monkeypatch.setattr(documents, "_logged", set())
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"The state of {name}. " * 99)
    places = {"mixture": f"{tmp_path}/a.txt=1,{tmp_path}/b.txt=1"} if mixed else {"source": f"{tmp_path}/a.txt"}
    places |= {"test_source": f"{tmp_path}/b.txt"} if rule == "text-2" else {}  # then one split is held out
    config = Config(data=DataConfig(tokenizer="bytes", **places), cache_dir=str(tmp_path / "cache"))
    opened = {name: open_documents(config.data, name, config.cache_dir) for name in ("train", "validation")}
    now = {name: docs.fingerprint for name, docs in opened.items()}
    earlier = {name: docs.fingerprint_by(rule) for name, docs in opened.items()}
    assert not set(now.values()) & set(earlier.values())
    write_run(tmp_path / "run", config, earlier, {"data": 1}, ByteTokenizer(), chat=NO_CHAT, history=None, parts=0)
    check_data(tmp_path / "run", config, now)
    assert [record.message.split(" is cut by a newer rule")[0] for record in caplog.records] == [
        docs.name for docs in opened.values()
    ]
    for split in ("train", "test"):
        assert open_run_stream(tmp_path / "run", config, split, ByteTokenizer()).num_tokens > 9
    with (tmp_path / "a.txt").open("a") as file:
        file.write("more")
    with pytest.raises(ConfigError, match="holds other data than"):
        check_data(tmp_path / "run", config, dict.fromkeys(now, "other"))


def answers(config: Config, workdir: pathlib.Path, text: pathlib.Path, output: pathlib.Path) -> list[Any]:
    """Of evaluation, generation and export."""
    with jax.set_mesh(make_mesh(config)):
        own, model = restore(workdir)
        tokenizer = load_run_tokenizer(workdir, config)
        score = evaluate(model, text_stream(text, tokenizer), 16, 4).score
        (completion,) = Generator(own, model).generate(["the state"], max_tokens=6, ignore_eos=True)
        export_model(config, model, output, tokenizer=tokenizer, format="bigmac")
    exported = {str(p.relative_to(output)): p.read_bytes() for p in sorted(output.rglob("*")) if p.is_file()}
    return [score, completion, exported]


@pytest.mark.full
@pytest.mark.parametrize("tokenizer", ["bpe", "gpt2"])
def test_an_old_run_answers_as_before(tokenizer: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, when the corpus, the cache and the package that a tokenizer came from are gone."""
    vocabulary = 320 if tokenizer == "bpe" else 50304
    fields = f"data.tokenizer={tokenizer}", f"model.vocab_size={vocabulary}", "train.steps=2", "train.eval_every=0"
    config, workdir = small(tmp_path, *fields), tmp_path / "run"
    run(config, workdir)
    text = tmp_path / "some.txt"
    text.write_text("the state of the nation, and its government; zebras juxtapose quartz\n" * 5)
    before = answers(config, workdir, text, tmp_path / "before" / "model")

    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    shutil.rmtree(tmp_path / "cache")

    def gone(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", gone)
    with pytest.raises(ConfigError):
        load_tokenizer(config)
    after = answers(config, workdir, text, tmp_path / "after" / "model")
    assert after[:2] == before[:2] and after[2].keys() == before[2].keys()
    assert [name for name in after[2] if after[2][name] != before[2][name]] == []
    assert any(name.endswith(".safetensors") for name in after[2])


@pytest.mark.parametrize(("me", "sees"), [(0, True), (0, False), (1, True), (1, False)])
def test_a_folder_that_is_not_shared_is_told_by_all(
    me: int, sees: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 0 writes a word there, which process 1 finds or does not."""
    monkeypatch.setattr(workdir_module, "_LATE", 0.5)
    monkeypatch.setattr(hosts, "is_distributed", lambda: True)
    monkeypatch.setattr(hosts, "is_first", lambda: me == 0)
    monkeypatch.setattr(hosts, "raise_together", contextlib.nullcontext)
    monkeypatch.setattr(hosts, "broadcast", lambda word: word or "the word")
    told: list[str] = []

    def gather(said: str) -> list[str]:
        told.append(said)
        return ["1", said] if me else [said, str(int(sees))]

    monkeypatch.setattr(hosts, "gather", gather)
    if me and sees:
        (tmp_path / ".seen").write_text("the word")
    if me and not sees:
        (tmp_path / ".seen").write_text("another run's")
    with contextlib.nullcontext() if sees else pytest.raises(ConfigError, match="process 1 does not see what process"):
        workdir_module.check_shared(tmp_path)
    assert told == [str(int(sees or me == 0))]
    assert (tmp_path / ".seen").exists() == (me == 1)  # process 0 takes it away


def test_a_config_that_was_edited_before_the_first_checkpoint(tmp_path: pathlib.Path) -> None:
    """There is nothing to take instead, and the line ends with what to do."""
    write_config(Config(), tmp_path)
    file = tmp_path / "config.json"
    kept = file.read_text()
    file.write_text(kept.replace('"top_k": 4', '"top_k": 3'))
    fix = "; bring back what the run wrote, or start a new workdir"
    with pytest.raises(ConfigError, match=f"config.json has changed since the run wrote it{fix}$"):
        read_config(tmp_path)
    file.write_text(kept)
    assert read_config(tmp_path) == Config().resolved
    file.unlink()
    file.mkdir()
    with pytest.raises(ConfigError, match=f"config.json cannot be read .Is a directory.{fix}$"):
        read_config(tmp_path)
