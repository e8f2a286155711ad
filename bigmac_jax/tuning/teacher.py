"""The model that a run learns from besides its text, named by tuning.teacher (`training.distillation`)."""

import dataclasses
import pathlib

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.interchange.tokenizer_files import extends
from bigmac_jax.tuning.pretrained import Pretrained, open_recorded, own_tokenizer

TEACHER = "teacher"  # the key of a run's teacher in run.json's `data`


def open_teacher(workdir: pathlib.Path, config: Config) -> Pretrained:
    """Finds the teacher of a run, and gives it the run's mesh and execution.

    Raises:
      ConfigError: as `open_recorded`; or its layers can't be compared with the run's.
    """
    found = open_recorded(workdir, config.tuning.teacher, TEACHER, "tuning.teacher")
    loops = [[(stack.name, len(stack.layers)) for stack in of.model.stacks] for of in (found.config, config)]
    layers = ("num_layers", "first_dense_layers", "blocks", "structure") if loops[0] != loops[1] else ()
    for name in ("vocab_size", *layers, *(("hidden_size",) if config.tuning.hidden_weight else ())):
        own, wanted = getattr(found.config.model, name), getattr(config.model, name)
        if own != wanted:
            raise ConfigError(
                f"model.{name}={wanted} must be the {own} of tuning.teacher={found.place}, which is compared with the "
                f"model layer by layer"
            )
    length, longest = config.data.sequence_length, found.config.context_length
    if found.config.model.positions == "learned" and length > longest:
        raise ConfigError(
            f"data.sequence_length={length} must be at most the {longest} that tuning.teacher={found.place} has"
        )
    data = dataclasses.replace(found.config.data, sequence_length=max(length, found.config.data.sequence_length))
    run_on = dataclasses.replace(found.config, mesh=config.mesh, execution=config.execution, data=data)
    return found._replace(config=run_on)


def check_teacher_tokenizer(teacher: Pretrained, config: Config, tokenizer: Tokenizer) -> None:
    """Raises ConfigError if a teacher has other tokens than the run. Their file may be another: an export's is written
    anew."""
    own = own_tokenizer(teacher, config)
    if own is not None and not (extends(own, tokenizer) and extends(tokenizer, own)):
        raise ConfigError(
            f"tuning.teacher={teacher.place} has another tokenizer than the run: its probabilities are of other tokens"
        )
