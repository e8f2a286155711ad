"""The configurations of a sweep: every combination of some fields' values."""

import itertools
from collections.abc import Mapping, Sequence

from bigmac_jax.config import Config, ConfigError, with_overrides
from bigmac_jax.config.names import unknown_field
from bigmac_jax.config.section import all_field_types, flat_values


def parse_axes(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Values by field, from arguments such as `top_k=1,2 structure=bigmac`; ConfigError for one that is no such."""
    axes: dict[str, list[str]] = {}
    for argument in " ".join(arguments).split() or arguments:
        name, equals, values = argument.removeprefix("--").removeprefix("config.").partition("=")
        if not (equals and all(values.split(","))):
            raise ConfigError(f"--sweep {argument!r} must be FIELD=a,b,…, as in --sweep top_k=1,2,4,8")
        axes[name] = axes.get(name, []) + values.split(",")
    return axes


def check_axes(config: Config, axes: Mapping[str, Sequence[str]]) -> None:
    """Raises ConfigError for what `sweep` refuses whatever the other fields are: names, and types of values."""
    kinds = all_field_types(Config)
    for name, values in zip(_full_names(config, axes), axes.values(), strict=True):
        for value in values:
            try:
                kinds[name].parse(value)
            except ValueError:
                with_overrides(config, [f"{name}={value}"])  # which says it


def sweep(config: Config, axes: Mapping[str, Sequence[str]]) -> list[tuple[dict[str, str], Config]]:
    """Lists (field values, config with them) for every combination of values; the last axis changes fastest.

    Args:
      axes: values by field, as the command line spells them; a field may be named without its section.

    Raises:
      ConfigError: a name that is no field or several, a value of the wrong type, or a combination that is invalid.
    """
    names = _full_names(config, axes)
    combinations = []
    for values in itertools.product(*axes.values()):
        overrides = [f"{name}={value}" for name, value in zip(names, values, strict=True)]
        combinations.append((dict(zip(axes, values, strict=True)), with_overrides(config, overrides)))
    return combinations


def _full_names(config: Config, axes: Mapping[str, Sequence[str]]) -> list[str]:
    names = [_full_name(config, name) for name in axes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{twice[0]} is swept twice; name it once, with all of its values")
    return names


def _full_name(config: Config, name: str) -> str:
    """A field's name with its section, as model.top_k for top_k."""
    known = list(flat_values(config))
    meant = [full for full in known if name in (full, full.rpartition(".")[2])]
    if not meant:
        raise ConfigError(unknown_field(name, known))
    if len(meant) > 1:
        raise ConfigError(f"{name!r} may be {' or '.join(meant)}; use the full name")
    return meant[0]
