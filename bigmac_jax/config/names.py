"""Suggestions for misspelled names and values. Every suggestion is a question: it is a guess."""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

from bigmac_jax.config.other_names import other_field, other_value

_ALIKE = 0.7  # of difflib's ratio, from which on a name is suggested
_ALIKE_VALUE = 0.6  # the same of values, which are few and short
_SAME_GROUP = 0.2  # that a field of the group that was named is preferred by


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Finds the entries of `known` that are most like `name`; dotted names are compared by their last parts."""
    group, _, last = name.rpartition(".")
    matcher, likeness = SequenceMatcher(b=last), {}
    for candidate in known:
        matcher.set_seq1(_last(candidate))
        likeness[candidate] = matcher.ratio() + _SAME_GROUP * (group != "" and candidate.startswith(f"{group}."))
    if (most := max(likeness.values(), default=0)) >= _ALIKE:
        return [candidate for candidate, value in likeness.items() if value == most]
    # model.layers for model.num_layers: words that are all there.
    words = set(last.split("_"))
    return [found for found in likeness if found.startswith(group) and words <= set(_last(found).split("_"))]


def nearest_field(name: str, known: Sequence[str]) -> list[str]:
    """Finds the fields of `known` that `name` may mean: by what others call them, or else by likeness."""
    last = _last(name)
    own = any(last == _last(field) for field in known)
    return ([] if own else [field for field in other_field(name) if field in known]) or nearest(name, known)


def nearest_choice(text: str, choices: Sequence[str]) -> list[str]:
    """Finds the one of some words that `text` may mean: the same but for case, hyphens and underscores, the one that
    others call so, the only one that shares its words, or the likest."""
    plain = {_plain(choice): choice for choice in choices if choice}
    if same := plain.get(_plain(text)):
        return [same]
    if others := other_value(text, choices):
        return others[:1]
    parts = _words(text)
    inside = [choice for choice in plain.values() if parts and (parts <= _words(choice) or _words(choice) <= parts)]
    if len(inside) == 1:
        return inside
    matcher, likeness = SequenceMatcher(b=_plain(text)), {}
    for word, choice in plain.items():
        matcher.set_seq1(word)
        likeness[choice] = matcher.ratio()
    most = max(likeness.values(), default=0)
    return [choice for choice, value in likeness.items() if value == most >= _ALIKE_VALUE]


def ask(text: str, choices: Sequence[str]) -> str:
    """`; did you mean a?` at the end of a line that lists `choices`, or "" if none is likely."""
    meant = nearest_choice(text, choices)[:1]
    return f"; {question(meant)}" if meant else ""


def question(names: Sequence[str], prefix: str = "") -> str:
    """`did you mean a or b?`, or "" if there are none."""
    return f"did you mean {' or '.join(prefix + name for name in names[:3])}?" if names else ""


def unknown_field(name: str, known: Sequence[str]) -> str:
    """Writes the error line for a name that is no field of the config.

    Args:
      known: full names, as model.top_k.
    """
    groups = list(dict.fromkeys(field.partition(".")[0] for field in known if "." in field))
    what = f"{name!r} is not a field of the config"
    group = name.partition(".")[0]
    if name in groups:
        return f"{what}, but a group: {_fields_of(name, known)}"
    if near := nearest_field(name, known):
        return f"{what}; {question(near)}"
    if "." not in name and (near := nearest(name, groups)):
        return f"{what}; did you mean a field of {near[0]}? It has {_fields_of(near[0], known)}"
    if group in groups:
        return f"{what}; {group} has {_fields_of(group, known)}"
    return f"{what}; its groups are {', '.join(groups)} (`bigmac fields` lists their fields)"


def _plain(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+\d*|\d+", text.casefold()))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _fields_of(group: str, known: Iterable[str]) -> str:
    return ", ".join(name.removeprefix(f"{group}.") for name in known if name.startswith(f"{group}."))
