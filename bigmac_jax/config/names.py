"""What a misspelled name may have been meant to be. Every answer is a question: it is a guess."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

_LONGEST = 100  # characters of a name that something is looked for; it takes their product


def distance(a: str, b: str) -> int:
    """Edits between two words: insert, delete, replace, swap neighbours (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        older, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[j] = min(row[j], older[j - 2] + 1)
    return row[-1]


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Those of `known` that are the fewest edits away, if that is near; of dotted names the last part alone may be."""
    if len(name) > _LONGEST:
        return []
    last = _last(name)

    def edits(candidate: str) -> float:
        return min(distance(name, candidate), distance(last, _last(candidate)) + (1.5 if "." in name else 0))

    edit = {candidate: edits(candidate) for candidate in known}
    least = min(edit.values(), default=len(name))
    if last and least <= max(1.5, len(last) / 3):
        return [candidate for candidate, count in edit.items() if count == least]
    # model.experts for model.num_experts: words that are all there.
    group, words = name.rpartition(".")[0], set(last.split("_"))
    return [found for found in edit if found.startswith(group) and words <= set(_last(found).split("_"))]


def field_names(group: Any, prefix: str = "") -> list[str]:
    """Full names, as model.top_k, of the fields of a dataclass of dataclasses."""
    names = []
    for field in dataclasses.fields(group):
        inside = dataclasses.is_dataclass(field.type)
        names += field_names(field.type, f"{prefix}{field.name}.") if inside else [prefix + field.name]
    return names


def question(names: Sequence[str], prefix: str = "") -> str:
    """`did you mean a or b?`, or "" if there are none."""
    return f"did you mean {' or '.join(prefix + name for name in names[:3])}?" if names else ""


def unknown_field(name: str, known: Sequence[str]) -> str:
    """The line for a name that is no field of the config.

    Args:
      known: full names, as model.top_k.
    """
    groups = list(dict.fromkeys(field.partition(".")[0] for field in known if "." in field))
    what = f"{name!r} is not a field of the config"
    group = name.partition(".")[0]
    if name in groups:
        return f"{what}, but a group: {_fields_of(name, known)}"
    if near := nearest(name, known):
        return f"{what}; {question(near)}"
    if "." not in name and (near := nearest(name, groups)):
        return f"{what}; did you mean a field of {near[0]}? It has {_fields_of(near[0], known)}"
    if group in groups:
        return f"{what}; {group} has {_fields_of(group, known)}"
    return f"{what}; its groups are {', '.join(groups)} (`bigmac fields` lists their fields)"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _fields_of(group: str, known: Iterable[str]) -> str:
    return ", ".join(name.removeprefix(f"{group}.") for name in known if name.startswith(f"{group}."))
