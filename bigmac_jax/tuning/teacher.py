"""The model that a run learns from besides its text, named by tuning.teacher (`training.distillation`)."""

import dataclasses
import pathlib

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.tuning.pretrained import Origin, open_recorded, read_model, tokenizer_of

TEACHER = "teacher"  # under which run.json has its identity


def teacher_of(workdir: pathlib.Path, config: Config) -> Origin:
    """The teacher of a run, that it recorded if it has begun; errors as for `open_recorded`."""
    return open_recorded(workdir, config.tuning.teacher, TEACHER, "tuning.teacher")


def fitting(found: Origin, config: Config, tokenizer: Tokenizer) -> Origin:
    """A teacher whose config has the run's mesh and execution.

    Raises:
      ConfigError: its words or layers can't be compared with the run's.
    """
    place = found.place
    own, m, of_run = tokenizer_of(found, config), found.config.model, config.model
    if own is not None and own.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"tuning.teacher={place} has another tokenizer than the run: it would not say of the same words"
        )
    layers = ("num_layers", "first_dense_layers") + (("hidden_size",) if config.tuning.hidden_weight else ())
    for name in ("vocab_size", *layers):
        if getattr(m, name) != getattr(of_run, name):
            raise ConfigError(
                f"model.{name}={getattr(of_run, name)} must be the {getattr(m, name)} of tuning.teacher={place}, which "
                f"walks beside the model, layer by layer"
            )
    length, longest = config.data.sequence_length, found.config.data.sequence_length
    if m.positions == "learned" and length > longest:
        raise ConfigError(
            f"data.sequence_length={length} must be at most the {longest} that tuning.teacher={place} has"
        )
    # Only its layers' mathematics is its own.
    data = dataclasses.replace(found.config.data, sequence_length=max(length, longest))
    return found._replace(
        config=dataclasses.replace(found.config, mesh=config.mesh, execution=config.execution, data=data)
    )


def read_teacher(teacher: Origin) -> Transformer:
    """On the current mesh."""
    return read_model(teacher, teacher.config)
