"""From the token stream to batches: shuffled windows for training, every token once for evaluation."""

import codecs
import logging
import multiprocessing
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from bigmac_jax.config import Config, ConfigError, missing_place_fix
from bigmac_jax.data.batch import NO_TARGET, PADDING, Batch, batch_from_windows, number_documents
from bigmac_jax.data.conversations import Conversations
from bigmac_jax.data.corpus import MIXTURE, configs_by_source, open_documents
from bigmac_jax.data.documents import decode, log_once
from bigmac_jax.data.encoding import Counts, encode_stream
from bigmac_jax.data.kinds import Kind, check_content, guess_kind
from bigmac_jax.data.mixed_stream import Mixture
from bigmac_jax.data.packing import PackedDocuments, PackedWindows
from bigmac_jax.data.token_cache import CachedStream, JoinedStream, MemoryStream, TokenStream, open_cached_stream
from bigmac_jax.data.tokenizer import Tokenizer, load_tokenizer
from bigmac_jax.runtime import signals, storage

_BUFFERED_BATCHES = 4
_ENDLESS = 1 << 62  # rows of all epochs; of sys.maxsize Grain finds no number of batches, where a batch is one row
_log = logging.getLogger(__name__)
Stream = CachedStream | JoinedStream | Conversations


def open_stream(
    config: Config,
    split: str,
    tokenizer: Tokenizer,
    processes: int = 0,
    setting: str = "data.source",
    date: str = "",
) -> Stream:
    """Opens the tokens of a split, tokenised on the first call by at most `processes` on this machine (0 = one per
    core); for a tuning objective, its conversations, which `date` is of. Other arguments and errors are those of
    `open_documents`."""
    if config.tuning.objective != "pretrain":
        return Conversations(config, split, tokenizer, date)
    streams = {}
    for name, data in configs_by_source(config.data, split).items():
        docs = open_documents(data, split, config.cache_dir, MIXTURE if name else setting)
        streams[name] = open_cached_stream(docs, split, tokenizer, config.cache_dir, processes)
    return streams[""] if "" in streams else JoinedStream(streams)


def prepare(
    config: Config,
    splits: Sequence[str],
    processes: int = 0,
    load: Callable[[Config], Tokenizer] = load_tokenizer,
) -> Iterator[str]:
    """Loads the tokenizer and makes the tokens of splits; yields a line for each split. Arguments as for
    `open_stream`."""
    if (aim := config.tuning.objective) != "pretrain":
        raise ConfigError(f"tuning.objective={aim} reads rows at every start: nothing to prepare")
    tokenizer = load(config)
    for split in splits:
        start = time.perf_counter()
        counts = open_stream(config, split, tokenizer, processes).counts
        yield (
            f"{split}: {counts.tokens:,} tokens of {counts.documents:,} documents, {counts.bytes:,} bytes of text, "
            f"{time.perf_counter() - start:.1f} s"
        )


def text_stream(text_or_path: str | pathlib.Path, tokenizer: Tokenizer) -> MemoryStream:
    """The tokens of one document: a `str` is the text itself, a `Path` a file of text. Raises ConfigError for a file
    that cannot be read or is no text, and for a text without a word."""
    name, content = "the text", text_or_path if isinstance(text_or_path, str) else b""
    if isinstance(content, bytes):
        name = str(text_or_path)
        try:
            content = storage.locate(name, "text").read_bytes()
        except storage.errors() as error:
            fix = missing_place_fix(name, "give the path of a text file", hub="")
            raise ConfigError(f"{name} cannot be read ({storage.reason(error)}); {fix}") from None
        if (kind := guess_kind(pathlib.Path(name))) not in (None, Kind("txt")):
            ending = ".".join(filter(None, kind))
            raise ConfigError(f"{name} is no plain text, but .{ending}, whose documents --sources={name} scores")
        check_content(pathlib.Path(name), Kind("txt"), content)
        content = content.removeprefix(codecs.BOM_UTF8)
    text, whole = decode(content)
    if not whole:
        _log.warning("%s holds bytes that are not UTF-8, replaced by U+FFFD", name)
    if not text or text.isspace():
        raise ConfigError(f"{name} is empty ({len(text)} characters of white space); give a text with words")
    counts = Counts()
    tokens = np.concatenate(list(encode_stream([text], tokenizer, counts)))
    return MemoryStream(tokens, counts, tokenizer.eos_id)


def streams_by_source(stream: Any) -> dict[str, Any]:
    """The streams of a mixture's sources by name; any other stream itself, under \"\"."""
    return dict(stream.parts) if isinstance(stream, JoinedStream) else {"": stream}


class StreamWindows:
    """Windows of a stream: window w is tokens[w·L : w·L + L + 1], so that each token is predicted once."""

    def __init__(self, stream: TokenStream, sequence_length: int):
        self._stream, self._length = stream, sequence_length

    def __len__(self) -> int:
        return (self._stream.num_tokens - 1) // self._length

    def __getitem__(self, w: int) -> np.ndarray:
        return self._stream.tokens(w * self._length, (w + 1) * self._length + 1)


def make_windows(config: Config, stream: TokenStream | Conversations, name: str) -> StreamWindows | PackedWindows:
    """Cuts a stream, or the source `name` of a mixture, into the windows of one epoch, in its order. Raises ConfigError
    if there are fewer than data.batch_size; for a mixture's source, none."""
    data = config.data
    windows: StreamWindows | PackedWindows
    if isinstance(stream, Conversations):
        windows = stream.pack(data.sequence_length)
        _log.info("%s: %s", stream.name, windows.describe())
    elif data.packing == "stream":
        windows = StreamWindows(stream, data.sequence_length)
    else:
        windows = PackedDocuments(stream, data.sequence_length)
        _log.info("data.packing=best_fit: %s", windows.describe())
    if len(windows) < (1 if name else data.batch_size):
        source = f"{name} of data.mixture" if name else f"data.source={data.source}"
        least = "one" if name else f"data.batch_size={data.batch_size}"
        raise ConfigError(
            f"{source} has {stream.num_tokens} training tokens, {len(windows)} windows of "
            f"data.sequence_length={data.sequence_length}, fewer than {least}; "
            f"use more text, shorter sequences or a smaller batch"
        )
    return windows


def shuffle_windows(config: Config, windows: StreamWindows | PackedWindows) -> grain.MapDataset:
    """The endless sequence of training samples, int32 [L+1], or [3, L] if packed. Sample i depends on train.seed and i
    alone; every epoch is a new permutation of all windows."""
    return grain.MapDataset.source(windows).seed(config.train.seed).shuffle().repeat()


class TrainIterator(Iterator[Batch]):
    """Endless batches: the rows of each global batch that this process needs.

    Its whole state is the number of batches it has given, and the weights that a mixture had. Row j of global batch g
    is sample g·B + j whoever reads it, so a run may go on with other processes, another mesh or other workers. Raises
    ConfigError if there is too little text for one batch.

    Args:
      rows: the rows that this process needs (`hosts.local_rows`); by default all.
    """

    def __init__(self, config: Config, stream: TokenStream | Conversations, rows: Sequence[int] | None = None):
        self._config, self._rows = config, range(config.data.batch_size) if rows is None else rows
        self._mixture = Mixture.from_config(config.data)
        self._epochs = {name: make_windows(config, part, name) for name, part in streams_by_source(stream).items()}
        self._eos_id = stream.eos_id if config.data.documents == "masked" else None
        self._given = 0
        self._iterator: Any = None

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        rows = next(self._iterator)
        self._given += 1
        if rows.ndim == 3:  # packed
            inputs_BL, targets_BL, segments_BL, *reference = rows.swapaxes(0, 1)
            floats = (np.ascontiguousarray(bits_BL).view(np.float32) for bits_BL in reference)
            return Batch(inputs_BL, targets_BL, segments_BL, *floats)
        batch = batch_from_windows(rows)
        if self._eos_id is None:
            return batch
        return batch._replace(segments_BL=number_documents(batch.inputs_BL, self._eos_id))

    def get_state(self) -> dict[str, Any]:
        """A small JSON-serialisable dict; after `set_state` the batches go on from there exactly."""
        weights = {"mixture": self._mixture.state(self._given)} if self._mixture else {}
        return {"batches": self._given} | weights

    def set_state(self, state: dict[str, Any], step: int | None = None) -> None:
        """Goes on from a state of `get_state`; without a mixture's weights, they are those of this run until there.
        Raises ConfigError if a mixture can't go on from there, or would read a source more often than it may.

        Args:
          step: of the run, which lags its batches by those that rewinding left out; by default there are none.
        """
        self.close()
        self._given = int(state["batches"])
        if self._mixture is None:
            return
        done = self._given if step is None else step
        weights = state["mixture"] if "mixture" in state else self._mixture.state(self._given)
        self._mixture = self._mixture.resume(weights, self._given, done)
        epochs = {name: len(epoch) for name, epoch in self._epochs.items()}
        for line in self._mixture.check_epochs(epochs, max(done, self._config.train.steps), self._given - done):
            log_once(logging.INFO, f"data.mixture: {line}")

    def tokens_by_source(self, batches: int) -> dict[str, int]:
        """Number of tokens of each source of a mixture in the first batches; empty without a mixture."""
        if self._mixture is None:
            return {}
        counts = zip(self._mixture.parts, self._mixture.counts(batches), strict=True)
        return {part.name: count * self._config.data.sequence_length for part, count in counts}

    def close(self) -> None:
        """Stops the threads or workers; the next batch starts them again."""
        if self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()
        self._iterator = None

    def _start(self) -> Any:
        data, mixture, rows = self._config.data, self._mixture, self._rows
        sources = [shuffle_windows(self._config, epoch) for epoch in self._epochs.values()]

        def read(i: int) -> np.ndarray:
            batch, row = divmod(i, len(rows))
            sample = batch * data.batch_size + rows[row]
            source, n = mixture.locate(sample) if mixture else (0, sample)
            return sources[source][n]

        dataset = grain.MapDataset.range(_ENDLESS).map(read).batch(len(rows))[self._given :]
        # One thread suffices by far (docs/data.md), and the training step wants the cores.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_BUFFERED_BATCHES)
        batches = dataset.to_iter_dataset(options)
        if data.num_workers:
            if not flags.FLAGS.is_parsed():  # Grain hands the flags on to its workers; a notebook has parsed none
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=data.num_workers, per_worker_buffer_size=_BUFFERED_BATCHES),
                worker_init_fn=_end_with_parent_alone,
            )
        return iter(batches)


def _end_with_parent_alone(_index: int, _count: int) -> None:
    """Makes a worker ignore what a terminal or a launcher sends to the whole group: a run that saves before it ends may
    wait for a batch. The worker ends when the run closes it, or dies."""
    for number in signals.WORDS:
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def eval_batches(
    stream_or_tokens: TokenStream | Conversations | np.ndarray,
    sequence_length: int,
    batch_size: int,
    stride: int = 0,
    documents: str = "stream",
) -> Iterator[Batch]:
    """Yields windows in which each token after the first is a target once; the last window and batch are padded.

    Args:
      stride: 0: windows do not overlap. Otherwise each begins so many tokens after the one before, and only tokens that
        are new in it are targets: all but the first are predicted from at least `sequence_length` - stride others.
      documents: as data.documents; masked: windows hold whole documents, so that what a document's tokens are given
        does not depend on others.
    """
    stream = stream_or_tokens
    if isinstance(stream, np.ndarray):
        stream = MemoryStream(stream, Counts(tokens=len(stream)))
    if isinstance(stream, Conversations) or documents == "masked":
        packed: PackedWindows = (
            stream.pack(sequence_length)
            if isinstance(stream, Conversations)
            else PackedDocuments(stream, sequence_length, stride)
        )
        for first in range(0, len(packed), batch_size):
            rows = [packed[w] for w in range(first, min(first + batch_size, len(packed)))]
            batch = Batch(*np.stack(rows, axis=1)[:3])
            if isinstance(stream, Conversations) and stream.pairs:  # how likely is what was chosen
                batch.targets_BL[batch.segments_BL % 2 == 1] = NO_TARGET
            yield pad_batch(batch, batch_size)
        return
    step = stride or sequence_length
    starts = range(0, max(1, stream.num_tokens - 1 - sequence_length + step), step)
    for first in range(0, len(starts), batch_size):
        inputs_BL, targets_BL = np.zeros((2, batch_size, sequence_length), np.int32)
        targets_BL[:] = NO_TARGET
        for row, start in enumerate(starts[first : first + batch_size]):
            tokens = stream.tokens(start, min(start + sequence_length + 1, stream.num_tokens))
            again = sequence_length - step if start else 0
            inputs_BL[row, : len(tokens) - 1] = tokens[:-1]
            targets_BL[row, again : len(tokens) - 1] = tokens[1 + again :]
        yield Batch(inputs_BL, targets_BL)


def count_targets(stream: TokenStream | Conversations) -> int:
    """The number of tokens that `eval_batches` of a stream has as targets, but for a mixture's few edges."""
    return stream.num_tokens - (not isinstance(stream, Conversations))


def pad_batch(batch: Batch, rows: int) -> Batch:
    """Adds rows without targets, up to a number of rows."""
    more = ((0, rows - len(batch.inputs_BL)), (0, 0))
    inputs_BL, targets_BL, segments_BL = batch[:3]
    return Batch(
        np.pad(inputs_BL, more),
        np.pad(targets_BL, more, constant_values=NO_TARGET),
        None if segments_BL is None else np.pad(segments_BL, more, constant_values=PADDING),
    )
