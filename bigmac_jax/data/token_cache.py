"""The token stream of a split, tokenised once into shards (`shards`) and read at random."""

import collections
import hashlib
import json
import logging
import os
import pathlib
import threading
from typing import Any, Protocol

import numpy as np

from bigmac_jax.config import ConfigError
from bigmac_jax.data.corpus import joined
from bigmac_jax.data.documents import Documents
from bigmac_jax.data.encoding import Counts
from bigmac_jax.data.files import Digests, cache_directory, file_digest
from bigmac_jax.data.token_shards import INDEX, SHARD, Store, unit_of
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.data.workers import fill
from bigmac_jax.runtime import storage

_VERSION = 3  # of the files; a new one makes old caches unused
_OPEN = 64  # shards that are open at a time
_log = logging.getLogger(__name__)


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


class JoinedStream(_Counted):
    """Streams one behind the other, by name.

    text: the fingerprint of all their documents.
    """

    def __init__(self, parts: "dict[str, CachedStream]"):
        self.parts, self.counts = parts, Counts()
        for part in parts.values():
            self.counts.add(part.counts)
        self.text = joined({name: part.text for name, part in parts.items()})
        self.eos_id = next(iter(parts.values())).eos_id

    def tokens(self, start: int, stop: int) -> np.ndarray:
        self._check(start, stop)
        found, first = [np.zeros(0, np.int32)], 0
        for part in self.parts.values():
            a, b = max(start - first, 0), min(stop - first, part.num_tokens)
            if a < b:
                found.append(part.tokens(a, b))
            first += part.num_tokens
        return np.concatenate(found)


class CachedStream(_Counted):
    """A stream on disk. It can be pickled, and read from several threads. Shards are opened when they are read, those
    of an object store fetched then.

    text: the fingerprint of its documents.
    """

    def __init__(self, store: Store, index: dict[str, Any], text: str, eos_id: int):
        self.counts, self._dtype = Counts(**index["counts"]), np.dtype(index["dtype"])
        self.text, self.eos_id = text, eos_id
        self._folder, self._kept = store.folder, store.kept
        self._names = [name for name, _, _ in index["shards"]]
        self._digests = [digest for _, _, digest in index["shards"]]
        self._start = np.cumsum([0, *(tokens for _, tokens, _ in index["shards"])])
        self._files: collections.OrderedDict[int, int] = collections.OrderedDict()  # shard → its descriptor
        self._lock = threading.Lock()

    def tokens(self, start: int, stop: int) -> np.ndarray:
        self._check(start, stop)
        found = np.empty(stop - start, np.int32)
        at, shard = start, int(np.searchsorted(self._start, start, "right")) - 1
        while at < stop:
            first = int(self._start[shard])
            end = min(stop, int(self._start[shard + 1]))
            found[at - start : end - start] = self._read(shard, at - first, end - first)
            at, shard = end, shard + 1
        return found

    def _read(self, shard: int, start: int, stop: int) -> np.ndarray:
        """pread and no map: what is read does not count as memory of this process."""
        size = self._dtype.itemsize
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = os.open(self._local(shard), os.O_RDONLY)
                if len(self._files) > _OPEN:
                    os.close(self._files.popitem(last=False)[1])
            else:
                self._files.move_to_end(shard)
            content = os.pread(file, (stop - start) * size, start * size)
        if len(content) != (stop - start) * size:
            raise OSError(f"{self._folder / self._names[shard]}.bin is shorter than it was when the stream was opened")
        return np.frombuffer(content, self._dtype)

    def _local(self, shard: int) -> pathlib.Path:
        path = self._folder / f"{self._names[shard]}.bin"
        if self._kept != self._folder and not path.exists():
            storage.fetch_file(self._kept / path.name, path)
            if file_digest(path) != self._digests[shard]:
                path.unlink()
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


def cached_stream(
    docs: Documents, split: str, tokenizer: Tokenizer, cache_dir: str, processes: int = 0
) -> CachedStream:
    """Opens the tokens of `docs`, and makes those first that are not in the cache or are damaged there.

    Safe against other processes and hosts that do the same, which share the work, and against being killed at any
    moment.

    Args:
      processes: that tokenise on this machine, at most; 0: as many as there are cores.
    """
    key = hashlib.sha256(
        json.dumps([_VERSION, SHARD, docs.fingerprint, tokenizer.fingerprint], allow_nan=False).encode()
    ).hexdigest()
    kept = cache_directory(cache_dir, "tokens") / f"{split}-{key[:20]}"
    store, digests = Store(kept, key, docs, split, tokenizer), Digests(cache_dir, str(kept))
    storage.make_folder(store.folder)
    while True:
        index = store.index()
        if index is None:
            if (store.folder / INDEX).exists():
                _log.warning("%s is damaged (its index); tokenising again", kept)
            old = {unit for unit in range(len(docs.units)) if store.finished(unit) is not None}
            fill(store, processes)
            index = store.finish()
            made = {
                store.folder / f"{name}.bin": digest for name, _, digest in index["shards"] if unit_of(name) not in old
            }
            digests.add({path: digest for path, digest in made.items() if path.exists()})
        damaged = _damaged(store, index, digests)
        if store.kept != store.folder:  # of the copies here, which are fetched again
            for name in damaged:
                (store.folder / f"{name}.bin").unlink()
        elif damaged:
            _log.warning("%s is damaged (%s); tokenising again", kept, ", ".join(f"{name}.bin" for name in damaged[:5]))
            store.forget(damaged)
            continue
        return CachedStream(store, index, docs.fingerprint, tokenizer.eos_id)


def _damaged(store: Store, index: dict[str, Any], digests: Digests) -> list[str]:
    """Names of shards that are not what the index says; of an object store those that are here."""
    known = {store.folder / f"{name}.bin": digest for name, _, digest in index["shards"]}
    here = [path for path in known if store.kept == store.folder or path.exists()]
    missing = [path for path in here if not path.is_file()]
    here = [path for path in here if path not in set(missing)]
    wrong = [path for path, found in zip(here, digests(here), strict=True) if found != known[path]]
    return sorted(path.stem for path in {*missing, *wrong})
