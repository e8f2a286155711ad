"""A corpus as shards of tokens on disk, each written once by whoever comes first, and an index when all are there.

    UNIT-SHARD.bin    tokens, 16 or 32 bits each, one behind the other
    UNIT-SHARD.json   its record, while the unit is not finished: a start after a kill goes on behind it
    UNIT.json         the records of a finished unit's shards
    index.json        all of them, once all units are finished

A unit is what one process reads at a time (`Documents.units`); it and its shards depend on the source alone. Whoever
works on one holds its lock, which a killed process lets go. Nothing that has its final name is unfinished.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, BinaryIO

import numpy as np

from bigmac_jax.config import ConfigError, parse_object, sealed, unsealed
from bigmac_jax.data.documents import Documents, Seen
from bigmac_jax.data.encoding import Counts, Words, encode
from bigmac_jax.data.files import disk_full, file_digest, locked, remove
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.runtime import leases, storage
from bigmac_jax.runtime.clock import clock

SHARD = 1 << 25  # tokens after which the next shard begins
INDEX = "index.json"
_POLL = 0.2  # seconds between looks at what others work on
_log = logging.getLogger(__name__)
Record = dict[str, Any]


class Store:
    """Where the shards of a split are: `kept`, which is what all see, and `folder` on this machine.

    Args:
      key: what the tokens depend on.
    """

    def __init__(self, kept: pathlib.Path, key: str, docs: Documents, split: str, tokenizer: Tokenizer):
        self.kept, self.key, self.docs, self.split, self.tokenizer = kept, key, docs, split, tokenizer
        self.folder = storage.local_copy_path(kept.parent) / kept.name if storage.is_store(kept) else kept
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)

    def index(self) -> Record | None:
        """None if it is not there or is not of this key; a damaged one is none."""
        for path in dict.fromkeys((self.folder / INDEX, self.kept / INDEX)):
            found = _read(path)
            if found is not None and found.get("key") == self.key:
                if path != self.folder / INDEX:
                    _put(self.folder / INDEX, path.read_bytes())
                return found
        return None

    def finished(self, unit: int) -> Record | None:
        """The record of a finished unit: `shards`, and what was `seen`."""
        return _read(self.kept / f"{unit:05}.json")

    def forget(self, names: list[str]) -> None:
        """Shards on this disk that are damaged: their units are made again."""
        remove(self.folder / INDEX)
        for unit in set(map(unit_of, names)):
            (self.folder / f"{unit:05}.json").unlink(missing_ok=True)

    def work(self, units: list[int], report: Callable[[int, int], None]) -> None:
        """Makes the units that nobody has made or makes now, then waits for those of others.

        Args:
          report: is given a unit and how many bytes of its source are read.
        """
        held = units
        while held:
            waiting = []
            for unit in held:
                if self.finished(unit) is not None:
                    report(unit, self.size_of(unit))
                    continue
                try:
                    with _held(self.kept / f"{unit:05}"):
                        if self.finished(unit) is None:
                            self._make(unit, report)
                    report(unit, self.size_of(unit))
                except leases.HeldError:
                    waiting.append(unit)
            if len(waiting) == len(held):
                clock.tick()  # whoever makes them is watched itself
                time.sleep(_POLL)
            held = waiting

    def size_of(self, unit: int) -> int:
        """Bytes of source, roughly."""
        parts = self.docs.units[unit]
        return sum(part.size for part in parts) if parts else self.docs.size

    def _make(self, unit: int, report: Callable[[int, int], None]) -> None:
        """Goes on behind the shards that a killed process has left."""
        records = list(self._left(unit))
        skip = records[-1]["pieces"] if records else 0
        seen, words = Seen(), Words()
        parts = self.docs.pieces(self.docs.units[unit], seen)
        for _ in range(skip):
            piece, last = next(parts)
            words.pass_over(piece, last)
        counts, pieces = Counts(), skip
        arrays = encode(parts, self.tokenizer, counts, words)
        if unit == 0 and not records:
            counts.tokens = 1
        before = np.array([self.tokenizer.eos_id] * counts.tokens, self.dtype)
        more = True
        while more:
            more, name = False, f"{unit:05}-{len(records):03}"
            part = self.folder / f".{name}.part"
            with written(part, self.kept) as file:
                file.write(before.tobytes())
                for array, number in arrays:
                    file.write(array.astype(self.dtype).tobytes())
                    pieces += number
                    report(unit, seen.source)
                    if counts.tokens >= SHARD:
                        more = True
                        break
            before = before[:0]
            if (shard := self.folder / f"{name}.bin").is_dir():  # whatever damage left there
                remove(shard)
            part.replace(shard)
            digest = file_digest(self.folder / f"{name}.bin")
            records.append({"name": name, **asdict(counts), "pieces": pieces, "digest": digest})
            for name_of in vars(counts):
                setattr(counts, name_of, 0)
            _put(self.folder / f"{name}.json", _seal(records[-1]))
        if storage.is_store(self.kept):
            for record in records:
                storage.send_file(self.folder / f"{record['name']}.bin", self.kept / f"{record['name']}.bin")
        _put(self.kept / f"{unit:05}.json", _seal({"shards": records, "seen": asdict(seen)}))
        for record in records:
            (self.folder / f"{record['name']}.json").unlink(missing_ok=True)

    def _left(self, unit: int) -> Iterator[Record]:
        """The records of a unit's first shards, as far as they are intact."""
        for number in itertools.count():
            name = f"{unit:05}-{number:03}"
            record, file = _read(self.folder / f"{name}.json"), self.folder / f"{name}.bin"
            if record is None or not file.is_file() or file_digest(file) != record.get("digest"):
                return
            yield record

    def finish(self) -> Record:
        """Writes the index, unless another process has; logs what was read, and raises ConfigError if that is no
        document."""
        with locked(self.kept / INDEX):
            if (found := self.index()) is not None:
                return found
            units = [self.finished(unit) for unit in range(len(self.docs.units))]
            counts, seen = Counts(), Seen()
            for unit in units:
                assert unit is not None
                seen.add(Seen(**unit["seen"]))
                for shard in unit["shards"]:
                    counts.add(Counts(*(shard[field.name] for field in dataclasses.fields(Counts))))
            self.docs.tell(seen)
            shards = [[s["name"], s["tokens"], s["digest"]] for unit in units if unit for s in unit["shards"]]
            index = {
                "key": self.key, "dtype": self.dtype.name, "counts": asdict(counts),
                "shards": [shard for shard in shards if shard[1]],
            }  # fmt: skip
            _put(self.folder / INDEX, _seal(index))
            if storage.is_store(self.kept):
                _put(self.kept / INDEX, _seal(index))
            _log.info(
                "%s split: %s", self.split, ", ".join(f"{value} {name}" for name, value in asdict(counts).items())
            )
            return index


def unit_of(shard: str) -> int:
    """The unit that a shard is of, by its name."""
    return int(shard.partition("-")[0])


def _held(path: pathlib.Path) -> Any:
    return leases.lock(path.with_name(f".{path.name}.lock"), wait=False)


@contextlib.contextmanager
def written(path: pathlib.Path, cache: pathlib.Path) -> Iterator[BinaryIO]:
    """A file that is written; a full disk is a ConfigError that names the `cache`."""
    try:
        with path.open("wb") as file:
            yield file
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and (fix := disk_full(error, path)):
            raise ConfigError(f"{cache} cannot be written: {fix}") from None
        raise


def _put(path: pathlib.Path, record: bytes) -> None:
    if not storage.is_store(path) and path.is_dir():  # whatever damage left there
        remove(path)
    try:
        storage.write_atomically(path, record)
    except OSError as error:
        if fix := disk_full(error, path):
            raise ConfigError(f"{path} cannot be written: {fix}") from None
        raise


def _seal(record: Record) -> bytes:
    return (json.dumps(sealed(record), separators=(",", ":"), allow_nan=False) + "\n").encode()


def _read(path: pathlib.Path) -> Record | None:
    """None if it is not there, or damaged."""
    try:
        return unsealed(parse_object(path.read_bytes()))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return None
