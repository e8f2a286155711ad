"""Paths, whole writes, local copies and leases, each against a real server."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import threading
import time
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import pytest

from benchmarks.stores import BUCKET, Proxy, Server, gcs, s3
from bigmac_jax.config import ConfigError, DataConfig
from bigmac_jax.data import token_cache
from bigmac_jax.data.corpus import open_documents
from bigmac_jax.data.files import Digests, file_digest
from bigmac_jax.data.token_cache import open_cached_stream
from bigmac_jax.data.token_shards import ShardStore
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.runtime import leases, storage
from bigmac_jax.runtime import mirror as mirror_module
from bigmac_jax.runtime.leases import HeldError, Lease
from bigmac_jax.runtime.mirror import Mirror
from bigmac_jax.training import manifest
from bigmac_jax.training.checkpoint import Checkpoints

from .conftest import entered


def test_a_path(place: str, tmp_path: pathlib.Path) -> None:
    folder = storage.locate(place, "workdir")
    assert storage.is_store(folder) and str(folder / "a") == f"{place}/a" and not folder.exists()
    storage.write_atomically(folder / "b" / "c.txt", b"one")
    storage.write_atomically(folder / "b-d.txt", b"three")
    before = storage.file_version(folder / "b" / "c.txt")
    storage.write_atomically(folder / "b" / "c.txt", b"four")
    assert (folder / "b" / "c.txt").read_bytes() == b"four" and storage.file_version(folder / "b" / "c.txt") != before
    storage.fetch_file(folder / "b" / "c.txt", tmp_path / "new" / "folders" / "c.txt")
    assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [b"four"]
    # In the order of paths, which is not that of their texts: a corpus has one order wherever it lies.
    assert storage.list_files(folder) == {folder / "b" / "c.txt": 4, folder / "b-d.txt": 5}
    assert list(storage.list_files(folder)) == [folder / "b" / "c.txt", folder / "b-d.txt"]
    assert list(storage.find_files(folder / "**" / "*.txt")) == [folder / "b" / "c.txt", folder / "b-d.txt"]
    storage.move(folder / "b", folder / "e")
    assert list(storage.list_files(folder)) == [folder / "b-d.txt", folder / "e" / "c.txt"]
    storage.remove_tree(folder)
    storage.remove_tree(folder)
    assert not storage.list_files(folder)


def test_what_other_processes_write_is_seen(place: str) -> None:
    """fsspec keeps listings; here another instance of it writes."""
    folder = storage.locate(place, "workdir")
    storage.write_atomically(folder / "a", b"")
    assert [path.name for path in folder.iterdir()] == ["a"]
    type(storage.filesystem(folder))(skip_instance_cache=True).pipe_file(str(folder / "b"), b"")
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"] and (folder / "b").exists()


def test_a_store_that_does_not_answer_is_not_empty(monkeypatch: pytest.MonkeyPatch, gs_server: Server) -> None:
    """Or a run would begin anew, or its checkpoints be taken for unfinished ones."""
    workdir = storage.locate(f"gs://{BUCKET}/none", "workdir")
    checkpoints = Checkpoints(workdir)
    assert manifest.list_steps(workdir) == []

    def refused(*_: object, **__: object) -> None:
        raise ConnectionResetError

    folder = checkpoints._folder
    monkeypatch.setattr(storage.filesystem(folder.path), "ls", refused)
    for read in (lambda: manifest.list_steps(workdir), folder.remove_unfinished, checkpoints.newest_intact):
        with pytest.raises(ConnectionResetError):
            read()


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize("mode", ["503", "reset"])
def test_texts_are_read_over_a_network_that_fails(scheme: str, mode: str, tmp_path: pathlib.Path) -> None:
    """For ten seconds, in the middle of a file."""
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(Proxy())
        server = stack.enter_context(gcs(tmp_path, proxy.port) if scheme == "gs" else s3(proxy.port))
        proxy.target = server.port
        stack.enter_context(entered(server))
        file = storage.locate(f"{scheme}://{BUCKET}/text.jsonl", "data.source")
        rows = [json.dumps({"text": f"row {i} " + "word " * 2000}) for i in range(7000)]
        file.write_bytes("\n".join(rows).encode())  # 70 MB: s3fs asks for 50 at a time
        documents = iter(
            open_documents(DataConfig(str(file), validation_source="-", test_source="-"), "train", str(tmp_path))
        )
        found = [next(documents)]
        proxy.disturb(mode)
        timer = threading.Timer(10, proxy.disturb, ("pass",))
        timer.start()
        found += documents
        timer.join()
        assert proxy.refused > 0 and found == [json.loads(row)["text"] for row in rows]


def test_a_folder_is_fetched_whole_or_not_at_all(
    place: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of what was there before, which stays if the store fails on the way; nothing half-way is left."""
    folder, target = storage.locate(place, "workdir") / "run", tmp_path / "copies" / "run"
    contents = {"a.txt": b"one", "b/c.txt": b"two", "b/d/e.txt": b""}
    for name, content in contents.items():
        storage.write_atomically(folder / name, content)
    storage.write_atomically(storage.locate(place, "workdir") / "runs.txt", b"beside it")
    target.mkdir(parents=True)
    (target / "old.txt").write_text("old")

    def found() -> dict[str, bytes]:
        assert [path.name for path in target.parent.iterdir()] == ["run"]
        return {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}

    with monkeypatch.context() as patch:

        def half(names: list[str], local: list[str], **_: object) -> None:
            assert len(names) == 3 and all(path.startswith(f"{target.parent}/.run.part-") for path in local)
            raise ConnectionResetError

        patch.setattr(storage.filesystem(folder), "get", half)
        with pytest.raises(ConnectionResetError):
            storage.fetch_tree(folder, target)
    assert found() == {"old.txt": b"old"}
    storage.fetch_tree(folder, target)
    assert found() == contents
    storage.fetch_tree(folder, tmp_path / "not" / "there" / "yet")
    assert (tmp_path / "not" / "there" / "yet" / "a.txt").read_bytes() == b"one"
    with storage.local_folder(folder) as copy:
        assert copy.name == "run" and (copy / "b" / "c.txt").read_bytes() == b"two"
    assert not copy.exists()
    nothing = folder.parent / "nothing"
    with pytest.raises(ConfigError, match="/nothing holds nothing; give a folder"), storage.local_folder(nothing):
        pass


def test_a_bucket_that_is_not_there_is_not_made(place: str) -> None:
    wrong = storage.locate(place.replace("bucket", "buket"), "workdir")
    storage.make_folder(wrong)
    with pytest.raises(storage.errors()) as error:
        storage.write_atomically(wrong / "a", b"")
    assert storage.is_store_error(error.value) and not wrong.parent.exists()


def test_missing_packages_and_schemes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    for place, extra in (("gs://a/b", "gcs"), ("s3://a/b", "s3")):
        with pytest.raises(ConfigError, match=rf"--workdir={place} needs .*; pip install 'bigmac-jax\[{extra}\]'$"):
            storage.locate(place, "--workdir")
    with pytest.raises(ConfigError, match=r"must be a local path, or begin with gs:// or s3://"):
        storage.locate("hdfs://a/b", "--workdir")
    assert storage.locate("a/b", "--workdir") == pathlib.Path("a/b")


def test_errors_are_told_in_a_line() -> None:
    """Those of a store have no number; those of a disk say what the system calls them."""
    for error, of_store, said in (
        (OSError(2, "No such file"), False, "No such file"),
        (PermissionError(13, "Permission\ndenied"), False, "Permission denied"),
        (OSError("broken  pipe"), True, "OSError: broken pipe"),
        (ConnectionResetError(), True, "ConnectionResetError:"),
        (ValueError("no\nnumber"), False, "ValueError: no number"),
        (OSError("x" * 300), True, ("OSError: " + "x" * 300)[:200]),
    ):
        assert storage.is_store_error(error) == of_store and storage.reason(error) == said
    assert storage.errors(KeyError)[:2] == (OSError, KeyError)


def test_links_out_of_a_folder_are_refused(tmp_path: pathlib.Path) -> None:
    """But for those of the hub's cache, from a snapshot to the model's blobs."""
    model = tmp_path / "models--a"
    snapshot, other = model / "snapshots" / "1", tmp_path / "other"
    for folder in (snapshot, model / "blobs", other, tmp_path / "blobs"):
        folder.mkdir(parents=True)
        (folder / "file").write_text("text")
    for name, target in {"blob": model / "blobs", "out": other, "above": tmp_path / "blobs", "own": snapshot}.items():
        (snapshot / name).symlink_to(target / "file")
        (other / name).symlink_to(target / "file")
    for folder, name, fine in (
        (snapshot, "file", True), (snapshot, "blob", True), (snapshot, "own", True), (snapshot, "out", False),
        (snapshot, "above", False), (other, "out", True), (other, "blob", False),
    ):  # fmt: skip
        with contextlib.nullcontext() if fine else pytest.raises(ConfigError, match="outside of its folder"):
            assert storage.check_inside(folder, name) == folder / name


def test_a_file_that_a_disk_does_not_take_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_atomically(tmp_path / "a", b"before")
    monkeypatch.setattr(storage.os, "fsync", mock.Mock(side_effect=OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        storage.write_atomically(tmp_path / "a", b"after")
    assert storage.list_files(tmp_path) == {tmp_path / "a": 6} and (tmp_path / "a").read_bytes() == b"before"


def test_two_write_one_file_at_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one stays, whole; what a killed process has left goes after an hour, by whoever writes the file next."""
    fsync, path = os.fsync, tmp_path / "a[1]"
    left = [tmp_path / f"a[1].{name}.tmp" for name in ("old", "new")] + [tmp_path / "a1.old.tmp"]
    for file in left:
        file.touch()
    for file in left[::2]:
        os.utime(file, (0, 0))

    def write_between(file: int) -> None:
        monkeypatch.setattr(storage.os, "fsync", fsync)
        storage.write_atomically(path, b"another's")
        fsync(file)

    monkeypatch.setattr(storage.os, "fsync", write_between)
    storage.write_atomically(path, b"this one's")
    assert path.read_bytes() == b"this one's" and sorted(tmp_path.iterdir()) == [left[2], path, left[1]]


def test_linked_folders_are_listed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each folder once, where it stands, or by the first of its links; what cannot be looked into is named."""
    for name in ("c/a.txt", "c/sub/b.txt", "far/web.txt", "far/deep/d.txt"):
        storage.write_atomically(tmp_path / name, name.encode())
    folder = tmp_path / "c"
    for link, target in (("far", "../far"), ("sub/up", ".."), ("one.txt", "../far/web.txt")):
        (folder / link).symlink_to(target)
    (tmp_path / "far" / "back").symlink_to("../c/sub")
    for link, target in (("again", "../far"), ("latest", "sub")):
        (folder / link).symlink_to(target)
    os.mkfifo(folder / "pipe")
    names = ["a.txt", "again/deep/d.txt", "again/web.txt", "one.txt", "sub/b.txt"]
    assert list(storage.list_files(folder)) == [folder / name for name in names]
    assert storage.list_files(folder)[folder / "again" / "web.txt"] == len("far/web.txt")
    (folder / "gone").symlink_to("../unmounted")
    (folder / "itself").symlink_to("itself")
    listdir = os.listdir

    def refuse(path: pathlib.Path) -> list[str]:
        if path == folder / "sub":
            raise PermissionError(errno.EACCES, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(storage.os, "listdir", refuse)
    found = storage.list_files(folder)
    assert [path.name for path, size in found.items() if not size] == ["gone", "itself", "sub"]


def test_paths_of_a_disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_atomically(tmp_path / "b" / "c.txt", b"three")
    storage.write_atomically(tmp_path / "a.txt", b"one")
    storage.write_atomically(tmp_path / "a.txt", b"other")
    assert storage.list_files(tmp_path) == {tmp_path / "a.txt": 5, tmp_path / "b" / "c.txt": 5}
    assert storage.list_folder(tmp_path) == [tmp_path / "a.txt", tmp_path / "b"]
    assert storage.list_folder(tmp_path / "no") == storage.list_folder(tmp_path / "a.txt") == []
    assert storage.find_files(tmp_path / "**" / "c*") == {tmp_path / "b" / "c.txt": 5}
    assert storage.find_files(tmp_path / "*") == {tmp_path / "a.txt": 5}  # and no folder
    (tmp_path / "b" / "a.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "self").symlink_to(tmp_path / "b")
    assert storage.find_files(tmp_path / "**" / "*.txt") == {tmp_path / "a.txt": 5, tmp_path / "b" / "c.txt": 5}
    (tmp_path / "b" / "gone.txt").symlink_to(tmp_path / "gone")
    assert storage.find_files(tmp_path / "b" / "g*") == {tmp_path / "b" / "gone.txt": 0}
    for link in ("a", "b/a.txt", "b/self", "b/gone.txt"):
        (tmp_path / link).unlink()
    assert storage.file_size(tmp_path / "a.txt") == 5
    assert storage.file_version(tmp_path / "a.txt") == str((tmp_path / "a.txt").stat().st_mtime_ns)
    with storage.local_folder(tmp_path / "b") as folder, storage.local_file(folder / "c.txt") as file:
        assert file.read_bytes() == b"three"
    with storage.open_lines(tmp_path / "a.txt") as lines:
        assert list(lines) == [b"other"]
    storage.move(tmp_path / "b", tmp_path / "d")
    assert storage.list_folder(tmp_path) == [tmp_path / "a.txt", tmp_path / "d"]
    storage.remove_tree(tmp_path / "d")
    storage.remove_tree(tmp_path / "d")
    storage.make_folder(tmp_path / "e" / "f")
    storage.make_folder(tmp_path / "e" / "f")
    assert storage.list_folder(tmp_path / "e") == [tmp_path / "e" / "f"]
    monkeypatch.chdir(tmp_path)
    assert storage.absolute(pathlib.Path("a.txt")) == tmp_path / "a.txt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = storage.make_local_copy_folder(pathlib.Path("gs:/a"))
    assert copy == tmp_path / "cache" / "bigmac_jax" / "stores" / hashlib.sha256(b"gs:/a").hexdigest()[:20]
    assert copy == storage.make_local_copy_folder(pathlib.Path("gs:/a")) and copy.is_dir()


def test_a_lease(place: str) -> None:
    """Held once; refused while it is renewed; free at once when it was let go, after its time when it was not."""
    folder, said = storage.locate(place, "workdir") / ".lock", list[str]()
    with Lease(folder, seconds=1, say=said.append).hold():
        start = time.monotonic()
        with pytest.raises(HeldError, match=r"process .* on "), Lease(folder, seconds=1).hold(wait=False):
            pass
        assert time.monotonic() - start < 1
    start = time.monotonic()
    with Lease(folder, seconds=1).hold(wait=False):
        assert time.monotonic() - start < 0.5 and not said
    dead = Lease(folder, seconds=2)
    assert dead._take(wait=False)  # and never renews
    start = time.monotonic()
    with Lease(folder, seconds=1, say=said.append).hold(wait=False):
        assert 1 <= time.monotonic() - start < 5
    assert "waiting until it is renewed, or 2 s old" in said[0] and said[1].endswith("taken over"), said
    assert [path.name for path in folder.iterdir()] == ["00000004"]


def test_who_lost_the_lease_is_told(place: str) -> None:
    folder, lost = storage.locate(place, "workdir") / ".lock", list[str]()
    with Lease(folder, seconds=1, lost=lost.append).hold():
        (folder / "00000002").write_bytes(json.dumps({"holder": "process 7 on node9"}).encode())
        time.sleep(1)
    assert lost == [f"{folder} was not renewed in time, and process 7 on node9 has taken it over"]


def test_whatever_a_store_raises_a_lease_is_renewed_or_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """gcsfs raises ValueError for some answers of a server, and a proxy's page is no JSON."""
    files, lost, answered = mock.Mock(), list[str](), threading.Event()
    monkeypatch.setattr(leases, "filesystem", lambda _: files)
    files.ls.side_effect = [[], ValueError("Bad Request: invalid"), *99 * [[]]]
    with Lease(folder := pathlib.Path("gs://b/x"), seconds=0.06, lost=lost.append).hold():
        files.pipe_file.side_effect = lambda *_, **__: answered.set()
        assert answered.wait(5) and not lost
    assert files.ls.call_count > 2
    monkeypatch.setattr(leases, "AWAY", 0.03)
    files.ls.side_effect = [[], *99 * [RuntimeError("no answer")]]
    with Lease(folder, seconds=0.06, lost=lambda line: (lost.append(line), answered.set())).hold():
        answered.clear()
        assert answered.wait(5)
        files.pipe_file.side_effect = ValueError("nor this one")  # when it is let go
    assert lost == ["gs:/b/x could not be renewed for 0 s (RuntimeError: no answer)"]


def test_only_one_of_many_gets_it(place: str) -> None:
    folder, inside, most = storage.locate(place, "workdir") / ".lock", [0], [0]

    def work() -> None:
        with Lease(folder, seconds=5).hold():
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.05)
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert most == [1]
    assert [path.name for path in folder.iterdir()] == ["00000005"]


def test_tokens_are_made_once_and_fetched_by_others(
    place: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("some words " * 50)
    made, make = list[int](), ShardStore._make
    monkeypatch.setattr(
        ShardStore, "_make", lambda store, unit, report: (made.append(unit), make(store, unit, report))[1]
    )

    def read() -> bytes:
        docs = open_documents(
            DataConfig(str(tmp_path / "a.txt"), validation_source="-", test_source="-"),
            "train",
            str(tmp_path / "digests"),
        )
        stream = open_cached_stream(docs, "train", ByteTokenizer(), place, processes=0)
        return bytes(stream.tokens(1, stream.num_tokens - 1).astype(np.uint8))

    text = (tmp_path / "a.txt").read_bytes()
    assert read() == read() == text and made == [0]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    assert read() == text and made == [0]
    (copy,) = (tmp_path / "another machine").rglob("*.bin")
    copy.write_bytes(b"123")  # damaged: fetched again
    assert read() == text and made == [0]
    with monkeypatch.context() as patch:  # another process has dropped the damaged copy already
        patch.setattr(token_cache, "_find_damaged", lambda *_: (copy.unlink(), [copy.stem])[1])
        assert read() == text and made == [0]
    kept = next(path for path in storage.list_files(storage.locate(place, "cache_dir")) if path.suffix == ".bin")
    storage.write_atomically(kept, b"123")  # damaged on the store: whoever has no copy is told
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a third"))
    with pytest.raises(ConfigError, match=r"00000-000\.bin is damaged; remove .*, and the text is tokenised again"):
        read()
    storage.remove_tree(kept.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a fourth"))
    assert read() == text and made == [0, 0]


def test_each_machine_keeps_digests_of_its_own(
    place: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    (tmp_path / "a.txt").write_text("some words")
    assert Digests(place, "corpus")([tmp_path / "a.txt"]) == [file_digest(tmp_path / "a.txt")]
    assert len(list((tmp_path / "machine").rglob("*.json"))) == 1
    assert not list(storage.list_files(storage.locate(place, "cache_dir") / "digests"))


def test_a_mirror(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = storage.locate(place, "workdir")
    mirror = Mirror(folder)
    with (mirror.folder / "metrics.jsonl").open("a") as file:
        file.write("1\n")
        file.flush()
        mirror.copy()
        assert (folder / "metrics.jsonl").read_bytes() == b"1\n"
        file.write("2\n")
        file.flush()
        mirror.copy_sometimes()  # not yet
        assert (folder / "metrics.jsonl").read_bytes() == b"1\n"
        monkeypatch.setattr(mirror_module, "_EVERY", 0.0)
        mirror.copy_sometimes()
        assert mirror._thread
        mirror._thread.join(30)
        assert (folder / "metrics.jsonl").read_bytes() == b"1\n2\n"
    mirror.close()
    assert not mirror.folder.exists()
    again = Mirror(folder)
    again.fetch("metrics.jsonl")
    again.fetch("nothing")
    assert (again.folder / "metrics.jsonl").read_bytes() == b"1\n2\n"
    again.close()


def test_a_store_is_asked_for_what_is_there_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again where it does not answer; what the user has set stays."""
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: name)
    retries = {"retries": {"max_attempts": 10, "mode": "standard"}}
    for own in ({}, {"s3": {"use_listings_cache": True, "config_kwargs": {}}}):
        conf: dict[str, Any] = {name: dict(values) for name, values in own.items()}
        monkeypatch.setattr(fsspec.config, "conf", conf)
        assert str(storage.locate("s3://bucket/run", "workdir")) == "s3://bucket/run"
        assert conf["gs"] == {"use_listings_cache": False}
        assert conf["s3"] == (own.get("s3") or {"use_listings_cache": False, "config_kwargs": retries})


def test_a_figure_is_as_large_on_a_store(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its format is that of the name."""
    figure, written = mock.Mock(), dict[pathlib.Path, bytes]()
    storage.save_figure(figure, tmp_path / "a.svg")
    on_disk = figure.savefig.call_args
    assert on_disk.args == (tmp_path / "a.svg",)
    monkeypatch.setattr(storage, "is_store", lambda path: True)
    monkeypatch.setattr(storage, "write_atomically", written.__setitem__)
    figure.savefig.side_effect = lambda file, **_: file.write(b"drawn")
    storage.save_figure(figure, tmp_path / "a.svg")
    assert figure.savefig.call_args.kwargs == on_disk.kwargs | {"format": "svg"} and on_disk.kwargs == {"dpi": 110}
    assert written == {tmp_path / "a.svg": b"drawn"}
