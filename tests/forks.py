"""Programs of this repository as forks of one process that imported JAX once: a start of Python costs more than most.

    child = start(["train.py", "--workdir=run"], log)

A child is what subprocess.Popen would be. What forks them ends with the process that asked first.
"""

import functools
import gc
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = os.environ | {
    "BIGMAC_KEEP_ENV": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # of LLVM: they take longer than the run
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # programs of any size are kept between starts
}


class Child:
    """A program that runs; `returncode` is negative if a signal ended it, and None before it was seen to end."""

    def __init__(self, parent: subprocess.Popen[str], argv: Sequence[str], out: pathlib.Path, err: pathlib.Path):
        self._parent, self.returncode = parent, None
        self.pid = self._ask(argv=[*map(str, argv)], out=str(out), err=str(err))

    def _ask(self, **request: Any) -> Any:
        assert self._parent.stdin and self._parent.stdout
        print(json.dumps(request, allow_nan=False), file=self._parent.stdin, flush=True)
        return json.loads(self._parent.stdout.readline())

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """
        Raises:
          subprocess.TimeoutExpired: it runs on.
        """
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    argv: Sequence[str],
    out: pathlib.Path,
    err: pathlib.Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Child:
    """Starts a script in the repository's folder.

    Args:
      out: gets what it prints, and its errors if there is no `err`.
      environment: what differs from ENVIRONMENT.
    """
    for log in {out, err or out}:
        log.write_text("")  # there is one to read before the child says anything
    return Child(_parent(tuple(sorted((environment or {}).items()))), argv, out, err or out)


@functools.cache
def _parent(environment: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    """What forks the children of an environment; it ends with this process, whose end of the pipe is then closed."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = ENVIRONMENT | {"PYTHONPATH": path} | dict(environment)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=variables, stdin=pipe, stdout=pipe, text=True)


def _serve() -> None:
    """Answers a request with the pid of a new child, or with a child's exit code; ends those that are left."""
    gc.freeze()  # the children need not look through what was imported
    children = set[int]()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            children.discard(pid)
        else:
            with warnings.catch_warnings(action="ignore"):  # JAX would have threads, if it had devices
                answer = os.fork()
            if not answer:
                return _become(**request)
            children.add(answer)
        print(json.dumps(answer, allow_nan=False), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _become(argv: list[str], out: str, err: str) -> None:
    """Makes this process the command `argv`, as if Python had been started with it."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(out, os.O_WRONLY), 1)
    os.dup2(1 if err == out else os.open(err, os.O_WRONLY), 2)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    # What the commands import, so that it is imported once; the commands' own modules define flags, each its own.
    import bigmac_jax.evaluation.tasks.task_jobs
    import bigmac_jax.inference
    import bigmac_jax.interchange
    import bigmac_jax.report.page
    import bigmac_jax.run.loop
    import bigmac_jax.training.tensorboard
    import bigmac_jax.tuning.conversion
    import bigmac_jax.tuning.peft  # noqa: F401

    _serve()
