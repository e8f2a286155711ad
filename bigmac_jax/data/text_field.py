"""The field of a row that holds its text."""

from collections.abc import Callable
from typing import Any, NamedTuple

from bigmac_jax.config import ConfigError
from bigmac_jax.data.documents import ReadCounts

_SKIP = "leave such rows out with data.null_rows=skip"


class TextField(NamedTuple):
    """The name of the field (data.text_field), and whether rows without a text are left out (data.null_rows)."""

    name: str
    skips_null: bool = False

    def read(self, row: dict[str, Any], where: Callable[[], str], counts: ReadCounts) -> str | None:
        """The text of a row, or None for a row that is left out and counted. Raises ConfigError if the text is missing
        or null and such rows are not left out, or if it is not a text; `where` gives the row's place for that.
        """
        text = row.get(self.name)
        if isinstance(text, str):
            return text
        others = [name for name, value in row.items() if isinstance(value, str)]
        if text is not None:
            raise self.type_error(where(), f"holds {type(text).__name__}", others)
        if self.skips_null:
            counts.null += 1
            return None
        if self.name in row:
            raise self.null_error(where())
        raise ConfigError(f"{self.type_error(where(), 'is missing', others)}, or {_SKIP}")

    def null_error(self, place: str) -> ConfigError:
        """Makes the error of a row whose text is null."""
        return ConfigError(f"{place}: data.text_field={self.name!r} is null; mend the row, or {_SKIP}")

    def type_error(self, place: str, found: str, others: list[str]) -> ConfigError:
        """Makes the error of a row or column that is `found` not to be a text; `others` are."""
        return ConfigError(
            f"{place}: data.text_field={self.name!r} {found}; set data.text_field to a field of text, "
            f"one of {', '.join(others) or '(none here)'}"
        )
