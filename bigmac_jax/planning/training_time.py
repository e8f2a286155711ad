"""How long a training of so many tokens takes, at the predicted step."""

import math
import re
from typing import Any

from bigmac_jax.config import ConfigError

_SCALES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_DAY = 24 * 3600


def parse_tokens(text: str) -> int:
    """Reads a number of tokens, as 15T, 300B, 250M or 1.5e12.

    Raises:
      ConfigError: no number, or none above 0.
    """
    found = re.fullmatch(r"(\d+\.?\d*(?:e\+?\d+)?)([kmbt]?)", text.strip().lower())
    number = float(found[1]) * _SCALES[found[2]] if found else 0.0
    if not 1 <= number < math.inf:
        raise ConfigError(f"--tokens={text} must be a number of at least 1, as in --tokens=15T, 300B or 1.5e12")
    return round(number)


def training_time(tokens: int, tokens_per_step: int, step_seconds: float, devices: int) -> dict[str, Any]:
    """Days and device-hours of the steps alone: nothing is evaluated or saved, and nothing fails."""
    steps = -(-tokens // tokens_per_step)
    seconds = steps * step_seconds
    return {
        "tokens": tokens,
        "steps": steps,
        "seconds": seconds,
        "days": seconds / _DAY,
        "device_hours": seconds * devices / 3600,
    }
