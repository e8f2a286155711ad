"""SIGINT and SIGTERM from a command's first line on: one line, and the exit code that shells have for them; and readers
of a command's lines that leave.

Nothing is imported here that takes time.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_PATIENCE = 0.3  # seconds for the main thread to come back from C
_half_way: list[Callable[[], object]] = []
_spared: set[int] = set()  # whose next one is `stop_signals`'
_ending = threading.Lock()
_loops: list[list[int]] = []  # what those inside `stop_signals` were given


def install() -> None:
    """From here on both signals end the process, but for one inside `stop_signals`.

    Python's own way is an exception in the main thread: swallowed where C++ called back, a traceback where a library
    expects none, and late where C++ compiles or waits for another process. What a killed process leaves half-way is
    removed by the next one in any case, so that this one may end as it stands.
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
    """Both wait; also where the program is replaced inside, until the new one calls `install`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WORDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WORDS)


@contextlib.contextmanager
def stop_signals(told: Callable[[], object] | None = None) -> Iterator[list[int]]:
    """SIGTERM and SIGINT fill the list, so that the loop can save and end; a second one acts as usual.

    Args:
      told: called at the first one, whichever it is, after which either acts as usual.
    """
    received: list[int] = []
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in WORDS}

    def stop(number: int, _: Any) -> None:
        received.append(number)
        for ended in WORDS if told else (number,):
            signal.signal(ended, previous[ended])
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
def tolerate_closed_pipe(stream: TextIO) -> Iterator[None]:
    """For lines to a reader that may have left: head, or tee at a ctrl-C that was for both. The loop inside
    `stop_signals` then saves and ends as for a signal, and further lines go nowhere."""
    try:
        yield
    except BrokenPipeError:
        if not _loops:
            raise
        discard_output(stream)
        _loops[-1].append(signal.SIGPIPE)


def discard_output(stream: TextIO) -> None:
    """Its reader has left: what else is written to it goes nowhere."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextlib.contextmanager
def undo_on_signal(undo: Callable[[], object]) -> Iterator[None]:
    """A signal that ends the process inside calls `undo` first, as a `finally` would be for an exception."""
    _half_way.append(undo)
    try:
        yield
    finally:
        _half_way.remove(undo)


def _listen(pipe: int) -> None:
    """For a main thread that does not come to its handler."""
    while received := os.read(pipe, 1):
        if received[0] in _spared:
            _spared.discard(received[0])
            continue
        time.sleep(_PATIENCE)
        if received[0] in WORDS:
            _end(received[0], None)


def _end(number: int, _: Any) -> None:
    if not _ending.acquire(blocking=False):
        return
    for undo in reversed(_half_way):
        with contextlib.suppress(Exception):
            undo()
    with contextlib.suppress(Exception):
        os.write(sys.stderr.fileno(), f"{WORDS[number]}\n".encode())  # a stream's lock may be held
    os._exit(128 + number)
