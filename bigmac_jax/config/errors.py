"""The error of a configuration that cannot run."""

import math

_LONGEST_LINE = 2000  # characters; a damaged file may hold any value


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line: rule, values, fix."""

    def __init__(self, message: str):
        line = " ".join(message.split())
        super().__init__(line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + "…")


def near_divisors(number: int, wanted: int) -> str:
    """`2 or 4`: the divisors of `number` next to `wanted`, below and above, for the fix that a line ends with."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    divisors = {*small, *(number // divisor for divisor in small)}
    below = [max(d for d in divisors if d <= max(1, wanted))]
    above = sorted(d for d in divisors if d > wanted)[:1]
    return " or ".join(map(str, dict.fromkeys(below + above)))


def near_ranks(number: int, ranks: int) -> str:
    """The most of `ranks` that divide `number`, which the same devices can be; or else its divisors next to them."""
    shared = math.gcd(number, ranks)
    return str(shared) if shared > 1 else near_divisors(number, ranks)


def require(holds: bool, message: str) -> None:
    """Raises ConfigError with `message` unless the rule holds."""
    if not holds:
        raise ConfigError(message)
