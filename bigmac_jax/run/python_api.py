"""For notebooks and scripts: train.py and plan.py in one call each, and what a run has logged as columns."""

import logging
import os
from typing import Any

import jax
import numpy as np

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.config.reads import notes
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.planning.place import Request
from bigmac_jax.planning.planner import make_plan
from bigmac_jax.run import loop
from bigmac_jax.training.metrics_file import read_records
from bigmac_jax.training.workdir import locate_workdir

_log = logging.getLogger(__name__)


def train(config: Config, workdir: str | os.PathLike[str]) -> loop.Result:
    """Trains in `workdir` on the config's mesh, as train.py does: a run that has begun goes on where it stands. The
    mesh is not fitted to fewer replicas, and programs are kept where JAX is told to.

    It has to be called from the main thread, where signals arrive: an interrupt saves the run and ends it. Fields that
    are set and not read are named in a warning of the logger `bigmac_jax`.

    Raises:
      ConfigError, RunError: as `bigmac_jax.run.loop.train`.
    """
    path = locate_workdir(os.fspath(workdir))
    with jax.set_mesh(mesh := make_mesh(config)):
        for line in notes(config, ranks=mesh.shape["data"]):
            _log.warning("%s", line)
        return loop.train(config, path)


def metrics(workdir: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads what a run has logged, even while it goes on: a row for each step that was logged, evaluated or scored by
    tasks, a column for each name.

    Rows are in order of their steps. What a step did not log is NaN (evaluations, for most steps), and so is what was
    not finite. `moe/load` is [rows, layers, experts]. Steps that were skipped or rewound are not among them.

    Raises:
      ConfigError: the workdir has logged nothing yet.
    """
    rows: dict[int, dict[str, Any]] = {}
    for record in read_records(locate_workdir(os.fspath(workdir))):
        if not record.keys().isdisjoint(("loss", "eval/loss")) or any(name.startswith("tasks/") for name in record):
            rows.setdefault(record["step"], {}).update(record)
    if not rows:
        raise ConfigError(f"workdir={workdir} has logged no step in metrics.jsonl; train there first")
    names = dict.fromkeys(name for row in rows.values() for name in row)
    return {name: _column([rows[step].get(name) for step in sorted(rows)]) for name in names}


def plan(config: Config, **asked: Any) -> dict[str, Any]:
    """Plans what a config costs, as plan.py does with --json; no device is needed.

    Args:
      **asked: fields of `planning.place.Request`, such as topology="h100:64x8" and search=True.

    Raises:
      ConfigError: what cannot be planned.
    """
    if unknown := asked.keys() - set(Request._fields):
        raise ConfigError(f"plan({min(unknown)}=…) is not known; use {', '.join(Request._fields)}")
    return make_plan(config, Request(**asked))


def _column(values: list[Any]) -> np.ndarray:
    """One array of a column's values, NaN where there is None; integers where all are."""
    shape = next((np.shape(value) for value in values if value is not None), ())
    array = np.asarray(
        [value if np.shape(value) == shape and value is not None else np.full(shape, np.nan) for value in values]
    )
    return array if array.dtype.kind in "iu" else array.astype(float)
