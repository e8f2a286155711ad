"""Who holds a workdir: one job at a time."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from bigmac_jax import hosts
from bigmac_jax.config import ConfigError


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir for this job; the kernel lets it go when process 0 ends, however it ends.

    Raises:
      ConfigError: another job trains there, or the workdir cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with hosts.together():
            if hosts.is_first():
                try:
                    workdir.mkdir(parents=True, exist_ok=True)
                    file = stack.enter_context((workdir / ".lock").open("a+"))
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    holder = (workdir / ".lock").read_text().strip() or "another process"
                    raise ConfigError(
                        f"--workdir={workdir} is in use by {holder}; wait for it, stop it, or give another --workdir"
                    ) from None
                except OSError as error:
                    raise ConfigError(f"--workdir={workdir} cannot be written ({error}); give another one") from None
                with contextlib.suppress(OSError):  # of a full disk: this is for whoever is refused
                    os.ftruncate(file.fileno(), 0)
                    os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
