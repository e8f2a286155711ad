"""The token stream of a split, tokenised once into an array_record file and read at random.

Convention, for training and evaluation alike: one end-of-text token, then every document followed by one.
"""

import hashlib
import json
import logging
import pathlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from bigmac_jax.config import parse_object, sealed, unsealed
from bigmac_jax.data.documents import Documents
from bigmac_jax.data.files import Digests, cache_directory, file_digest, made_once
from bigmac_jax.data.tokenizer import PIECE, Tokenizer, pieces
from bigmac_jax.phases import NOW
from bigmac_jax.progress import Progress

CHUNK = 4096  # tokens a record; a sample reads one record or two
_VERSION = 2  # of the files; a new one makes old caches unused
_BATCH = 8 * PIECE  # characters that are encoded at a time
_log = logging.getLogger(__name__)


@dataclass
class Counts:
    tokens: int = 0
    documents: int = 0
    bytes: int = 0  # of the text as UTF-8
    words: int = 0  # len(text.split())


class TokenStream(Protocol):
    """Tokens of a split or a text, in order; `tokens(start, stop)` gives int32 [stop − start]."""

    eos_id: int  # -1: there is none

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_documents(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def num_words(self) -> int: ...
    def tokens(self, start: int, stop: int) -> np.ndarray: ...


class _Counted:
    counts: Counts

    @property
    def num_tokens(self) -> int:
        return self.counts.tokens

    @property
    def num_documents(self) -> int:
        return self.counts.documents

    @property
    def num_bytes(self) -> int:
        return self.counts.bytes

    @property
    def num_words(self) -> int:
        return self.counts.words

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.counts.tokens:
            raise IndexError(f"tokens {start} to {stop} are not within the stream's {self.counts.tokens}")


class MemoryStream(_Counted):
    """A stream held in memory."""

    def __init__(self, tokens: np.ndarray, counts: Counts, eos_id: int = -1):
        self._tokens, self.counts, self.eos_id = tokens, counts, eos_id

    def tokens(self, start: int, stop: int) -> np.ndarray:
        self._check(start, stop)
        return self._tokens[start:stop].astype(np.int32)


class CachedStream(_Counted):
    """A stream on disk. It can be pickled, and read from several threads.

    text: the fingerprint of its documents.
    """

    def __init__(self, directory: pathlib.Path, counts: Counts, dtype: str, text: str, eos_id: int):
        self.counts, self._dtype, self.text, self.eos_id = counts, np.dtype(dtype), text, eos_id
        self._records = grain.sources.ArrayRecordDataSource(str(directory / _TOKENS))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        self._check(start, stop)
        if start == stop:
            return np.zeros(0, np.int32)
        first, last = start // CHUNK, (stop - 1) // CHUNK
        # One at a time: the plural __getitems__ starts a pool of threads on every call and is 7 times slower.
        records = b"".join([self._records[i] for i in range(first, last + 1)])
        tokens = np.frombuffer(records, self._dtype)
        return tokens[start - first * CHUNK : stop - first * CHUNK].astype(np.int32)


_TOKENS, _META = "tokens.array_record", "meta.json"


def cached_stream(docs: Documents, split: str, tokenizer: Tokenizer, cache_dir: str) -> CachedStream:
    """Opens the tokens of `docs`, and makes them first if they are not in the cache or are damaged there.

    Safe against other processes that do the same, and against being killed at any moment (`made_once`).
    """
    key = hashlib.sha256(json.dumps([_VERSION, CHUNK, docs.fingerprint, tokenizer.fingerprint]).encode()).hexdigest()
    path = cache_directory(cache_dir, "tokens") / f"{split}-{key[:20]}"
    digests, made = Digests(cache_dir, str(path)), list[str]()

    def opened(folder: pathlib.Path) -> CachedStream | None:
        while made:  # this process has just read it
            digests.add(folder / _TOKENS, made.pop())
        return _open(folder, key, docs.fingerprint, tokenizer.eos_id, digests)

    def make(folder: pathlib.Path) -> None:
        made.append(_write(folder, key, docs, split, tokenizer))

    return made_once(path, opened, make, last=_META)


def _open(path: pathlib.Path, key: str, text: str, eos_id: int, digests: Digests) -> CachedStream | None:
    if not path.exists():
        return None
    try:
        meta = unsealed(parse_object((path / _META).read_bytes()))  # fewer tokens would be read without a word
        if meta["key"] == key and [meta["digest"]] == digests([path / _TOKENS]):
            return CachedStream(path, Counts(**meta["counts"]), meta["dtype"], text, eos_id)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    _log.warning("%s is damaged; tokenising again", path)
    return None


def _write(directory: pathlib.Path, key: str, docs: Documents, split: str, tokenizer: Tokenizer) -> str:
    """Returns the digest of the tokens' file."""
    counts = Counts()
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    writer = ArrayRecordWriter(str(directory / _TOKENS), "group_size:1,uncompressed")
    left, seen = np.zeros(0, dtype), 0
    with NOW.doing("tokenise"), Progress(f"tokenising {split}", docs.size, "byte", scaled=True, delay=2) as progress:
        for part in encode_stream(docs, tokenizer, counts):
            left = np.concatenate([left, part.astype(dtype)])
            whole = len(left) // CHUNK * CHUNK
            for chunk in left[:whole].reshape(-1, CHUNK):
                writer.write(chunk.tobytes())
            left = left[whole:]
            progress.update(counts.bytes - seen)
            seen = counts.bytes
    if len(left):
        writer.write(left.tobytes())
    writer.close()
    meta: dict[str, Any] = {"key": key, "counts": asdict(counts), "dtype": dtype.name, "chunk": CHUNK}
    meta["digest"] = file_digest(directory / _TOKENS)
    (directory / _META).write_text(json.dumps(sealed(meta), indent=2) + "\n")
    _log.info("%s split: %s", split, ", ".join(f"{value} {name}" for name, value in asdict(counts).items()))
    return str(meta["digest"])


def encode_stream(docs: Iterable[str], tokenizer: Tokenizer, counts: Counts) -> Iterator[np.ndarray]:
    """Yields the stream as int arrays of bounded length and adds up `counts` on the way."""
    eos = np.array([tokenizer.eos_id], np.uint32)
    counts.tokens += 1
    yield eos
    for batch in _batches(docs, counts):
        arrays: list[np.ndarray] = []
        for ids, (_, last) in zip(tokenizer.encode_batch([text for text, _ in batch]), batch, strict=True):
            arrays.append(np.array(ids, np.uint32))
            if last:
                arrays.append(eos)
        joined = np.concatenate(arrays)
        counts.tokens += len(joined)
        yield joined


def _batches(docs: Iterable[str], counts: Counts) -> Iterator[list[tuple[str, bool]]]:
    """Groups pieces of documents, each with whether it is the document's last, to about _BATCH characters."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for doc in docs:
        before = " "
        start = 0
        for piece in pieces(doc):
            start += len(piece)
            counts.bytes += len(piece.encode())
            # A word that a forced cut halved counts once.
            counts.words += len(piece.split()) - (not before[-1].isspace() and not piece[0].isspace())
            before = piece
            batch.append((piece, start == len(doc)))
            size += len(piece)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
        counts.documents += 1
    if batch:
        yield batch
