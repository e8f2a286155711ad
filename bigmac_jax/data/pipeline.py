"""From the token stream to batches: shuffled windows for training, every token once for evaluation."""

import logging
import pathlib
from collections.abc import Iterator, Sequence
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


class _Rows:
    """The samples of some rows of every global batch, batch after batch."""

    def __init__(self, samples: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        self._samples, self._batch_size, self._rows = samples, batch_size, rows

    def __len__(self) -> int:
        return len(self._samples) // self._batch_size * len(self._rows)

    def __getitem__(self, i: int) -> np.ndarray:
        batch, row = divmod(int(i), len(self._rows))
        return self._samples[batch * self._batch_size + self._rows[row]]


class TrainIterator(Iterator[np.ndarray]):
    """Endless batches int32 [rows, L+1]: the rows of each global batch that this process needs.

    Its whole state is the number of batches it has given. Row j of global batch g is sample g·B + j whoever reads it,
    so a run may go on with other processes, another mesh or other workers.
    """

    def __init__(self, config: Config, stream: TokenStream, rows: Sequence[int]):
        self._batches = grain.MapDataset.source(_Rows(samples(config, stream), config.data.batch_size, rows))
        self._batches = self._batches.batch(len(rows))
        self._workers = config.data.num_workers
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


def train_iterator(config: Config, stream: TokenStream, rows: Sequence[int] | None = None) -> TrainIterator:
    """Endless batches of this process, `next(it)` → int32 [rows, L+1].

    `it.get_state()` is a small JSON-serialisable dict; after `set_state` the batches go on from there exactly.

    Args:
      rows: the rows of the global batch that this process needs (`hosts.local_rows`); by default all.

    Raises:
      ConfigError: too little text for one batch.
    """
    return TrainIterator(config, stream, range(config.data.batch_size) if rows is None else rows)


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
