"""Reads models from checkpoints: for evaluation, generation, export, conversion and runs that begin with one."""

import contextlib
import hashlib
import logging
import pathlib
from typing import Any, NamedTuple

import jax
from flax import nnx

from bigmac_jax.config import Config
from bigmac_jax.model.adapters import make_adapters
from bigmac_jax.model.mesh import make_mesh, placed
from bigmac_jax.model.resident import experts_in_host
from bigmac_jax.model.transformer import init_model
from bigmac_jax.runtime import hosts, storage
from bigmac_jax.training import manifest
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.step import split_model
from bigmac_jax.training.workdir import read_config, software_changes, use_saved_tokenizer

_log = logging.getLogger(__name__)


def find_checkpoint(workdir: pathlib.Path, step: str) -> tuple[int, str]:
    """The number of the checkpoint that `restore_parts` would take if its arrays are intact, and a digest of it.
    Errors as for `tuning.restore`."""
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        number = checkpoints.resolve(step)
    file = workdir / "checkpoints" / str(number) / manifest.NAME  # names its files, as no other does
    return number, hosts.run_on_first(lambda: hashlib.sha256(file.read_bytes()).hexdigest())


class Restored(NamedTuple):
    """What a checkpoint holds of a model.

    Attributes:
      params: the model's parameters; of a run that trains adapters, the adapters.
      base: shapes of the model's parameters.
      loss: eval/loss, if it was evaluated.
    """

    config: Config
    graphdef: Any
    params: nnx.State
    rest: nnx.State
    base: nnx.State
    step: int
    loss: float | None


def restore_parts(workdir: str | pathlib.Path, step: str, config: Config | None, in_host: bool = False) -> Restored:
    """Reads a checkpoint; arguments and errors as for `tuning.restore`."""
    workdir = storage.locate(workdir, "workdir")
    if hosts.is_first():
        for line in software_changes(workdir):
            _log.warning("%s", line)
    config = use_saved_tokenizer(workdir, config or read_config(workdir))
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        mesh = make_mesh(config, fit_batch=False)
        jax.set_mesh(mesh)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        graphdef, base, rest = split_model(jax.eval_shape(lambda key: init_model(config, key), jax.random.key(0)))
        params = base
        if config.tuning.lora_rank:
            params = jax.eval_shape(lambda key: make_adapters(config, base, key), jax.random.key(0))
        abstract = placed({"params": params, "rest": rest}, mesh)
        if in_host and not config.tuning.lora_rank:
            abstract = experts_in_host(abstract, mesh)
        number, tree = checkpoints.restore_model(str(step), abstract)
        loss = hosts.run_on_first(lambda: checkpoints.loss(number))
        return Restored(config, graphdef, tree["params"], tree["rest"], base, number, loss)
