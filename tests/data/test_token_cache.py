"""The token stream on disk: convention, counts, and what happens to it when processes die or meet."""

import contextlib
import hashlib
import json
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_dataset  # noqa: F401  registers the datasets
from conftest import SAMPLE

from bigmac_jax.config import ConfigError
from bigmac_jax.data import arrow_tables, encoding, files, local_files, readers, token_cache, token_shards
from bigmac_jax.data.corpus import join_fingerprints
from bigmac_jax.data.encoding import Counts, encode_stream
from bigmac_jax.data.pipeline import open_stream, text_stream
from bigmac_jax.data.token_cache import CachedStream, JoinedStream, MemoryStream
from bigmac_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from bigmac_jax.runtime import leases

ROOT = pathlib.Path(__file__).parents[2]
EOS = 256
NOTHING_HELD_OUT = {"validation_source": "-", "test_source": "-"}


def start(*arguments: object) -> subprocess.Popen:
    script = pathlib.Path(__file__).with_name("tokenise.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def rows(tmp_path):
    """48 JSON lines, most of them in train."""
    texts = [f"{SAMPLE} {i} " + "word " * (37 * i) for i in range(48)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path, texts


def test_convention_and_counts(rows, make_config, tmp_path):
    path, texts = rows
    stream = open_stream(make_config(path, **NOTHING_HELD_OUT), "train", ByteTokenizer())
    expected = [EOS, *(i for text in texts for i in [*text.encode(), EOS])]
    assert stream.tokens(0, stream.num_tokens).tolist() == expected
    assert stream.num_tokens == len(expected) > 20_000
    assert stream.counts.documents == len(texts)
    assert stream.counts.bytes == sum(len(text.encode()) for text in texts)
    assert stream.counts.words == sum(len(text.split()) for text in texts)
    (index,) = tmp_path.glob("cache/tokens/train-*/index.json")
    assert json.loads(index.read_text())["dtype"] == "uint16"


def test_random_access(rows, make_config, monkeypatch):
    """Across shards, of which few are open at a time, and in a copy for another process."""
    monkeypatch.setattr(encoding, "_BATCH", 1000)
    monkeypatch.setattr(token_shards, "SHARD", 4096)
    monkeypatch.setattr(token_cache, "_OPEN", 2)
    stream = open_stream(make_config(rows[0]), "train", ByteTokenizer())
    whole = stream.tokens(0, stream.num_tokens)
    assert whole.dtype == np.int32 and len(stream._files) == 2
    edges = stream._start[1:].tolist()
    assert len(edges) > 5 and whole[0] == EOS
    copy = pickle.loads(pickle.dumps(stream))
    for a, b in [(0, 1), (5, 5), (edges[0] - 1, edges[0]), (edges[0], edges[0] + 1), (edges[1] - 3, edges[4] + 2),
                 (stream.num_tokens - 1, stream.num_tokens)]:  # fmt: skip
        np.testing.assert_array_equal(stream.tokens(a, b), whole[a:b])
        np.testing.assert_array_equal(copy.tokens(a, b), whole[a:b])
    for a, b in [(-1, 3), (4, 3), (0, stream.num_tokens + 1)]:
        with pytest.raises(IndexError):
            stream.tokens(a, b)


def test_large_vocabularies_keep_their_ids(text_file, make_config):
    class Large(ByteTokenizer):
        vocab_size, eos_id, fingerprint = 100_001, 100_000, "large"

    stream = open_stream(make_config(text_file, **NOTHING_HELD_OUT), "train", Large())
    assert stream.tokens(0, 2).tolist() == [100_000, ord("0")]
    assert stream.tokens(stream.num_tokens - 1, stream.num_tokens).tolist() == [100_000]


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_a_token_takes_two_bytes_while_its_largest_does(size, dtype, text_file, make_config, tmp_path):
    class AtItsLimit(ByteTokenizer):
        vocab_size, eos_id, fingerprint = size, size - 1, str(size)

    stream = open_stream(make_config(text_file, **NOTHING_HELD_OUT), "train", AtItsLimit())
    assert stream.tokens(0, 2).tolist() == [size - 1, ord("0")]
    (index,) = tmp_path.glob("cache/tokens/train-*/index.json")
    assert json.loads(index.read_text())["dtype"] == dtype
    assert index.with_name("00000-000.bin").stat().st_size == stream.num_tokens * np.dtype(dtype).itemsize


def test_a_shard_ends_with_the_batch_that_fills_it(tmp_path, make_config, monkeypatch):
    """Documents of four letters and an end; the first shard has an end of text before them. The last one, which holds
    nothing, is not of the index."""
    monkeypatch.setattr(encoding, "_BATCH", 4)
    monkeypatch.setattr(token_shards, "SHARD", 5)
    (tmp_path / "rows.jsonl").write_text('{"text": "abcd"}\n' * 3)
    stream = open_stream(make_config(tmp_path / "rows.jsonl", **NOTHING_HELD_OUT), "train", ByteTokenizer())
    (index,) = tmp_path.glob("cache/tokens/train-*/index.json")
    assert re.fullmatch("train-[0-9a-f]{20}", index.parent.name)
    shards = [(name, tokens) for name, tokens, _ in json.loads(index.read_text())["shards"]]
    assert shards == [("00000-000", 6), ("00000-001", 5), ("00000-002", 5)]
    assert (index.parent / "00000-003.bin").read_bytes() == b""
    assert stream.tokens(0, 16).tolist() == [EOS, *([*b"abcd", EOS] * 3)]


def test_made_once_and_made_again_when_the_text_changes(text_file, make_config, tmp_path, monkeypatch):
    config, made = make_config(text_file), []
    make = token_shards.ShardStore._make
    monkeypatch.setattr(token_shards.ShardStore, "_make", lambda *a: (made.append(1), make(*a))[1])
    first = open_stream(config, "train", ByteTokenizer())
    assert open_stream(config, "train", ByteTokenizer()).num_tokens == first.num_tokens
    assert len(made) == 1
    text_file.write_text(text_file.read_text().replace("0007", "7777"))
    changed = open_stream(config, "train", ByteTokenizer())
    assert len(made) == 2
    assert changed.tokens(36, 40).tolist() == list(b"7777")
    other = ByteTokenizer()
    other.fingerprint = "another"
    open_stream(config, "train", other)
    assert len(made) == 3


def test_tokens_with_another_end_are_other_tokens(text_file, make_config):
    """As when the same file is found to have another."""
    tokenizer = ByteTokenizer()
    first = open_stream(make_config(text_file), "train", tokenizer)
    tokenizer.eos_id = 0
    again = open_stream(make_config(text_file), "train", tokenizer)
    assert (first.tokens(0, 1)[0], again.tokens(0, 1)[0], again.eos_id) == (EOS, 0, 0)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "index", "fewer tokens", "gone", "unit"])
def test_damage_is_found_and_mended(rows, make_config, tmp_path, caplog, monkeypatch, damage):
    """Of what is damaged alone: other units are not made again."""
    monkeypatch.setattr(local_files, "UNIT", 20_000)
    config, made = make_config(rows[0]), []
    expected = open_stream(config, "train", ByteTokenizer()).tokens(0, 20_000)
    folder = next(tmp_path.glob("cache/tokens/train-*"))
    file, index = sorted(folder.glob("*.bin"))[1], folder / "index.json"
    content = file.read_bytes()
    make = token_shards.ShardStore._make
    monkeypatch.setattr(
        token_shards.ShardStore, "_make", lambda store, unit, *a: (made.append(unit), make(store, unit, *a))[1]
    )
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "index":
        index.write_text('{"key"')
    elif damage == "fewer tokens":
        meta = json.loads(index.read_text())
        meta["counts"]["tokens"] = 20_000
        index.write_text(json.dumps(meta))
    elif damage == "unit":
        (folder / "00001.json").write_bytes(b"[")
        index.write_bytes(b"")
    else:
        file.unlink()
    np.testing.assert_array_equal(open_stream(config, "train", ByteTokenizer()).tokens(0, 20_000), expected)
    assert sum("tokenising again" in record.message for record in caplog.records) == 1
    assert made == ([] if damage in ("index", "fewer tokens") else [1])
    assert file.read_bytes() == content


def test_killed_half_way(make_config, tmp_path):
    """What was finished stays; the rest is as if nothing had happened."""
    path = tmp_path / "large.txt"
    path.write_text("some words on a line\n" * 200_000)  # five batches
    config = make_config(path, **NOTHING_HELD_OUT)
    process = start(path, config.cache_dir, "bytes", "stop")
    assert process.stdout.readline() == "half-way\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = pathlib.Path(config.cache_dir).glob("tokens/train-*")
    assert sorted(p.name for p in folder.glob("0*")) == ["00000-000.bin", "00000-000.json", "00000-001.bin",
                                                          "00000-001.json"]  # fmt: skip
    made = (folder / "00000-000.bin").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_shards, "SHARD", 1 << 20)
        patch.setattr(token_cache, "SHARD", 1 << 20)
        stream = open_stream(config, "train", ByteTokenizer())
    found = stream.tokens(0, stream.num_tokens)
    assert found[1:-1].astype(np.uint8).tobytes() == path.read_bytes() and found[0] == found[-1] == EOS
    assert stream.counts.words == 1_000_000 and stream.counts.documents == 1
    assert (folder / "00000-000.bin").stat().st_mtime_ns == made
    assert {p.suffix for p in folder.glob("00000-*")} == {".bin"} and not list(folder.glob("*.part"))


def test_killed_before_each_write(tmp_path, make_config, monkeypatch):
    """And before each file that goes: in the end there are the same files, with the same in them."""

    class Killed(BaseException):
        pass

    steps, last = 0, 0

    def counted(function):
        def step(*arguments, **options):
            nonlocal steps
            steps += 1
            if steps == last:
                raise Killed
            return function(*arguments, **options)

        return step

    def files_of(config):
        (folder,) = pathlib.Path(config.cache_dir).glob("tokens/train-*")
        return {path.name: path.read_bytes() for path in folder.glob("[0-9i]*")}

    monkeypatch.setattr(local_files, "UNIT", 1 << 13)
    monkeypatch.setattr(token_shards, "SHARD", 1 << 12)
    monkeypatch.setattr(encoding, "_BATCH", 1 << 11)
    for module, name in [(token_shards, "_write_record"), (token_shards, "write_shard"), (pathlib.Path, "unlink")]:
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "word " * (300 + 100 * i)}) + "\n" for i in range(8)))
    config = make_config(rows, **NOTHING_HELD_OUT)
    open_stream(config, "train", ByteTokenizer())
    expected, total = files_of(config), steps
    assert total > 10 and len(expected) > 6
    for cut in range(1, total + 1):
        shutil.rmtree(config.cache_dir)
        steps, last = 0, cut
        with pytest.raises(Killed):
            open_stream(config, "train", ByteTokenizer())
        steps, last = 0, 0
        open_stream(config, "train", ByteTokenizer())
        assert files_of(config) == expected, cut


@pytest.mark.parametrize("first", ["store", "disk"])
def test_a_corpus_that_is_cut_otherwise_after_a_kill(make_config, tmp_path, monkeypatch, first):
    """As when it is moved from a store, where no table is cut, or to one: nothing made of other slices is taken."""

    class Killed(BaseException):
        pass

    monkeypatch.setattr(local_files, "UNIT", 1 << 12)
    monkeypatch.setattr(token_shards, "SHARD", 1 << 11)
    monkeypatch.setattr(encoding, "_BATCH", 1 << 10)
    texts = [[f"{name}{i:02} " * 100 for i in range(24)] for name in "ab"]
    (tmp_path / "tables").mkdir()
    for name, column in zip("ab", texts, strict=True):
        path = tmp_path / "tables" / f"{name}.parquet"
        pq.write_table(pa.table({"text": column}), path, row_group_size=6, compression="none", use_dictionary=False)
    expected = [EOS, *(i for column in texts for text in column for i in [*text.encode(), EOS])]
    config = make_config(tmp_path / "tables", **NOTHING_HELD_OUT)

    def read(place: str) -> tuple[int, list[int]]:
        monkeypatch.setattr(readers.storage, "is_store", lambda path: place == "store" and path.suffix == ".parquet")
        monkeypatch.setattr(arrow_tables.storage, "local_file", contextlib.nullcontext)
        stream = open_stream(config, "train", ByteTokenizer())
        return stream.counts.documents, stream.tokens(0, stream.num_tokens).tolist()

    second, write = "disk" if first == "store" else "store", token_shards._write_record
    for last in ("00000.json", "00001-000.json"):  # what the killed process wrote at last
        shutil.rmtree(config.cache_dir, ignore_errors=True)

        def killed(path: pathlib.Path, record: dict, last: str = last) -> None:
            write(path, record)
            if path.name == last:
                raise Killed

        monkeypatch.setattr(token_shards, "_write_record", killed)
        with pytest.raises(Killed):
            read(first)
        monkeypatch.setattr(token_shards, "_write_record", write)
        assert read(second) == (48, expected)
    # A repair, of a cache that was finished before the move.
    next(tmp_path.glob("cache/tokens/train-*/00001-000.bin")).write_bytes(b"damaged")
    assert read(first) == (48, expected)


def test_a_cache_of_an_earlier_version_is_read_and_mended(rows, make_config, tmp_path, monkeypatch):
    """Whose records do not name their slices; of what is finished, the damaged unit alone is made again."""
    monkeypatch.setattr(local_files, "UNIT", 20_000)
    config, made = make_config(rows[0]), []
    expected = open_stream(config, "train", ByteTokenizer()).tokens(0, 20_000)
    folder = next(tmp_path.glob("cache/tokens/train-*"))
    for path in folder.glob("0*.json"):
        record = token_shards._read_record(path)
        for shard in record["shards"]:
            del shard["slices"]
        token_shards._write_record(path, record)
    make = token_shards.ShardStore._make
    monkeypatch.setattr(
        token_shards.ShardStore, "_make", lambda store, unit, *a: (made.append(unit), make(store, unit, *a))[1]
    )
    np.testing.assert_array_equal(open_stream(config, "train", ByteTokenizer()).tokens(0, 20_000), expected)
    assert made == []
    (folder / "00001-000.bin").unlink()
    np.testing.assert_array_equal(open_stream(config, "train", ByteTokenizer()).tokens(0, 20_000), expected)
    assert made == [1]


def test_no_index_without_all_units(rows, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(local_files, "UNIT", 20_000)
    monkeypatch.setattr(token_cache, "make_shards", lambda store, processes: store.work([0, 2], lambda *a: None))
    with pytest.raises(ConfigError, match=r"^10 of 12 units in .* are gone, or another process .*; start again"):
        open_stream(make_config(rows[0]), "train", ByteTokenizer())
    assert not list(tmp_path.glob("cache/tokens/train-*/index.json"))


def test_who_waits_for_others_looks_now_and_then(tmp_path, monkeypatch):
    """Where a look has made a unit, the rest is looked at at once."""
    held, sleeps, made = iter([True, True, True, False, True, False]), [], []

    def lock(path: pathlib.Path, wait: bool) -> contextlib.nullcontext[None]:
        if next(held):
            raise leases.HeldError
        return contextlib.nullcontext()

    monkeypatch.setattr(token_shards.leases, "lock", lock)
    monkeypatch.setattr(token_shards.time, "sleep", sleeps.append)
    store = types.SimpleNamespace(kept=tmp_path, finished=lambda unit: None, size_of=int)
    store._make = lambda unit, report: made.append((unit, len(sleeps)))
    token_shards.ShardStore.work(store, [0, 1], lambda unit, read: None)
    # Looks: 0 and 1 are held; 0 is held, 1 not; 0 is held; 0 is not.
    assert made == [(1, 1), (0, 2)] and sleeps == [token_shards._POLL] * 2


@pytest.mark.full
def test_two_processes_at_once(make_config, tmp_path):
    source = "tfds:tiny_text/plain"  # so that the dataset, the tokenizer and the tokens are all to be made
    config = make_config(source, text_field="body", tokenizer="bpe", vocab_size=500)
    processes = [start(source, config.cache_dir, "bpe") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    results = {line for output in outputs for line in output.splitlines() if line.startswith("result")}
    together = "".join(outputs)
    assert [together.count(s) for s in ("preparing in", "training a BPE", "train split: ")] == [1, 1, 1]
    # And BPE training is deterministic: a third process, this one, gets the same in a cache of its own.
    object.__setattr__(config, "cache_dir", str(tmp_path / "another"))
    tokenizer = load_tokenizer(config)
    assert results == {f"result {tokenizer.fingerprint} {open_stream(config, 'train', tokenizer).num_tokens}"}


@pytest.mark.full
def test_one_large_document(make_config, tmp_path, sotu):
    path = tmp_path / "large.txt"
    words = "".join(f"word{i % 977} and\tmore\n" for i in range(500_000))
    path.write_text(words + "x" * 1_000_000)  # 11 MB, a word of 1 MB at the end
    config = make_config(path, **NOTHING_HELD_OUT)
    begin, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stream = open_stream(config, "train", sotu[1])
    assert time.perf_counter() - begin < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000  # KB
    assert (stream.counts.documents, stream.counts.bytes) == (1, path.stat().st_size)
    assert stream.counts.words == 1_500_001
    ids = stream.tokens(0, stream.num_tokens)
    assert (ids == sotu[1].eos_id).nonzero()[0].tolist() == [0, len(ids) - 1]
    assert sotu[1].decode(ids[1:50_001]) == words[: len(sotu[1].decode(ids[1:50_001]))]
    assert sotu[1].decode(ids[-2000:-1]).endswith("x" * 1000)


def test_batches_are_bounded():
    """However long a document is, and however many there are, little is encoded at a time."""
    counts = Counts()
    docs = ["x" * 5_000_000, *["short"] * 500_000]
    parts = [len(part) for part in encode_stream(docs, ByteTokenizer(), counts)]
    assert sum(parts) == counts.tokens == 5_000_000 + 500_000 * 6 + 2
    assert max(parts) < 2 * encoding._BATCH


def test_words_across_forced_cuts():
    for text in ("a" * 1_000_000, "a b\t" * 100_000, "a\tb\t\t" * 100_000, "\u3000x" * 300_000):
        assert text_stream(text, ByteTokenizer()).counts.words == len(text.split())


def test_cache_dir_that_cannot_be(text_file, make_config):
    config = make_config(text_file)
    object.__setattr__(config, "cache_dir", str(text_file / "below_a_file"))
    with pytest.raises(ConfigError, match=r"cache_dir=.* cannot be written"):
        open_stream(config, "train", ByteTokenizer())


def test_digest_of_files_above_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_WHOLE", 1)
    monkeypatch.setattr(files, "_BLOCK", 4)
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    first = files.file_digest(path)
    assert files.file_digest(path) == first
    path.write_bytes(b"012345678X")
    assert files.file_digest(path) != first
    for limit, content in ((9, b"01236789"), (10, b"0123456789")):  # its two ends, or all of it
        monkeypatch.setattr(files, "_WHOLE", limit)
        path.write_bytes(b"0123456789")
        version = b"v" if limit == 9 else b""
        assert files.file_digest(path, lambda _: "v") == hashlib.sha256(b"10" + content + version).hexdigest()


def test_the_digest_of_a_text_in_memory():
    """Of its tokens, four bytes each."""
    expected = hashlib.sha256(np.array([EOS, *b"ab", EOS], "<u4").tobytes()).hexdigest()
    assert text_stream("ab", ByteTokenizer()).text == expected


def test_streams_one_behind_the_other():
    """Every range of three, of which one is empty."""
    whole, parts, first = np.arange(100, 109), {}, 0
    for name, count in (("a", 4), ("b", 0), ("c", 5)):
        counts = Counts(tokens=count, documents=count + 1, bytes=2 * count, words=3 * count)
        parts[name] = MemoryStream(whole[first : first + count], counts, 7)
        parts[name].text = f"of {name}"
        first += count
    joined = JoinedStream(parts)
    for start in range(10):
        for stop in range(start, 10):
            found = joined.tokens(start, stop)
            assert found.dtype == np.int32 and found.tolist() == whole[start:stop].tolist()
    assert vars(joined.counts) == vars(Counts(tokens=9, documents=12, bytes=18, words=27)) and joined.eos_id == 7
    assert joined.text == join_fingerprints({"a": "of a", "b": "of b", "c": "of c"})


def test_a_kept_shard_is_fetched_once(tmp_path, monkeypatch):
    """From where it is kept, the first time that it is read; what is here is not fetched, nor what is kept here."""
    kept, here, fetched = tmp_path / "kept", tmp_path / "here", []
    kept.mkdir()
    here.mkdir()
    shards = {"00000-000": np.arange(3, dtype=np.uint16), "00000-001": np.arange(3, 8, dtype=np.uint16)}
    for name, tokens in shards.items():
        (kept / f"{name}.bin").write_bytes(tokens.tobytes())
    rows = [[name, len(tokens), files.file_digest(kept / f"{name}.bin")] for name, tokens in shards.items()]
    index = {"counts": vars(Counts(tokens=8)), "dtype": "uint16", "shards": rows}
    monkeypatch.setattr(token_cache.storage, "fetch_file", lambda *a: (fetched.append(a), shutil.copy(*a))[0])

    def stream(folder: pathlib.Path) -> CachedStream:
        return CachedStream(types.SimpleNamespace(folder=folder, kept=kept), index, "text", EOS)

    first = stream(here)
    assert first.tokens(3, 5).tolist() == [3, 4] and fetched == [(kept / "00000-001.bin", here / "00000-001.bin")]
    assert first.tokens(1, 7).tolist() == [1, 2, 3, 4, 5, 6] and len(fetched) == 2
    assert first.tokens(1, 2).tolist() == [1] and first.tokens(4, 6).tolist() == [4, 5]
    assert stream(here).tokens(0, 8).tolist() == list(range(8)) and len(fetched) == 2
    assert stream(kept).tokens(0, 8).tolist() == list(range(8)) and len(fetched) == 2
    (here / "00000-000.bin").unlink()
    (kept / "00000-000.bin").write_bytes(shards["00000-000"][::-1].tobytes())
    with pytest.raises(ConfigError, match=rf"{kept}/00000-000\.bin is damaged; remove {kept}, and the text is token"):
        stream(here).tokens(0, 1)
    assert len(fetched) == 3 and not (here / "00000-000.bin").exists()
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="is damaged"):  # two find it at once
        patch.setattr(token_cache, "file_digest", lambda path: path.unlink())
        stream(here).tokens(0, 1)
    (kept / "00000-000.bin").unlink()
    with pytest.raises(FileNotFoundError):
        stream(kept).tokens(0, 1)
    assert len(fetched) == 4
