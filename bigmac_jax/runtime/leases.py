"""Locks that end with the process: the kernel's on a disk, a lease on a store.

A lease is a folder of numbered objects. Whoever makes the next number, which a store lets only one process do, holds
the lease and renews its object from a thread; the highest number counts. Another process takes over, by making the next
number, when the object says that its holder has ended, or has not been renewed for as long as it promises. Ages are
differences of the server's own times, so clocks need not agree.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from bigmac_jax.runtime.storage import AWAY, errors, filesystem, is_store, make_folder, reason

SECONDS = 30.0  # for which a lease lasts without being renewed
_RENEWALS = 6  # in that time


class HeldError(RuntimeError):
    """Someone else holds the lock; the message says who."""


def me() -> str:
    """This process' name for others to read."""
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextlib.contextmanager
def lock(
    path: pathlib.Path, wait: bool = True, say: Callable[[str], object] = lambda line: None
) -> Iterator[Callable[[], bool]]:
    """Holds the lock `path`; it is released when this process ends, on a disk at once, on a store after SECONDS. Yields
    what says whether `path` still is that lock: on a disk its folder may be moved or removed, and another made.

    Args:
      wait: wait for whoever holds it, instead of raising HeldError.
      say: gets a line when a lease is waited for, and when it is taken over.

    Raises:
      HeldError: another process holds it.
      errors(): the lock can't be made.
    """
    if is_store(path):
        with Lease(path, say=say).hold(wait):
            yield lambda: True  # a lease that is lost ends the process
        return
    make_folder(path.parent)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise HeldError(path.read_text().strip() or "another process") from None
        with contextlib.suppress(OSError):  # of a full disk: this is for whoever is refused
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{me()}\n".encode())
        yield lambda: _is_at(file.fileno(), path)


def _is_at(descriptor: int, path: pathlib.Path) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # a disk that does not answer; the save says so
        return True


class Lease:
    """A lock on a store, with one holder at a time.

    Args:
      folder: where its objects are.
      seconds: how long it lasts without being renewed.
      lost: called in a thread, with a line, once another process has it or the store has not answered for AWAY seconds;
        by default it ends this process.
      say: gets a line when the lease is waited for, and when it is taken over.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        seconds: float = SECONDS,
        lost: Callable[[str], object] | None = None,
        say: Callable[[str], object] = lambda line: None,
    ):
        self._folder, self._seconds, self._say = folder, seconds, say
        self._lost = lost or _end
        self._files = filesystem(folder)
        self._id, self._number, self._beat = uuid.uuid4().hex, 0, 0
        self._closing = threading.Event()

    @contextlib.contextmanager
    def hold(self, wait: bool = True) -> Iterator[None]:
        """Holds the lease; if another process renews it, waits or raises HeldError."""
        while not self._take(wait):
            pass
        thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._closing.set()
            thread.join()
            with contextlib.suppress(Exception):  # it runs out
                self._write(ended=True, timeout=self._seconds)

    def _take(self, wait: bool) -> bool:
        """Takes the lease; False if another process was faster."""
        numbers = self._numbers()
        current = numbers[-1] if numbers else 0
        if current:
            self._wait_until_free(current, wait)
        try:
            self._files.pipe_file(self._name(current + 1), self._body(ended=False), mode="create")
        except FileExistsError:  # made by another one; or here, in a first try whose answer was lost
            if (self._read(current + 1) or {}).get("id") != self._id:
                return False
        self._number = current + 1
        for old in numbers:
            with contextlib.suppress(*errors()):
                self._files.rm_file(self._name(old))
        return True

    def _wait_until_free(self, number: int, wait: bool) -> None:
        """Returns once object `number` has ended, is no longer renewed, or is gone."""
        first, told = self._read(number), False
        while True:
            state = self._read(number)
            if state is None or state.get("ended"):
                return
            holder, seconds = state.get("holder", "another process"), float(state.get("seconds", SECONDS))
            if not wait and state != first:
                raise HeldError(holder)
            try:
                age = self._age(number)
            except FileNotFoundError:
                return
            if age > seconds:
                self._say(f"{self._folder} was held by {holder}, which has not renewed it for {age:.0f} s; taken over")
                return
            if not told:
                self._say(f"{self._folder} is held by {holder}; waiting until it is renewed, or {seconds:g} s old")
                told = True
            time.sleep(min(1.0, seconds / 20))

    def _age(self, number: int) -> float:
        """Seconds since the last renewal, by the server's clock, which a new object tells."""
        probe = f"{self._folder}/probe-{uuid.uuid4().hex}"
        self._files.pipe_file(probe, b"")
        try:
            return (self._files.modified(probe) - self._files.modified(self._name(number))).total_seconds()
        finally:
            self._files.rm_file(probe)

    def _renew(self) -> None:
        every = self._seconds / _RENEWALS
        renewed = time.monotonic()
        while not self._closing.wait(every):
            try:
                numbers = self._numbers(timeout=self._seconds)
                if numbers and numbers[-1] > self._number:
                    other = (self._read(numbers[-1]) or {}).get("holder", "another process")
                    self._lost(f"{self._folder} was not renewed in time, and {other} has taken it over")
                    return
                self._write(ended=False, timeout=self._seconds)
                renewed = time.monotonic()
            except Exception as error:  # whatever a store's package raises: without this thread the lease runs out
                if time.monotonic() - renewed > AWAY:
                    self._lost(f"{self._folder} could not be renewed for {AWAY:.0f} s ({reason(error)})")
                    return

    def _numbers(self, timeout: float | None = None) -> list[int]:
        try:
            names = self._files.ls(str(self._folder), detail=False, timeout=timeout)
        except FileNotFoundError:
            return []
        return sorted(int(last) for name in names if (last := name.rpartition("/")[2]).isdecimal())

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            return json.loads(self._files.cat_file(self._name(number)))
        except FileNotFoundError:
            return None

    def _write(self, ended: bool, timeout: float | None = None) -> None:
        self._beat += 1
        self._files.pipe_file(self._name(self._number), self._body(ended), timeout=timeout)

    def _body(self, ended: bool) -> bytes:
        state = {"id": self._id, "holder": me(), "seconds": self._seconds, "beat": self._beat, "ended": ended}
        return json.dumps(state, allow_nan=False).encode()

    def _name(self, number: int) -> str:
        return f"{self._folder}/{number:08d}"


def _end(line: str) -> NoReturn:
    with contextlib.suppress(Exception):  # where nothing can be printed, it ends all the same
        print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(3)
