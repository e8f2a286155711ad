"""Orbax checkpoints: parameters, optimizer, data position and config; a directory a step, written in the background."""

import json
import math
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
import orbax.checkpoint.checkpoint_managers as policies
from flax import nnx

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.mesh import make_mesh, placed
from bigmac_jax.model.transformer import Transformer, init_model
from bigmac_jax.training.step import TrainState, split

_METRIC = "eval/loss"


class Checkpoints:
    """The checkpoints of a workdir. A directory appears under its final name only when it is complete.

    `keep` newest and the best are kept. None is for a reader: it removes nothing, not even what a process that trains
    is just writing.
    """

    def __init__(self, workdir: pathlib.Path, keep: int | None = None):
        self._manager = ocp.CheckpointManager(
            workdir.absolute() / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                best_fn=lambda metrics: metrics[_METRIC],
                best_mode="min",
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(
                            get_metric_fn=lambda metrics: metrics[_METRIC],
                            reverse=True,  # a small loss is a good one
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                cleanup_tmp_directories=keep is not None,
                create=keep is not None,
            ),
        )

    def save(self, state: TrainState, data_state: Any, config: Config, step: int, eval_loss: float | None) -> None:
        """Copies the state to the host, returns, and writes in the background."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave({"params": state.params, "rest": state.rest}),
                optimizer=ocp.args.StandardSave({"opt_state": state.opt_state, "step": state.step}),
                data=ocp.args.JsonSave(data_state),
                config=ocp.args.JsonSave(json.loads(config.to_json())),
            ),
            metrics={_METRIC: eval_loss} if eval_loss is not None and math.isfinite(eval_loss) else None,
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best_loss(self) -> float:
        """eval/loss of the best checkpoint, inf if none was evaluated."""
        losses = [m[_METRIC] for step in self._manager.all_steps() if (m := self._manager.metrics(step))]
        return min(losses, default=float("inf"))

    def resolve(self, step: str) -> int:
        """The number of the checkpoint 'latest', 'best' or 'N'.

        Raises:
          ConfigError: there is no such checkpoint.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise ConfigError(f"{self._manager.directory} holds no checkpoint; train first")
        if step == "latest":
            return steps[-1]
        if step == "best":
            best = self._manager.best_step()
            return steps[-1] if best is None else best
        if not step.isdecimal() or int(step) not in steps:
            raise ConfigError(
                f"step={step} is not a checkpoint of {self._manager.directory}; use latest, best or one of {steps}"
            )
        return int(step)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, Any]:
        """The state, sharded as `abstract`, and the data position."""
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore({"params": abstract.params, "rest": abstract.rest}),
                optimizer=ocp.args.StandardRestore({"opt_state": abstract.opt_state, "step": abstract.step}),
                data=ocp.args.JsonRestore(),
            ),
        )
        model, optimizer = items["model"], items["optimizer"]
        return TrainState(optimizer["step"], model["params"], model["rest"], optimizer["opt_state"]), items["data"]

    def restore_model(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """{"params": …, "rest": …} alone."""
        return self._manager.restore(step, args=ocp.args.Composite(model=ocp.args.StandardRestore(abstract)))["model"]

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def read_config(workdir: pathlib.Path) -> Config:
    """The config that a workdir was trained with.

    Raises:
      ConfigError: there is none.
    """
    file = workdir / "config.json"
    if not file.is_file():
        raise ConfigError(f"--workdir={workdir} holds no config.json; give the workdir of a training run")
    return Config.from_json(file.read_text(), str(file))


def restore(
    workdir: str | pathlib.Path, step: str = "latest", config: Config | None = None
) -> tuple[Config, Transformer]:
    """The config and the model of a training run.

    Args:
      step: "latest", "best" (by eval/loss) or a number.
      config: the run's config with another mesh; by default as it was saved.

    The model is sharded on the current mesh; without one, the config's mesh becomes current.

    Raises:
      ConfigError: no such run or checkpoint.
    """
    workdir = pathlib.Path(workdir)
    config = config or read_config(workdir)
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        mesh = make_mesh(config, fit_batch=False)
        jax.set_mesh(mesh)
    checkpoints = Checkpoints(workdir)
    try:
        number = checkpoints.resolve(str(step))
        abstract = jax.eval_shape(lambda key: init_model(config, key), jax.random.key(0))
        graphdef, params, rest = split(abstract)
        tree = checkpoints.restore_model(number, placed({"params": params, "rest": rest}, mesh))
        return config, nnx.merge(graphdef, tree["params"], tree["rest"])
    finally:
        checkpoints.close()
