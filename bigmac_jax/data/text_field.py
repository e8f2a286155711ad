"""The field of a row that holds its text."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from bigmac_jax.config import ConfigError
from bigmac_jax.data.documents import ReadCounts

# Fields of the rows that a model is tuned on, and the tuning.objective that reads them.
_ROWS = {"chosen": "dpo", "messages": "sft", "conversations": "sft", "completion": "sft"}
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
            raise self.type_error(where(), f"holds {type(text).__name__}", others, row)
        if self.skips_null:
            counts.null += 1
            return None
        if self.name in row:
            raise self.null_error(where())
        skip = "" if _ROWS.keys() & row else f", or {_SKIP}"
        raise ConfigError(f"{self.type_error(where(), 'is missing', others, row)}{skip}")

    def check_once(self, place: str, names: Sequence[str]) -> None:
        """Raises ConfigError if several of a table's columns have the field's name: the text may be in any of them."""
        if (count := names.count(self.name)) > 1:
            raise ConfigError(
                f"{place}: {count} columns are named {self.name!r}, which is data.text_field; rename all but one"
            )

    def null_error(self, place: str) -> ConfigError:
        """Makes the error of a row whose text is null."""
        return ConfigError(f"{place}: data.text_field={self.name!r} is null; mend the row, or {_SKIP}")

    def type_error(self, place: str, found: str, others: list[str], names: Collection[str]) -> ConfigError:
        """Makes the error of a row or column that is `found` not to be a text; of its fields, `names`, `others` are."""
        found_rows = [name for name in _ROWS if name in names][:1]
        fixes = [f"rows with {name} are of tuning.objective={_ROWS[name]}; give that" for name in found_rows]
        if others:
            fixes.append(f"set data.text_field to a field of text, one of {', '.join(others)}")
        fix = ", or ".join(fixes) or "no field here is text: give another data.source"
        return ConfigError(f"{place}: data.text_field={self.name!r} {found}; {fix}")
