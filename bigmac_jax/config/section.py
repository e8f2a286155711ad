"""A section of the config: a frozen dataclass whose fields are checked against their types when it is made.

A type says all that one field may be: `Literal` lists words, `Annotated[int, Range(...)]` bounds a number, and
`number | Literal["auto"]` is either. What commands parse, what errors say and `bigmac fields` all follow from it.
"""

import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from absl import flags

from bigmac_jax.config.errors import ConfigError, require
from bigmac_jax.config.names import ask, question

_LARGEST_INT = 2**31 - 1  # steps and sizes are int32 on the device
_LARGEST_FLOAT = 10**300  # that an integer may stand for
_PARSERS = {bool: flags.BooleanParser, int: flags.IntegerParser, float: flags.FloatParser}
_SCALES = {"k": 10**3, "m": 10**6, "b": 10**9, "%": 0.01}
_NOTHING = ("none", "null", "no", "off")


@dataclass(frozen=True)
class Range:
    """The numbers that a field may hold; `above` and `below` themselves are outside."""

    least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    may_be_inf: bool = False

    def check(self, name: str, value: float) -> None:
        if self.least <= value < self.below and self.above < value:
            return  # nearly always, and texts of errors take longer than the rest of a config
        require(
            not (math.isnan(value) or (math.isinf(value) and not self.may_be_inf)),
            f"{name}={value} must be a finite number",
        )
        require(value >= self.least, f"{name}={value} must be at least {self.least:g}")
        require(value > self.above, f"{name}={value} must be above {self.above:g}")
        require(value < self.below or math.isinf(self.below), f"{name}={value} must be below {self.below:g}")

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "below": self.below}
        return " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if math.isfinite(bound))


Count = Annotated[int, Range(least=1)]
Size = Annotated[int, Range(least=0)]
Amount = Annotated[float, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(least=0, below=1)]


class FieldType(NamedTuple):
    """The values that a field may hold, read from its type.

    Attributes:
      kind: bool, int, float or str; of a section its class.
      choices: the words that it may be, of a number beside all numbers in range; () are all.
    """

    kind: type
    choices: tuple[str, ...] = ()
    range: Range = Range()

    def __str__(self) -> str:
        """As int or `float or auto`."""
        return " or ".join([self.kind.__name__, *self.choices]) if self.kind is float else self.kind.__name__

    def parse(self, text: str) -> Any:
        """Reads a value from the command line, 1e3 also as an integer; raises ValueError if it is of another type."""
        if self.kind not in _PARSERS or text in self.choices:
            return text
        try:
            return _PARSERS[self.kind]().parse(text)
        except ValueError:
            if self.kind is int and (number := float(text)).is_integer():
                return int(number)
            raise

    def ask(self, value: Any) -> str:
        """`; did you mean 1000?` for what may be meant by a value that the field can't hold, or ""."""
        text = str(value).strip()
        words = ("true", "false") if self.kind is bool else self.choices
        if asked := ask(text, words):
            return asked
        numbers = self._numbers(text) if self.kind in (int, float) else []
        return f"; {question(numbers)}" if numbers else ""

    def _numbers(self, text: str) -> list[str]:
        """Reads the number that 10k, 1,000, 1/4, 25% or none may stand for."""
        if text.lower() in _NOTHING:
            return ["inf"] if self.range.may_be_inf else ["0"] if self.range.least == 0 else []
        number, _, below = text.replace(",", "").replace(" ", "").partition("/")
        scale = _SCALES.get(number[-1:].lower(), 1)
        try:
            found = float(number[:-1] if scale != 1 else number) * scale / float(below or 1)
        except (ValueError, ArithmeticError):
            return []
        found = round(found, 12)
        whole = found.is_integer()
        return [f"{found:.0f}" if whole else f"{found:g}"] if whole or self.kind is float else []

    def check(self, name: str, value: Any) -> Any:
        """Returns the value as the field holds it: in a file 1 and "inf" are fine ways to write floats, 1e3 an integer.

        Raises:
          ConfigError: it is none that the field may hold.
        """
        if self.kind is int and type(value) is float and value.is_integer():
            value = int(value)
        largest = _LARGEST_FLOAT if self.kind is float else _LARGEST_INT
        if type(value) is int and abs(value) > largest:
            bits = value.bit_length()  # Python refuses to print very large ones
            shown = f"{str(value)[:20]}… ({len(str(abs(value)))} digits)" if bits < 4096 else f"({bits} bits)"
            raise ConfigError(f"{name}={shown} must be at most {_LARGEST_INT}")
        if value in self.choices:
            return value
        if self.kind is str and self.choices:
            listed = ", ".join(choice or '""' for choice in self.choices)
            raise ConfigError(f"{name}={value!r} must be one of {listed}{self.ask(value)}")
        if self.kind is float and (type(value) is int or value == "inf"):
            value = float(value)
        own = type(value) is self.kind
        if not own:
            raise ConfigError(f"{name}={value!r} must be of type {self}{self.ask(value)}")
        if self.kind in (int, float):
            self.range.check(name, value)
        return value


class Section:
    """A group of fields. Its name in a config is that of its class: ModelConfig is `model`.

    Attributes:
      field_types: what each field may hold, by name.
    """

    field_types: ClassVar[dict[str, FieldType]]

    def __init_subclass__(cls) -> None:
        hints = get_type_hints(cls, include_extras=True)
        cls.field_types = {name: _read(hints[name]) for name in cls.__annotations__}

    def __post_init__(self) -> None:
        group = type(self).__name__.removesuffix("Config").lower()
        for name, kind in self.field_types.items():
            value = kind.check(f"{group}.{name}" if group else name, getattr(self, name))
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Raises ConfigError where fields of this section contradict each other."""

    def as_dict(self) -> dict[str, Any]:
        """The values of the fields, a dictionary for each section; `dataclasses.asdict` would copy every value."""
        values = {name: getattr(self, name) for name in self.field_types}
        return {name: value.as_dict() if isinstance(value, Section) else value for name, value in values.items()}


def _read(hint: Any) -> FieldType:
    found = FieldType(str)
    for part in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if get_origin(part) is Literal:
            found = found._replace(choices=get_args(part))
        elif get_origin(part) is Annotated:
            found = found._replace(kind=get_args(part)[0], range=get_args(part)[1])
        else:
            found = found._replace(kind=part)
    return found


def all_field_types(section: type[Section], prefix: str = "") -> dict[str, FieldType]:
    """The types of a section's fields, and of the sections in it, by full name, as model.top_k."""
    found: dict[str, FieldType] = {}
    for name, of in section.field_types.items():
        nested = issubclass(of.kind, Section)
        found |= all_field_types(of.kind, f"{prefix}{name}.") if nested else {prefix + name: of}
    return found


def field_values(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(full name, value) of every field of nested dictionaries."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from field_values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def flat_values(config: Section) -> dict[str, Any]:
    """Every field's value by its full name."""
    return dict(field_values(config.as_dict()))
