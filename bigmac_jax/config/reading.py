"""Config files and command-line overrides → a validated Config.

A config file is Python with a function `get_config()` that returns a `Config`; `load_config` applies overrides of
the form `model.top_k=8` to it (ml_collections flags parse the values). Every error is a `ConfigError`.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from bigmac_jax.config.names import field_names, nearest, question, unknown_field
from bigmac_jax.config.rules import OR_AUTO, TOKENIZER_SIZES, ConfigError, check_batch
from bigmac_jax.config.sections import Config, ModelConfig, OptimizerConfig, from_dict, moved

# What a resumed run may change (docs/training.md, "Resuming"): how it is executed, periodic actions, and where its data
# lies, as long as that is the same (`training.workdir.check_data`).
MAY_CHANGE = ("execution.", "mesh.", "train.steps", "train.accumulate_steps", "train.log_every", "train.eval_every",
              "train.checkpoint_every", "train.keep_checkpoints", "train.on_bad_step", "train.max_bad_steps",
              "train.spike_factor", "train.wandb", "train.tasks", "tuning.chat_template", "data.source",
              "data.validation_source", "data.test_source", "data.mixture", "data.curriculum", "data.tokenizer",
              "data.num_workers", "cache_dir")  # fmt: skip
# Of bigmac alone.
_OF_PROJECTIONS = ("model.projection_init", "optimizer.projection_rate")
# What they name may be moved; that it is the same model is checked where it is opened (`tuning.pretrained`).
_MODELS = ("train.init_from", "tuning.teacher")
# What a saved config may name, for train.py to read it: data and models.
_PLACES = ("data.source", "data.validation_source", "data.test_source", "data.mixture", "data.tokenizer", *_MODELS)
# What it may not: what is rendered or run beside the model, and where metrics go. Somebody else may have written it.
_OF_USER = ("tuning.chat_template", "train.wandb", "train.tasks", "train.tasks_every")
_log = logging.getLogger(__name__)


def check_resume(saved: Config, new: Config) -> None:
    """Raises ConfigError if `new` differs from `saved` in a field that would change the result of the run."""
    before, after = (dict(field_values(dataclasses.asdict(config.resolved))) for config in (saved, new))
    without = () if "bigmac" in (saved.model.structure, new.model.structure) else _OF_PROJECTIONS
    for name, value in after.items():
        may = name.startswith((*MAY_CHANGE, *without)) or (name in _MODELS and before[name] and value)
        if before[name] != value and not may:
            raise ConfigError(
                f"{name}={value!r} differs from {before[name]!r}, which this workdir was started with; "
                f"keep {before[name]!r}, or use a new --workdir"
            )


def resume_notes(saved: Config, new: Config, mesh_before: dict[str, int], mesh_after: dict[str, int]) -> list[str]:
    """A line for each way in which a resumed run differs by more than rounding from one that was not changed.

    Args:
      mesh_before, mesh_after: ranks by axis.
    """
    model, parts = new.model, ("train.accumulate_steps", saved.train.accumulate_steps, new.train.accumulate_steps)
    split = [parts, *((f"mesh.{axis}", mesh_before.get(axis), size) for axis, size in mesh_after.items())]
    split += [
        (f"execution.{name}", getattr(saved.execution, name), getattr(new.execution, name))
        for name in ("exchange", "overlap_chunks")
    ]
    changed = ", ".join(f"{name} {before} → {after}" for name, before, after in split if before != after)
    notes = [
        f"data.{name} {before or 'none'} → {after or 'none'}: windows come in another order from here on, and each "
        f"source goes on where it was"
        for name in ("mixture", "curriculum")
        if (before := getattr(saved.data, name)) != (after := getattr(new.data, name))
    ]
    if model.is_moe and changed and not (saved.dropless and new.dropless):
        notes.append(
            f"{changed}: which choices find their expert full (model.capacity_factor={model.capacity_factor:g}) "
            f"depends on it; from here on the run drops others"
        )
    of_parts = notes_of_parts(saved, new)
    if parts[1] != parts[2] and model.dropout:
        of_parts.append(f"train.accumulate_steps {parts[1]} → {parts[2]}: model.dropout draws other entries")
    return notes + [f"{note} from here on" for note in of_parts]


def notes_of_parts(before: Config, after: Config) -> list[str]:
    """A line for each way in which another number of parts of a batch is another computation."""
    model, tuning = after.model, after.tuning
    steps = before.train.accumulate_steps, after.train.accumulate_steps
    if steps[0] == steps[1]:
        return []
    found = []
    if model.is_moe and model.balance == "aux_loss" and model.balance_scope == "part":
        found.append("model.balance_scope=part the balance loss is")
    if model.is_moe and model.balance_step == "same":
        found.append("model.balance_step=same quantiles are")
    if tuning.teacher and tuning.hidden_weight:
        found.append("tuning.hidden_weight the teacher's distance is")
    return [f"train.accumulate_steps {steps[0]} → {steps[1]}: with {what} of other parts" for what in found]


def load_config(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file, applies overrides, resolves and validates.

    Args:
      path: a Python file with `get_config()`, or `FILE:ARGUMENT` for one that takes an argument, or a `.json` file;
        or the name of a file in configs/, as tiny or paper/gpt3_xl:vanilla.
      overrides: "model.top_k=8", ...; later ones win.

    Raises:
      ConfigError: one line, whatever the input.
    """
    config = overridden(_read(str(path), overrides), overrides)
    check_batch(config, max(1, config.mesh.data))
    return config


def overridden(values: dict[str, Any], overrides: Sequence[str]) -> Config:
    """The config of nested dictionaries with some fields changed; overrides as for `load_config`."""
    fields = ConfigDict(values)
    for override in overrides:
        _apply(fields, override)
    return from_dict(fields.to_dict())


def with_mesh(config: Config, overrides: Sequence[str]) -> Config:
    """The config of a trained model on another mesh, executed otherwise or with another cache, for evaluation, which
    pads batches to whatever the mesh needs.

    Raises:
      ConfigError: an override is of something else, or is invalid.
    """
    values = ConfigDict(dataclasses.asdict(config))
    for override in overrides:
        if not (override.startswith(("mesh.", "execution.", "cache_dir=")) or moved(override.partition("=")[0])):
            raise ConfigError(
                f"--config.{override}: only mesh, execution and cache_dir can change after training; drop it"
            )
        _apply(values, override)
    return from_dict(values.to_dict())


def shipped() -> dict[str, pathlib.Path]:
    """The config files that come with the package, by name: tiny, paper/gpt3_xl, …"""
    package = pathlib.Path(__file__).parents[1]
    for folder in (package / "configs", package.parent / "configs"):  # installed, or in a checkout
        if folder.is_dir():
            files = sorted(folder.rglob("[!_]*.py"))
            return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    return {}


def _find(name: str) -> pathlib.Path:
    """A path, or the name of one of `shipped()`."""
    file, known = pathlib.Path(name).expanduser(), shipped()
    if file.is_file():
        return file
    if name in known:
        return known[name]
    stems = {file.stem: name for name, file in known.items()}
    near = question([stems[stem] for stem in nearest(pathlib.Path(name).stem, stems)])
    fix = near or f"give a path, or one of {', '.join(known)}"
    raise ConfigError(f"--config={name!r} is not a file; {fix}")


def of_saved(config: Config, file: str, overrides: Sequence[str]) -> Config:
    """What a run takes of a saved config, with a line for each field that it does not take and nobody gave."""
    values, defaults = dataclasses.asdict(config), dict(field_values(dataclasses.asdict(Config())))
    given = {override.partition("=")[0] for override in overrides}
    for name in _OF_USER:
        section, _, field = name.partition(".")
        value, values[section][field] = values[section][field], defaults[name]
        if value != defaults[name] and name not in given:
            _log.warning("%s has %s=%s, which only you may say: give --config.%s=%s", file, name, value, name, value)
    return from_dict(values)


def places_of(config: Config, overrides: Sequence[str]) -> list[str]:
    """What lies elsewhere and is named by a saved config that a run has taken, and not by the overrides."""
    values, defaults = (dict(field_values(dataclasses.asdict(of))) for of in (config, Config()))
    given = {override.partition("=")[0] for override in overrides}
    own = {"", *TOKENIZER_SIZES}
    return [
        f"{name}={values[name]}"
        for name in _PLACES
        if name not in given and values[name] != defaults[name] and values[name] not in own
    ]


def _read(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    name, _, argument = path.partition(":")
    with _one_line(f"--config={path!r} could not be read"):
        file = _find(name)
        if file.suffix == ".json":
            saved = freed(Config.from_json(file.read_text(), name))
            return dataclasses.asdict(of_saved(saved, name, overrides))
        spec = importlib.util.spec_from_file_location("bigmac_config_file", file)
        assert spec and spec.loader, file  # is_file() holds; a name without .py has no loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(*([argument] if argument else []))
        if isinstance(config, ConfigDict):
            config = from_dict(config.to_dict())
        if not isinstance(config, Config):
            raise TypeError(f"get_config() returned {type(config).__name__}, not a Config")
    return dataclasses.asdict(config)


def freed(config: Config) -> Config:
    """With what is saved as it was resolved back at its default where that is the same, so that model.structure and
    model.projection_init can be changed alone."""
    model = dataclasses.replace(config.model, latent_norm=ModelConfig.latent_norm)
    optimizer = dataclasses.replace(config.optimizer, projection_rate=OptimizerConfig.projection_rate)
    if model.latent_norms == config.model.latent_norms:
        config = dataclasses.replace(config, model=model)
    free = dataclasses.replace(config, optimizer=optimizer)
    return free if free.projection_rate == config.projection_rate else config


def _apply(values: ConfigDict, override: str) -> None:
    name, equals, text = override.partition("=")
    known = dict(field_values(values.to_dict()))
    if new := moved(name):
        value = {"true": "layer", "false": "none"}.get(text.lower(), text) if new == "execution.remat" else text
        raise ConfigError(f"{name} is {new} now; use --config.{new}{equals}{value}")
    if name not in known:
        raise ConfigError(unknown_field(name, field_names(Config)))
    if not equals:
        raise ConfigError(f"{name} needs a value: --config.{name}={known[name]}")
    if name in OR_AUTO:  # a flag of ml_collections keeps its value's type
        section, _, field = name.partition(".")
        with values.ignore_type():
            values[section][field] = _number(text)
        return
    kind = type(known[name]).__name__
    # The flags of ml_collections write to sys.stderr or raise several kinds of error on a value of the wrong type.
    try:
        holder = flags.FlagValues()
        argument = f"--config.{name}={text}"
        config_flags.DEFINE_config_dict("config", values, flag_values=holder, sys_argv=["", argument])
        holder(["", argument])
    except Exception:
        raise ConfigError(f"{name}={text!r} must be of type {kind}, as in --config.{name}={known[name]}") from None


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def field_values(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(full name, value) of every field of nested dictionaries."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from field_values(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turns whatever a user's config file raises into one line that names the place."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        trace = sys.exc_info()[2]
        while trace and trace.tb_next:
            trace = trace.tb_next
        line = getattr(error, "lineno", None) or (trace.tb_lineno if trace else "?")
        try:
            message = " ".join(str(error).split())
        except Exception:
            message = "its message cannot be printed"
        raise ConfigError(f"{what}: {type(error).__name__} at line {line}: {message}") from None
