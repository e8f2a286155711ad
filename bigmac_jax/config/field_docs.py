"""The reference of the config's fields: their comments in sections.py, and the choices that rules.py allows."""

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Sequence
from typing import Any, NamedTuple

from bigmac_jax.config import rules, sections
from bigmac_jax.config.names import unknown_field
from bigmac_jax.config.rules import ConfigError

_INDENTED = textwrap.TextWrapper(width=100, initial_indent=" " * 6, subsequent_indent=" " * 6)


class Field(NamedTuple):
    """A field: its full name, its type, its default as a command line spells it, its comments, and allowed values."""

    name: str
    type: str
    default: str
    meaning: str
    choices: tuple[str, ...]


def reference() -> list[Field]:
    """All fields, in their order."""
    allowed, found = _choices(), []
    for group in dataclasses.fields(sections.Config):
        if not dataclasses.is_dataclass(group.type):
            found.append(_field("", group, _comments(sections.Config), allowed))
            continue
        comments = _comments(group.type)
        found += [_field(f"{group.name}.", field, comments, allowed) for field in dataclasses.fields(group.type)]
    return found


def describe(names: Sequence[str] = ()) -> str:
    """The reference as text.

    Args:
      names: groups or fields, as model or model.top_k; none are all.

    Raises:
      ConfigError: there is no such group or field.
    """
    all_fields = reference()
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
            lines += ["", f"{group}: {_group_doc(group)}", ""]
        lines += [f"  --config.{field.name}={field.default}  ({field.type})", *_wrapped(field)]
    return "\n".join(lines).strip("\n")


def _wrapped(field: Field) -> list[str]:
    told = re.findall(r"\w+", field.meaning)
    listed = ", ".join(choice or '""' for choice in field.choices)
    values = "" if set(field.choices) <= {"", *told} else f"One of {listed}."
    return [line for part in (field.meaning, values) for line in _INDENTED.wrap(part)]


def _group_doc(group: str) -> str:
    """The first paragraph of a group's docstring."""
    cls = next(field.type for field in dataclasses.fields(sections.Config) if field.name == group)
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def _field(prefix: str, field: Any, comments: dict[str, str], allowed: dict[str, tuple[str, ...]]) -> Field:
    name = prefix + field.name
    kind = "float or auto" if name in rules.OR_AUTO else field.type.__name__
    return Field(name, kind, str(field.default), comments.get(field.name, ""), allowed.get(name, ()))


def _comments(cls: Any) -> dict[str, str]:
    """Of each field of a dataclass: the comment lines right above it, then the one behind it."""
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }  # line → (text, whether it stands alone)
    found = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above: list[str] = []
            line = node.lineno - 1
            while comments.get(line, ("", False))[1]:
                above.insert(0, comments[line][0])
                line -= 1
            behind = comments.get(node.end_lineno or 0, ("", False))[0]
            found[node.target.id] = " ".join(filter(None, [" ".join(above), behind]))
    return found


def _choices() -> dict[str, tuple[str, ...]]:
    """What each `one_of(name, value, allowed)` of rules.py allows, by name."""
    found = {}
    for node in ast.walk(ast.parse(inspect.getsource(rules))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "one_of":
            name, _, allowed = node.args
            value = eval(compile(ast.Expression(allowed), "rules.py", "eval"), vars(rules))
            found[ast.literal_eval(name)] = tuple(value)
    return found
