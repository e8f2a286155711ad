"""The documents of one file, or of a part of it, by its kind. Every error names the file and the place in it."""

import csv
import functools
import io
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from bigmac_jax.config import ConfigError
from bigmac_jax.data import kinds
from bigmac_jax.data.documents import Content, Seen, Slice, decode, whole_characters
from bigmac_jax.data.kinds import Kind, open_content
from bigmac_jax.runtime import storage

# Bytes of a document that is not a file of its own: what is read of it must be in memory as a whole.
LONGEST = 1 << 26
_TOO_LONG = f"is longer than {LONGEST >> 20} MiB; give such a text a .txt of its own"
_SKIP = "leave such rows out with data.null_rows=skip"
_BLOCK = 1 << 20
_ROWS = 64  # of a table that are in memory at a time; each may have LONGEST bytes
_SPLIT = ("jsonl", "parquet", "arrow", "feather")  # kinds of which parts are read by themselves, uncompressed
Found = Iterator[tuple[str, Content, bool]]


class Wanted(NamedTuple):
    """Of rows: the field that holds their text, and whether those where it is null or missing are left out."""

    field: str
    skips_null: bool = False


def read_slice(path: pathlib.Path, kind: Kind, part: Slice, wanted: Wanted, seen: Seen) -> Found:
    """Yields (file, content, whether undecodable bytes were replaced already).

    Raises:
      ConfigError: a file that is damaged, or another kind than its name says; a row without the text that is wanted.
    """
    before = seen.source
    try:
        yield from _READERS[kind.name](path, kind, part, wanted, seen)
    except kinds.errors() as error:
        raise kinds.broken(path, error) from None
    seen.source = before + part.size  # tables do not say what they read


def slices(number: int, path: pathlib.Path, kind: Kind, size: int, unit: int) -> list[Slice]:
    """Parts of about `unit` bytes of a file whose kind allows it; they do not depend on anything else."""
    if kind.compression or size <= unit or kind.name not in _SPLIT:
        return [Slice(number, size=size)]
    if kind.name == "jsonl":
        starts = range(0, size, unit)
        return [Slice(number, start, min(start + unit, size), min(unit, size - start)) for start in starts]
    if storage.is_store(path):  # each look at its index is several requests
        return [Slice(number, size=size)]
    try:
        count = pq.read_metadata(path).num_row_groups if kind.name == "parquet" else _batches(path)
    except kinds.errors():  # who reads it will say what is wrong
        count = 1
    parts = max(1, min(count, -(-size // unit)))
    edges = [count * i // parts for i in range(parts + 1)]
    return [Slice(number, a, b, size // parts + (size % parts if a == 0 else 0)) for a, b in itertools.pairwise(edges)]


def _txt(path: pathlib.Path, kind: Kind, part: Slice, wanted: Wanted, seen: Seen) -> Found:
    with open_content(path, kind, seen) as file:
        yield str(path), iter(lambda: file.read(_BLOCK), b""), False


def _jsonl(path: pathlib.Path, kind: Kind, part: Slice, wanted: Wanted, seen: Seen) -> Found:
    """Lines that begin in the slice."""
    at = max(0, part.start - 1)  # a line that begins right at its start has a line's end before it
    with open_content(path, kind, seen, at) as file:
        if part.start:
            at += _skip_line(file)
        numbers = itertools.count(1)
        while part.stop < 0 or at < part.stop:
            line = file.readline(LONGEST + 1)
            if not line:
                return
            where = functools.partial(_line, path, kind, part.start, at, next(numbers))
            if len(line) > LONGEST:
                raise ConfigError(f"{where()} {_TOO_LONG}")
            at += len(line)
            if line.isspace():
                continue
            text, whole = decode(line)
            try:
                row = json.loads(text.removeprefix("\ufeff"))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{where()} is not valid JSON ({error}); each line must be one JSON object") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{where()} is a JSON {type(row).__name__}; each line must be one JSON object")
            if (content := _of_row(row, wanted, where, seen)) is not None:
                yield str(path), content, not whole


def _skip_line(file: io.BufferedReader) -> int:
    skipped = 0
    while line := file.readline(LONGEST):
        skipped += len(line)
        if line.endswith(b"\n"):
            break
    return skipped


def _line(path: pathlib.Path, kind: Kind, start: int, at: int, number: int) -> str:
    """A place in a file of lines; of a slice its lines are counted now that one is wrong."""
    if start:
        number = 1
        with path.open("rb") as file:
            left = at
            while left and (block := file.read(min(_BLOCK, left))):
                number += block.count(b"\n")
                left -= len(block)
    return f"{path} line {number}"


def _json(path: pathlib.Path, kind: Kind, part: Slice, wanted: Wanted, seen: Seen) -> Found:
    """An array of objects, or objects one after the other, such as lines."""
    with open_content(path, kind, seen) as file:
        for number, (row, whole) in enumerate(_values(file, str(path)), 1):
            place = f"{path} entry {number}"
            if not isinstance(row, dict):
                raise ConfigError(f"{place} is a JSON {type(row).__name__}; entries must be JSON objects")
            content = _of_row(row, wanted, lambda place=place: place, seen)  # type: ignore[misc]
            if content is not None:
                yield str(path), content, not whole


def _values(file: io.BufferedReader, name: str) -> Iterator[tuple[Any, bool]]:
    """Values of JSON and whether their bytes were UTF-8; no more of the file is in memory than the longest of them."""
    parse, text, at, whole = json.JSONDecoder().raw_decode, "", 0, True
    left, ended, in_array, number = b"", False, False, 0

    def more(size: int) -> None:
        nonlocal text, at, whole, left, ended
        block = file.read(size)
        ended = not block
        block, left = (left, b"") if ended else whole_characters(left + block)
        new, good = decode(block)
        whole &= good
        text, at = text[at:] + new, 0

    def next_character() -> str:
        nonlocal at
        while True:
            while at < len(text) and text[at] in " \t\r\n":
                at += 1
            if at < len(text) or ended:
                return text[at : at + 1]
            more(_BLOCK)

    more(_BLOCK)
    if next_character() == "[":
        in_array, at = True, at + 1
    while True:
        character = next_character()
        if in_array and number and character == ",":
            at += 1
            next_character()
        elif in_array and number and character not in ("]", ""):
            raise ConfigError(f"{name} behind entry {number}: a comma is missing; check the file")
        elif in_array and character == "]":
            at += 1
            if next_character():
                raise ConfigError(f"{name}: something stands behind the array; use .jsonl for lines")
            return
        elif not character:
            if in_array:
                raise ConfigError(f"{name} is cut off behind entry {number}; bring back a good copy")
            return
        number, size = number + 1, _BLOCK
        while True:
            try:
                value, end = parse(text, at)
                break
            except RecursionError:
                raise ConfigError(f"{name} entry {number} is nested too deeply; check the file") from None
            except ValueError as error:
                if ended:
                    raise ConfigError(f"{name} entry {number} is not valid JSON ({error}); check the file") from None
            if len(text) - at > LONGEST:
                raise ConfigError(f"{name} entry {number} {_TOO_LONG}")
            more(size)
            size *= 2  # of a long one little is parsed twice
        if end - at > LONGEST:
            raise ConfigError(f"{name} entry {number} {_TOO_LONG}")
        at = end
        yield value, whole
        whole = True


def _csv(path: pathlib.Path, kind: Kind, part: Slice, wanted: Wanted, seen: Seen) -> Found:
    """The first row names the columns."""
    csv.field_size_limit(LONGEST)
    with open_content(path, kind, seen) as file:
        flags: list[bool] = []
        rows = csv.reader(_lines(file, flags, str(path)), strict=True)
        try:
            names = next(rows, None)
            if names is None:
                return
            for row in rows:
                if not row:
                    continue
                if len(row) != len(names):
                    raise ConfigError(
                        f"{path} line {rows.line_num} has {len(row)} columns, its first line {len(names)}; check quotes"
                    )
                place = f"{path} line {rows.line_num}"
                values = dict(zip(names, row, strict=True))
                if wanted.field not in values:
                    raise ConfigError(_no_text(place, wanted.field, "is missing", names))
                yield str(path), values[wanted.field], bool(flags)
                flags.clear()
        except csv.Error as error:
            raise ConfigError(f"{path} line {rows.line_num} is not valid CSV ({error}); check the file") from None


def _lines(file: io.BufferedReader, flags: list[bool], name: str) -> Iterator[str]:
    """`flags` gets an entry for each line that is not UTF-8."""
    while line := file.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise ConfigError(f"{name}: a line {_TOO_LONG}")
        text, whole = decode(line)
        if not whole:
            flags.append(True)
        yield text


def _table(path: pathlib.Path, kind: Kind, part: Slice, wanted: Wanted, seen: Seen) -> Found:
    """Row by row of Parquet, and of Arrow as a file (also called Feather) or as a stream."""
    with storage.local_file(path) as file:
        if kind.compression:
            with open_content(path, kind, seen) as content:
                if kind.name == "parquet":
                    raise ConfigError(f"{path}: Parquet is compressed inside; decompress the file")
                yield from _rows(path, wanted, _stream(content), 0, seen)
            return
        with file.open("rb") as opened:
            kinds.check_content(path, kind, opened.read(8))
        if kind.name == "parquet":
            # A buffer: or a row group's whole column would be in memory.
            table = pq.ParquetFile(file, buffer_size=_BLOCK, pre_buffer=False)
            groups = range(part.start, table.num_row_groups if part.stop < 0 else part.stop)
            _check_field(path, wanted, table.schema_arrow)
            first = sum(table.metadata.row_group(g).num_rows for g in range(part.start))
            batches = table.iter_batches(batch_size=_ROWS, row_groups=list(groups), columns=[wanted.field])
            yield from _rows(path, wanted, batches, first, seen)
        else:
            yield from _rows(path, wanted, *_mapped(file, part), seen)


def _mapped(file: pathlib.Path, part: Slice) -> tuple[Iterable[Any], int]:
    """Record batches of a slice, and how many rows stand before them."""
    reader = _ipc(pa.memory_map(str(file)))
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        numbers = range(part.start, reader.num_record_batches if part.stop < 0 else part.stop)
        first = sum(reader.get_batch(i).num_rows for i in range(part.start))
        return map(reader.get_batch, numbers), first
    first = sum(batch.num_rows for batch in itertools.islice(reader, part.start))
    return itertools.islice(reader, None if part.stop < 0 else part.stop - part.start), first


def _stream(content: io.BufferedReader) -> Iterable[Any]:
    """Batches of a file that is not on the disk as it is: the form with an index at its end can't be read there."""
    if content.peek(6)[:6] == b"ARROW1":
        content.read(8)  # its magic; the stream that follows is the same in both forms
    return pa.ipc.open_stream(content)


def _ipc(source: Any) -> Any:
    if source.read(6) == b"ARROW1":
        return pa.ipc.open_file(source)
    source.seek(0)
    return pa.ipc.open_stream(source)


def _batches(path: pathlib.Path) -> int:
    reader = _ipc(pa.memory_map(str(path)))
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        return reader.num_record_batches
    return sum(1 for _ in reader)


def _rows(path: pathlib.Path, wanted: Wanted, batches: Iterable[Any], first: int, seen: Seen) -> Found:
    number, field = first, wanted.field
    for batch in batches:
        _check_field(path, wanted, batch.schema)
        column = batch.column(batch.schema.get_field_index(field))
        for start in range(0, len(column), _ROWS):
            for entry in column[start : start + _ROWS]:
                number += 1
                if isinstance(entry, pa.DictionaryScalar):  # one by one: a batch that is decoded may be large
                    entry = entry.value
                if not entry.is_valid:
                    if not wanted.skips_null:
                        raise ConfigError(f"{_null(f'{path} row {number}', field)}, or {_SKIP}")
                    seen.null += 1
                    continue
                # Bytes, which are decoded like those of every other kind.
                content = entry.as_buffer()
                if content.size > LONGEST:
                    raise ConfigError(f"{path} row {number} {_TOO_LONG}")
                yield str(path), content.to_pybytes(), False


def _check_field(path: pathlib.Path, wanted: Wanted, schema: Any) -> None:
    field, texts = wanted.field, [f.name for f in schema if _is_text(f.type)]
    no_text = wanted.skips_null and field in schema.names and pa.types.is_null(schema.field(field).type)
    if field not in texts and not no_text:
        held = f"holds {schema.field(field).type}" if field in schema.names else "is missing"
        raise ConfigError(_no_text(str(path), field, held, texts))


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    of_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    of_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(check(kind) for check in (*of_text, *of_bytes))


def _of_row(row: dict[str, Any], wanted: Wanted, where: Callable[[], str], seen: Seen) -> str | None:
    """Its text; None of a row that is left out."""
    field, text = wanted.field, row.get(wanted.field)
    if isinstance(text, str):
        return text
    others = [name for name, value in row.items() if isinstance(value, str)]
    if text is not None:
        raise ConfigError(_no_text(where(), field, f"holds {type(text).__name__}", others))
    if not wanted.skips_null:
        null = field in row and _null(where(), field)
        raise ConfigError(f"{null or _no_text(where(), field, 'is missing', others)}, or {_SKIP}")
    seen.null += 1
    return None


def _null(place: str, field: str) -> str:
    return f"{place}: data.text_field={field!r} is null; mend the row"


def _no_text(place: str, field: str, held: str, others: list[str]) -> str:
    return (
        f"{place}: data.text_field={field!r} {held}; set data.text_field to a field of text, "
        f"one of {', '.join(others) or '(none here)'}"
    )


_READERS: dict[str, Callable[[pathlib.Path, Kind, Slice, Wanted, Seen], Found]] = {
    "txt": _txt,
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _table,
    "arrow": _table,
    "feather": _table,
}
