"""Rows of Parquet, and of Arrow as a file (also called Feather) or as a stream."""

import itertools
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bigmac_jax.config import ConfigError
from bigmac_jax.data import kinds
from bigmac_jax.data.documents import Content, ReadCounts, Slice
from bigmac_jax.data.kinds import Kind
from bigmac_jax.data.text_field import TextField
from bigmac_jax.runtime import storage

_ROWS = 64  # in memory at a time; each may have LONGEST bytes
_TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
               pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)  # fmt: skip


def read_table(
    path: pathlib.Path, kind: Kind, part: Slice, field: TextField, counts: ReadCounts
) -> Iterator[tuple[str, Content, bool]]:
    """Yields the texts of a slice's rows, as `readers.read_slice` does."""
    if kind.compression:
        with kinds.open_content(path, kind, counts) as content:
            if kind.name == "parquet":
                raise ConfigError(f"{path}: Parquet is compressed inside; decompress the file")
            if content.peek(6)[:6] == b"ARROW1":
                content.read(8)  # the index at its end can't be reached; behind its magic stands a stream
            yield from _read_batches(path, field, pa.ipc.open_stream(content), 0, counts)
        return
    with storage.local_file(path) as file:
        with file.open("rb") as opened:
            kinds.check_content(path, kind, opened.read(8))
        if kind.name == "parquet":
            # With a buffer: else a row group's whole column would be in memory.
            table = pq.ParquetFile(file, buffer_size=kinds.BLOCK, pre_buffer=False)
            groups = range(table.num_row_groups)[part.start : part.stop]
            _check_field(path, field, table.schema_arrow)
            first = sum(table.metadata.row_group(g).num_rows for g in range(part.start))
            batches = table.iter_batches(batch_size=_ROWS, row_groups=list(groups), columns=[field.name])
        else:
            first = sum(batch.num_rows for batch in _batches(file, 0, part.start))
            batches = _batches(file, part.start, part.stop)
        yield from _read_batches(path, field, batches, first, counts)


def count_parts(path: pathlib.Path, kind: Kind) -> int:
    """Number of row groups or record batches, by which a file is cut into slices. Raises ConfigError for a damaged
    file: by a guess, this host would cut it as no other does."""
    try:
        with path.open("rb") as file:
            kinds.check_content(path, kind, file.read(8))
        if kind.name == "parquet":
            return pq.read_metadata(path).num_row_groups
        reader = _open_arrow(path)
        return reader.num_record_batches if _has_index(reader) else sum(1 for _ in reader)
    except kinds.read_errors() as error:
        raise kinds.explain_error(path, error) from None


def _open_arrow(file: pathlib.Path) -> Any:
    source = pa.memory_map(str(file))
    if source.read(6) == b"ARROW1":
        return pa.ipc.open_file(source)
    source.seek(0)
    return pa.ipc.open_stream(source)


def _has_index(reader: Any) -> bool:
    return isinstance(reader, pa.ipc.RecordBatchFileReader)


def _batches(file: pathlib.Path, start: int, stop: int | None) -> Iterator[Any]:
    reader = _open_arrow(file)
    if _has_index(reader):
        return map(reader.get_batch, range(reader.num_record_batches)[start:stop])
    return itertools.islice(reader, start, stop)


def _read_batches(
    path: pathlib.Path, field: TextField, batches: Iterable[Any], first: int, counts: ReadCounts
) -> Iterator[tuple[str, Content, bool]]:
    numbers = itertools.count(first + 1)  # `first` rows of the file stand before these batches
    for batch in batches:
        _check_field(path, field, batch.schema)
        column = batch.column(batch.schema.get_field_index(field.name))
        for start in range(0, len(column), _ROWS):
            for entry, number in zip(column[start : start + _ROWS], numbers, strict=False):
                if isinstance(entry, pa.DictionaryScalar):  # one by one: a batch that is decoded may be large
                    entry = entry.value
                place = f"{path} row {number}"
                if not entry.is_valid:
                    if not field.skips_null:
                        raise field.null_error(place)
                    counts.null += 1
                    continue
                # Bytes, which are decoded like those of every other kind.
                content = entry.as_buffer()
                if content.size > kinds.LONGEST:
                    raise ConfigError(f"{place} {kinds.TOO_LONG}")
                yield str(path), content.to_pybytes(), False


def _check_field(path: pathlib.Path, field: TextField, schema: Any) -> None:
    name, texts = field.name, [column.name for column in schema if _is_text(column.type)]
    field.check_once(str(path), schema.names)
    is_null = name in schema.names and pa.types.is_null(schema.field(name).type)
    if name not in texts and not (is_null and field.skips_null):
        found = f"holds {schema.field(name).type}" if name in schema.names else "is missing"
        raise field.type_error(str(path), found, texts, schema.names)


def _is_text(kind: Any) -> bool:
    return any(check(kind.value_type if pa.types.is_dictionary(kind) else kind) for check in _TEXT_TYPES)
