"""data.mixture and data.curriculum, as they are written on a command line."""

import itertools
import math
import pathlib
from fractions import Fraction
from typing import NamedTuple

from bigmac_jax.config.errors import require
from bigmac_jax.config.places import check_place

Weights = tuple[Fraction, ...]  # of the parts, in their order; they need not add up to 1
_MOST = 10**6  # that weights add up to: the order of sources is a table of so many


class Part(NamedTuple):
    """A source of a mixture.

    Attributes:
      name: its name in metrics, reports and data.curriculum.
      weight: 0 where data.curriculum begins with it later, or never: it is evaluated all the same.
      epochs: how often it is read at most; inf: as often as needed.
    """

    name: str
    source: str
    weight: Fraction
    epochs: float = math.inf


def parse_mixture(text: str) -> tuple[Part, ...]:
    """Reads `SOURCE=WEIGHT,SOURCE=WEIGHTxEPOCHS` → the parts by name, whatever their order.

    Raises:
      ConfigError: it is written otherwise, or a source is named twice.
    """
    parts: list[Part] = []
    for entry in _entries(text, ","):
        source, _, rest = entry.rpartition("=")
        weight, times, epochs = rest.partition("x")
        require(bool(source), f"data.mixture: {entry!r} must be SOURCE=WEIGHT, or SOURCE=WEIGHTxEPOCHS")
        most = math.inf
        if times:
            most = float(_number(epochs, what := f"data.mixture: the epochs of {source}"))
            require(most > 0, f"{what} must be above 0, not {epochs!r}")
        parts.append(Part("", source, _number(weight, f"data.mixture: the weight of {source}"), most))
        check_place(source, "data.mixture")
    all_zero = not any(part.weight for part in parts)
    require(not (parts and all_zero), "data.mixture has weights of 0 alone; give at least one another")
    sources = [part.source for part in parts]
    for source in sources:
        require(sources.count(source) == 1, f"data.mixture names {source} twice; give it one weight")
    named: dict[str, Part] = {}
    for part in sorted(parts, key=lambda part: part.source):
        short = short_name(part.source)
        free = (name for i in itertools.count(1) if (name := f"{short}-{i}" if i > 1 else short) not in named)
        name = next(free)
        named[name] = part._replace(name=name)
    return tuple(sorted(named.values()))


def parse_curriculum(text: str, parts: tuple[Part, ...]) -> list[tuple[int, Weights]]:
    """Reads `STEP:NAME=WEIGHT,NAME=WEIGHT;STEP:…` → [(step, weights of all parts)], with the mixture's own at step 0.

    A part that a stage does not name has weight 0 in it.

    Raises:
      ConfigError: it is written otherwise, steps do not grow, or a name is not of the mixture.
    """
    require(not text or bool(parts), f"data.curriculum={text} needs data.mixture, whose weights it changes; set it")
    weights = {part.name: part.weight for part in parts}
    stages = [(0, _check_sum(weights, "data.mixture"))]
    for entry in _entries(text, ";"):
        step, colon, rest = entry.partition(":")
        grows = colon and step.strip().isdecimal() and int(step) > stages[-1][0]
        require(bool(grows), f"data.curriculum: {entry!r} must be STEP:NAME=WEIGHT,… with a step above {stages[-1][0]}")
        weights = dict.fromkeys(weights, Fraction(0))
        for pair in _entries(rest, ","):
            given, equals, weight = pair.rpartition("=")
            name = next((part.name for part in parts if given in (part.name, part.source)), "")
            known = bool(equals and name)
            require(known, f"data.curriculum: {pair!r} must be NAME=WEIGHT, with one of {', '.join(weights)}")
            weights[name] = _number(weight, f"data.curriculum: the weight of {name}")
        require(any(weights.values()), f"data.curriculum: step {step} names no source; give at least one")
        stages.append((int(step), _check_sum(weights, f"data.curriculum, step {step}")))
    return stages


def whole_numbers(weights: Weights) -> list[int]:
    """The smallest whole numbers in the proportion of `weights`."""
    shared = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * shared) for weight in weights]
    return [number // math.gcd(*whole) for number in whole]


def short_name(source: str) -> str:
    """Names a source in metrics: as a data set, a folder, or a file without its endings."""
    _, colon, rest = source.partition(":")
    if colon and not rest.startswith("//"):
        return rest.strip("/").replace("/", "-")
    path = pathlib.PurePosixPath(source)
    named = [part for part in path.parts if not set(part) & set("*?[")]
    return (named[-1].partition(".")[0] or named[-1]) if named else "all"


def _check_sum(weights: dict[str, Fraction], what: str) -> Weights:
    values = tuple(weights.values())
    total = sum(whole_numbers(values)) if values else 0
    require(total <= _MOST, f"{what}: its weights, as whole numbers, add up to {total}, more than {_MOST}; round them")
    return values


def _entries(text: str, separator: str) -> list[str]:
    return [entry.strip() for entry in text.split(separator) if entry.strip()]


def _number(text: str, what: str) -> Fraction:
    try:
        value = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        value = Fraction(-1)
    require(0 <= value < 10**9, f"{what} must be a number of at least 0, not {text!r}")
    return value
