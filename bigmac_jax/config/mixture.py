"""data.mixture and data.curriculum, as they are written on a command line."""

import itertools
import math
import pathlib
from fractions import Fraction
from typing import NamedTuple

from bigmac_jax.config.errors import ConfigError
from bigmac_jax.config.places import check_place

Weights = tuple[Fraction, ...]  # of the parts, in their order; they need not add up to 1


_MOST = 10**6  # that weights add up to: the order of sources is a table of so many


class Part(NamedTuple):
    """A source of a mixture.

    Attributes:
      name: in metrics and reports, and in data.curriculum.
      weight: 0 where data.curriculum begins with it later, or never: it is evaluated all the same.
      epochs: that it is read at most; inf: as often as needed.
    """

    name: str
    source: str
    weight: Fraction
    epochs: float = math.inf


def parse_mixture(text: str) -> tuple[Part, ...]:
    """`SOURCE=WEIGHT,SOURCE=WEIGHTxEPOCHS` → its parts; none of "".

    Raises:
      ConfigError: it is written otherwise, or a source is named twice.
    """
    parts: list[Part] = []
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        source, equals, rest = entry.rpartition("=")
        weight, times, epochs = rest.partition("x")
        if not equals or not source:
            raise ConfigError(f"data.mixture: {entry!r} must be SOURCE=WEIGHT, or SOURCE=WEIGHTxEPOCHS")
        most = float(_positive(epochs, f"data.mixture: the epochs of {source}")) if times else math.inf
        parts.append(Part("", source, _weight(weight, f"data.mixture: the weight of {source}"), most))
        check_place(source, "data.mixture")
    if parts and not any(part.weight for part in parts):
        raise ConfigError("data.mixture has weights of 0 alone; give at least one another")
    sources = [part.source for part in parts]
    if twice := [source for source in sources if sources.count(source) > 1]:
        raise ConfigError(f"data.mixture names {twice[0]} twice; give it one weight")
    named: dict[str, Part] = {}
    for part in sorted(parts, key=lambda part: part.source):
        short = short_name(part.source)
        free = (name for i in itertools.count(1) if (name := f"{short}-{i}" if i > 1 else short) not in named)
        name = next(free)
        named[name] = part._replace(name=name)
    # By name: the order in which they are given decides nothing.
    return tuple(sorted(named.values()))


def parse_curriculum(text: str, parts: tuple[Part, ...]) -> list[tuple[int, Weights]]:
    """`STEP:NAME=WEIGHT,NAME=WEIGHT;STEP:…` → [(step, weights)], the mixture's own from step 0 on before them. A part
    that is not named has weight 0 from there on.

    Raises:
      ConfigError: it is written otherwise, steps do not grow, or a name is not of the mixture.
    """
    of_mixture = _checked(tuple(part.weight for part in parts), "data.mixture") if parts else ()
    stages: list[tuple[int, Weights]] = [(0, of_mixture)]
    for entry in filter(None, (entry.strip() for entry in text.split(";"))):
        step, colon, rest = entry.partition(":")
        if not colon or not step.strip().isdecimal() or int(step) <= stages[-1][0]:
            raise ConfigError(
                f"data.curriculum: {entry!r} must be STEP:NAME=WEIGHT,… with a step above {stages[-1][0]}"
            )
        weights = dict.fromkeys((part.name for part in parts), Fraction(0))
        for pair in filter(None, (pair.strip() for pair in rest.split(","))):
            name, equals, weight = pair.rpartition("=")
            name = next((part.name for part in parts if name in (part.name, part.source)), name)
            if not equals or name not in weights:
                raise ConfigError(f"data.curriculum: {pair!r} must be NAME=WEIGHT, with one of {', '.join(weights)}")
            weights[name] = _weight(weight, f"data.curriculum: the weight of {name}")
        if not any(weights.values()):
            raise ConfigError(f"data.curriculum: step {step} names no source; give at least one")
        stages.append((int(step), _checked(tuple(weights.values()), f"data.curriculum, step {step}")))
    return stages


def check_mixture(mixture: str, curriculum: str) -> None:
    """Raises ConfigError where one of them cannot be read, or the curriculum has no mixture."""
    parts = parse_mixture(mixture)
    if curriculum and not parts:
        raise ConfigError(f"data.curriculum={curriculum} needs data.mixture, whose weights it changes; set it")
    parse_curriculum(curriculum, parts)


def whole_numbers(weights: Weights) -> list[int]:
    """The smallest ones in the same proportion."""
    shared = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * shared) for weight in weights]
    return [number // math.gcd(*whole) for number in whole]


def _checked(weights: Weights, what: str) -> Weights:
    if (total := sum(whole_numbers(weights))) > _MOST:
        raise ConfigError(f"{what}: its weights, as whole numbers, add up to {total}, more than {_MOST}; round them")
    return weights


def short_name(source: str) -> str:
    """Of a source, in metrics: a file's without its endings, a folder's, a data set's."""
    _, colon, rest = source.partition(":")
    if colon and not rest.startswith("//"):
        return rest.strip("/").replace("/", "-")
    path = pathlib.PurePosixPath(source)
    named = [part for part in path.parts if not set(part) & set("*?[")]
    return (named[-1].partition(".")[0] or named[-1]) if named else "all"


def _positive(text: str, what: str) -> Fraction:
    if not (value := _weight(text, what)):
        raise ConfigError(f"{what} must be above 0, not {text!r}")
    return value


def _weight(text: str, what: str) -> Fraction:
    try:
        value = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        value = Fraction(-1)
    if not 0 <= value < 10**9:
        raise ConfigError(f"{what} must be a number of at least 0, not {text!r}")
    return value
