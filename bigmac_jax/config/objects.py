"""Reads and writes JSON objects: parsed with bounds, sealed where a changed value would pass for a good one."""

import hashlib
import json
import math
import pathlib
from typing import Any

from bigmac_jax.config.errors import ConfigError

_DEEPEST = 64  # levels; beyond some hundred, whatever looks at a value or prints it raises RecursionError
_DIGITS = 20  # of an integer: 64 bits
_SEAL = "seal"


def parse_object(content: str | bytes) -> dict[str, Any]:
    """Parses a JSON object; raises ValueError for anything else, for deep nesting, and for integers above 64 bits."""
    text = (content.decode() if isinstance(content, bytes) else content).removeprefix("\ufeff")
    try:
        values = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if is_too_deep(text, values):
        raise ValueError("it is nested too deeply")
    if not isinstance(values, dict):
        raise ValueError(f"it is a JSON {type(values).__name__}, no object")
    return values


def is_too_deep(text: str, values: Any) -> bool:
    """Whether what was parsed of this JSON is nested so deeply that whoever writes it again may fail."""
    try:
        return text.count("[") + text.count("{") > _DEEPEST and _depth(values) > _DEEPEST
    except RecursionError:
        return True


def read_object(file: pathlib.Path, fix: str) -> dict[str, Any]:
    """Parses a file as `parse_object` does.

    Raises:
      ConfigError: it is not there, cannot be read, or is no object; `fix` ends the line.
    """
    try:
        return parse_object(file.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{file.parent} holds no {file.name}; {fix}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); {fix}") from None


def strict_json(values: Any, **how: Any) -> str:
    """Writes results as JSON with null for NaN and infinity; `how` goes to `json.dumps`."""
    return json.dumps(_finite(values), allow_nan=False, **how)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of the values with a digest of them, by which `unseal` notices a change."""
    return values | {_SEAL: _digest(values)}


def unseal(values: dict[str, Any]) -> dict[str, Any]:
    """The values that were sealed; raises ValueError if they have changed."""
    rest = {name: value for name, value in values.items() if name != _SEAL}
    if values.get(_SEAL) != _digest(rest):
        raise ValueError("it has changed since it was written")
    return rest


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _depth(value: Any) -> int:
    """Levels of objects and arrays."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)
