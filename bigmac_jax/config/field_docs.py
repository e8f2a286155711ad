"""`bigmac fields`: every field with its type, default, choices, and the comments that stand at it in the source."""

import inspect
import re
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from bigmac_jax.config.errors import ConfigError
from bigmac_jax.config.names import unknown_field
from bigmac_jax.config.root import Config
from bigmac_jax.config.section import Section

_INDENTED = textwrap.TextWrapper(width=100, initial_indent=" " * 6, subsequent_indent=" " * 6)


class Field(NamedTuple):
    """One field of the config.

    Attributes:
      name: in full, as model.top_k.
      type: as `int, at least 1`.
      default: as a command line spells it.
      meaning: its comments.
      choices: the values that it may have; () are all of its type.
    """

    name: str
    type: str
    default: str
    meaning: str
    choices: tuple[str, ...]


def list_fields() -> list[Field]:
    """Lists all fields, in their order."""
    return [field for group, section in _sections().items() for field in _fields(section, f"{group}.".lstrip("."))]


def describe(names: Sequence[str] = ()) -> str:
    """Describes fields as text.

    Args:
      names: groups or fields, as model or model.top_k; none are all.

    Raises:
      ConfigError: there is no such group or field.
    """
    all_fields, sections = list_fields(), _sections()
    chosen: list[Field] = []
    for name in names or [""]:
        part = [field for field in all_fields if name in ("", field.name) or field.name.startswith(f"{name}.")]
        if not part:
            raise ConfigError(unknown_field(name, [field.name for field in all_fields]))
        chosen += part
    lines, group = [], ""
    for field in chosen:
        if "." in field.name and field.name.partition(".")[0] != group:
            group = field.name.partition(".")[0]
            summary = (inspect.getdoc(sections[group]) or "").split("\n\n")[0]
            lines += ["", f"{group}: {' '.join(summary.split())}", ""]
        lines += [f"  --config.{field.name}={field.default}  ({field.type})", *_wrap(field)]
    return "\n".join(lines).strip("\n")


def _sections() -> dict[str, type[Section]]:
    """The sections by name, and under "" the config's own fields."""
    kinds = {name: of.kind for name, of in Config.field_types.items()}
    return {name: kind for name, kind in kinds.items() if issubclass(kind, Section)} | {"": Config}


def _fields(section: type[Section], prefix: str) -> list[Field]:
    found: list[Field] = []
    above: list[str] = []  # comments that wait for their field
    kinds = section.field_types
    for line in inspect.getsource(section).splitlines():
        code, _, comment = line.partition("# ")
        name = (re.match(r"    (\w+): ", code) or ["", ""])[1]
        if name in kinds and not issubclass((kind := kinds[name]).kind, Section):
            bounds = f", {kind.range}" if str(kind.range) else ""
            meaning = " ".join(filter(None, [*above, comment]))
            default = str(getattr(section, name))
            found.append(Field(f"{prefix}{name}", f"{kind}{bounds}", default, meaning, kind.choices))
        above = [*above, comment] if comment and not code.strip() else []
    return found


def _wrap(field: Field) -> list[str]:
    told = re.findall(r"\w+", field.meaning)
    listed = ", ".join(choice or '""' for choice in field.choices)
    values = "" if set(field.choices) <= {"", *told} else f"One of {listed}."
    return [line for part in (field.meaning, values) for line in _INDENTED.wrap(part)]
