"""Writes a model that came from elsewhere as a run of train.py at step 0."""

import pathlib
from collections.abc import Sequence

import jax

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.runtime import hosts
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.step import make_trainer, split_model
from bigmac_jax.training.workdir import write_config


def check_no_run(workdir: pathlib.Path, flag: str) -> None:
    """Raises ConfigError if the folder that `flag` named holds a run."""
    with hosts.raise_together():
        if (workdir / "config.json").exists() or (workdir / "checkpoints").exists():
            raise ConfigError(f"{flag}={workdir} holds a run; give another one")


def check_new(config: Config) -> Config:
    """Returns the config; raises ConfigError if it begins with another model."""
    for name, value in (("train.init_from", config.train.init_from), ("tuning.lora_rank", config.tuning.lora_rank)):
        if value:
            raise ConfigError(f"{name}={value} begins with the model that is written here; give it to train.py then")
    return config


def write_new_run(workdir: pathlib.Path, config: Config, model: Transformer, history: Sequence[str]) -> None:
    """Writes a model on the current mesh as a run at step 0, with a new optimizer state; the workdir is locked. The
    model's arrays are donated.

    Args:
      history: what it has learned before, and where it comes from.

    Raises:
      ConfigError: it cannot be written.
    """
    _, params, rest = split_model(model)
    state = make_trainer(config, jax.sharding.get_mesh()).begin(params, rest, jax.random.key(0))
    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
    checkpoints.save(state, {"batches": 0}, config, 0, None)
    checkpoints.wait()
    saved = hosts.broadcast(checkpoints.latest())
    checkpoints.close()
    if saved is None:
        raise ConfigError(f"{workdir} cannot be written (see above); free space, or give another folder")
    with hosts.raise_together():
        if hosts.is_first():
            write_config(config, workdir, history=list(history))
