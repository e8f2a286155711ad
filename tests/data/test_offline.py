"""A network that is not there, and a disk that is full: one line, in seconds."""

import contextlib
import errno
import threading
import time
import types
import urllib.parse

import pytest
import requests

from bigmac_jax.config import ConfigError
from bigmac_jax.data import datasets
from bigmac_jax.data.files import disk_full_fix
from bigmac_jax.data.token_shards import write_shard
from bigmac_jax.evaluation.tasks.task_rows import read_rows


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize(("name", "host"), [("hellaswag", "raw.githubusercontent.com"), ("lambada", "zenodo.org")])
def test_a_dataset_that_cannot_be_downloaded(tmp_path, monkeypatch, name, host, hangs):
    """One line after seconds, which names the folder to fill. TFDS knows hellaswag only once its module is imported."""

    def head(*_, **__):
        time.sleep(60 if hangs else 0)
        raise requests.ConnectionError

    monkeypatch.setattr(requests, "head", head)
    monkeypatch.setattr(datasets, "_PATIENCE", 0.3)
    start = time.monotonic()
    with pytest.raises(ConfigError) as error:
        read_rows(f"tfds:{name}", "validation", 0, str(tmp_path), f"{name}'s source=tfds:{name}")
    assert time.monotonic() - start < 10
    message = str(error.value)
    assert f"{host} can't be reached" in message and f"fills {tmp_path}/tfds/{name}/1." in message
    assert "--task_data=NAME=PATH" in message and "\n" not in message


def test_hosts_are_asked_before_a_download(tmp_path, monkeypatch):
    """Four at most, each once; none where there is nothing to fetch, or an earlier attempt has fetched it."""
    asked, answers = [], {"a.org", "e.org"}

    def head(url, timeout):
        asked.append(url)
        if urllib.parse.urlsplit(url).netloc not in answers:
            raise requests.ConnectionError
        assert timeout == datasets._PATIENCE

    monkeypatch.setattr(requests, "head", head)
    monkeypatch.setattr(datasets, "_PATIENCE", 0.05)
    info = types.SimpleNamespace(full_name="set/config/1.0.0")
    urls = [f"https://{host}.org/file" for host in "dcba"]
    for given, error, count in (
        (urls, "", 4), (urls[:3], r"and b\.org can't be reached", 3),
        ([*urls[:3], *urls[:1], "https://e.org/x"], "", 4),
        ([*urls[:3], "http://f.org/x", "https://e.org/x"], r"b\.org and f\.org can't", 4), ([], "", 0), (None, "", 0),
        (["file:///x"], "", 0),
    ):  # fmt: skip
        asked.clear()
        builder = types.SimpleNamespace(url_infos=given, data_path=tmp_path / "set/config/1.0.0", info=info)
        with pytest.raises(ConfigError, match=error) if error else contextlib.nullcontext():
            datasets._check_network(builder, "tfds:set")
        if not error:
            time.sleep(0.01)  # those that answer later
        assert len(asked) == len(set(asked)) == count, given


def test_what_was_downloaded_needs_no_network(tmp_path, monkeypatch):
    """And one host of several that answers is enough."""
    builder = types.SimpleNamespace(
        url_infos={"https://a.example/x": 0, "https://b.example/y": 0},
        data_path=str(tmp_path / "some" / "config" / "1.0.0"),
        info=types.SimpleNamespace(full_name="some/config/1.0.0"),
    )
    answering, waited_for = set(), []

    def head(url, timeout):
        waited_for.append(not threading.current_thread().daemon)  # by Python's end
        if url not in answering:
            raise requests.ConnectionError

    monkeypatch.setattr(requests, "head", head)
    monkeypatch.setattr(datasets, "_PATIENCE", 0.3)
    with pytest.raises(ConfigError, match=r"S is not here, and a\.example and b\.example can't be reached"):
        datasets._check_network(builder, "S")
    answering.add("https://b.example/y")
    datasets._check_network(builder, "S")
    answering.clear()
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "x.INFO").write_text("{}")
    datasets._check_network(builder, "S")
    assert waited_for == [False] * 4


def test_a_full_disk_is_named(tmp_path):
    mount = next(str(parent) for parent in tmp_path.parents if parent.is_mount())
    (tmp_path / "stream").mkdir()
    said = rf"stream cannot be written: the disk at {mount} \(.* GB\) is full"
    with pytest.raises(ConfigError, match=said), write_shard(tmp_path / "stream" / "00000-000.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list((tmp_path / "stream").iterdir())
    caused = RuntimeError("failed")
    caused.__cause__ = OSError(errno.EDQUOT, "quota")
    assert disk_full_fix(caused, tmp_path / "not" / "there").startswith(f"the disk at {mount}")
    assert disk_full_fix(OSError(errno.EACCES, "no"), tmp_path) == ""
