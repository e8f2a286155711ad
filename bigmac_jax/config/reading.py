"""Config files and command-line overrides → a validated Config.

A config file is Python with a function `get_config()` that returns a `Config`; `load_config` applies overrides of
the form `model.top_k=8` to it. Every error is a `ConfigError`.
"""

import contextlib
import dataclasses
import logging
import pathlib
import sys
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from bigmac_jax.config.errors import ConfigError, require
from bigmac_jax.config.model import ModelConfig
from bigmac_jax.config.names import nearest, question
from bigmac_jax.config.root import TOKENIZER_SIZES, Config, check_batch, check_name, from_dict, is_moved
from bigmac_jax.config.section import all_field_types, field_values, flat_values
from bigmac_jax.config.training import OptimizerConfig

# Paths that train.py takes from a saved config: of data and models.
_PLACES = ("data.source", "data.validation_source", "data.test_source", "data.mixture", "data.tokenizer",
           "train.init_from", "tuning.teacher")  # fmt: skip
# What it doesn't take, because somebody else may have written the config: what is rendered or run beside the model,
# and where metrics go.
_OF_USER = ("tuning.chat_template", "train.wandb", "train.tasks", "train.tasks_every")
_EXAMPLE = 'as load_config("tiny", {"model.top_k": 2})'
_log = logging.getLogger(__name__)


def load_config(
    path: str | pathlib.Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Config:
    """Reads a config file, applies overrides, resolves and validates.

    Args:
      path: a Python file with `get_config()`, or `FILE:ARGUMENT` for one that takes an argument, or a `.json` file;
        or the name of a file in configs/, as tiny or paper/gpt3_xl:vanilla; or a dictionary of fields, the others of
        which have their defaults.
      overrides: ["model.top_k=8", …], later ones win, or a dictionary: {"model.top_k": 8} or {"model": {"top_k": 8}}.

    Raises:
      ConfigError: one line, whatever the input.
    """
    return load_with_base(path, overrides)[0]


def load_with_base(
    path: str | pathlib.Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any]
) -> tuple[Config, Config]:
    """As `load_config`, with the config as it was before the overrides."""
    if isinstance(overrides, str):
        raise ConfigError(f"the overrides are a text, {overrides!r}; give a list, [{overrides!r}], or a dictionary")
    overrides = _as_overrides(overrides) if isinstance(overrides, Mapping) else overrides
    base = with_overrides(Config(), _as_overrides(path)) if isinstance(path, Mapping) else _read(str(path), overrides)
    config = with_overrides(base, overrides)
    check_batch(config, max(1, config.mesh.data))
    return config, base


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Changes some fields of a config; overrides as for `load_config`."""
    values, kinds = config.as_dict(), all_field_types(Config)
    for override in overrides:
        name, equals, text = override.partition("=")
        check_name(name, equals + text)
        section, _, field = name.rpartition(".")
        group = values[section] if section else values
        require(equals != "", f"{name} needs a value: --config.{name}={group[field]}")
        try:
            group[field] = kinds[name].parse(text)
        except ValueError:
            fix = kinds[name].ask(text) or f", as in --config.{name}={group[field]}"
            message = f"{name}={text!r} must be of type {kinds[name]}{fix}"
            raise ConfigError(message) from None
    return from_dict(values)


def retrained(config: Config, overrides: Sequence[str]) -> Config:
    """Changes some fields of a trained model's config as `with_overrides`; shorter windows leave its context length."""
    changed = with_overrides(config, overrides)
    unnamed = changed.model.context_length == config.model.context_length
    if unnamed and changed.context_length < config.context_length:
        model = dataclasses.replace(changed.model, context_length=config.context_length)
        return dataclasses.replace(changed, model=model)
    return changed


def with_mesh(config: Config, overrides: Sequence[str]) -> Config:
    """Changes the mesh, the execution or the cache of a trained model's config, for evaluation.

    The batch need not divide over the mesh: evaluation pads it.

    Raises:
      ConfigError: an override is of something else, or is invalid.
    """
    for override in overrides:
        may = override.startswith(("mesh.", "execution.", "cache_dir=")) or is_moved(override.partition("=")[0])
        require(may, f"--config.{override}: only mesh, execution and cache_dir can change after training; drop it")
    return with_overrides(config, overrides)


def list_shipped() -> dict[str, pathlib.Path]:
    """Lists the config files that come with the package, by name: tiny, paper/gpt3_xl, …"""
    package = pathlib.Path(__file__).parents[1]
    for folder in (package / "configs", package.parent / "configs"):  # installed, or in a checkout
        if folder.is_dir():
            files = sorted(folder.rglob("[!_]*.py"))
            return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    return {}


def drop_user_fields(config: Config, file: str, overrides: Sequence[str]) -> Config:
    """Resets the fields of a saved config that only the user may set, and warns of each that the overrides don't set.

    Args:
      file: names the config in the warnings.
    """
    values, defaults, given = config.as_dict(), flat_values(Config()), _names(overrides)
    for name in _OF_USER:
        section, _, field = name.partition(".")
        value, values[section][field] = values[section][field], defaults[name]
        if value != defaults[name] and name not in given:
            _log.warning("%s has %s=%s, which only you may say: give --config.%s=%s", file, name, value, name, value)
    return from_dict(values)


def saved_places(config: Config, overrides: Sequence[str]) -> list[str]:
    """Lists FIELD=PATH for each path that a run takes from a saved config and not from the overrides."""
    values, defaults = flat_values(config), flat_values(Config())
    own = {"", *TOKENIZER_SIZES}
    return [
        f"{name}={values[name]}"
        for name in _PLACES
        if name not in _names(overrides) and values[name] != defaults[name] and values[name] not in own
    ]


def unresolve(config: Config) -> Config:
    """Puts `auto` back into a saved config where it says the same, so that model.structure and model.projection_init
    can be changed alone."""
    model = dataclasses.replace(config.model, latent_norm=ModelConfig.latent_norm)
    optimizer = dataclasses.replace(config.optimizer, projection_rate=OptimizerConfig.projection_rate)
    if model.latent_norms == config.model.latent_norms:
        config = dataclasses.replace(config, model=model)
    free = dataclasses.replace(config, optimizer=optimizer)
    return free if free.projection_rate == config.projection_rate else config


def as_base(config: Config, file: str, overrides: Sequence[str]) -> Config:
    """A saved config as another run begins with it: `auto` where it says the same, and no field that is the user's.
    Arguments as for `drop_user_fields`."""
    return drop_user_fields(unresolve(config), file, overrides)


def _as_overrides(fields: Mapping[str, Any]) -> list[str]:
    """FIELD=VALUE of each field of a dictionary, whose groups may be dictionaries."""
    values = list(field_values(dict(fields)))
    for name, value in values:
        if value is None or isinstance(value, list | tuple | set):
            raise ConfigError(
                f"{name} is {value!r}, and a field is a text, a number or a bool; leave it out, or give one"
            )
    return [f"{name}={value}" for name, value in values]


def _names(overrides: Sequence[str]) -> set[str]:
    return {override.partition("=")[0] for override in overrides}


def _read(path: str, overrides: Sequence[str]) -> Config:
    what = f"--config={path!r} could not be read"
    with _one_line(what):
        whole = pathlib.Path(path).expanduser().is_file()
        name, _, argument = (path, "", "") if whole else path.partition(":")
        file = _find(name)
    with _one_line(what, str(file)):
        if file.suffix == ".json":
            return as_base(Config.from_json(file.read_text(), name), name, overrides)
        if file.suffix != ".py":
            raise ConfigError(f"--config={name!r} is neither .py nor .json; give a file of Python, {_EXAMPLE}")
        # Not by an import, whose bytecode is taken for that of a file of the same size and second.
        module = sys.modules["bigmac_config_file"] = types.ModuleType("bigmac_config_file")
        module.__file__ = str(file)
        exec(compile(file.read_bytes(), file, "exec"), module.__dict__)
        if not callable(getattr(module, "get_config", None)):
            raise ConfigError(f"{name} has no get_config(); define one that returns a Config, {_EXAMPLE}")
        config = module.get_config(*([argument] if argument else []))
        if isinstance(config, ConfigDict):
            config = from_dict(config.to_dict())
        if not isinstance(config, Config):
            kind = type(config).__name__
            raise ConfigError(f"get_config() of {name} returned {kind}, not a Config; return one, {_EXAMPLE}")
    return config


def _find(name: str) -> pathlib.Path:
    """Finds a config file by its path, or by its name if it is shipped."""
    file, known = pathlib.Path(name).expanduser(), list_shipped()
    if file.is_file():
        return file
    if name in known:
        return known[name]
    stems = {file.stem: name for name, file in known.items()}
    near = question([stems[stem] for stem in nearest(pathlib.Path(name).stem, stems)])
    fix = near or f"give a path, or one of {', '.join(known)}"
    raise ConfigError(f"--config={name!r} is not a file; {fix}")


@contextlib.contextmanager
def _one_line(what: str, file: str = "") -> Iterator[None]:
    """Turns whatever a user's config file raises into one line that names the line of that file, if it is one's."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            lines.append(error.lineno)
        where = f" at line {lines[-1]}" if lines else ""
        try:
            message = " ".join(str(error).split())
        except Exception:
            message = "its message cannot be printed"
        raise ConfigError(f"{what}: {type(error).__name__}{where}: {message}") from None
