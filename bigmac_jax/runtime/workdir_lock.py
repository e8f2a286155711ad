"""Gives a workdir to one job at a time."""

import contextlib
import logging
import pathlib
from collections.abc import Callable, Iterator

from bigmac_jax.config import ConfigError
from bigmac_jax.runtime import hosts, leases, storage

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def lock_workdir(workdir: pathlib.Path) -> Iterator[Callable[[], bool]]:
    """Holds the workdir for this job, until process 0 ends, however it ends; on a store for half a minute longer.
    Yields what says, in process 0, whether the folder is still there: what was moved or removed is no longer held.

    Raises:
      ConfigError: another job trains there, or the workdir cannot be written.
    """
    is_held: Callable[[], bool] = _process_0_knows
    with contextlib.ExitStack() as stack:
        with hosts.raise_together():
            if hosts.is_first():
                try:
                    is_held = stack.enter_context(leases.lock(workdir / ".lock", wait=False, say=_log.warning))
                except leases.HeldError as holder:
                    raise ConfigError(
                        f"--workdir={workdir} is in use by {holder}; wait for it, stop it, or give another --workdir"
                    ) from None
                except storage.errors() as error:
                    raise ConfigError(
                        f"--workdir={workdir} cannot be written ({storage.reason(error)}); give another one"
                    ) from None
        yield is_held


def _process_0_knows() -> bool:
    return True
