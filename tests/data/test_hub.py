"""Data sets of the `datasets` library: from a folder, and from its cache; no network is asked."""

import json
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pyarrow as pa
import pytest

from bigmac_jax.config import ConfigError, DataConfig
from bigmac_jax.data.corpus import open_documents
from bigmac_jax.data.hub import _readings

ROOT = pathlib.Path(__file__).parents[2]
READ = """
import json, sys
from bigmac_jax.config import DataConfig
from bigmac_jax.data.corpus import open_documents
found = {s: open_documents(DataConfig(source=sys.argv[1], text_field="body"), s, sys.argv[2]) for s in sys.argv[3:]}
print(json.dumps({s: [list(docs), docs.fingerprint] for s, docs in found.items()}))
"""


def read(home: pathlib.Path, source: object, *splits: str) -> dict[str, list]:
    """In a process of its own, whose `datasets` has its cache in `home`."""
    environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HOME": str(home)}
    command = [sys.executable, "-c", READ, f"hf:{source}", str(home / "cache"), *splits]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def write(path: pathlib.Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"body": text, "n": 1}) + "\n" for text in texts))


@pytest.mark.full
def test_a_folder_and_its_cache(tmp_path):
    """Its own splits where it has them; what it has not is held out of its training split."""
    texts = [f"text {i} é" for i in range(40)]
    folder = tmp_path / "set"
    write(folder / "train.jsonl", texts)
    write(folder / "test.jsonl", ["a test"])
    found = read(tmp_path, folder, "train", "validation", "test")
    assert sorted(found["train"][0] + found["validation"][0]) == sorted(texts)
    assert len(found["validation"][0]) == 2 and found["test"][0] == ["a test"]
    assert read(tmp_path, folder, "train", "validation", "test") == found  # and the same fingerprints
    write(folder / "test.jsonl", ["another"])
    changed = read(tmp_path, folder, "train", "test")
    assert changed["train"] == found["train"] and changed["test"][1] != found["test"][1]


def test_what_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"hf:x needs the package datasets; pip install 'bigmac-jax\[datasets\]'"):
        open_documents(DataConfig(source="hf:x"), "train", str(tmp_path))


def test_splits_that_a_data_set_lacks_are_held_out(tmp_path, monkeypatch):
    """In the place of `datasets` stands what it returns: tables in Arrow files."""
    texts, asked = {"train": [f"text {i}" for i in range(40)], "test": ["a test"]}, []
    for split, rows in texts.items():
        table = pa.table({"text": rows})
        with pa.ipc.new_stream(str(tmp_path / f"{split}.arrow"), table.schema) as file:
            file.write_table(table)

    def load_dataset(path, config):
        asked.append((path, config))
        if path == "owner/set":
            raise ValueError("no such data set")
        return {name: SimpleNamespace(cache_files=[{"filename": str(tmp_path / f"{name}.arrow")}]) for name in texts}

    library = SimpleNamespace(load_dataset=load_dataset, disable_progress_bars=lambda: None)
    monkeypatch.setitem(sys.modules, "datasets", library)

    def read(source, split, **own):
        return list(open_documents(DataConfig(source=source, **own), split, str(tmp_path)))

    found = {split: read("hf:owner/name/config", split) for split in ("train", "validation", "test")}
    assert set(asked) == {("owner/name", "config")}
    assert sorted(found["train"] + found["validation"]) == sorted(texts["train"])
    assert len(found["validation"]) == 2 and found["test"] == ["a test"]
    assert read("hf:set", "train", validation_source="-") == texts["train"] and asked[-1] == ("set", None)
    assert read("hf:owner/set", "test") == ["a test"] and asked[-2:] == [("owner/set", None), ("owner", "set")]
    del texts["train"]
    with pytest.raises(ConfigError, match=r"hf:set has no train split, only test; choose another data set"):
        read("hf:set", "test")


@pytest.mark.full
def test_a_data_set_that_is_not_there(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "bigmac_jax.data", "prepare", "--config.data.source=hf:nobody/nothing"],
        env={"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "error: data.source=hf:nobody/nothing cannot be loaded (" in run.stderr


def test_names(tmp_path):
    assert _readings("wikitext") == [("wikitext", None)]
    assert _readings("owner/name") == [("owner/name", None), ("owner", "name")]
    assert _readings("owner/name/config") == [("owner/name", "config")]
    assert _readings(str(tmp_path)) == [(str(tmp_path), None)]
    assert _readings(f"{tmp_path}/config") == [(str(tmp_path), "config")]
