"""The token stream on disk: convention, counts, and what happens to it when processes die or meet."""

import json
import os
import pathlib
import pickle
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_dataset  # noqa: F401  registers the datasets
from conftest import SAMPLE

from bigmac_jax.config import ConfigError
from bigmac_jax.data import cache as cache_module
from bigmac_jax.data import files
from bigmac_jax.data.pipeline import open_stream, text_stream
from bigmac_jax.data.tokenizer import ByteTokenizer, load_tokenizer

ROOT = pathlib.Path(__file__).parents[2]
EOS = 256


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
    stream = open_stream(make_config(path, validation_source="-", test_source="-"), "train", ByteTokenizer())
    expected = [EOS, *(i for text in texts for i in [*text.encode(), EOS])]
    assert stream.tokens(0, stream.num_tokens).tolist() == expected
    assert stream.num_tokens == len(expected) > 3 * cache_module.CHUNK
    assert stream.num_documents == len(texts)
    assert stream.num_bytes == sum(len(text.encode()) for text in texts)
    assert stream.num_words == sum(len(text.split()) for text in texts)
    (meta,) = tmp_path.glob("cache/tokens/train-*/meta.json")
    assert json.loads(meta.read_text())["dtype"] == "uint16"


def test_random_access(rows, make_config):
    stream = open_stream(make_config(rows[0]), "train", ByteTokenizer())
    whole = stream.tokens(0, stream.num_tokens)
    assert whole.dtype == np.int32
    chunk = cache_module.CHUNK
    copy = pickle.loads(pickle.dumps(stream))
    for a, b in [(0, 1), (5, 5), (chunk - 1, chunk), (chunk, chunk + 1), (chunk - 3, 3 * chunk + 2),
                 (stream.num_tokens - 1, stream.num_tokens)]:  # fmt: skip
        np.testing.assert_array_equal(stream.tokens(a, b), whole[a:b])
        np.testing.assert_array_equal(copy.tokens(a, b), whole[a:b])
    for a, b in [(-1, 3), (4, 3), (0, stream.num_tokens + 1)]:
        with pytest.raises(IndexError):
            stream.tokens(a, b)


def test_large_vocabularies_keep_their_ids(text_file, make_config):
    class Large(ByteTokenizer):
        vocab_size, eos_id, fingerprint = 100_001, 100_000, "large"

    stream = open_stream(make_config(text_file), "train", Large())
    assert stream.tokens(0, 2).tolist() == [100_000, ord("0")]
    assert stream.tokens(stream.num_tokens - 1, stream.num_tokens).tolist() == [100_000]


def test_made_once_and_made_again_when_the_text_changes(text_file, make_config, tmp_path, monkeypatch):
    config, made = make_config(text_file), []
    write = cache_module._write
    monkeypatch.setattr(cache_module, "_write", lambda *a: (made.append(1), write(*a))[1])
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


@pytest.mark.parametrize("damage", ["truncated", "flipped", "meta", "fewer tokens", "gone"])
def test_damage_is_found_and_mended(rows, make_config, tmp_path, caplog, damage):
    config = make_config(rows[0])
    expected = open_stream(config, "train", ByteTokenizer()).tokens(0, 20_000)
    (file,) = tmp_path.glob("cache/tokens/train-*/tokens.array_record")
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "meta":
        file.with_name("meta.json").write_text('{"key"')
    elif damage == "fewer tokens":
        meta = json.loads(file.with_name("meta.json").read_text())
        meta["counts"]["tokens"] = 20_000
        file.with_name("meta.json").write_text(json.dumps(meta))
    else:
        file.unlink()
    np.testing.assert_array_equal(open_stream(config, "train", ByteTokenizer()).tokens(0, 20_000), expected)
    assert sum("is damaged; tokenising again" in record.message for record in caplog.records) == 1
    assert file.read_bytes() == content


def test_killed_half_way(make_config, tmp_path):
    path = tmp_path / "large.txt"
    path.write_text("some words on a line\n" * 200_000)  # five batches
    config = make_config(path)
    process = start(path, config.cache_dir, "bytes", "stop")
    assert process.stdout.readline() == "half-way\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    tokens = pathlib.Path(config.cache_dir) / "tokens"
    assert list(tokens.glob(".train-*.part-*"))
    assert not list(tokens.glob("train-*"))

    open_stream(config, "train", ByteTokenizer())
    assert not list(tokens.glob(".train-*.part-*"))
    undisturbed = make_config(path)
    object.__setattr__(undisturbed, "cache_dir", str(tmp_path / "undisturbed"))
    open_stream(undisturbed, "train", ByteTokenizer())
    files_of = [sorted(p.glob("tokens/train-*/*")) for p in (tmp_path / "cache", tmp_path / "undisturbed")]
    assert len(files_of[0]) == 2
    assert [f.read_bytes() for f in files_of[0]] == [f.read_bytes() for f in files_of[1]]


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
    config = make_config(path)
    begin, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stream = open_stream(config, "train", sotu[1])
    assert time.perf_counter() - begin < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000  # KB
    assert (stream.num_documents, stream.num_bytes) == (1, path.stat().st_size)
    assert stream.num_words == 1_500_001
    ids = stream.tokens(0, stream.num_tokens)
    assert (ids == sotu[1].eos_id).nonzero()[0].tolist() == [0, len(ids) - 1]
    assert sotu[1].decode(ids[1:50_001]) == words[: len(sotu[1].decode(ids[1:50_001]))]
    assert sotu[1].decode(ids[-2000:-1]).endswith("x" * 1000)


def test_batches_are_bounded():
    """However long a document is, and however many there are, little is encoded at a time."""
    counts = cache_module.Counts()
    docs = ["x" * 5_000_000, *["short"] * 500_000]
    parts = [len(part) for part in cache_module.encode_stream(docs, ByteTokenizer(), counts)]
    assert sum(parts) == counts.tokens == 5_000_000 + 500_000 * 6 + 2
    assert max(parts) < 2 * cache_module._BATCH


def test_words_across_forced_cuts():
    for text in ("a" * 1_000_000, "a b\t" * 100_000, "a\tb\t\t" * 100_000, "\u3000x" * 300_000):
        assert text_stream(text, ByteTokenizer()).num_words == len(text.split())


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
