"""Processes and hosts that tokenise together, and what becomes of it when they are killed."""

import contextlib
import json
import os
import pathlib
import pickle
import random
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from bigmac_jax.config import ConfigError
from bigmac_jax.data import files, local_files, token_shards, workers
from bigmac_jax.data.pipeline import TrainIterator, open_stream
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.runtime import hosts

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def corpus(tmp_path: pathlib.Path) -> pathlib.Path:
    """2.7 MB: lines, and a document that is longer than a unit."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    generator = random.Random(1)
    words = ["one", "two ", "three,", "über", "4\n"]
    texts = [" ".join(generator.choices(words, k=generator.randrange(2, 900))) for _ in range(900)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "b.txt").write_text("a long document\n" * 30_000)
    (folder / "c.txt").write_text("a short one")
    return folder


def preparing(corpus: pathlib.Path, cache: pathlib.Path, tokenizer: str, processes: int) -> subprocess.Popen:
    script = pathlib.Path(__file__).with_name("preparing.py")
    command = [sys.executable, str(script), str(corpus), str(cache), tokenizer, str(processes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def contents(cache: pathlib.Path) -> dict[str, bytes]:
    """Of all shards and of what says what they are, by name."""
    return {path.name: path.read_bytes() for path in cache.glob("tokens/train-*/[0-9i]*")}


@pytest.mark.parametrize("process", [0, 1])
def test_the_first_process_alone_shows_what_is_done(monkeypatch, tmp_path, caplog, process):
    """All of them tokenise, and wait for each other's locks on a store."""
    shown = []
    monkeypatch.setattr(hosts, "is_first", lambda: process == 0)
    monkeypatch.setattr(workers, "Progress", lambda *_, **how: shown.append(how["silent"]) or contextlib.nullcontext())
    docs = types.SimpleNamespace(units=[], size=0, alone=True)
    workers.make_shards(types.SimpleNamespace(docs=docs, split="train", work=lambda *_: None), processes=0)
    assert shown == [process == 1]
    monkeypatch.setattr(files.leases, "lock", lambda _, say: say("waiting") or contextlib.nullcontext())
    caplog.set_level("WARNING" if process else "INFO", "bigmac_jax")  # as `hosts` and the commands do
    with files.lock_path(tmp_path / "a"):
        assert caplog.messages == ([] if process else ["waiting"])


class Shown:
    """A bar that keeps what it is told."""

    def __init__(self, *what, **how):
        self.what, self.how, self.counts = what, how, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, count):
        self.counts.append(count)


@pytest.mark.parametrize(
    ("sizes", "alone", "processes", "expected"),
    [
        ([7, 40, 50, 10], False, 2, 2),
        ([7, 40, 49, 10], False, 2, 1),  # little of it is left to do
        ([7, 40, 50, 10], False, 1, 1),
        ([7, 40, 50, 10], False, 0, 3),  # one per core
        ([7, 50, 50], False, 0, 2),  # or per unit
        ([7, 40, 50, 10], True, 2, 1),
        ([7, 100], False, 2, 1),
    ],
)
def test_how_many_processes_tokenise(monkeypatch, sizes, alone, processes, expected):
    """Several from so many bytes on that are left; the bar counts each byte once, those of before from the start on."""
    bars, started = [], []

    def work(units, report, count=1):
        started.append((units, count))
        for unit in units:
            for done in (sizes[unit] // 2, sizes[unit]):
                report(unit, done)

    store = types.SimpleNamespace(
        docs=types.SimpleNamespace(units=[()] * len(sizes), size=sum(sizes), alone=alone), split="test", work=work,
        size_of=sizes.__getitem__, finished=lambda unit: None if unit else {},
    )  # fmt: skip
    monkeypatch.setattr(workers, "_ALONE", 100)
    monkeypatch.setattr(workers, "count_cores", lambda: 3)
    monkeypatch.setattr(workers, "_share_work", lambda store, units, count, report: work(units, report, count))
    monkeypatch.setattr(workers, "Progress", lambda *what, **how: bars.append(Shown(*what, **how)) or bars[0])
    workers.make_shards(store, processes)
    assert started == [(list(range(1, len(sizes))), expected)]
    assert bars[0].what == ("tokenising test", sum(sizes), "byte", sizes[0])
    assert bars[0].how == {"scaled": True, "delay": 2, "silent": False}
    assert bars[0].counts == [count for size in sizes[1:] for count in (size // 2, size - size // 2)]


def test_as_many_as_there_are_make_the_same(corpus, make_config, monkeypatch, tmp_path):
    monkeypatch.setattr(local_files, "UNIT", 1 << 18)
    own = {"validation_source": "-", "test_source": "-"}
    alone = open_stream(make_config(corpus, **own), "train", ByteTokenizer())
    monkeypatch.setattr(workers, "_ALONE", 0)
    config = make_config(corpus, **own)
    object.__setattr__(config, "cache_dir", str(tmp_path / "together"))
    popen, threads = subprocess.Popen, []
    monkeypatch.setattr(workers, "count_cores", lambda: 7)
    monkeypatch.setattr(
        workers.subprocess, "Popen", lambda *a, env, **b: (threads.append(env["RAYON_NUM_THREADS"]),
                                                           popen(*a, env=env, **b))[1],
    )  # fmt: skip
    together = open_stream(config, "train", ByteTokenizer(), processes=3)
    assert threads == ["2"] * 3  # each has its share of the cores
    assert together.counts == alone.counts and len(alone._names) > 5
    np.testing.assert_array_equal(
        together.tokens(0, together.num_tokens), alone.tokens(0, alone.num_tokens)
    )  # the files, too:
    assert contents(tmp_path / "together") == contents(tmp_path / "cache")


def test_an_error_of_one_ends_all(corpus, make_config, monkeypatch):
    monkeypatch.setattr(local_files, "UNIT", 1 << 18)
    monkeypatch.setattr(workers, "_ALONE", 0)
    with (corpus / "a.jsonl").open("a") as file:
        file.write('{"text": 7}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl line 901: data\.text_field='text' holds int"):
        open_stream(make_config(corpus), "train", ByteTokenizer(), processes=2)


def test_one_that_is_killed_is_named(corpus, make_config, monkeypatch):
    monkeypatch.setattr(local_files, "UNIT", 1 << 18)
    monkeypatch.setattr(workers, "_ALONE", 0)
    popen = subprocess.Popen

    def killed(*arguments, **more):
        process = popen(*arguments, **more)
        process.send_signal(signal.SIGKILL)
        return process

    monkeypatch.setattr(workers.subprocess, "Popen", killed)
    with pytest.raises(ConfigError, match=r"the train split was killed by SIGKILL; memory may not suffice; run it"):
        open_stream(make_config(corpus), "train", ByteTokenizer(), processes=2)


class Unfinished:
    """A store whose last unit is wrong."""

    def work(self, units, report):
        for unit in units:
            report(unit, 10 * unit)
        raise ConfigError("é" * 700)


def test_what_a_process_says(monkeypatch):
    """A line for each step and for an error, on stdout; it ends at once when stdin does, and cannot be interrupted."""
    given, task = os.pipe()
    lines, said = os.pipe()
    codes, interrupt = [], signal.getsignal(signal.SIGINT)
    os.write(task, pickle.dumps((Unfinished(), [3, 1])))
    with os.fdopen(given, "rb") as reading, os.fdopen(lines) as told:
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=reading))
        monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(fileno=lambda: said))
        monkeypatch.setattr(os, "_exit", codes.append)
        try:
            workers.main()
            held, before = signal.getsignal(signal.SIGINT), list(codes)
        finally:
            signal.signal(signal.SIGINT, interrupt)
            os.close(task)
            os.close(said)
        assert held == signal.SIG_IGN and before == [0]
        while len(codes) < 2:
            time.sleep(0.01)
        assert codes == [0, 1]
        found = [json.loads(line) for line in told]
    assert found == [{"unit": 3, "bytes": 30}, {"unit": 1, "bytes": 10}, {"error": "é" * 600}]


@pytest.mark.full
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_killed_at_random_moments(corpus, tmp_path, tokenizer):
    """Twenty times, with processes of its own; two hosts at once, of which one is killed. Nothing is made twice but
    what was not finished."""
    assert preparing(corpus, tmp_path / "undisturbed", tokenizer, 2).wait() == 0
    expected, generator = contents(tmp_path / "undisturbed"), random.Random(2)
    cache, made = tmp_path / "cache", dict[str, int]()
    for _ in range(20):
        process = preparing(corpus, cache, tokenizer, 2)
        time.sleep(generator.uniform(0.3, 2.5))
        process.send_signal(signal.SIGSTOP)  # or it would start more
        own = _children(process)
        process.kill()
        process.wait()
        while any(map(_runs, own)):  # until they see that it has ended
            time.sleep(0.05)
        for path in cache.glob("tokens/train-*/?????.json"):
            assert made.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
        if (left := contents(cache)).keys() == expected.keys():
            for path in cache.glob("tokens/train-*/*"):  # finished: from the start again
                path.unlink()
            made.clear()
        assert all(left[name] == expected[name] for name in left if name in expected)
    hosts = [preparing(corpus, cache, tokenizer, 2) for _ in range(2)]
    time.sleep(1.5)
    hosts[0].kill()
    assert hosts[1].wait() == 0, hosts[1].communicate()[0]
    assert contents(cache) == expected


@pytest.mark.full
def test_processes_end_with_the_one_that_started_them(corpus, tmp_path, make_config):
    process = preparing(corpus, tmp_path / "cache", "bpe", 2)
    end = time.monotonic() + 60
    children: list[int] = []
    while len(children) < 2 and time.monotonic() < end:
        children = _children(process)
    process.kill()
    process.wait()
    assert len(children) == 2
    while any(_runs(pid) for pid in children) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(_runs(pid) for pid in children)


def _children(process: subprocess.Popen) -> list[int]:
    listed = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in listed.read_text().split()] if listed.exists() else []


def _runs(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.full
def test_ten_thousand_shards_are_opened_lazily(make_config, tmp_path, monkeypatch):
    """Their index is read, and a few of them when they are asked for."""
    (tmp_path / "a.txt").write_text("a")
    config = make_config(tmp_path / "a.txt", validation_source="-", test_source="-")
    stream = open_stream(config, "train", ByteTokenizer())
    folder = stream._folder
    shard = np.arange(128, dtype=np.uint16).tobytes()
    for i in range(10_000):
        (folder / f"{i:05}-000.bin").write_bytes(shard)
    digest = token_shards.file_digest(folder / "00000-000.bin")
    index = json.loads((folder / "index.json").read_text())
    del index["seal"]
    index["shards"] = [[f"{i:05}-000", 128, digest] for i in range(10_000)]
    index["counts"]["tokens"] = 1_280_000
    token_shards._write_record(folder / "index.json", index)
    time.sleep(2.1)  # files that were just written are read each time
    open_stream(config, "train", ByteTokenizer())
    start = time.perf_counter()
    stream = open_stream(config, "train", ByteTokenizer())
    assert time.perf_counter() - start < 3 and not stream._files
    for at in random.Random(0).choices(range(1_280_000 - 300), k=500):
        expected = np.arange(at, at + 300) % 128
        np.testing.assert_array_equal(stream.tokens(at, at + 300), expected)
    assert len(stream._files) <= 65
    # Three epochs of training read every shard; memory stays what it was after the first tenth of one.
    batches = TrainIterator(config, stream)
    epoch = stream.num_tokens // (config.data.batch_size * config.data.sequence_length)
    used = []
    for step in range(3 * epoch):
        next(batches)
        if step % (epoch // 10) == 0:
            used.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert max(used[1:]) - used[1] < 20e6, [f"{size / 1e6:.0f} MB" for size in used]
