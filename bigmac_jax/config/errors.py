"""The error of a configuration that cannot run."""

_LONGEST_LINE = 2000  # characters; a damaged file may hold any value


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line: rule, values, fix."""

    def __init__(self, message: str):
        line = " ".join(message.split())
        super().__init__(line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + "…")


def require(holds: bool, message: str) -> None:
    """Raises ConfigError with `message` unless the rule holds."""
    if not holds:
        raise ConfigError(message)
