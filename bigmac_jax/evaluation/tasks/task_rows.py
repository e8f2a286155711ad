"""Rows of a task: from TFDS, or from a local file of JSON lines, Arrow, Parquet or plain text."""

import codecs
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from bigmac_jax.config import ConfigError
from bigmac_jax.data.datasets import DATASET, find_dataset, quiet
from bigmac_jax.data.documents import decode, one_line
from bigmac_jax.runtime import storage

Row = dict[str, Any]
TEXT_FILES = (".txt", ".raw", ".tokens")  # one row, whose column is `text`
SUFFIXES = (".jsonl", ".arrow", ".parquet", *TEXT_FILES)


def read_rows(source: str, split: str, limit: int, cache_dir: str, setting: str) -> list[tuple[str, Row]]:
    """The first `limit` rows (0 = all) as (place for messages, columns), texts as `str` and lists as `list`.

    Args:
      source: `tfds:NAME`, or the path of a file; `setting` is the flag or field it came from.
      split: of TFDS.

    Raises:
      ConfigError: nothing there, a line that is no JSON object or no UTF-8, or no row at all.
    """
    rows = _dataset(source, split, cache_dir, setting) if source.startswith(DATASET) else _file(source, setting)
    found = [(place, _plain(row, place)) for place, row in itertools.islice(rows, limit or None)]
    if not found:
        raise ConfigError(f"{setting} has no rows; give a file with at least one")
    return found


def _dataset(source: str, split: str, cache_dir: str, setting: str) -> Iterator[tuple[str, Row]]:
    with quiet():
        try:
            builder = find_dataset(source.removeprefix(DATASET), cache_dir, setting)
        except ConfigError as error:
            raise ConfigError(f"{error}; or give its rows from a file: --task_data=NAME=PATH") from None
        if split not in builder.info.splits:
            raise ConfigError(f"{setting} has no {split} split; use one of {', '.join(builder.info.splits)}")
        rows = builder.as_data_source(split=split)
    for number in range(len(rows)):
        yield f"{setting} row {number + 1}", rows[number]


def _file(source: str, setting: str) -> Iterator[tuple[str, Row]]:
    path = storage.locate(source, setting)
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in SUFFIXES:
        what = f"must end in {', '.join(SUFFIXES)}" if path.is_file() else "is not a file"
        raise ConfigError(f"{setting} {what}; give rows as JSON lines, Arrow, Parquet or, for perplexity, plain text")
    try:
        if suffix in TEXT_FILES:
            yield str(path), {"text": path.read_bytes().removeprefix(codecs.BOM_UTF8)}
        elif suffix == ".jsonl":
            yield from _json_lines(path)
        else:
            with storage.local_file(path) as file:
                yield from _table(file, path)
    except storage.errors() as error:
        raise ConfigError(f"{path} cannot be read ({one_line(error)}); check the file") from None


def _json_lines(path: pathlib.Path) -> Iterator[tuple[str, Row]]:
    with storage.open_lines(path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            place = f"{path} line {number}"
            try:
                row = json.loads(_text(line, place).removeprefix("\ufeff"))
            except (ValueError, RecursionError) as error:
                if isinstance(error, ConfigError):
                    raise
                raise ConfigError(f"{place} is not valid JSON ({error}); each line must be one JSON object") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{place} is a JSON {type(row).__name__}; each line must be one JSON object")
            yield place, row


def _table(path: pathlib.Path, name: pathlib.Path) -> Iterator[tuple[str, Row]]:
    """Arrow as a stream (what Hugging Face's datasets write) or as a file, or Parquet; `name` is for messages."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix.lower() == ".parquet":
            batches: Any = pq.ParquetFile(path).iter_batches()
        else:
            with path.open("rb") as file:
                magic = file.read(6)
            source = pa.memory_map(str(path))
            reader = pa.ipc.open_file(source) if magic == b"ARROW1" else pa.ipc.open_stream(source)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if magic == b"ARROW1" else reader
        numbers = itertools.count(1)
        for batch in batches:
            for row in batch.to_pylist():
                yield f"{name} row {next(numbers)}", row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read ({one_line(error)}); check the file") from None


def _plain(value: Any, place: str) -> Any:
    """Texts as str, arrays and tuples as lists, numbers as Python's."""
    if isinstance(value, str | bytes):
        return _text(value, place)
    if isinstance(value, dict):
        return {str(key): _plain(entry, place) for key, entry in value.items()}
    if hasattr(value, "tolist"):  # numpy
        value = value.tolist()
        return _plain(value, place) if isinstance(value, list | str | bytes) else value
    return [_plain(entry, place) for entry in value] if isinstance(value, list | tuple) else value


def _text(content: str | bytes, place: str) -> str:
    text, whole = decode(content)
    if not whole:
        where = len(text[: text.index("\ufffd")].encode())
        raise ConfigError(f"{place} is not UTF-8 at byte {where + 1}; scores would be of another text: mend the file")
    return text
