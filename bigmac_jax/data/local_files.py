"""Documents from files of text, of lines and of tables, on disks and on object stores."""

import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator

from bigmac_jax.config import ConfigError
from bigmac_jax.data import kinds
from bigmac_jax.data.documents import WHOLE, Content, Documents, Portion, Seen, Unit, once
from bigmac_jax.data.files import Digests
from bigmac_jax.data.kinds import Kind
from bigmac_jax.data.readers import Wanted, read_slice, slices
from bigmac_jax.data.splits import RULE, Held, hold_out, key_of
from bigmac_jax.runtime import storage

UNIT = 1 << 26  # bytes of files that one process reads at a time


class FileDocuments(Documents):
    """The documents of files, in their order.

    Args:
      source: what the user named; `setting` is the config field it came from, for messages.
      files: → bytes.
      wanted: of rows.
      cache_dir: where digests of the files are kept.
      split: the split asked for; with `held_out`, the splits that are cut out of this source (`splits`). What belongs
        to a split that is not held out here is for training.
    """

    def __init__(
        self,
        source: str,
        setting: str,
        files: dict[pathlib.Path, int],
        wanted: Wanted,
        split: str,
        cache_dir: str,
        held_out: tuple[str, ...] = (),
    ):
        self.setting = f"{setting}={source}"
        self.name = f"{split} split of {self.setting}"
        self.fix = f"set data.{split}_source to a path of its own" if split in held_out else "give a path with text"
        self.wanted, self.split, self.held_out = wanted, split, held_out
        self.files = files
        self._digests = Digests(cache_dir, source)
        self.size = sum(files.values())

    @functools.cached_property
    def fingerprint(self) -> str:
        # Names, not whole paths: a corpus that was moved is still the same one.
        try:
            digests = self._digests(list(self.files))
        except storage.errors() as error:
            what = getattr(error, "filename", None) or self.name
            raise ConfigError(f"{what} cannot be read ({storage.reason(error)}); check the file") from None
        parts = [[path.name, digest] for path, digest in zip(self.files, digests, strict=True)]
        key = [parts, self.wanted.field, [RULE, self.split] if self.held_out else "", self.held_out]
        key += ["skips null"] if self.wanted.skips_null else []
        return hashlib.sha256(json.dumps(key, allow_nan=False).encode()).hexdigest()

    @functools.cached_property
    def units(self) -> list[Unit]:
        """Of about UNIT bytes: parts of large files, or several small ones."""
        found: list[Unit] = []
        unit: Unit = ()
        size = 0
        for number, (path, bytes_) in enumerate(self.files.items()):
            for part in slices(number, path, self._kinds[path], bytes_, UNIT):
                if unit and size + part.size > UNIT:
                    found.append(unit)
                    unit, size = (), 0
                unit, size = (*unit, part), size + part.size
        return [*found, unit]

    @functools.cached_property
    def _kinds(self) -> dict[pathlib.Path, Kind]:
        return {path: kind for path in self.files if (kind := kinds.kind_of(path))}

    def read(self, unit: Unit, seen: Seen) -> Iterator[tuple[str, Content, bool]]:
        paths = list(self.files)
        for part in unit:
            path = paths[part.file]
            yield from read_slice(path, self._kinds[path], part, self.wanted, seen)

    @functools.cached_property
    def held(self) -> Held:
        """What is held out; of few documents all are read for it once."""
        if not self.held_out:
            return Held(())
        held, line = hold_out(self._sizes(), self.held_out)
        once(logging.INFO, f"{self.setting}: {line}")
        return held

    def _sizes(self) -> Iterator[tuple[str, int]]:
        """(key, characters) of every document."""
        key, size = "", 0
        for unit in self.units:
            for piece, last in self.pieces(unit, Seen(), lambda beginning: WHOLE):
                key, size = key or key_of(piece), size + len(piece)
                if last:
                    yield key, size
                    key, size = "", 0

    def portion(self, beginning: str) -> Portion | None:
        return self.held.portion(beginning, self.split)


class LocalDocuments(FileDocuments):
    """The documents of a file, folder or glob, files in order of their names; arguments as for `FileDocuments`.

    Raises:
      ConfigError: nothing to read there, or a file of a kind that is not read.
    """

    def __init__(
        self, source: str, setting: str, wanted: Wanted, split: str, cache_dir: str, held_out: tuple[str, ...] = ()
    ):
        super().__init__(source, setting, find_files(source, setting), wanted, split, cache_dir, held_out)


def find_files(source: str, setting: str) -> dict[pathlib.Path, int]:
    """The files of a file, folder (all levels) or glob, sorted → bytes; ConfigError without any, or for one of a kind
    that is not read. Hidden files of a folder, its README and its license are left out."""
    path = storage.locate(source, setting)
    want = f"{setting}={source!r}"
    if path.is_dir():
        found = storage.list_files(path)
        beside = [p for p in found if kinds.is_beside(p)]
        found = {p: size for p, size in found.items() if p not in set(beside)}
        if beside:
            names = ", ".join(sorted({p.name for p in beside})[:5])
            once(logging.INFO, f"{want}: {len(beside)} files beside the corpus left out: {names}")
    elif path.exists():
        found = {path: storage.file_size(path)}
    else:
        found = storage.find_files(path)
        if not found:
            raise ConfigError(
                f"{want} is not there; use sotu, tfds:NAME, hf:NAME, or the path of a file, folder or glob that exists"
            )
    if not found:
        raise ConfigError(f"{want} holds no file; put files there that are {kinds.READ}")
    if unknown := [p for p in found if kinds.kind_of(p) is None]:
        more = f" ({len(unknown)} such files)" if len(unknown) > 1 else ""
        fix = "rename it to .txt" if (what := _seems(unknown[0])) == "text" else "convert it"
        fix += "" if len(found) == 1 else ", take it away, or name the others with a glob such as 'FOLDER/**/*.jsonl'"
        raise ConfigError(f"{want}: {unknown[0]} seems to be {what}{more}, and read are {kinds.READ}; {fix}")
    return found


def _seems(path: pathlib.Path) -> str:
    try:
        return kinds.seems(path)
    except storage.errors() as error:
        return f"unreadable ({storage.reason(error)})"
