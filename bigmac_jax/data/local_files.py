"""Documents from files of text, of lines and of tables, on disks and on object stores."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Iterator

from bigmac_jax.config import ConfigError, missing_place_fix
from bigmac_jax.data import kinds
from bigmac_jax.data.documents import WHOLE, Content, Documents, Portion, ReadCounts, Unit, log_once
from bigmac_jax.data.files import Digests, json_digest
from bigmac_jax.data.kinds import Kind
from bigmac_jax.data.readers import cut_slices, read_slice
from bigmac_jax.data.splits import RULES, HeldOut, hold_out, text_key
from bigmac_jax.data.text_field import TextField
from bigmac_jax.runtime import storage

UNIT = 1 << 26  # bytes of files that one process reads at a time


@dataclasses.dataclass(eq=False)
class FileDocuments(Documents):
    """The documents of files, in the order of the files."""

    source: str  # what the user named, in the config field `setting`
    setting: str
    files: dict[pathlib.Path, int]  # path → bytes
    field: TextField
    split: str
    cache_dir: str  # digests of the files are kept there
    held_out: tuple[str, ...] = ()  # splits that are held out of these files; all other text is for training

    def __post_init__(self) -> None:
        self.setting = f"{self.setting}={self.source}"
        self.name = f"{self.split} split of {self.setting}"
        own = f"set data.{self.split}_source to a path of its own"
        self.fix = own if self.split in self.held_out else "give a path with text"
        self.size = sum(self.files.values())
        self._digests = Digests(self.cache_dir, self.source)

    @functools.cached_property
    def fingerprint(self) -> str:
        return self.fingerprint_by(RULES.get(len(self.held_out), ""))

    def fingerprint_by(self, rule: str) -> str:
        try:
            digests = self._digests(list(self.files))
        except storage.errors() as error:
            what = getattr(error, "filename", None) or self.name
            raise ConfigError(f"{what} cannot be read ({storage.reason(error)}); check the file") from None
        # Names, not whole paths: a corpus that was moved is still the same one.
        parts = [[path.name, digest] for path, digest in zip(self.files, digests, strict=True)]
        key = [parts, self.field.name, [rule, self.split] if self.held_out else "", self.held_out]
        key += ["skips null"] if self.field.skips_null else []
        return json_digest(key)

    @functools.cached_property
    def units(self) -> list[Unit]:
        """Parts of large files, or several small files, of about UNIT bytes each."""
        found: list[Unit] = []
        unit: Unit = ()
        size = 0
        for number, (path, bytes_) in enumerate(self.files.items()):
            for part in cut_slices(number, path, self._kinds[path], bytes_, UNIT):
                if unit and size + part.size > UNIT:
                    found.append(unit)
                    unit, size = (), 0
                unit, size = (*unit, part), size + part.size
        return [*found, unit]

    @functools.cached_property
    def _kinds(self) -> dict[pathlib.Path, Kind]:
        return {path: kind for path in self.files if (kind := kinds.guess_kind(path))}

    def read(self, unit: Unit, counts: ReadCounts) -> Iterator[tuple[str, Content, bool]]:
        paths = list(self.files)
        for part in unit:
            path = paths[part.file]
            yield from read_slice(path, self._kinds[path], part, self.field, counts)

    @functools.cached_property
    def held(self) -> HeldOut:
        """Which documents are held out; to decide it, a small corpus is read once."""
        return self.choose_held_out(self._sizes())

    def choose_held_out(self, sizes: Iterator[tuple[str, int]]) -> HeldOut:
        """Chooses what is held out of documents, given as (key, characters), and logs it."""
        if not self.held_out:
            return HeldOut(())
        held, line = hold_out(sizes, self.held_out)
        log_once(logging.INFO, f"{self.setting}: {line}")
        return held

    def _sizes(self) -> Iterator[tuple[str, int]]:
        key, size = "", 0
        for unit in self.units:
            for piece, last in self.pieces(unit, ReadCounts(), lambda beginning: WHOLE):
                key, size = key or text_key(piece), size + len(piece)
                if last:
                    yield key, size
                    key, size = "", 0

    def portion(self, beginning: str) -> Portion | None:
        return self.held.portion(beginning, self.split)


def find_files(source: str, setting: str) -> dict[pathlib.Path, int]:
    """Finds the files of a path, a folder (all levels) or a glob, in order; returns path → bytes. A folder's hidden
    files and folders, its README and its license are left out. Raises ConfigError for no file, or one of a kind that is
    not read."""
    path = storage.locate(source, setting)
    want = f"{setting}={source!r}"
    if path.is_dir():
        found = storage.list_files(path)
        if beside := {p for p in found if kinds.is_side_file(p.relative_to(path))}:
            found = {p: size for p, size in found.items() if p not in beside}
            names = ", ".join(sorted(str(p.relative_to(path)) for p in beside)[:5])
            count = "1 file" if len(beside) == 1 else f"{len(beside)} files"
            log_once(logging.INFO, f"{want}: {count} beside the corpus left out: {names}")
    elif path.exists():
        found = {path: storage.file_size(path)}
    elif not (found := storage.find_files(path)):
        fix = "use sotu, tfds:NAME, hf:NAME, or the path of a file, folder or glob that exists"
        raise ConfigError(f"{want} is not there; {missing_place_fix(source, fix, hub='did you mean hf:{place}?')}")
    if not found:
        raise ConfigError(f"{want} holds no file; put files there that are {kinds.READ}")
    if unknown := [p for p in found if kinds.guess_kind(p) is None]:
        what = kinds.describe_content(unknown[0])
        more = f" ({len(unknown)} such files)" if len(unknown) > 1 else ""
        fix = "rename it to .txt" if what == "text" else "convert it"
        fix += "" if len(found) == 1 else ", take it away, or name the others with a glob such as 'FOLDER/**/*.jsonl'"
        raise ConfigError(f"{want}: {unknown[0]} seems to be {what}{more}, and read are {kinds.READ}; {fix}")
    return found
