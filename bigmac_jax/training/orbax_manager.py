"""Orbax's manager of a folder of checkpoints: what it keeps, how it writes, and what of its log is said."""

import logging
import pathlib
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import orbax.checkpoint as ocp
import orbax.checkpoint.checkpoint_managers as policies
from orbax.checkpoint.path import atomicity

from bigmac_jax.runtime.storage import is_store
from bigmac_jax.training.atomic_save import temporary_path_class
from bigmac_jax.training.checkpoint_arrays import array_handlers

METRIC = "eval/loss"
# Seconds after which Orbax gives up a save. Slow storage may take hours for a large one; what hangs is ended by the
# watchdog, and a store that does not answer by TensorStore.
_LONGEST = 24 * 3600


def _is_not_of_a_save(record: logging.LogRecord) -> bool:
    """Orbax and asyncio log a failed save with several tracebacks, some when memory is collected; `Checkpoints` says it
    in one line."""
    if not record.exc_info:
        return True
    told = "".join((record.pathname, record.getMessage(), *traceback.format_exception(record.exc_info[1])))
    return not re.search("orbax|tensorstore", told, re.IGNORECASE)


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_is_not_of_a_save)
# Each save between evaluations says this: it has no metric, and needs none.
logging.getLogger("absl").addFilter(lambda r: not r.getMessage().startswith("Requested `tracked_metric`"))


class _Needed(policies.PreservationPolicy):
    """Keeps the saves that restoring one of the newest would read."""

    def __init__(self, needed: Callable[[Sequence[int]], set[int]]):
        self._needed = needed

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [info.step for info in checkpoints]
        needed = self._needed(steps)
        return [step in needed for step in steps]


def open_manager(
    folder: pathlib.Path, items: Sequence[str], needed: Callable[[Sequence[int]], set[int]], reads: bool
) -> ocp.CheckpointManager:
    """Opens a folder of checkpoints, of which the one with the least `METRIC` stays, and those that are needed.

    Args:
      items: those that hold arrays.
      needed: of the steps that there are, those that stay.
      reads: for a reader; the folder is not made.
    """
    best = policies.BestN(
        get_metric_fn=lambda metrics: metrics[METRIC],
        reverse=True,  # a small loss is a good one
        n=1,
        keep_checkpoints_without_metrics=False,
    )
    return ocp.CheckpointManager(
        folder,
        handler_registry=array_handlers(*items),
        options=ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: metrics[METRIC],
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy([_Needed(needed), best]),
            create=not reads,
            # In the background, a directory that can't be made would leave threads that wait five minutes for it.
            async_options=ocp.AsyncOptions(timeout_secs=_LONGEST, create_directories_asynchronously=False),
            lightweight_initialize=reads,
            temporary_path_class=temporary_path_class(folder),
            # Renamed first: what a killed run leaves of one would look damaged. A store renames nothing.
            todelete_subdir=None if is_store(folder) else f"removed{atomicity.TMP_DIR_SUFFIX}",
        ),
    )
