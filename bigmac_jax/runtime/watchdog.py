"""No process of a job waits for ever: who died, went silent or hangs is named, and all end.

Through the key-value store of jax's coordination service, which process 0 holds: every process writes how far it is and
reads what process 0 has found, which reads all at once. That is two small requests a beat for each, whatever their
number, and no file. jax's heartbeats come from a thread of C++ that lives on when the step hangs, and its verdict is an
abort; they are the second line.
"""

import contextlib
import faulthandler
import functools
import json
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import jax

from bigmac_jax.config import ConfigError
from bigmac_jax.runtime import hosts
from bigmac_jax.runtime.clock import STEPPING, Clock, clock

_GRACE = 10.0  # seconds to find out which process an error comes from
_LEAST = 5.0  # seconds for which a live process may be silent, on a machine that has too much to do
_LOOK = 0.5  # seconds between looks at what is known
_SLOW, _LONG = 10, 600.0  # what is no step may stand still for so many times the timeout, and for so many seconds
_MOST = 6  # times that, where only the processor is busy: who waits for another may spin
_KEY = "bigmac/watch/"


class Store(Protocol):
    """What the watch needs of `jax.distributed`'s client."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
    def key_value_try_get(self, key: str) -> str: ...
    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


class _Peer:
    """What this process knows of another one."""

    def __init__(self, index: int):
        self.index, self.text, self.seen = index, "", time.monotonic()
        self.state: dict[str, Any] = {}

    def hear(self, text: str) -> None:
        if text != self.text:
            self.text, self.state, self.seen = text, json.loads(text), time.monotonic()

    def silent(self) -> float:
        """Seconds since it was heard."""
        return time.monotonic() - self.seen

    def idle(self) -> float:
        """Seconds for which nothing has moved in it; inf if it has ended, since it moves no one."""
        return float("inf") if self.ended else self.state.get("idle", 0.0) + self.silent()

    def died(self) -> bool:
        """Whether it is known to have died: only where it runs beside this one."""
        return bool(self.state) and self.state["place"] == _place() and not _alive(self.state["pid"])

    @property
    def ended(self) -> bool:
        return bool(self.state.get("ended"))

    @property
    def started(self) -> int:
        return int(self.state.get("started", 0))

    @property
    def phase(self) -> str:
        return str(self.state.get("phase", ""))

    def __str__(self) -> str:
        if not self.state:
            return f"process {self.index}"
        step, phase = self.state["step"], self.phase
        at = ([f"step {step}"] if step else []) + ([] if phase in STEPPING or not phase else [phase])
        return f"process {self.index} ({self.state['pid']} on {self.state['host']}, {', '.join(at) or 'start'})"


class Watchdog:
    """Inside it, this process ends with one line and exit code 3 if the job cannot go on.

    The line names the process that died, is silent (nothing heard of it for `timeout` seconds) or hangs (it started
    fewer steps than the others, and no step has been finished for `timeout` seconds). What is no step (`phases`) may
    take as long as anything moves in any process: work that is counted, or a busy processor.

    Args:
      timeout: seconds.
      store, me, count: of the job, this process' number, and how many there are.
      clock: tells which phase this process is in, and since when.
    """

    def __init__(self, timeout: float, store: Store, me: int, count: int, clock: Clock = clock) -> None:
        self._timeout, self._store, self._me, self._clock = timeout, store, me, clock
        # Two requests each; process 0 answers all, and shall not notice it.
        self.beat = max(1.0, min(5.0, timeout / 20), count / 64)
        self._silence = max(timeout - self.beat - _LOOK, 2 * self.beat, _LEAST)
        self._peers = [_Peer(i) for i in range(count)]
        self._beats, self._error, self._trace, self._failed = 0, "", "", 0.0
        self._verdict, self._lost, self._ended = "", 0, False
        self._closing, self._ending, self._hurry = threading.Event(), threading.Lock(), threading.Event()
        self._busy = self._moved = 0.0
        self._judged = time.monotonic()

    def __enter__(self) -> "Watchdog":
        hosts.on_abort(lambda: self.blame("aborted; its output says why"))
        self._threads = [
            threading.Thread(target=run, name="watchdog", daemon=True) for run in (self._talk, self._judge)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, SystemExit) and error.code:
            self.blame(f"it ended with exit code {error.code}; its line says why")
        if isinstance(error, KeyboardInterrupt):
            self.blame("it was interrupted")
        if isinstance(error, Exception) and not isinstance(error, (ConfigError, hosts.PeerError)):
            self._trace = "".join(traceback.format_exception(error))
            self.blame(" ".join(f"{type(error).__name__}: {error}".split())[:500])
        self._ended = True
        self._closing.set()
        self._hurry.set()
        for thread in self._threads:
            thread.join(_GRACE)
        faulthandler.cancel_dump_traceback_later()
        hosts.on_abort(None)
        end = time.monotonic() + _GRACE
        with contextlib.suppress(Exception):  # process 0 may be gone by now
            self._exchange()
            while self._me == 0 and time.monotonic() < end and not all(p.ended or p.died() for p in self._others()):
                time.sleep(_LOOK / 5)
                self._exchange()

    def blame(self, error: str) -> NoReturn:
        """Ends the job for an error here, which is another process' doing if that one is dead, silent or behind."""
        self._error = error
        self._hurry.set()
        time.sleep(2 * _GRACE + 3 * self.beat)  # process 0 finds out, and the other threads end this process
        self._end(f"process {self._me} failed: {error}")

    def _others(self) -> Sequence[_Peer]:
        return [peer for peer in self._peers if peer.index != self._me]

    def _talk(self) -> None:
        """Tells and asks; may wait for process 0, so another thread judges."""
        while not self._closing.is_set():
            try:
                self._exchange()
                self._lost = 0
            except Exception:
                self._lost += 1
            if self._hurry.wait(self.beat):
                self._closing.wait(_LOOK)

    def _exchange(self) -> None:
        """This process' state to all, and process 0's verdict to this one."""
        self._beats += 1
        self._peers[self._me].hear(self._state())
        if self._me:
            self._store.key_value_set(f"{_KEY}of/{self._me}", self._peers[self._me].text, allow_overwrite=True)
            found = json.loads(self._store.key_value_try_get(f"{_KEY}verdict"))
            self._verdict = found["line"]
            self._peers[0].hear(found["state"])
        else:
            for key, text in self._store.key_value_dir_get(f"{_KEY}of/"):
                self._peers[int(key.rpartition("/")[2])].hear(text)
            found = {"line": self._verdict, "state": self._peers[0].text}
            self._store.key_value_set(f"{_KEY}verdict", json.dumps(found, allow_nan=False), allow_overwrite=True)

    def _state(self) -> str:
        clock = self._clock
        busy, now = time.process_time(), time.monotonic()
        if busy - self._busy > 0.2 * self.beat:
            self._moved = now
        self._busy = busy
        idle = now - clock.last_tick
        if clock.phase not in STEPPING and idle < _MOST * self._patience(clock.phase):
            idle = min(idle, now - self._moved)
        state = {"host": socket.gethostname(), "pid": os.getpid(), "place": _place(), "step": clock.step,
                 "started": clock.started, "phase": clock.phase, "idle": round(idle, 1), "beat": self._beats,
                 "ended": self._ended, "error": self._error}  # fmt: skip
        return json.dumps(state, allow_nan=False)

    def _patience(self, phase: str) -> float:
        return self._timeout if phase in STEPPING else max(_SLOW * self._timeout, _LONG)

    def _judge(self) -> None:
        while not self._closing.wait(_LOOK):
            # A thread of C: where another one keeps the interpreter's lock, neither this thread nor a handler runs.
            faulthandler.dump_traceback_later(2 * self._timeout + _GRACE, exit=True)
            late, self._judged = time.monotonic() - self._judged > self._silence / 2, time.monotonic()
            if late:  # this process stood still itself: what the others say comes now
                for peer in self._peers:
                    peer.seen = max(peer.seen, self._judged - self._silence / 2)
                continue
            if line := self._found():
                self._end(line)

    def _found(self) -> str:
        """The line that ends the job, if it can't go on."""
        if self._verdict:
            return self._verdict
        if self._me:
            first = self._peers[0]
            errs = self._lost >= 2 or (self._error and first.silent() > max(_LEAST, 2 * self.beat))
            if not first.ended and first.state and (errs or first.died()):
                return f"{first} has died"
            if not first.ended and first.silent() > self._silence:
                return f"{first} has given no sign of life for {first.silent():.0f} s"
            return ""
        waiting = [peer for peer in self._others() if not peer.ended]
        for peer in waiting:
            if peer.died():
                return f"{peer} has died"
            if peer.silent() > self._silence:
                return f"{peer} has given no sign of life for {peer.silent():.0f} s"
        failed = [peer for peer in self._peers if peer.state.get("error")]
        if failed:
            return self._reason(failed, [peer for peer in waiting if peer not in failed])
        return self._hang()

    def _reason(self, failed: Sequence[_Peer], others: Sequence[_Peer]) -> str:
        """What stands behind errors: a process that has died closes its connections, and the others notice."""
        self._failed = self._failed or time.monotonic()
        for peer in others:
            if peer.silent() > max(_LEAST, 2 * self.beat):
                return f"{peer} has died"
        if time.monotonic() - self._failed < max(_GRACE, 3 * self.beat):
            return ""
        if behind := [peer for peer in others if peer.started < failed[0].started]:
            return f"{_names(behind)} did not start step {failed[0].state['step']}: {failed[0].state['error']}"
        return f"process {failed[0].index} failed: {failed[0].state['error']}"

    def _hang(self) -> str:
        """The line that names who holds up the job, if nothing moves in any process."""
        idle = min((peer.idle() for peer in self._peers), default=0.0)
        if not any(idle > self._patience(peer.phase) for peer in self._peers if peer.state and not peer.ended):
            return ""
        ahead = max(self._peers, key=lambda peer: peer.started)
        behind = [peer for peer in self._peers if peer.started < ahead.started]
        who = f"{_names(behind)} did not start step {ahead.state['step']}" if behind else ""
        if any(peer.phase in STEPPING for peer in behind or self._peers):
            return f"no step has ended for {idle:.0f} s: " + (who or f"all started step {ahead.state['step']}")
        return f"nothing has moved for {idle:.0f} s: {who or _names(self._peers)}"

    def _end(self, line: str) -> NoReturn:
        if not self._ending.acquire(blocking=False):
            time.sleep(3600)  # the other thread is ending the process
        sys.stdout.flush()
        if line.startswith(f"process {self._me} failed: "):  # of an error that another one caused, it says nothing
            print(self._trace, end="", file=sys.stderr)
        bar = "" if self._me or not sys.stderr.isatty() else "\n"  # of progress, which stands in the line
        print(f"{bar}error: {line}", file=sys.stderr, flush=True)
        if self._me == 0:
            self._verdict = line
            self._hurry.set()  # the other thread tells it: where jax is aborting, a request may never return
            # jax aborts the others as soon as process 0 is gone; they ask once a beat.
            end = time.monotonic() + 2 * self.beat + _LOOK
            while time.monotonic() < end and not all(peer.ended or peer.died() for peer in self._others()):
                time.sleep(_LOOK)
        os._exit(hosts.EXIT_CODE)


def _names(peers: Sequence[_Peer]) -> str:
    more = f" and {len(peers) - 3} more" if len(peers) > 3 else ""
    return (", ".join if more else " and ".join)([str(peer) for peer in peers[:3]]) + more


@functools.cache
def _place() -> str:
    """Equal for processes that see each other's numbers: of one machine, and of one container there."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{socket.gethostname()}:{os.getpid()}"  # of itself alone


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return False


def watch_job(timeout: float) -> contextlib.AbstractContextManager[Any]:
    """The watch of this process; none of a job of one, or where timeout is 0."""
    if not hosts.is_distributed() or timeout <= 0:
        return contextlib.nullcontext()
    return Watchdog(timeout, hosts.coordination_store(), jax.process_index(), jax.process_count())
