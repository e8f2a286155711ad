"""Whatever stands in a file that is read back: what is read is what was written, or one line says that it is not.

500 mutations in this process, of which `make test` takes a third; `test_programs` takes some through the programs.
"""

import dataclasses
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from interchange.tools import config_of
from model.tools import on_mesh, random_model
from training.tools import ROOT, small

from bigmac_jax.config import Config, ConfigError, DataConfig, load_config
from bigmac_jax.data.corpus import open_documents
from bigmac_jax.data.pipeline import open_stream
from bigmac_jax.data.tokenizer import load_tokenizer
from bigmac_jax.evaluation.score_log import ScoreLog
from bigmac_jax.interchange import export_model, importing
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.model.parameters import named_leaves
from bigmac_jax.model.transformer import init_model
from bigmac_jax.report.page import page
from bigmac_jax.report.plots import write_report
from bigmac_jax.report.runs import read_runs
from bigmac_jax.run.loop import train
from bigmac_jax.training import manifest
from bigmac_jax.training.metrics_file import drop_records, read_records
from bigmac_jax.training.run_data import check_data
from bigmac_jax.training.workdir import load_run_tokenizer, read_config, resume_warnings

from .mutations import damage, restored

sys.path.append(str(ROOT / "tests" / "data"))
import tiny_dataset  # noqa: F401  registers a dataset

TEXT = "the state of the union, and its government"


class Reader(NamedTuple):
    """How a file is read back, and how many mutations it gets."""

    count: int
    file: Callable[[pathlib.Path], pathlib.Path]  # of the scene
    read: Callable[[pathlib.Path], Any]
    same: bool = True  # what is read must be what was written; else any sane value will do: nothing says what was there


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """A run of two checkpoints with a tokenizer of its own, its cache, and exported models."""
    folder = tmp_path_factory.mktemp("scene")
    config = small(folder, "data.tokenizer=bpe", "model.vocab_size=320", "train.steps=4")
    with jax.set_mesh(make_mesh(config)):
        train(config, folder / "run")
    for kind in ("nemotron_h", "plain"):
        exported = config_of("bigmac")
        with on_mesh(exported):
            export_model(exported, random_model(exported), folder / kind, format=kind, max_shard_size="20KB")
    dataset(folder)
    finished = ScoreLog(folder / "run" / "tasks.jsonl", "model")
    finished.add({f"window {i}": (-float(i), bool(i % 2)) for i in range(20)})
    with on_mesh(config):
        yield folder


def config_of_run(scene: pathlib.Path) -> Any:
    return read_config(scene / "run")


def config_with_cache(scene: pathlib.Path) -> Config:
    return dataclasses.replace(read_config(scene / "run"), cache_dir=str(scene / "cache"))


def rest_of_run(scene: pathlib.Path) -> Any:
    workdir = scene / "run"
    config = config_with_cache(scene)
    check_data(workdir, config, {"tokenizer": load_tokenizer(config).fingerprint})
    return resume_warnings(workdir, config, {"data": 1}, 1), load_run_tokenizer(workdir, config).encode(TEXT)


def tokenizer_of_run(scene: pathlib.Path) -> Any:
    return load_run_tokenizer(scene / "run", read_config(scene / "run")).encode(TEXT)


def cached_tokenizer(scene: pathlib.Path) -> Any:
    return load_tokenizer(config_with_cache(scene)).encode(TEXT)


def cached_tokens(scene: pathlib.Path) -> Any:
    config = config_with_cache(scene)
    stream = open_stream(config, "train", load_run_tokenizer(scene / "run", config))
    return stream.counts, stream.tokens(0, stream.num_tokens).tobytes()


def tokens_without_index(scene: pathlib.Path) -> Any:
    (index,) = scene.glob("cache/tokens/train-*/index.json")
    index.unlink()
    return cached_tokens(scene)


def records_of_run(scene: pathlib.Path) -> Any:
    """At least those of the lines that are whole; a digit that has changed in a line is one that was logged."""
    kept = read_records(scene / "run")
    drop_records(scene / "run", 3)
    assert read_records(scene / "run") == [record for record in kept if record["step"] <= 3]


def report_of_run(scene: pathlib.Path) -> Any:
    assert page(read_runs([str(scene / "run")])).endswith("</html>\n")


def picture_of_run(scene: pathlib.Path) -> Any:
    write_report(scene / "run")


def checkpoint(scene: pathlib.Path) -> Any:
    """Damaged, or what its manifest says is what is there."""
    folder = scene / "run" / "checkpoints" / "4"
    if manifest.find_damage(folder) is None:
        wanted = json.loads((folder / manifest.NAME).read_text())
        assert {name: entry["size"] for name, entry in wanted.items()}.items() <= {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*")
        }.items()


def user_config(scene: pathlib.Path) -> Any:
    load_config(scene / "config.json")


def scores(scene: pathlib.Path) -> Any:
    """A damaged line costs its window; no other score comes of it."""
    known = ScoreLog(scene / "run" / "tasks.jsonl", "model")._known
    assert all(known[key] == (-float(key.split()[1]), bool(int(key.split()[1]) % 2)) for key in known)


def dataset(scene: pathlib.Path) -> Any:
    return list(open_documents(DataConfig("tfds:tiny_text/plain", text_field="body"), "train", str(scene / "cache")))


def imported(kind: str) -> Callable[[pathlib.Path], Any]:
    def read(scene: pathlib.Path) -> Any:
        config, layout, files = importing.open_checkpoint(scene / kind, ())
        model = jax.eval_shape(lambda key: init_model(config, key), jax.random.key(0))
        assert importing._match_tensors(layout, config, named_leaves(model), files)

    return read


def only(pattern: str) -> Callable[[pathlib.Path], pathlib.Path]:
    def find(scene: pathlib.Path) -> pathlib.Path:
        (file,) = scene.glob(pattern)
        return file

    return find


READERS = {
    "config.json": Reader(60, only("run/config.json"), config_of_run),
    "run.json": Reader(60, only("run/run.json"), rest_of_run),
    "metrics.jsonl": Reader(60, only("run/metrics.jsonl"), records_of_run, same=False),
    "report of records": Reader(60, only("run/metrics.jsonl"), report_of_run, same=False),
    "report of a config": Reader(36, only("run/config.json"), report_of_run, same=False),
    "dataset": Reader(24, only("cache/tfds/tiny_text/plain/1.0.0/dataset_info.json"), dataset, same=False),
    "its features": Reader(12, only("cache/tfds/tiny_text/plain/1.0.0/features.json"), dataset, same=False),
    "picture": Reader(6, only("run/metrics.jsonl"), picture_of_run, same=False),
    "manifest.json": Reader(36, only("run/checkpoints/4/manifest.json"), checkpoint, same=False),
    "index of tokens": Reader(36, only("cache/tokens/train-*/index.json"), cached_tokens),
    "unit of tokens": Reader(12, only("cache/tokens/train-*/00000.json"), tokens_without_index),
    "tokenizer.json": Reader(24, only("run/tokenizer.json"), tokenizer_of_run),
    "cached tokenizer": Reader(12, only("cache/tokenizers/bpe-*.json"), cached_tokenizer),
    "scores": Reader(36, only("run/tasks.jsonl"), scores, same=False),
    "a user's config": Reader(24, only("config.json"), user_config, same=False),
    "nemotron_h": Reader(24, only("nemotron_h/config.json"), imported("nemotron_h"), same=False),
    "plain": Reader(12, only("plain/config.json"), imported("plain"), same=False),
    "index": Reader(12, only("nemotron_h/model.safetensors.index.json"), imported("nemotron_h"), same=False),
}


def test_they_are_500() -> None:
    assert sum(reader.count for reader in READERS.values()) >= 500


@pytest.mark.parametrize("share", [0.15, pytest.param(1.0, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", READERS)
def test_a_reader(scene: pathlib.Path, name: str, share: float) -> None:
    reader = READERS[name]
    file = reader.file(scene)
    content, expected, bad = file.read_bytes(), reader.read(scene), []
    restored(file, content)
    for seed in range(round(share * reader.count)):
        what, start = damage(file, seed), time.monotonic()
        try:
            found = reader.read(scene)
            if reader.same and not np.array_equal(np.asarray(found, object), np.asarray(expected, object)):
                bad.append(f"{what}: another value, silently")
        except ConfigError as error:
            if "\n" in str(error) or not str(error):
                bad.append(f"{what}: {error}")
        except Exception as error:
            bad.append(f"{what}: {type(error).__name__}: {error}"[:300])
        if time.monotonic() - start > 20:
            bad.append(f"{what}: {time.monotonic() - start:.0f} s")
        if file.parent.exists():
            restored(file, content)
        else:  # made again under the same name
            shutil.rmtree(file, ignore_errors=True)
    assert not bad, "\n".join(bad)
