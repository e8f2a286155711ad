"""Files of a corpus are read once; afterwards their size, inode and times of change tell that they are the same."""

import os
import pathlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bigmac_jax.config import ConfigError
from bigmac_jax.data import datasets, files
from bigmac_jax.data.corpus import open_documents
from bigmac_jax.data.documents import WHOLE
from bigmac_jax.data.files import Digests
from bigmac_jax.data.local_files import FileDocuments
from bigmac_jax.data.pipeline import open_stream
from bigmac_jax.data.token_shards import ShardStore
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.runtime import storage


def bytes_read() -> int:
    """What this process has asked the system to read so far."""
    return int(pathlib.Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.fixture
def corpus(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(100):  # of which the 97th is for validation
        (folder / f"{i:02}.txt").write_text(f"document {i} " * 5000)
    return sorted(folder.iterdir())


def test_what_cannot_be_removed_is_left(corpus: list[pathlib.Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As what another process just now removes as well."""
    folder = corpus[0].parent
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", lambda *_, **__: os.stat(folder / "none"))
        files.remove(folder)
    assert not list(folder.iterdir())
    files.remove(folder)
    files.remove(folder)
    assert not folder.exists()


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are old enough as soon as they are written."""
    monkeypatch.setattr(files, "_RACY", -(10**9))


def read_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of the files that are digested from now on."""
    digest, names = files.file_digest, []
    monkeypatch.setattr(files, "file_digest", lambda path: (names.append(path.name), digest(path))[1])
    return names


def test_a_second_start_reads_no_text(corpus, settled, make_config, monkeypatch) -> None:
    config, names = make_config(corpus[0].parent), read_names(monkeypatch)
    size = sum(path.stat().st_size for path in corpus)
    read, streams = [], []
    for _ in range(2):
        before = bytes_read()
        streams.append([open_stream(config, split, ByteTokenizer()) for split in ("train", "validation")])
        read.append(bytes_read() - before)
        if len(read) == 1:
            assert sorted(name for name in names if name.endswith(".txt")) == [path.name for path in corpus]
        else:
            assert not names
        names.clear()
    assert read[0] > 2 * size > 4 * read[1], (read, size)  # of array_record's own: half a megabyte a split
    assert [s.num_tokens for s in streams[0]] == [s.num_tokens for s in streams[1]]
    assert [s.text for s in streams[0]] == [s.text for s in streams[1]]


@pytest.mark.full
def test_ten_thousand_files_of_five_gigabytes(tmp_path, make_config, monkeypatch) -> None:
    """They are sparse; what is tokenised is something shorter."""

    monkeypatch.setattr(FileDocuments, "units", [()])
    monkeypatch.setattr(FileDocuments, "read", lambda self, unit, seen: iter([("a", "a few", False)]))
    monkeypatch.setattr(FileDocuments, "portion", lambda self, beginning: WHOLE)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(10_000):
        with open(folder / f"{i}.txt", "wb") as file:
            file.write(b"%d" % i)
            file.truncate(512_000)
    time.sleep(files._RACY / 1e9)
    config = make_config(folder)
    for first in (True, False):
        before, start = bytes_read(), time.perf_counter()
        for split in ("train", "validation"):
            open_stream(config, split, ByteTokenizer())
        read, seconds = bytes_read() - before, time.perf_counter() - start
        if first:
            assert read > 5e9
        else:
            assert read < 0.01 * 5.12e9 and seconds < 3, (read, seconds)


@pytest.mark.parametrize(
    "use",
    [
        lambda place: files.Digests(place, "corpus"),
        lambda place: datasets._on_disk(storage.locate(place, "cache_dir")),
        lambda place: ShardStore(storage.locate(place, "cache_dir") / "tokens" / "a", "", None, "train", None),
    ],
)
@pytest.mark.parametrize("why", ["Not a directory", "Permission denied", "Could not determine home"])
def test_a_home_that_cannot_be_written_is_one_line(use, why, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" if why == "Not a directory" else tmp_path))
    if why == "Permission denied":
        monkeypatch.setattr(storage.os, "access", lambda *_: False)
    elif why != "Not a directory":

        def homeless(path):
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(pathlib.Path, "expanduser", homeless)
    line = rf"gs://bucket/\S+ is read from a copy .* cannot be written \(.*{why}.*\); set the .* XDG_CACHE_HOME to"
    with pytest.raises(ConfigError, match=line):
        use("gs://bucket/cache")


def test_only_what_is_new_or_changed_is_read(corpus, settled, tmp_path, monkeypatch) -> None:
    names = read_names(monkeypatch)
    digests = Digests(tmp_path / "cache", "corpus")
    first = digests(corpus)
    assert first == [files.file_digest(path) for path in corpus] and len(set(first)) == len(corpus)
    names.clear()
    assert digests(corpus) == digests(corpus[::-1])[::-1] == first and not names

    content = corpus[3].read_bytes()
    stat = corpus[3].stat()
    corpus[3].write_bytes(content.replace(b"document", b"DOCUMENT"))
    os.utime(corpus[3], ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as rsync or tar set it: ctime tells
    corpus[4].with_suffix(".new").write_bytes(b"x" * corpus[4].stat().st_size)
    os.replace(corpus[4].with_suffix(".new"), corpus[4])
    changed = digests(corpus)
    assert sorted(names) == ["03.txt", "04.txt"]
    assert [i for i, (a, b) in enumerate(zip(first, changed, strict=True)) if a != b] == [3, 4]

    corpus[5].unlink()
    names.clear()
    assert digests(corpus[:5] + corpus[6:]) == changed[:5] + changed[6:] and not names
    corpus[5].write_bytes(b"back, as something else")
    digests(corpus)
    assert names == ["05.txt"]


def test_a_file_that_was_just_changed_is_not_trusted(corpus, tmp_path, monkeypatch) -> None:
    """It may change again in the same tick of the file system's clock."""
    state, age = files._state, 1.0
    then = time.time_ns()
    monkeypatch.setattr(files, "_state", lambda path: [state(path)[0], *[int(then - age * 1e9)] * 2, 7])
    digests = Digests(tmp_path / "cache", "corpus")
    path = corpus[0]
    before = digests([path])
    path.write_bytes(path.read_bytes()[:-1] + b"x")  # with the same size and, here, times
    after = digests([path])
    assert after != before and after == [files.file_digest(path)]
    age = 10.0  # what is said above is all that is looked at: an old file with the same times is the same one
    kept = digests([path])
    path.write_bytes(path.read_bytes()[:-1] + b"y")
    assert digests([path]) == kept


@pytest.mark.parametrize("damage", ["digit", "cut", "binary", "deep", "list", "missing"])
def test_a_damaged_table_is_not_trusted(corpus, settled, tmp_path, monkeypatch, damage: str) -> None:
    digests = Digests(tmp_path / "cache", "corpus")
    first = digests(corpus)
    (table,) = (tmp_path / "cache" / "digests").glob("*.json")
    content = table.read_bytes()
    table.write_bytes({
        "digit": content.replace(first[0].encode(), b"0" * 64), "cut": content[:-9], "binary": b"\xff\xfe" + content,
        "deep": b"[" * 100_000, "list": b"[]", "missing": b"{}",
    }[damage])  # fmt: skip
    names = read_names(monkeypatch)
    assert digests(corpus) == first and len(names) == len(corpus)
    names.clear()
    assert digests(corpus) == first and not names


def test_those_who_come_at_the_same_time_wait_for_the_first(corpus, settled, tmp_path, monkeypatch) -> None:
    names = read_names(monkeypatch)
    with ThreadPoolExecutor(6) as pool:  # each with a file handle, and so a lock, of its own
        found = list(pool.map(lambda _: Digests(tmp_path / "cache", "corpus")(corpus), range(6)))
    assert sorted(names) == [path.name for path in corpus]
    assert found == [found[0]] * 6


def test_a_full_disk_costs_the_table_alone(corpus, settled, tmp_path, monkeypatch) -> None:
    digests = Digests(tmp_path / "cache", "corpus")

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(pathlib.Path, "write_text", no_space)
        first = digests(corpus)
    assert digests(corpus) == first


def test_a_file_that_cannot_be_read_is_one_line(corpus, make_config, tmp_path) -> None:
    documents = open_documents(make_config(corpus[0].parent).data, "train", str(tmp_path / "cache"))
    corpus[7].unlink()
    with pytest.raises(ConfigError, match=r"07\.txt cannot be read \(No such file or directory\); check the file"):
        _ = documents.fingerprint
