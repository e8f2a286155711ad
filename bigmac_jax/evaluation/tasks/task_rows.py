"""Rows of a task: from TFDS, or from a local file of JSON lines, Arrow, Parquet or plain text."""

import codecs
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

from bigmac_jax.config import ConfigError, parse_object
from bigmac_jax.data.datasets import DATASET, open_dataset, silence_tfds
from bigmac_jax.data.documents import decode
from bigmac_jax.data.kinds import Kind, check_content
from bigmac_jax.runtime import storage

Row = dict[str, Any]
TEXT_FILES = (".txt", ".raw", ".tokens")  # one row, whose column is `text`
SUFFIXES = (".jsonl", ".arrow", ".parquet", *TEXT_FILES)


def read_rows(source: str, split: str, limit: int, cache_dir: str, setting: str) -> list[tuple[str, Row]]:
    """Reads the first `limit` rows (0 = all), each as (place for messages, columns) in plain Python types.

    Args:
      source: `tfds:NAME`, or the path of a file; `setting` is the flag or field it came from.
      split: of TFDS.

    Raises:
      ConfigError: no such source, a line that is no JSON object or no UTF-8, or no row at all.
    """
    rows = (
        _read_dataset(source, split, cache_dir, setting) if source.startswith(DATASET) else _read_file(source, setting)
    )
    found = [(place, _to_plain(row, place)) for place, row in itertools.islice(rows, limit or None)]
    if not found:
        raise ConfigError(f"{setting} has no rows; give a file with at least one")
    return found


def _read_dataset(source: str, split: str, cache_dir: str, setting: str) -> Iterator[tuple[str, Row]]:
    with silence_tfds():
        try:
            builder = open_dataset(source.removeprefix(DATASET), cache_dir, setting)
        except ConfigError as error:
            raise ConfigError(f"{error}; or give its rows from a file: --task_data=NAME=PATH") from None
        if split not in builder.info.splits:
            raise ConfigError(f"{setting} has no {split} split; use one of {', '.join(builder.info.splits)}")
        rows = builder.as_data_source(split=split)
    for number in range(len(rows)):
        yield f"{setting} row {number + 1}", rows[number]


def _read_file(source: str, setting: str) -> Iterator[tuple[str, Row]]:
    path = storage.locate(source, setting)
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in SUFFIXES:
        what = f"must end in {', '.join(SUFFIXES)}" if path.is_file() else "is not a file"
        raise ConfigError(f"{setting} {what}; give rows as JSON lines, Arrow, Parquet or, for perplexity, plain text")
    try:
        if suffix in TEXT_FILES:
            content = path.read_bytes()
            check_content(path, Kind(suffix[1:]), content)
            yield str(path), {"text": content.removeprefix(codecs.BOM_UTF8)}
        elif suffix == ".jsonl":
            yield from _read_json_lines(path)
        else:
            with storage.local_file(path) as file:
                yield from _read_table(file, path)
    except storage.errors() as error:
        raise ConfigError(f"{path} cannot be read ({storage.reason(error)}); check the file") from None


def _read_json_lines(path: pathlib.Path) -> Iterator[tuple[str, Row]]:
    with storage.open_lines(path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            place = f"{path} line {number}"
            text = _text(line, place)
            try:
                row = parse_object(text)
            except ValueError as error:
                raise ConfigError(f"{place} is no JSON object ({error}); each line must be one") from None
            yield place, row


def _read_table(path: pathlib.Path, name: pathlib.Path) -> Iterator[tuple[str, Row]]:
    """Reads Parquet, or Arrow as a file or a stream (as Hugging Face's datasets write it); `name` is for messages."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix.lower() == ".parquet":
            table = pq.ParquetFile(path)
            batches: Any = table.iter_batches()
            names = table.schema_arrow.names
        else:
            source = pa.memory_map(str(path))
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            names = reader.schema.names
        if twice := next((column for column in names if names.count(column) > 1), ""):
            raise ConfigError(f"{name}: {names.count(twice)} columns are named {twice!r}; rename all but one")
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from ((f"{name} row {number}", row) for number, row in enumerate(rows, 1))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read ({storage.reason(error)}); check the file") from None


def _to_plain(value: Any, place: str) -> Any:
    """Makes texts `str`, arrays and tuples lists, and numbers Python's."""
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy
    if isinstance(value, str | bytes):
        return _text(value, place)
    if isinstance(value, dict):
        return {str(key): _to_plain(entry, place) for key, entry in value.items()}
    return [_to_plain(entry, place) for entry in value] if isinstance(value, list | tuple) else value


def _text(content: str | bytes, place: str) -> str:
    text, whole = decode(content)
    if not whole:
        where = len(text[: text.index("\ufffd")].encode())
        raise ConfigError(f"{place} is not UTF-8 at byte {where + 1}; scores would be of another text: mend the file")
    return text
