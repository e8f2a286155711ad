"""JSON objects that are read back: parsed with bounds, sealed where a changed value would pass for a good one."""

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
    """Raises ValueError, with one line, for all that is no JSON object of a sane depth, and integers above 64 bits."""
    text = (content.decode() if isinstance(content, bytes) else content).removeprefix("\ufeff")
    try:
        values = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"it is a JSON {type(values).__name__}, no object")
    if text.count("[") + text.count("{") > _DEEPEST:
        _check_depth(values)
    return values


def read_object(file: pathlib.Path, fix: str) -> dict[str, Any]:
    """What `parse_object` gives of a file.

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
    """The JSON of results: it has neither NaN nor infinity, in whose places stands null. `how`: as of `json.dumps`."""
    return json.dumps(_finite(values), allow_nan=False, **how)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """With a digest of the others among them."""
    return values | {_SEAL: _digest(values)}


def unsealed(values: dict[str, Any]) -> dict[str, Any]:
    """What `sealed` was given; raises ValueError if it is not that any more."""
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


def _check_depth(values: dict[str, Any]) -> None:
    level: list[Any] = [values]
    for _ in range(_DEEPEST):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
    if level:
        raise ValueError("it is nested too deeply")
