"""Batches: the same whatever the processes and workers, every window once an epoch, every token once in evaluation."""

import itertools
import json
import multiprocessing
import os
import signal
import time
import types

import numpy as np
import pytest
from absl import flags

from bigmac_jax.config import ConfigError
from bigmac_jax.data import pipeline, token_cache
from bigmac_jax.data.batch import NO_TARGET, PADDING, Batch
from bigmac_jax.data.pipeline import (
    TrainIterator,
    eval_batches,
    make_windows,
    open_stream,
    pad_batch,
    prepare,
    shuffle_windows,
    text_stream,
)
from bigmac_jax.data.tokenizer import ByteTokenizer, train_bpe
from bigmac_jax.tuning.pretrained import Pretrained

LENGTH, BATCH = 16, 8
WHOLE = {"validation_source": "-", "test_source": "-"}  # nothing is held out of the text


@pytest.fixture
def small(text_file, make_config):
    """(config, stream): 5,003 tokens, 312 windows; 39 batches are an epoch."""
    config = make_config(text_file, **WHOLE, sequence_length=LENGTH, batch_size=BATCH)
    return config, open_stream(config, "train", ByteTokenizer())


def take(iterator, count: int) -> np.ndarray:
    """Windows [count, B, L + 1] of a stream's batches."""
    batches = list(itertools.islice(iterator, count))
    assert all((batch.inputs_BL[:, 1:] == batch.targets_BL[:, :-1]).all() for batch in batches)
    return np.stack([np.append(batch.inputs_BL, batch.targets_BL[:, -1:], axis=1) for batch in batches])


def windows_of(batches: np.ndarray, stream) -> list[int]:
    """The window number of each row, found by its content (every window here is unique)."""
    whole = stream.tokens(0, stream.num_tokens)
    count = (len(whole) - 1) // LENGTH
    known = {whole[w * LENGTH : w * LENGTH + LENGTH + 1].tobytes(): w for w in range(count)}
    assert len(known) == count
    return [known[row.tobytes()] for row in batches.reshape(-1, LENGTH + 1)]


def test_shape_and_dtype(small):
    inputs_BL, targets_BL, segments_BL, *_ = next(TrainIterator(*small))
    assert inputs_BL.shape == targets_BL.shape == (BATCH, LENGTH)
    assert inputs_BL.dtype == targets_BL.dtype == np.int32
    assert segments_BL is None


def test_every_epoch_is_another_permutation(small):
    assert (small[1].num_tokens, 312 // BATCH) == (5003, 39)
    order = windows_of(take(TrainIterator(*small), 2 * 39), small[1])
    first, second = order[:312], order[312:]
    assert sorted(first) == sorted(second) == list(range(312))
    assert first != second
    assert first != sorted(first)


def test_an_epoch_may_end_inside_a_batch(text_file, make_config):
    config = make_config(text_file, **WHOLE, sequence_length=LENGTH, batch_size=10)
    stream = open_stream(config, "train", ByteTokenizer())
    order = windows_of(take(TrainIterator(config, stream), 63), stream)
    assert sorted(order[:312]) == sorted(order[312:624]) == list(range(312))


def test_the_seed_decides(small, make_config, text_file):
    other = make_config(text_file, **WHOLE, seed=1, sequence_length=LENGTH, batch_size=BATCH)
    assert (take(TrainIterator(*small), 3) == take(TrainIterator(*small), 3)).all()
    assert (take(TrainIterator(*small), 3) != take(TrainIterator(other, small[1]), 3)).any()


@pytest.mark.parametrize("count", [1, 2, 4, BATCH])
def test_processes_share_the_global_batches(small, count):
    config, stream = small
    dataset = shuffle_windows(config, make_windows(config, stream, name=""))
    expected = np.stack([np.stack([dataset[g * BATCH + j] for j in range(BATCH)]) for g in range(50)])
    for rows in (np.arange(BATCH).reshape(count, -1), np.arange(BATCH).reshape(-1, count).T):  # blocks, and strided
        parts = [take(TrainIterator(config, stream, part.tolist()), 50) for part in rows]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected[:, rows.ravel()])


def test_resume_is_exact_across_processes_and_workers(small, text_file, make_config):
    expected = take(TrainIterator(*small), 60)
    iterator = TrainIterator(*small)
    take(iterator, 41)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = TrainIterator(*small)
    next(resumed)  # an iterator that has begun elsewhere
    resumed.set_state(state)
    np.testing.assert_array_equal(take(resumed, 19), expected[41:])
    halves = [TrainIterator(*small, rows) for rows in (range(BATCH // 2), range(BATCH // 2, BATCH))]
    for half in halves:
        half.set_state(state)
    np.testing.assert_array_equal(np.concatenate([take(half, 19) for half in halves], axis=1), expected[41:])


def test_worker_processes(small, text_file, make_config):
    expected = take(TrainIterator(*small), 30)
    config = make_config(text_file, **WHOLE, sequence_length=LENGTH, batch_size=BATCH, num_workers=1)
    iterator = TrainIterator(config, small[1])
    np.testing.assert_array_equal(take(iterator, 5), expected[:5])
    state = iterator.get_state()
    (worker,) = multiprocessing.active_children()
    iterator.close()
    assert not worker.is_alive()
    iterator.set_state(state)
    np.testing.assert_array_equal(take(iterator, 1), expected[5:6])
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM):  # to the group: the run takes the batches up to its last save
        os.kill(worker.pid, number)
    np.testing.assert_array_equal(take(iterator, 24), expected[6:])
    assert iterator.get_state() == {"batches": 30}
    iterator.close()
    assert not worker.is_alive()


def test_throughput(sotu):
    config, _, streams = sotu
    iterator = TrainIterator(config, streams["train"])
    next(iterator)
    begin = time.perf_counter()
    take(iterator, 200)
    rate = 200 * config.data.batch_size * config.data.sequence_length / (time.perf_counter() - begin)
    assert rate > 240_000  # 20 × what training reads; 5 M when the machine is idle


def test_too_little_text(small, make_config, text_file):
    config = make_config(text_file, **WHOLE, sequence_length=5003, batch_size=1)
    with pytest.raises(ConfigError, match=r"5003 training tokens, 0 windows of data.sequence_length=5003"):
        TrainIterator(config, small[1])
    config = make_config(text_file, **WHOLE, sequence_length=LENGTH, batch_size=313)
    with pytest.raises(ConfigError, match=r"312 windows .* fewer than data.batch_size=313"):
        TrainIterator(config, small[1])


@pytest.mark.parametrize(("length", "batch"), [(16, 8), (5002, 1), (5001, 1), (10_000, 2), (1, 7), (41, 61)])
def test_evaluation_counts_each_token_once(small, length, batch):
    stream = small[1]
    whole = stream.tokens(0, stream.num_tokens)
    inputs, targets = [], []
    for inputs_BL, targets_BL, *_ in eval_batches(stream, length, batch):
        assert inputs_BL.shape == targets_BL.shape == (batch, length)
        assert inputs_BL.dtype == targets_BL.dtype == np.int32
        inputs.append(inputs_BL[targets_BL != NO_TARGET])
        targets.append(targets_BL[targets_BL != NO_TARGET])
    np.testing.assert_array_equal(np.concatenate(inputs), whole[:-1])
    np.testing.assert_array_equal(np.concatenate(targets), whole[1:])


def test_evaluation_of_an_array():
    ((inputs_BL, targets_BL, segments_BL, _),) = eval_batches(np.arange(5), 3, 2)
    assert inputs_BL.tolist() == [[0, 1, 2], [3, 0, 0]]
    assert targets_BL.tolist() == [[1, 2, 3], [4, NO_TARGET, NO_TARGET]]
    assert segments_BL is None


def test_rows_are_added_to_a_batch():
    batch = Batch(np.array([[1, 2]]), np.array([[2, 3]]), np.array([[0, 1]]))
    padded = pad_batch(batch, 3)
    assert padded.inputs_BL.tolist() == [[1, 2], [0, 0], [0, 0]]
    assert padded.targets_BL.tolist() == [[2, 3], [NO_TARGET] * 2, [NO_TARGET] * 2]
    assert padded.segments_BL.tolist() == [[0, 1], [PADDING] * 2, [PADDING] * 2]
    assert pad_batch(batch._replace(segments_BL=None), 1).segments_BL is None


def test_windows_that_overlap_by_hand():
    """The last may be short, and none is without a token that is new; each token counts in the first that has it."""
    whole = [(batch.inputs_BL.tolist(), batch.targets_BL.tolist()) for batch in eval_batches(np.arange(7), 3, 2, 2)]
    x = NO_TARGET
    assert whole == [([[0, 1, 2], [2, 3, 4]], [[1, 2, 3], [x, 4, 5]]), ([[4, 5, 0], [0, 0, 0]], [[x, 6, x], [x, x, x]])]
    ((inputs_BL, targets_BL, *_),) = eval_batches(np.arange(6), 3, 2, 2)
    assert (inputs_BL.tolist(), targets_BL.tolist()) == ([[0, 1, 2], [2, 3, 4]], [[1, 2, 3], [x, 4, 5]])


def test_text_stream(tmp_path, caplog):
    tokenizer = ByteTokenizer()
    text = "Vier Wörter, und mehr"
    path = tmp_path / "t.md"
    path.write_text(text)
    for stream in (text_stream(text, tokenizer), text_stream(path, tokenizer)):
        assert stream.tokens(0, stream.num_tokens).tolist() == [256, *text.encode(), 256]
        assert (stream.counts.bytes, stream.counts.words, stream.counts.documents) == (22, 4, 1)
    path.write_bytes(b"broken \xff")
    assert text_stream(path, tokenizer).counts.words == 2
    assert "not UTF-8" in caplog.text
    path.write_text(" \n")
    refused = [
        (path, "is empty"),
        ("", "is empty"),
        (tmp_path / "none", "cannot be read"),
        (tmp_path, "cannot be read"),
    ]
    for bad, message in refused:
        with pytest.raises(ConfigError, match=message):
            text_stream(bad, tokenizer)


def test_what_is_prepared_is_told(text_file, make_config, tmp_path, monkeypatch):
    (tmp_path / "held_out.txt").write_text("one two\n")
    config = make_config(text_file, **dict.fromkeys(WHOLE, str(tmp_path / "held_out.txt")))
    make, asked, now = token_cache.make_shards, [], iter([10.0, 12.25, 20.0, 20.5, 30.0, 31.0, 40.0])
    monkeypatch.setattr(token_cache, "make_shards", lambda *given: (asked.append(given[1]), make(*given))[1])
    monkeypatch.setattr(pipeline, "time", types.SimpleNamespace(perf_counter=now.__next__))
    assert list(prepare(config, ["train", "validation"], 3)) == [
        "train: 5,003 tokens of 1 documents, 5,001 bytes of text, 2.2 s",
        "validation: 10 tokens of 1 documents, 8 bytes of text, 0.5 s",
    ]
    assert list(prepare(config, ["test"])) == ["test: 10 tokens of 1 documents, 8 bytes of text, 1.0 s"]
    assert asked == [3, 3, 0]
    assert list((tmp_path / "cache" / "tokens").glob("train-*/index.json"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    tuned = make_config(rows, validation_source="-", test_source="-")
    object.__setattr__(tuned.tuning, "objective", "sft")
    with pytest.raises(ConfigError, match=r"tuning\.objective=sft reads rows at every start: nothing to prepare"):
        list(prepare(tuned, ["train"]))


@pytest.mark.parametrize("given", [0, 1])
def test_prepares_for_a_run_that_begins_with_a_model(
    tmp_path, text_file, make_config, monkeypatch, caplog, capsys, command, given
):
    """With that one's tokenizer, which the run takes, and its config unless one is given."""
    program = command("data")
    (tmp_path / "tokenizer.json").write_text(train_bpe([text_file.read_text()], 270))
    there = make_config("", tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=300)
    monkeypatch.setattr(program, "open_pretrained", lambda place: Pretrained(place, "4", "", there))
    fields = ["train.init_from=there", f"data.source={text_file}", f"cache_dir={tmp_path}/cache"]
    monkeypatch.setattr(program.cli, "OVERRIDES", [*fields, "optimizer.momentum=0.9"])
    monkeypatch.setattr(program.cli, "ARGUMENTS", ["prepare"])
    monkeypatch.setattr(flags.FLAGS["config"], "present", given)
    for name, value in {"_CONFIG": "tiny", "_SPLITS": ["validation"], "_PROCESSES": 1}.items():
        monkeypatch.setattr(program, name, types.SimpleNamespace(value=value))
    monkeypatch.setattr(
        program, "prepare", lambda config, *args: [str(config.model.vocab_size), *prepare(config, *args)]
    )
    program.main()
    size, line = capsys.readouterr().out.splitlines()
    assert size == ("8192" if given else "300")
    assert line.startswith("validation: ") and not (tmp_path / "cache" / "tokenizers").exists()
    assert caplog.messages[0] == "set, but not read: optimizer.momentum=0.9 (optimizer.name=adamw)"
