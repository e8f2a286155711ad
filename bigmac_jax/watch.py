"""No process of a job waits for ever: who died, went silent or hangs is named, and all end.

Every process beats into a file of its own under workdir/hosts and reads those of the others. jax's heartbeats come from
a thread of C++ that lives on when the step hangs, and its verdict is an abort; they are the second line.
"""

import contextlib
import faulthandler
import fcntl
import json
import logging
import os
import pathlib
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

from bigmac_jax import hosts, storage
from bigmac_jax.config import ConfigError

_log = logging.getLogger(__name__)
_BEAT = 0.5  # seconds
_GRACE = 10.0  # seconds to find out which process an error comes from
_SLOW = 10  # compilation, evaluation and saving may take so many times as long as a step


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir for this job. When process 0 ends, however it ends, the kernel lets it go at once, a store
    after half a minute (`storage.locks`).

    Raises:
      ConfigError: another job trains there, or the workdir cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with hosts.together():
            if hosts.is_first():
                try:
                    stack.enter_context(storage.locked(workdir / ".lock", wait=False, say=_log.warning))
                except storage.HeldError as holder:
                    raise ConfigError(
                        f"--workdir={workdir} is in use by {holder}; wait for it, stop it, or give another --workdir"
                    ) from None
                except storage.errors() as error:
                    raise ConfigError(
                        f"--workdir={workdir} cannot be written ({storage.reason(error)}); give another one"
                    ) from None
        yield


class _Peer:
    """What this process knows of another one."""

    def __init__(self, file: pathlib.Path, index: int):
        self.file, self.index = file, index
        self.text, self.seen = "", time.monotonic()
        self.state: dict[str, Any] = {}
        self.had_lock = False

    def look(self) -> bool:
        """Reads its file → whether the process is known to have died."""
        try:
            with self.file.open() as file:  # opened anew: this is what makes NFS ask the server
                locked = _is_locked(file)
                dead = self.had_lock and not locked  # on a file system without locks it never had one
                self.had_lock |= locked
                text = file.read()
                state = json.loads(text)
        except (OSError, ValueError):  # not there yet, or half-written
            return False
        if text != self.text:
            self.text, self.state, self.seen = text, state, time.monotonic()
        return dead and not self.ended

    @property
    def ended(self) -> bool:
        return bool(self.state.get("ended"))

    @property
    def step(self) -> int:
        return int(self.state.get("step", 0))

    @property
    def started(self) -> int:
        """Steps, those that a rewind has undone included: it only grows."""
        return int(self.state.get("started", 0))

    def __str__(self) -> str:
        where = f" ({self.state['pid']} on {self.state['host']}, step {self.step})" if self.state else ""
        return f"process {self.index}{where}"


class Watch:
    """Inside it, this process ends with one line and exit code 3 if the job cannot go on.

    The line names the process that died (its file lock is gone), is silent (its file has not changed for `timeout`
    seconds) or hangs (it started fewer steps than the others, and no step has been finished for `timeout` seconds).
    A job of one process, and timeout=0, are not watched.

    Args:
      agreed: errors that every process raises at the same step; others end the job.
      kind: train, which holds the workdir (`held`), or eval, of which several may run beside it.
    """

    def __init__(
        self, workdir: pathlib.Path, timeout: float, agreed: tuple[type[Exception], ...] = (), kind: str = "train"
    ):
        self._timeout, self._agreed = timeout, (ConfigError, hosts.PeerError, *agreed)
        self._on = hosts.several() and timeout > 0
        self._step, self._started = 0, 0
        self._advanced, self._patience = time.monotonic(), _SLOW * timeout
        self._beats, self._closing, self._ending = 0, threading.Event(), threading.Lock()
        if not self._on:
            return
        parent, name = workdir / "hosts", f"{kind}-{time.time_ns()}"
        with hosts.together():
            if hosts.is_first():
                for left_over in parent.glob("train-*") if kind == "train" else ():  # of a job that was killed
                    shutil.rmtree(left_over, ignore_errors=True)
                try:
                    (parent / name).mkdir(parents=True)
                except OSError as error:
                    raise ConfigError(
                        f"{parent} cannot be written ({error}), where several processes watch each other; use a "
                        f"workdir that they share, or --peer_timeout=0"
                    ) from None
        self._folder = parent / hosts.gather(name)[0]
        self._me = jax.process_index()

    def __enter__(self) -> "Watch":
        if self._on:
            self._file = (self._folder / str(self._me)).open("w")
            with contextlib.suppress(OSError):  # without locks, silence tells
                fcntl.flock(self._file, fcntl.LOCK_EX)
            self._peers = [_Peer(self._folder / str(i), i) for i in range(jax.process_count()) if i != self._me]
            hosts.on_abort(lambda: self.blame("aborted; its output says why"))
            self._beat()
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self._on:
            return
        if error is not None and not isinstance(error, self._agreed):
            traceback.print_exception(error)
            self.blame(" ".join(f"{type(error).__name__}: {error}".split())[:500])
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._beat(ended=True)
        self._file.close()
        hosts.on_abort(None)
        if self._me == 0 and error is None:
            end = time.monotonic() + _GRACE
            while not (done := all(peer.look() or peer.ended for peer in self._peers)) and time.monotonic() < end:
                time.sleep(_BEAT / 5)
            if done:
                shutil.rmtree(self._folder, ignore_errors=True)

    def step(self, step: int) -> None:
        """To be called when a step is started, and the one before the last has ended."""
        self._step, self._started = step, self._started + 1
        self._advanced, self._patience = time.monotonic(), self._timeout

    def advance(self) -> None:
        """A long piece of work goes on."""
        self._advanced = time.monotonic()

    def relax(self) -> None:
        """What follows may take longer than a step."""
        self._patience = _SLOW * self._timeout
        self.advance()

    @contextlib.contextmanager
    def slow(self) -> Iterator[None]:
        """Around what takes longer than a step."""
        before = self._patience
        self.relax()
        yield
        self._patience = before
        self.advance()

    def blame(self, error: str) -> NoReturn:
        """Ends the job for an error here, which is another process' doing if that one is dead, silent or behind."""
        end = time.monotonic() + _GRACE
        line = None
        while line is None and time.monotonic() < end:
            line = self._verdict(_GRACE / 2)
            time.sleep(_BEAT / 2)
        if line is None and any(peer.started < self._started for peer in self._peers):
            line = self._hang()
        self._end(line or f"process {self._me} failed: {error}")

    def _run(self) -> None:
        while not self._closing.wait(_BEAT):
            # A thread of C: where another one keeps the interpreter's lock, neither this thread nor a handler runs.
            faulthandler.dump_traceback_later(2 * self._timeout, exit=True)
            self._beat()
            line = self._verdict(self._timeout)
            if line is None and time.monotonic() - self._advanced > self._patience:
                line = self._hang()
            if line is not None:
                self._end(line)

    def _beat(self, ended: bool = False) -> None:
        self._beats += 1
        state = {"host": socket.gethostname(), "pid": os.getpid(), "step": self._step,
                 "started": self._started, "beat": self._beats}  # fmt: skip
        with contextlib.suppress(OSError):  # of a moment; of more, the others see the silence
            os.pwrite(self._file.fileno(), json.dumps(state | {"ended": ended}).ljust(400).encode(), 0)

    def _verdict(self, silence: float) -> str | None:
        """The line that ends the job, if a process has ended it, is dead or has been silent for so many seconds."""
        if not self._folder.exists():
            return f"{self._folder} is gone: another job has taken the workdir"
        with contextlib.suppress(OSError):
            if line := (self._folder / "failure").read_text():
                return line
        now = time.monotonic()
        for peer in self._peers:
            if peer.look():
                return f"{peer} has died"
            if not peer.ended and now - peer.seen > silence:
                return f"{peer} has given no sign of life for {now - peer.seen:.0f} s"
        return None

    def _hang(self) -> str:
        """The line that names who holds up the step."""
        waited = time.monotonic() - self._advanced
        started, latest = max([(self._started, self._step), *((peer.started, peer.step) for peer in self._peers)])
        behind = [str(peer) for peer in self._peers if peer.started < started]
        if self._started < started:
            behind.append(f"process {self._me} ({os.getpid()} on {socket.gethostname()}, step {self._step})")
        who = f"{' and '.join(behind)} did not start step {latest}" if behind else f"all started step {latest}"
        return f"no step has ended for {waited:.0f} s: {who}"

    def _end(self, line: str) -> NoReturn:
        if not self._ending.acquire(blocking=False):
            time.sleep(3600)  # the other thread is ending the process
        try:
            with open(self._folder / f"failure.{self._me}", "w") as file:
                file.write(line)
            os.link(file.name, self._folder / "failure")  # whole, and only the first
        except OSError:
            with contextlib.suppress(OSError):
                line = (self._folder / "failure").read_text()
        sys.stdout.flush()
        bar = "" if self._me else "\n"  # of progress, which stands in the line
        print(f"{bar}error: {line}", file=sys.stderr, flush=True)
        if self._me == 0:
            time.sleep(4 * _BEAT)  # jax aborts the others as soon as process 0 is gone
        os._exit(hosts.EXIT_CODE)


def _is_locked(file: Any) -> bool:
    """Whether another process holds the lock of an open file."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
