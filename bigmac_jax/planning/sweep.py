"""The configurations of a sweep: every combination of some fields' values."""

import difflib
import itertools

from bigmac_jax.config import Config, ConfigError, with_overrides
from bigmac_jax.config.section import flat_values


def sweep(config: Config, axes: dict[str, list[str]]) -> list[Config]:
    """Every combination of values, as the command line spells them; the last axis changes fastest.

    Args:
      axes: values by field, which may be named without its section: {"structure": ["bigmac", "fine_grained"], …}.

    Raises:
      ConfigError: a name that is no field or several, a value of the wrong type, or a combination that is invalid.
    """
    names = [_field(config, name) for name in axes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{twice[0]} is swept twice; name it once, with all of its values")
    return [
        with_overrides(config, [f"{name}={value}" for name, value in zip(names, values, strict=True)])
        for values in itertools.product(*axes.values())
    ]


def _field(config: Config, name: str) -> str:
    """The full name, as model.top_k for top_k."""
    known = list(flat_values(config))
    if name in known:
        return name
    meant = [full for full in known if full.rpartition(".")[2] == name]
    if not meant:
        short = [full.rpartition(".")[2] for full in known]
        close = difflib.get_close_matches(name, known + short, n=1, cutoff=0.5) or ["a field such as model.top_k"]
        raise ConfigError(f"{name!r} is not a field of the config; did you mean {close[0]}?")
    if len(meant) > 1:
        raise ConfigError(f"{name!r} may be {' or '.join(meant)}; use the full name")
    return meant[0]
