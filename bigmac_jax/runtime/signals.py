"""Handles SIGINT and SIGTERM from a command's first line on, and readers of its output that leave.

A signal ends the command with one line and the exit code that shells use. Nothing that takes time is imported here.
"""

from __future__ import annotations  # so that a Python that is too old gets as far as the line that says so

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
UNREAD = 128 + signal.SIGPIPE  # the exit code where nobody reads a command's output any more, as a shell counts it
_PATIENCE = 0.3  # seconds for the main thread to come back from C
# Seconds in which a signal that comes again is the same one: `timeout` and `systemctl stop` signal a group of
# processes, and the one among them that has started the others passes it on.
_ONE = 1.0
_undo: list[Callable[[], object]] = []  # what `undo_on_signal` was given
_spared: set[int] = set()  # signals whose next one `stop_signals` takes
_taken: dict[int, float] = {}  # when `stop_signals` took a signal
_ending = threading.Lock()
_loops: list[list[int]] = []  # what `stop_signals` gave


def install() -> None:
    """Makes both signals end the process from here on, except inside `stop_signals`.

    Python's own way, an exception in the main thread, is swallowed where C++ called back, gives a traceback where a
    library expects none, and comes late where C++ compiles or waits for another process. The process ends as it stands:
    what a killed process leaves half-way is removed by the next one in any case.
    """
    for number in WORDS:
        signal.signal(number, _end)
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    with block():  # in the thread, which inherits it: a signal that it took would be lost where `block` holds them
        threading.Thread(target=_listen, args=(read,), name="signals", daemon=True).start()


@contextlib.contextmanager
def block() -> Iterator[None]:
    """A context in which both signals wait; if the program is replaced inside, until the new one calls `install`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WORDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WORDS)


@contextlib.contextmanager
def stop_signals(told: Callable[[], object] | None = None) -> Iterator[list[int]]:
    """A context in which SIGTERM and SIGINT only fill the list, so that a loop can save and end.

    The same signal acts as usual when it comes again, a second later or more.

    Args:
      told: called at the first signal; a second after it both act as usual.
    """
    received: list[int] = []
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in WORDS}

    def stop(number: int, _: Any) -> None:
        if number in received or (told and received):
            if not _is_taken(number):
                signal.signal(number, previous[number])
                signal.raise_signal(number)
            return
        received.append(number)
        for ended in WORDS if told else (number,):
            _take(ended)
            if ended != number:
                _spared.discard(ended)
        if told:
            told()

    _loops.append(received)
    try:
        for number in WORDS:
            _spared.add(number)
            signal.signal(number, stop)
        yield received
    finally:
        _loops.pop()
        for number, handler in previous.items():
            signal.signal(number, handler)
            if number not in received:
                _spared.discard(number)


@contextlib.contextmanager
def tolerate_lost_output(stream: TextIO) -> Iterator[None]:
    """A context for printing in a loop inside `stop_signals`, which a line must not end. To a reader that may leave, as
    head does, tee at a ctrl-C, or a terminal: if it left, further output goes nowhere, and the loop saves and ends as
    for a signal. To a file: on a full disk, what can't be written is left out."""
    try:
        yield
    except OSError as error:
        if not _loops:
            raise
        if error.errno in (errno.EPIPE, errno.EIO):
            discard_output(stream)
            _loops[-1].append(signal.SIGPIPE)


def discard_output(stream: TextIO) -> None:
    """Makes everything that is still written to a stream go nowhere; for one whose reader has left."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextlib.contextmanager
def undo_on_signal(undo: Callable[[], object]) -> Iterator[None]:
    """A context in which a signal that ends the process calls `undo` first, as `finally` would for an exception."""
    _undo.append(undo)
    try:
        yield
    finally:
        _undo.remove(undo)


def _listen(pipe: int) -> None:
    """Thread that ends the process where the main thread does not come to its handler."""
    while received := os.read(pipe, 1):
        if received[0] in _spared:
            _spared.discard(received[0])
            _take(received[0])  # the main thread may come to it later
            continue
        if _is_taken(received[0]):
            continue
        time.sleep(_PATIENCE)
        if received[0] in WORDS:
            _end(received[0], None)


def _take(number: int) -> None:
    if not _is_taken(number):
        _taken[number] = time.monotonic()


def _is_taken(number: int) -> bool:
    """Whether a signal is the one that `stop_signals` has just taken."""
    return number in _taken and time.monotonic() - _taken[number] < _ONE


def _end(number: int, _: Any) -> None:
    if _is_taken(number) or not _ending.acquire(blocking=False):
        return
    for undo in reversed(_undo):
        with contextlib.suppress(Exception):
            undo()
    with contextlib.suppress(Exception):
        os.write(sys.stderr.fileno(), f"{WORDS[number]}\n".encode())  # a stream's lock may be held
    os._exit(128 + number)
