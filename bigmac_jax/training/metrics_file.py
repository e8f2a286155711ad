"""metrics.jsonl, read back: its records, and those that a killed run left after a step dropped."""

import logging
import math
import os
import pathlib
from typing import Any

import numpy as np

from bigmac_jax.config import ConfigError, parse_object
from bigmac_jax.runtime.storage import write_atomically

_log = logging.getLogger(__name__)
Record = dict[str, Any]
NAME = "metrics.jsonl"
_DIMENSIONS = {"moe/load": 2, "moe/drop_rate_by_layer": 1}  # of values that are no single number
_TEXTS = ("event",)


def read_records(workdir: pathlib.Path) -> list[Record]:
    """Reads the records, in order. Lines that are none are left out: the last one of a run that is writing it, or one
    that a full disk has cut."""
    return [record for line in _read_lines(workdir / NAME) if (record := _parse(line)) is not None]


def drop_records(workdir: pathlib.Path, step: int) -> None:
    """Drops the records after `step`, and what is no record, which is named but for a half-written last line. Nothing
    is written where they are the file's end: a full disk takes that, too. Raises OSError."""
    path = workdir / NAME
    if not (lines := _read_lines(path)):
        return
    kept, damaged = [], 0
    for line in lines:
        record = _parse(line)
        if record is None:
            damaged += line is not lines[-1]
        elif record["step"] <= step:
            kept.append(line + b"\n")
    if damaged:
        _log.warning("%s: %d lines that are no records were left out", path, damaged)
    if b"\n".join(lines).startswith(text := b"".join(kept)):
        os.truncate(path, len(text))
    else:
        write_atomically(path, text)


def _read_lines(path: pathlib.Path) -> list[bytes]:
    """The lines of a file, the last one being what stands behind the last line's end; none if there is no file yet.

    Raises:
      ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); move it away") from None


def _parse(line: bytes) -> Record | None:
    """The record of a line, with None for numbers that are not finite; None if it is none: no step, or another type."""
    try:
        record = parse_object(line)
        if type(record.get("step")) is not int or record["step"] < 0:
            return None
        return {name: _check(name, value) for name, value in record.items()}
    except (ValueError, TypeError):
        return None


def _check(name: str, value: Any) -> Any:
    """Returns a value, None if it is not finite; raises ValueError or TypeError for one of another type."""
    if name in _TEXTS:
        valid = isinstance(value, str)
    elif dimensions := _DIMENSIONS.get(name, 0):
        array = np.array(value, float)
        valid = array.ndim == dimensions and array.size > 0
    else:
        valid = value is None or type(value) in (int, float)
    if not valid:
        raise TypeError(name)
    return None if isinstance(value, float) and not math.isfinite(value) else value
