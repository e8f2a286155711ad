"""The token stream of a split: tokenised once into shards (`token_shards`), and read at random."""

import abc
import collections
import functools
import hashlib
import logging
import os
import pathlib
import threading
from typing import Any

import numpy as np

from bigmac_jax.config import ConfigError
from bigmac_jax.data.corpus import join_fingerprints
from bigmac_jax.data.documents import Documents
from bigmac_jax.data.encoding import Counts
from bigmac_jax.data.files import Digests, file_digest, json_digest, make_cache_directory
from bigmac_jax.data.token_shards import INDEX, SHARD, ShardStore
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.data.workers import make_shards
from bigmac_jax.runtime import storage

_VERSION = 3  # of the files; a new one makes old caches unused
_OPEN = 64  # shards that are open at a time
_log = logging.getLogger(__name__)


class TokenStream(abc.ABC):
    """The tokens of a split or a text, in order."""

    counts: Counts
    eos_id: int  # the end-of-text token; -1 without one
    text: str  # the fingerprint of its documents

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop`, int32 [stop - start]."""
        if not 0 <= start <= stop <= self.counts.tokens:
            raise IndexError(f"tokens {start} to {stop} are not within the stream's {self.counts.tokens}")
        return self._read(start, stop)

    @abc.abstractmethod
    def _read(self, start: int, stop: int) -> np.ndarray: ...

    @property
    def num_tokens(self) -> int:
        return self.counts.tokens


class MemoryStream(TokenStream):
    """A stream in memory."""

    def __init__(self, tokens: np.ndarray, counts: Counts, eos_id: int = -1):
        self._tokens, self.counts, self.eos_id = tokens, counts, eos_id

    @functools.cached_property
    def text(self) -> str:  # type: ignore[override]
        return hashlib.sha256(self._tokens.tobytes()).hexdigest()

    def _read(self, start: int, stop: int) -> np.ndarray:
        return self._tokens[start:stop].astype(np.int32)


class JoinedStream(TokenStream):
    """Streams one behind the other, by name."""

    def __init__(self, parts: "dict[str, CachedStream]"):
        self.parts, self.counts = parts, Counts()
        for part in parts.values():
            self.counts.add(part.counts)
        self.text = join_fingerprints({name: part.text for name, part in parts.items()})
        self.eos_id = next(iter(parts.values())).eos_id

    def _read(self, start: int, stop: int) -> np.ndarray:
        found, first = [np.zeros(0, np.int32)], 0
        for part in self.parts.values():
            a, b = max(start - first, 0), min(stop - first, part.num_tokens)
            if a < b:
                found.append(part.tokens(a, b))
            first += part.num_tokens
        return np.concatenate(found)


class CachedStream(TokenStream):
    """A stream on disk. It can be pickled, and read from several threads.
    Shards are opened, or fetched from an object store, when they are first read."""

    def __init__(self, store: ShardStore, index: dict[str, Any], text: str, eos_id: int):
        self.counts, self._dtype = Counts(**index["counts"]), np.dtype(index["dtype"])
        self.text, self.eos_id = text, eos_id
        self._folder, self._kept = store.folder, store.kept
        self._names, _, self._digests = zip(*index["shards"], strict=True)
        self._start = np.cumsum([0, *(tokens for _, tokens, _ in index["shards"])])
        self._files: collections.OrderedDict[int, int] = collections.OrderedDict()  # shard → its descriptor
        self._lock = threading.Lock()

    def _read(self, start: int, stop: int) -> np.ndarray:
        found = np.empty(stop - start, np.int32)
        at, shard = start, int(np.searchsorted(self._start, start, "right")) - 1
        while at < stop:
            first = int(self._start[shard])
            end = min(stop, int(self._start[shard + 1]))
            found[at - start : end - start] = self._read_shard(shard, at - first, end - first)
            at, shard = end, shard + 1
        return found

    def _read_shard(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Reads by pread, not through a map: what is read does not count as memory of this process."""
        size = self._dtype.itemsize
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = os.open(self._fetch(shard), os.O_RDONLY)
                if len(self._files) > _OPEN:
                    os.close(self._files.popitem(last=False)[1])
            else:
                self._files.move_to_end(shard)
            content = os.pread(file, (stop - start) * size, start * size)
        if len(content) != (stop - start) * size:
            raise OSError(f"{self._folder / self._names[shard]}.bin is shorter than it was when the stream was opened")
        return np.frombuffer(content, self._dtype)

    def _fetch(self, shard: int) -> pathlib.Path:
        path = self._folder / f"{self._names[shard]}.bin"
        if self._kept != self._folder and not path.exists():
            storage.fetch_file(self._kept / path.name, path)
            if file_digest(path) != self._digests[shard]:
                path.unlink(missing_ok=True)  # another process may have seen it, too
                raise ConfigError(
                    f"{self._kept / path.name} is damaged; remove {self._kept}, and the text is tokenised again"
                )
        return path

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_files": collections.OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)


def open_cached_stream(
    docs: Documents, split: str, tokenizer: Tokenizer, cache_dir: str, processes: int
) -> CachedStream:
    """Opens the tokens of `docs`; those that are missing or damaged in the cache are made first, together with other
    processes and hosts that do the same, at most `processes` here (0 = one per core). Any of them may be killed at any
    moment."""
    key = json_digest([_VERSION, SHARD, docs.fingerprint, tokenizer.fingerprint, tokenizer.eos_id])
    kept = make_cache_directory(cache_dir, "tokens") / f"{split}-{key[:20]}"
    store, digests = ShardStore(kept, key, docs, split, tokenizer), Digests(cache_dir, str(kept))
    storage.make_folder(store.folder)
    while True:
        index = store.index()
        if index is None:
            if (store.folder / INDEX).exists():
                _log.warning("%s is damaged (its index); tokenising again", kept)
            make_shards(store, processes)
            index = store.finish()
        damaged = _find_damaged(store, index, digests)
        if store.kept != store.folder:  # the copies here, which are fetched again
            for name in damaged:
                (store.folder / f"{name}.bin").unlink(missing_ok=True)
        elif damaged:
            _log.warning("%s is damaged (%s); tokenising again", kept, ", ".join(f"{name}.bin" for name in damaged[:5]))
            store.forget(damaged)
            continue
        return CachedStream(store, index, docs.fingerprint, tokenizer.eos_id)


def _find_damaged(store: ShardStore, index: dict[str, Any], digests: Digests) -> list[str]:
    """Names of the shards that are not what the index says; for an object store, of those with a copy here."""
    known = {store.folder / f"{name}.bin": digest for name, _, digest in index["shards"]}
    here = [path for path in known if path.is_file()]
    wrong = {path for path, found in zip(here, digests(here), strict=True) if found != known[path]}
    if store.kept == store.folder:
        wrong |= known.keys() - set(here)
    return sorted(path.stem for path in wrong)
