"""Watchdog of a job of several processes: names the dead, silent or hung process and stops the job.

Processes talk through the key-value store of jax's coordination service, which process 0 holds. Once a beat each writes
its state and reads process 0's verdict; process 0 reads all states. That is two small requests a beat for each process,
whatever their number, and no file. jax's own heartbeats are the second line: they come from a C++ thread that lives on
when the step hangs, and end in an abort.
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
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax

from bigmac_jax.config import ConfigError
from bigmac_jax.runtime import hosts, known_errors, signals
from bigmac_jax.runtime.clock import STEPPING, Clock, clock

_GRACE = 10.0  # seconds to find out which process an error comes from
_UNWINDING = 60.0  # seconds in which process 0, where it meets the same config error, comes to its own line
_LEAST = 5.0  # seconds for which a live process may be silent on an overloaded machine
_LOOK = 0.5  # seconds between looks at what is known
# A phase that is no step may make no progress for _SLOW timeouts and at least _LONG seconds; for _BUSY times that where
# the processor is busy, because a process that waits for another may spin.
_SLOW, _LONG, _BUSY = 10, 600.0, 6
_KEY = "bigmac/watch/"
_belongs_to: list[str] = []  # what this process is a part of, beside its host


def belong_to(parts: Sequence[str]) -> None:
    """Says what this process is a part of, such as a replica, for the lines that name it."""
    _belongs_to[:] = parts


class _Peer:
    """What this process knows of another one."""

    def __init__(self, index: int):
        self.index, self.text, self.heard_at = index, "", time.monotonic()
        self.state: dict[str, Any] = {}

    def hear(self, text: str) -> None:
        if text != self.text:
            self.text, self.state, self.heard_at = text, json.loads(text), time.monotonic()

    def silent(self) -> float:
        """Seconds since it was last heard."""
        return time.monotonic() - self.heard_at

    def idle(self) -> float:
        """Seconds without progress in it; inf if it has ended, since then it holds up no one."""
        return float("inf") if self.ended else self.state.get("idle", 0.0) + self.silent()

    def died(self) -> bool:
        """Whether it is known to have died, which shows only where it runs beside this one."""
        return bool(self.state) and self.state["place"] == _place() and not _is_alive(self.state["pid"])

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
        where = [f"{self.state['pid']} on {self.state['host']}", *self.state.get("of", ()), *(at or ["start"])]
        return f"process {self.index} ({', '.join(where)})"


class Watchdog:
    """A context in which this process ends with one line and exit code 3 once the job cannot go on.

    The line names the process that died, is silent (not heard for `timeout` seconds) or hangs (it started fewer steps
    than the others, and no step has ended for `timeout` seconds). Other phases of `clock` may last as long as any
    process makes progress: work that is counted, or a busy processor.

    Args:
      timeout: seconds.
      store: of `hosts.coordination_store`.
      me, count: this process' number, and how many there are.
      clock: tells which phase this process is in, and since when.
    """

    def __init__(self, timeout: float, store: Any, me: int, count: int, clock: Clock = clock) -> None:
        self._timeout, self._store, self._me, self._clock = timeout, store, me, clock
        # Seconds between two requests of each process; process 0 answers all, and must not be slowed down.
        self.beat = max(1.0, min(5.0, timeout / 20), count / 64)
        self._silence = max(timeout - self.beat - _LOOK, 2 * self.beat, _LEAST)
        self._peers = [_Peer(i) for i in range(count)]
        self._beats, self._error, self._trace, self._failed_at = 0, "", "", 0.0
        self._grace = _GRACE  # before process 0 names an error of this process
        self._verdict, self._lost, self._ended = "", 0, False
        self._closing, self._ending, self._hurry = threading.Event(), threading.Lock(), threading.Event()
        self._busy = self._busy_at = 0.0
        self._judged_at = time.monotonic()

    def __enter__(self) -> "Watchdog":
        hosts.on_abort(lambda: self.blame("aborted; its output says why"))
        work = self._talk, self._judge
        self._threads = [threading.Thread(target=run, name="watchdog", daemon=True) for run in work]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, SystemExit) and error.code:
            self.blame(f"it ended with exit code {error.code}; its line says why")
        if isinstance(error, KeyboardInterrupt):
            self.blame("it was interrupted")
        if isinstance(error, BrokenPipeError) and self._me == 0:
            signals.discard_output(sys.stdout)
            self._end("nobody reads what process 0 prints any more", signals.UNREAD)
        if isinstance(error, Exception) and not isinstance(error, (ConfigError, hosts.PeerError)):
            line = known_errors.explain(error)
            self._trace = "" if line else "".join(traceback.format_exception(error))
            self.blame(line or " ".join(f"{type(error).__name__}: {error}".split())[:500])
        if isinstance(error, ConfigError) and self._me:
            self._grace = _UNWINDING
            self._tell(str(error), lambda: self._peers[0].ended)  # it prints the line, if it has it, too
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
            while self._me == 0 and time.monotonic() < end and not self._alone():
                time.sleep(_LOOK / 5)
                self._exchange()

    def blame(self, error: str) -> NoReturn:
        """Ends the job because of an error here; the line names another process if one is dead, silent or behind."""
        self._tell(error)
        self._end(f"process {self._me} failed: {error}")

    def _tell(self, error: str, enough: Callable[[], bool] = bool) -> None:
        """Waits until process 0 has found out about an error here, and the other threads end this process; or until
        `enough`."""
        self._error = error
        self._hurry.set()
        end = time.monotonic() + self._grace + _GRACE + 3 * self.beat
        while time.monotonic() < end and not enough():
            time.sleep(_LOOK / 5)

    def _others(self) -> Sequence[_Peer]:
        return [peer for peer in self._peers if peer.index != self._me]

    def _alone(self) -> bool:
        return all(peer.ended or peer.died() for peer in self._others())

    def _talk(self) -> None:
        """Thread that exchanges states; it may wait for process 0, so another thread judges."""
        while not self._closing.is_set():
            try:
                self._exchange()
                self._lost = 0
            except Exception:
                self._lost += 1
            if self._hurry.wait(self.beat):
                self._closing.wait(_LOOK)

    def _exchange(self) -> None:
        """Tells all others this process' state, and hears process 0's verdict, or in process 0 all states."""
        self._beats += 1
        self._peers[self._me].hear(self._state())
        if self._me:
            self._store.key_value_set(f"{_KEY}of/{self._me}", self._peers[self._me].text, allow_overwrite=True)
            told = json.loads(self._store.key_value_try_get(f"{_KEY}verdict"))
            self._verdict = told["line"]
            self._peers[0].hear(told["state"])
        else:
            for key, text in self._store.key_value_dir_get(f"{_KEY}of/"):
                self._peers[int(key.rpartition("/")[2])].hear(text)
            told = {"line": self._verdict, "state": self._peers[0].text}
            self._store.key_value_set(f"{_KEY}verdict", json.dumps(told, allow_nan=False), allow_overwrite=True)

    def _state(self) -> str:
        clock = self._clock
        busy, now = time.process_time(), time.monotonic()
        if busy - self._busy > 0.2 * self.beat:
            self._busy_at = now
        self._busy = busy
        idle = now - clock.last_tick
        if clock.phase not in STEPPING and idle < _BUSY * self._patience(clock.phase):
            idle = min(idle, now - self._busy_at)
        state = {"host": socket.gethostname(), "pid": os.getpid(), "place": _place(), "of": _belongs_to,
                 "step": clock.step, "started": clock.started, "phase": clock.phase, "idle": round(idle, 1),
                 "beat": self._beats, "ended": self._ended, "error": self._error, "grace": self._grace}  # fmt: skip
        return json.dumps(state, allow_nan=False)

    def _patience(self, phase: str) -> float:
        """Seconds for which a phase may make no progress."""
        return self._timeout if phase in STEPPING else max(_SLOW * self._timeout, _LONG)

    def _judge(self) -> None:
        """Thread that ends this process once the job cannot go on."""
        while not self._closing.wait(_LOOK):
            # A thread of C: where another one keeps the interpreter's lock, neither this thread nor a handler runs.
            faulthandler.dump_traceback_later(2 * self._timeout + _GRACE, exit=True)
            late, self._judged_at = time.monotonic() - self._judged_at > self._silence / 2, time.monotonic()
            if late:  # this process stood still itself: what the others say comes now
                for peer in self._peers:
                    peer.heard_at = max(peer.heard_at, self._judged_at - self._silence / 2)
            elif line := self._find_reason():
                self._end(line)

    def _find_reason(self) -> str:
        """The line that says why the job cannot go on; "" if it can."""
        if self._verdict:
            return self._verdict
        if self._me:
            first = self._peers[0]
            errors = self._lost >= 2 or (self._error and first.silent() > max(_LEAST, 2 * self.beat))
            if first.ended:  # it waits for the others, and then says no more
                left = first.silent() > max(_GRACE, 3 * self.beat) and not self._error
                return "process 0 has ended; its line says why" if left else ""
            if first.state and (errors or first.died()):
                return f"{first} has died"
            return self._name_silent([first])
        waiting = [peer for peer in self._others() if not peer.ended]
        if lost := self._name_silent(waiting):
            return lost
        failed = [peer for peer in self._peers if peer.state.get("error")]
        if failed:
            return self._explain_errors(failed, [peer for peer in waiting if peer not in failed])
        return self._name_hung()

    def _name_silent(self, peers: Sequence[_Peer]) -> str:
        for peer in peers:
            if peer.died():
                return f"{peer} has died"
            if peer.silent() > self._silence:
                return f"{peer} has given no sign of life for {peer.silent():.0f} s"
        return ""

    def _explain_errors(self, failed: Sequence[_Peer], others: Sequence[_Peer]) -> str:
        """What is behind errors: a process that dies closes its connections, and then the others fail."""
        self._failed_at = self._failed_at or time.monotonic()
        for peer in others:
            if peer.silent() > max(_LEAST, 2 * self.beat):
                return f"{peer} has died"
        if time.monotonic() - self._failed_at < max(failed[0].state["grace"], 3 * self.beat):
            return ""
        if behind := [peer for peer in others if peer.started < failed[0].started]:
            return f"{_join(behind)} did not start step {failed[0].state['step']}: {failed[0].state['error']}"
        return f"process {failed[0].index} failed: {failed[0].state['error']}"

    def _name_hung(self) -> str:
        """The line that names who holds up the job, if no process makes progress."""
        idle = min((peer.idle() for peer in self._peers), default=0.0)
        if not any(idle > self._patience(peer.phase) for peer in self._peers if peer.state and not peer.ended):
            return ""
        ahead = max(self._peers, key=lambda peer: peer.started)
        behind = [peer for peer in self._peers if peer.started < ahead.started]
        who = f"{_join(behind)} did not start step {ahead.state['step']}" if behind else ""
        if any(peer.phase in STEPPING for peer in behind or self._peers):
            return f"no step has ended for {idle:.0f} s: " + (who or f"all started step {ahead.state['step']}")
        return f"nothing has moved for {idle:.0f} s: {who or _join(self._peers)}"

    def _end(self, line: str, code: int = hosts.EXIT_CODE) -> NoReturn:
        if not self._ending.acquire(blocking=False):
            time.sleep(3600)  # the other thread is ending the process
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(Exception):  # where nothing can be printed, it ends all the same
            if line.startswith(f"process {self._me} failed: "):  # no trace of an error that another process caused
                print(self._trace, end="", file=sys.stderr)
            bar = "" if self._me or not sys.stderr.isatty() else "\n"  # a progress bar stands in the line
            if code != signals.UNREAD:
                print(f"{bar}error: {line}", file=sys.stderr, flush=True)
        if self._me == 0:
            self._verdict = line
            self._hurry.set()  # the other thread tells it: where jax is aborting, a request may never return
            # jax aborts the others as soon as process 0 is gone; they ask once a beat.
            end = time.monotonic() + 2 * self.beat + _LOOK
            while time.monotonic() < end and not self._alone():
                time.sleep(_LOOK)
        os._exit(code)


def _join(peers: Sequence[_Peer]) -> str:
    more = f" and {len(peers) - 3} more" if len(peers) > 3 else ""
    return (", ".join if more else " and ".join)([str(peer) for peer in peers[:3]]) + more


@functools.cache
def _place() -> str:
    """Equal for processes that see each other's process ids: on one machine, in one container."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{socket.gethostname()}:{os.getpid()}"  # equal to no other


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return False


def watch_job(timeout: float) -> contextlib.AbstractContextManager[Any]:
    """The Watchdog of this process; a context that does nothing in a job of one process, or where timeout is 0."""
    if not hosts.is_distributed() or timeout <= 0:
        return contextlib.nullcontext()
    return Watchdog(timeout, hosts.coordination_store(), jax.process_index(), jax.process_count())
