"""The models that checkpoints hold, for whoever reads a run: evaluation, generation, export, conversion, a new run."""

import hashlib
import logging
import pathlib
from typing import Any, NamedTuple

import jax
from flax import nnx

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.adapters import make_adapters
from bigmac_jax.model.mesh import make_mesh, placed
from bigmac_jax.model.transformer import Transformer, init_model
from bigmac_jax.runtime import hosts, storage
from bigmac_jax.training import manifest
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.step import split
from bigmac_jax.training.workdir import changes_of_edition, read_config, with_own_tokenizer

_log = logging.getLogger(__name__)


def find_checkpoint(workdir: pathlib.Path, step: str) -> tuple[int, str]:
    """The number of the checkpoint that `restore` would take if its arrays are intact, and a digest of what it holds;
    ConfigError likewise."""
    checkpoints = Checkpoints(workdir)
    try:
        number = checkpoints.resolve(step)
    finally:
        checkpoints.close()
    file = workdir / "checkpoints" / str(number) / manifest.NAME  # names its files, as no other does
    return number, hosts.run_on_first(lambda: hashlib.sha256(file.read_bytes()).hexdigest())


def restore(
    workdir: str | pathlib.Path, step: str = "latest", config: Config | None = None
) -> tuple[Config, Transformer]:
    """The config and the model of a training run.

    Args:
      step: "latest", "best" (by eval/loss) or a number.
      config: the run's config with another mesh; by default as it was saved.

    The config that is returned names the run's own copy of its tokenizer. The model is
    sharded on the current mesh; without one, the config's mesh becomes current.

    Raises:
      ConfigError: no such run or checkpoint.
    """
    return restore_step(workdir, step, config)[:2]


def restore_step(
    workdir: str | pathlib.Path, step: str = "latest", config: Config | None = None
) -> tuple[Config, Transformer, int, float | None]:
    """As `restore`; also the checkpoint's step, and its eval/loss if it was evaluated."""
    found = restore_parts(workdir, step, config)
    if found.config.tuning.lora_rank:
        raise ConfigError(f"{workdir} holds adapters, and no whole model; use bigmac_jax.restore")
    model = nnx.merge(found.graphdef, found.params, found.rest)
    return found.config, model, found.step, found.loss


class Restored(NamedTuple):
    """Attributes:
    params: the model's; of a run that trains adapters, these, and `base` has the shapes of the model's.
    """

    config: Config
    graphdef: Any
    params: nnx.State
    rest: nnx.State
    base: nnx.State
    step: int
    loss: float | None


def restore_parts(workdir: str | pathlib.Path, step: str = "latest", config: Config | None = None) -> Restored:
    """What a checkpoint holds; arguments and errors as for `restore`."""
    workdir = storage.locate(workdir, "workdir")
    if hosts.is_first():
        for line in changes_of_edition(workdir):
            _log.warning("%s", line)
    config = with_own_tokenizer(workdir, config or read_config(workdir))
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        mesh = make_mesh(config, fit_batch=False)
        jax.set_mesh(mesh)
    checkpoints = Checkpoints(workdir)
    try:
        graphdef, base, rest = split(jax.eval_shape(lambda key: init_model(config, key), jax.random.key(0)))
        params = base
        if config.tuning.lora_rank:
            params = jax.eval_shape(lambda key: make_adapters(config, base, key), jax.random.key(0))
        number, tree = checkpoints.restore_model(str(step), placed({"params": params, "rest": rest}, mesh))
        loss = hosts.run_on_first(lambda: checkpoints.loss(number))
        return Restored(config, graphdef, tree["params"], tree["rest"], base, number, loss)
    finally:
        checkpoints.close()
