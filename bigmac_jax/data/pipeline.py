"""From the token stream to batches: shuffled windows for training, every token once for evaluation."""

import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.cache import CachedStream, Counts, MemoryStream, TokenStream, cached_stream, encode_stream
from bigmac_jax.data.corpus import documents
from bigmac_jax.data.documents import decode
from bigmac_jax.data.tokenizer import Tokenizer

_BUFFERED_BATCHES = 4
_log = logging.getLogger(__name__)


def open_stream(config: Config, split: str, tokenizer: Tokenizer) -> CachedStream:
    """The tokens of a split, tokenised on the first call; raises ConfigError as `documents` does."""
    docs = documents(config.data, split, config.cache_dir)
    return cached_stream(docs, split, tokenizer, config.cache_dir)


def text_stream(text_or_path: str | pathlib.Path, tokenizer: Tokenizer) -> MemoryStream:
    """The tokens of one document: a `str` is the text itself, a `Path` a file of text.

    Raises:
      ConfigError: a file that is not there or cannot be read, or a text without a word.
    """
    name = "the text"
    text, whole = "", True
    if isinstance(text_or_path, pathlib.Path):
        name = str(text_or_path)
        try:
            text, whole = decode(text_or_path.expanduser().read_bytes())
        except OSError as error:
            raise ConfigError(f"{name} cannot be read ({error.strerror}); give the path of a text file") from None
    else:
        text, whole = decode(text_or_path)
    if not whole:
        _log.warning("%s holds bytes that are not UTF-8, replaced by U+FFFD", name)
    if not text or text.isspace():
        raise ConfigError(f"{name} is empty ({len(text)} characters of white space); give a text with words")
    counts = Counts()
    tokens = np.concatenate(list(encode_stream([text], tokenizer, counts)))
    return MemoryStream(tokens, counts)


class Windows:
    """Sample w of a stream is tokens[w·L : w·L + L + 1], so that each token is predicted once."""

    def __init__(self, stream: TokenStream, sequence_length: int):
        self._stream, self._length = stream, sequence_length

    def __len__(self) -> int:
        return (self._stream.num_tokens - 1) // self._length

    def __getitem__(self, w: int) -> np.ndarray:
        return self._stream.tokens(w * self._length, (w + 1) * self._length + 1)


def samples(config: Config, stream: TokenStream) -> grain.MapDataset:
    """The endless sequence of training samples, int32 [L+1]; sample i depends on train.seed and i alone.

    Every epoch is a new permutation of all windows.

    Raises:
      ConfigError: fewer windows than data.batch_size.
    """
    data = config.data
    windows = Windows(stream, data.sequence_length)
    if len(windows) < data.batch_size:
        raise ConfigError(
            f"data.source={data.source} has {stream.num_tokens} training tokens, {len(windows)} windows of "
            f"data.sequence_length={data.sequence_length}, fewer than data.batch_size={data.batch_size}; "
            f"use more text, shorter sequences or a smaller batch"
        )
    return grain.MapDataset.source(windows).seed(config.train.seed).shuffle().repeat()


class TrainIterator(Iterator[np.ndarray]):
    """Endless batches int32 [B/P, L+1] of process p of P. Its whole state is the number of batches it has given.

    Row j of global batch g is sample g·B + j whatever P is, so a run may go on with other processes or workers.
    """

    def __init__(self, config: Config, stream: TokenStream, process_index: int, process_count: int):
        size, workers = config.data.batch_size, config.data.num_workers
        if size % process_count:
            raise ConfigError(f"data.batch_size={size} must be a multiple of the {process_count} processes")
        # Local batch m·P + p of size B/P is rows p·B/P … (p+1)·B/P of global batch m.
        batches = samples(config, stream).batch(size // process_count)
        self._batches = batches[process_index::process_count]
        self._workers = workers
        self._given = 0
        self._iterator: Any = None

    def __next__(self) -> np.ndarray:
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        self._given += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"batches": self._given}

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self._given = int(state["batches"])

    def close(self) -> None:
        """Stops the threads or workers; the next batch starts them again."""
        if self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()
        self._iterator = None

    def _start(self) -> Any:
        # One thread suffices by far (docs/data.md), and the training step wants the cores.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_BUFFERED_BATCHES)
        dataset = self._batches[self._given :].to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # Grain hands the flags on to its workers; a notebook has parsed none
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=_BUFFERED_BATCHES)
            dataset = dataset.mp_prefetch(workers)
        return iter(dataset)


def train_iterator(
    config: Config, stream: TokenStream, process_index: int = 0, process_count: int = 1
) -> TrainIterator:
    """Endless batches of this process, `next(it)` → int32 [data.batch_size / process_count, L+1].

    `it.get_state()` is a small JSON-serialisable dict; after `set_state` the batches go on from there exactly.

    Raises:
      ConfigError: too little text for one batch, or a batch the processes cannot share equally.
    """
    return TrainIterator(config, stream, process_index, process_count)


def eval_batches(
    stream_or_tokens: TokenStream | np.ndarray, sequence_length: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (tokens int32 [B, L+1], mask bool [B, L]): each token after the first is a target once, in order.

    mask[b, l] says whether tokens[b, l+1] counts; the last window and the last batch are padded with 0.
    """
    stream = stream_or_tokens
    if isinstance(stream, np.ndarray):
        stream = MemoryStream(stream, Counts(tokens=len(stream)))
    step = sequence_length * batch_size
    for start in range(0, stream.num_tokens - 1, step):
        real = stream.tokens(start, min(start + step + 1, stream.num_tokens))
        tokens = np.zeros(step + 1, np.int32)
        tokens[: len(real)] = real
        inputs_BL = tokens[:-1].reshape(batch_size, sequence_length)
        last_B1 = tokens[sequence_length::sequence_length, None]
        mask_BL = (np.arange(step) < len(real) - 1).reshape(batch_size, sequence_length)
        yield np.concatenate([inputs_BL, last_B1], axis=1), mask_BL
