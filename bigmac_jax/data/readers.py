"""Reads the documents of one file, or of a slice of it, by its kind. Every error names the file and the place in it."""

import codecs
import csv
import functools
import io
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from bigmac_jax.config import ConfigError
from bigmac_jax.data import kinds
from bigmac_jax.data.arrow_tables import count_parts, read_table
from bigmac_jax.data.documents import Content, ReadCounts, Slice, decode, split_last_character
from bigmac_jax.data.kinds import Kind, open_content
from bigmac_jax.data.text_field import TextField
from bigmac_jax.runtime import storage

_SPACE = re.compile(r"[ \t\r\n]*")
# What stands for bytes that are not UTF-8 until it is known whose they are: no UTF-8 gives it.
_MARK, _MARKED = "bigmac_jax.mark", "\udfff"
codecs.register_error(_MARK, lambda error: (_MARKED, error.end))  # type: ignore[attr-defined]
_parse_json = json.JSONDecoder().raw_decode
Contents = Iterator[tuple[str, Content, bool]]


def read_slice(path: pathlib.Path, kind: Kind, part: Slice, field: TextField, counts: ReadCounts) -> Contents:
    """Yields (file, content, whether bytes that are not UTF-8 were replaced already) for each document. Raises
    ConfigError for a file that is damaged or not what its name says, and for a row without the text that is wanted."""
    before = counts.source
    try:
        yield from _READERS[kind.name](path, kind, part, field, counts)
    except kinds.read_errors() as error:
        raise kinds.explain_error(path, error) from None
    counts.source = before + part.size  # tables do not say what they read


def cut_slices(number: int, path: pathlib.Path, kind: Kind, size: int, unit: int) -> list[Slice]:
    """Cuts a file into slices of about `unit` bytes, or takes it whole where its kind can't be cut; `number` is its
    place in the corpus."""
    if kind.compression or size <= unit or kind.name not in ("jsonl", *kinds.TABLES):
        return [Slice(number, size=size)]
    if kind.name == "jsonl":
        starts = range(0, size, unit)
        return [Slice(number, start, min(start + unit, size), min(unit, size - start)) for start in starts]
    if storage.is_store(path):  # each look at its index is several requests
        return [Slice(number, size=size)]
    count = count_parts(path, kind)
    parts = max(1, min(count, -(-size // unit)))
    edges = [count * i // parts for i in range(parts + 1)]
    return [Slice(number, a, b, size // parts + (size % parts if a == 0 else 0)) for a, b in itertools.pairwise(edges)]


def _read_txt(path: pathlib.Path, kind: Kind, part: Slice, field: TextField, counts: ReadCounts) -> Contents:
    with open_content(path, kind, counts) as file:
        yield str(path), iter(lambda: file.read(kinds.BLOCK), b""), False


def _read_jsonl(path: pathlib.Path, kind: Kind, part: Slice, field: TextField, counts: ReadCounts) -> Contents:
    for where, line in read_lines(path, kind, part, counts):
        try:
            row, whole = parse_row(line)
        except ValueError as error:
            raise ConfigError(f"{where()} {error}") from None
        if (content := field.read(row, where, counts)) is not None:
            yield str(path), content, not whole


def read_lines(
    path: pathlib.Path, kind: Kind, part: Slice, counts: ReadCounts
) -> Iterator[tuple[Callable[[], str], bytes]]:
    """Yields (function that names its place, line) for each line that begins in a slice and is not blank; raises
    ConfigError for one that is longer than `kinds.LONGEST`."""
    at = max(0, part.start - 1)  # a line that begins right at its start has a line's end before it
    with open_content(path, kind, counts, at) as file:
        if part.start:
            at += _skip_line(file)
        for number in itertools.count(1):
            line = b"" if part.stop is not None and at >= part.stop else file.readline(kinds.LONGEST + 1)
            if not line:
                return
            where = functools.partial(_name_line, path, part.start, at, number)
            if len(line) > kinds.LONGEST:
                raise ConfigError(f"{where()} {kinds.TOO_LONG}")
            at += len(line)
            if not line.isspace():
                yield where, line


def parse_row(line: bytes) -> tuple[dict[str, Any], bool]:
    """Parses a line of JSON; returns the object, and whether the line was UTF-8. Raises ValueError if it is none."""
    text, whole = decode(line)
    try:
        row = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error}); each line must be one JSON object") from None
    if not isinstance(row, dict):
        raise ValueError(f"is a JSON {type(row).__name__}; each line must be one JSON object")
    return row, whole


def _skip_line(file: io.BufferedReader) -> int:
    skipped = 0
    while line := file.readline(kinds.LONGEST):
        skipped += len(line)
        if line.endswith(b"\n"):
            break
    return skipped


def _name_line(path: pathlib.Path, start: int, at: int, number: int) -> str:
    """Names the line at byte `at`; in a slice that does not begin the file, its number is counted only now."""
    if start:
        with path.open("rb") as file:
            blocks = (file.read(min(kinds.BLOCK, at - done)) for done in range(0, at, kinds.BLOCK))
            number = 1 + sum(block.count(b"\n") for block in blocks)
    return f"{path} line {number}"


def _read_json(path: pathlib.Path, kind: Kind, part: Slice, field: TextField, counts: ReadCounts) -> Contents:
    """Reads an array of objects, or objects one after the other, such as lines."""
    with open_content(path, kind, counts) as file:
        for number, (row, whole) in enumerate(_read_values(file, str(path)), 1):
            place = f"{path} entry {number}"
            if not isinstance(row, dict):
                raise ConfigError(f"{place} is a JSON {type(row).__name__}; entries must be JSON objects")
            content = field.read(row, functools.partial(str, place), counts)
            if content is not None:
                yield str(path), content, not whole


def _read_values(file: io.BufferedReader, name: str) -> Iterator[tuple[Any, bool]]:
    """Yields the entries of an array, or values one after the other, each with whether its bytes were UTF-8; memory
    is bounded by the longest of them.

    ijson 3.6 is as fast, but 20 KB of nested lists take it 1 GB, nothing bounds the length of a text, and half of a
    surrogate pair becomes "?" where all other formats here have U+FFFD.
    """
    text, number = _JsonText(file), 0
    if in_array := text.next_character() == "[":
        text.at += 1
    while character := text.next_character():
        if in_array and character == "]":
            text.at += 1
            if text.next_character():
                raise ConfigError(f"{name}: something stands behind the array; use .jsonl for lines")
            return
        if in_array and number:
            if character != ",":
                raise ConfigError(f"{name} behind entry {number}: a comma is missing; check the file")
            text.at += 1
            text.next_character()
        number += 1
        yield text.next_value(f"{name} entry {number}")
    if in_array:
        raise ConfigError(f"{name} is cut off behind entry {number}; bring back a good copy")


class _JsonText:
    """A file's text around the place `at`, read as far as needed."""

    def __init__(self, file: io.BufferedReader):
        self._file, self._left, self._ended = file, b"", False
        self._text, self.at = "", 0

    def _read_on(self, size: int) -> None:
        block = self._file.read(size)
        self._ended = not block
        block, self._left = (self._left, b"") if self._ended else split_last_character(self._left + block)
        self._text, self.at = self._text[self.at :] + block.decode(errors=_MARK), 0

    def next_character(self) -> str:
        """Goes on to the next character that is not white space; "" at the end."""
        while True:
            self.at = _SPACE.match(self._text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self._text) or self._ended:
                return self._text[self.at : self.at + 1]
            self._read_on(kinds.BLOCK)

    def next_value(self, place: str) -> tuple[Any, bool]:
        """Parses the value at the place, and goes on behind it → the value, and whether its bytes were UTF-8."""
        size, end = kinds.BLOCK, 0
        while True:
            try:
                value, end = _parse_json(self._text, self.at)
            except RecursionError:
                raise ConfigError(f"{place} is nested too deeply; check the file") from None
            except ValueError as error:
                if self._ended:
                    raise ConfigError(f"{place} is not valid JSON ({error}); check the file") from None
            if (end or len(self._text)) - self.at > kinds.LONGEST:
                raise ConfigError(f"{place} {kinds.TOO_LONG}")
            if end:
                start, self.at = self.at, end
                if self._text.find(_MARKED, start, end) < 0:
                    return value, True
                return _parse_json(self._text[start:end].replace(_MARKED, "\ufffd"))[0], False
            self._read_on(size)
            size *= 2  # little of a long value is parsed twice


def _read_csv(path: pathlib.Path, kind: Kind, part: Slice, field: TextField, counts: ReadCounts) -> Contents:
    """Reads rows of columns, which the first row names."""
    csv.field_size_limit(kinds.LONGEST)
    with open_content(path, kind, counts) as file:
        replaced: list[bool] = []
        rows = csv.reader(_decode_lines(file, replaced, str(path)), strict=True)
        try:
            names = next(rows, [])
            field.check_once(f"{path} line 1", names)
            for row in filter(None, rows):
                place = f"{path} line {rows.line_num}"
                if len(row) != len(names):
                    raise ConfigError(f"{place} has {len(row)} columns, its first line {len(names)}; check quotes")
                values = dict(zip(names, row, strict=True))
                if field.name not in values:
                    raise field.type_error(place, "is missing", names, names)
                yield str(path), values[field.name], bool(replaced)
                replaced.clear()
        except csv.Error as error:
            raise ConfigError(f"{path} line {rows.line_num} is not valid CSV ({error}); check the file") from None


def _decode_lines(file: io.BufferedReader, replaced: list[bool], name: str) -> Iterator[str]:
    """Yields lines; `replaced` gets an entry for each that is not UTF-8."""
    while line := file.readline(kinds.LONGEST + 1):
        if len(line) > kinds.LONGEST:
            raise ConfigError(f"{name}: a line {kinds.TOO_LONG}")
        text, whole = decode(line)
        if not whole:
            replaced.append(True)
        yield text


_READERS: dict[str, Callable[[pathlib.Path, Kind, Slice, TextField, ReadCounts], Contents]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": read_table,
    "arrow": read_table,
    "feather": read_table,
}
