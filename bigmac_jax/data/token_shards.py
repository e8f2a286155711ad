"""A corpus as shards of tokens on disk, each written once by whoever comes first, and an index of all of them.

    UNIT-SHARD.bin    tokens, 16 or 32 bits each
    UNIT-SHARD.json   the shard's record, until all units are finished: a start after a kill goes on behind it
    UNIT.json         the records of a finished unit's shards
    index.json        all of them, once all units are finished

A unit is what one process reads at a time (`Documents.units`); it and its shards depend on the source alone, and on
where that lies: a store's tables are not cut. So a shard's record names the slices of its unit, and a start that cuts
the source otherwise takes none of it. Whoever works on a unit holds its lock, which a killed process lets go. A file
under its final name is complete.
"""

import contextlib
import itertools
import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, BinaryIO

import numpy as np

from bigmac_jax.config import ConfigError, parse_object, seal, unseal
from bigmac_jax.data.documents import Documents, ReadCounts
from bigmac_jax.data.encoding import Counts, WordCounter, encode_pieces
from bigmac_jax.data.files import explain_full_disk, file_digest, json_digest, lock_path, remove
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.runtime import leases, storage
from bigmac_jax.runtime.clock import clock

SHARD = 1 << 25  # tokens after which the next shard begins
INDEX = "index.json"
_POLL = 0.2  # seconds between looks at what others work on
_log = logging.getLogger(__name__)
Record = dict[str, Any]


class ShardStore:
    """The shards of a split: in `kept`, which all hosts see, and in `folder` on this machine; the same on a disk. `key`
    is the digest of what the tokens depend on."""

    def __init__(self, kept: pathlib.Path, key: str, docs: Documents, split: str, tokenizer: Tokenizer):
        self.kept, self.key, self.docs, self.split, self.tokenizer = kept, key, docs, split, tokenizer
        self.folder = storage.make_local_copy_folder(kept.parent) / kept.name if storage.is_store(kept) else kept
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)

    def index(self) -> Record | None:
        """Reads the index; None if it is missing, damaged or of another key."""
        for path in dict.fromkeys((self.folder / INDEX, self.kept / INDEX)):
            found = _read_record(path)
            if found is not None and found.get("key") == self.key:
                if path != self.folder / INDEX:
                    _write_bytes(self.folder / INDEX, path.read_bytes())
                return found
        return None

    def finished(self, unit: int) -> Record | None:
        """Reads the record of a finished unit: its `shards`, and what was `seen`; None if it is not finished, or if it
        was cut otherwise."""
        found, slices = _read_record(self.kept / f"{unit:05}.json"), self._slices(unit)
        # Earlier versions have not written the slices.
        return found if found and found["shards"][0].get("slices", slices) == slices else None

    def forget(self, names: list[str]) -> None:
        """Has the units of damaged shards on this disk made again."""
        remove(self.folder / INDEX)
        for unit in {int(name.partition("-")[0]) for name in names}:
            (self.folder / f"{unit:05}.json").unlink(missing_ok=True)

    def work(self, units: list[int], report: Callable[[int, int], None]) -> None:
        """Makes the units that nobody has made or is making; then waits for those of others. `report` is called with a
        unit and the number of bytes of its source that are read."""
        left = units
        while left:
            waiting = []
            for unit in left:
                try:
                    if self.finished(unit) is None:
                        with leases.lock(self.kept / f".{unit:05}.lock", wait=False):
                            if self.finished(unit) is None:
                                self._make(unit, report)
                    report(unit, self.size_of(unit))
                except leases.HeldError:
                    waiting.append(unit)
            if len(waiting) == len(left):
                clock.tick()  # whoever makes them is watched itself
                time.sleep(_POLL)
            left = waiting

    def size_of(self, unit: int) -> int:
        """Bytes of source in a unit, roughly."""
        parts = self.docs.units[unit]
        return sum(part.size for part in parts) if parts else self.docs.size

    def _slices(self, unit: int) -> str:
        """Digest of what a unit is made of."""
        return json_digest([part[:3] for part in self.docs.units[unit]])

    def _make(self, unit: int, report: Callable[[int, int], None]) -> None:
        """Makes a unit's shards, behind those that a killed process has left."""
        path, slices = self.kept / f"{unit:05}.json", self._slices(unit)
        if _read_record(path) is not None:  # of a unit that was cut otherwise, whose shards are replaced now
            path.unlink()
        records = list(self._read_finished_shards(unit))
        seen, words, pieces = ReadCounts(), WordCounter(), records[-1]["pieces"] if records else 0
        parts = self.docs.pieces(self.docs.units[unit], seen)
        for piece, last in itertools.islice(parts, pieces):
            words.skip(piece, last)
        counts = Counts(tokens=int(unit == 0 and not records))
        arrays = encode_pieces(parts, self.tokenizer, counts, words)
        first = np.array([self.tokenizer.eos_id] * counts.tokens, self.dtype)
        more = not (records and records[-1].get("last"))
        while more:
            more, name = False, f"{unit:05}-{len(records):03}"
            shard = self.folder / f"{name}.bin"
            with write_shard(shard) as file:
                file.write(first.tobytes())
                for array, number in arrays:
                    file.write(array.astype(self.dtype).tobytes())
                    pieces += number
                    report(unit, seen.source)
                    if counts.tokens >= SHARD:
                        more = True
                        break
            ends = {"pieces": pieces, "last": not more, "slices": slices}
            records.append({"name": name, **asdict(counts), **ends, "digest": file_digest(shard)})
            _write_record(self.folder / f"{name}.json", records[-1])
            first = first[:0]
            vars(counts).update(asdict(Counts()))
        for _ in arrays:  # what was `seen` behind the last piece counts, too
            pass
        if storage.is_store(self.kept):
            for record in records:
                storage.send_file(self.folder / f"{record['name']}.bin", self.kept / f"{record['name']}.bin")
        _write_record(path, {"shards": records, "seen": asdict(seen)})

    def _read_finished_shards(self, unit: int) -> Iterator[Record]:
        """Yields the records of a unit's first shards, as far as they are intact."""
        for number in itertools.count():
            name = f"{unit:05}-{number:03}"
            record, file = _read_record(self.folder / f"{name}.json"), self.folder / f"{name}.bin"
            if record is None or record.get("slices") != self._slices(unit):
                return
            if not file.is_file() or file_digest(file) != record.get("digest"):
                return
            yield record

    def finish(self) -> Record:
        """Writes the index once all units are finished; raises ConfigError if one is not, or if the corpus has no
        document."""
        with lock_path(self.kept / INDEX):
            if (found := self.index()) is not None:  # another process has written it
                return found
            found_units = [self.finished(unit) for unit in range(len(self.docs.units))]
            units = [record for record in found_units if record]
            if missing := len(found_units) - len(units):
                raise ConfigError(
                    f"{missing} of {len(found_units)} units in {self.kept} are gone, or another process has made them "
                    f"from a copy of the corpus that is cut otherwise; start again, with the corpus in one place for "
                    f"all hosts"
                )
            counts, seen = Counts(), ReadCounts()
            for unit in units:
                seen.add(ReadCounts(**unit["seen"]))
                for shard in unit["shards"]:
                    counts.add(Counts(**{name: shard[name] for name in vars(counts)}))
            self.docs.report(seen)
            for left in self.folder.glob("?????-*.json"):  # of shards whose units are finished
                left.unlink(missing_ok=True)
            shards = [[s["name"], s["tokens"], s["digest"]] for unit in units for s in unit["shards"] if s["tokens"]]
            index = {"key": self.key, "dtype": self.dtype.name, "counts": asdict(counts), "shards": shards}
            for path in dict.fromkeys((self.folder / INDEX, self.kept / INDEX)):
                _write_record(path, index)
            _log.info(
                "%s split: %s", self.split, ", ".join(f"{value} {name}" for name, value in asdict(counts).items())
            )
            return index


@contextlib.contextmanager
def write_shard(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file for writing, which gets its name when it is complete; raises ConfigError if the disk is full."""
    part = path.with_name(f".{path.stem}.part")
    try:
        with explain_full_disk(path.parent), part.open("wb") as file:
            yield file
        if path.is_dir():  # whatever damage left there
            remove(path)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_bytes(path: pathlib.Path, content: bytes) -> None:
    if not storage.is_store(path) and path.is_dir():  # whatever damage left there
        remove(path)
    with explain_full_disk(path):
        storage.write_atomically(path, content)


def _write_record(path: pathlib.Path, record: Record) -> None:
    _write_bytes(path, (json.dumps(seal(record), separators=(",", ":"), allow_nan=False) + "\n").encode())


def _read_record(path: pathlib.Path) -> Record | None:
    """The record in a file; None if it is missing or damaged."""
    try:
        return unseal(parse_object(path.read_bytes()))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return None
