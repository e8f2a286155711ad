"""The records of metrics.jsonl, as they are read back."""

import math
import pathlib
from typing import Any

import numpy as np

from bigmac_jax.config import ConfigError, parse_object

Record = dict[str, Any]
NAME = "metrics.jsonl"
_DIMENSIONS = {"moe/load": 2, "moe/drop_rate_by_layer": 1}  # of values that are no single number
_TEXTS = ("event",)


def read_records(workdir: pathlib.Path) -> list[Record]:
    """In order. Lines that are no record are left out: the last one of a run that is writing it, or one that a full
    disk has cut."""
    return [record for line in read_lines(workdir / NAME) if (record := as_record(line)) is not None]


def read_lines(path: pathlib.Path) -> list[bytes]:
    """The last one is what stands behind the last line's end. None, if there is no file yet.

    Raises:
      ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); move it away") from None


def as_record(line: bytes) -> Record | None:
    """What a line says, None for numbers that are not finite; None if it is no record: no step, or another type."""
    try:
        record = parse_object(line)
        if type(record.get("step")) is not int or record["step"] < 0:
            return None
        return {name: _checked(name, value) for name, value in record.items()}
    except (ValueError, TypeError):
        return None


def _checked(name: str, value: Any) -> Any:
    if name in _TEXTS:
        if not isinstance(value, str):
            raise TypeError
        return value
    if dimensions := _DIMENSIONS.get(name, 0):
        array = np.array(value, float)
        if array.ndim != dimensions or not array.size:
            raise TypeError
        return value
    if value is not None and type(value) not in (int, float):
        raise TypeError
    return value if value is None or math.isfinite(value) else None
