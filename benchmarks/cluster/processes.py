"""One process of a command in each host: started, watched, ended."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from benchmarks.cluster.network import Namespaces, Network
from benchmarks.ports import free_port

HOST = str(pathlib.Path(__file__).with_name("host.py"))


class Cluster:
    """A network and the processes in it; inside a `with` that leaves neither behind."""

    def __init__(self, network: Network, pin: bool = True, grace: float = 20.0):
        """Args:
        pin: every host has its share of the cores; where there are too few, hosts share one.
        grace: seconds in which the others end after a process failed; five times as many after SIGTERM, to save.
        """
        self.network, self._pin, self._grace = network, pin, grace
        self._stack = contextlib.ExitStack()
        self._namespaces: Namespaces | None = None
        self.interrupted = False  # by a signal to this process, in `run`

    def __enter__(self) -> "Cluster":
        if self.network.shaped:
            self._namespaces = self._stack.enter_context(Namespaces(self.network))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def sent_bytes(self, host: int) -> int | None:
        """That left through the host's link so far; None over loopback."""
        return self._namespaces.sent_bytes(host) if self._namespaces else None

    def sent_by_machine(self, machine: int) -> int | None:
        """That left through a machine's link to the others so far; None over loopback, or where each host is one."""
        several = self.network.machine > 1
        return self._namespaces.sent_by_machine(machine) if self._namespaces and several else None

    def run(
        self,
        command: Sequence[str],
        logs: pathlib.Path | None = None,
        environment: dict[str, str] | None = None,
        stop: Callable[[], bool] = lambda: False,
        limit: float = float("inf"),
        join: bool = True,
    ) -> int:
        """Runs a command in every host, as one job, until all have ended.

        The first SIGINT, SIGTERM or SIGHUP to this process ends all with SIGTERM (train.py saves), a second one kills.

        Args:
          command: gets --coordinator, --num_processes and --process_id, if `join`; HOST in an argument stands for the
            host's number.
          logs: folder of hostN.log; without it lines are printed, with the host's number before each.
          stop: asked now and then; all get SIGTERM once it holds.
          limit: seconds; then, too.

        Returns:
          The exit code of the first process that failed (negative: the signal that killed it), or 0.
        """
        coordinator = f"{self.network.address(0)}:{1234 if self.network.shaped else free_port()}"
        job = [f"--coordinator={coordinator}", f"--num_processes={self.network.hosts}"] if join else []
        processes: list[subprocess.Popen[str]] = []
        printers: list[threading.Thread] = []
        deadline, kill_at, code = time.monotonic() + limit, float("inf"), 0
        with contextlib.ExitStack() as stack:
            signals = stack.enter_context(_signals())
            stack.callback(_reap, processes)
            for host in range(self.network.hosts):
                output = stack.enter_context((logs / f"host{host}.log").open("w")) if logs else subprocess.PIPE
                whole = [argument.replace("HOST", str(host)) for argument in command]
                whole += [*job, f"--process_id={host}"] if join else []
                processes.append(self._start(host, whole, output, environment))
                if not logs:
                    printers.append(threading.Thread(target=_print, args=(host, processes[-1].stdout), daemon=True))
                    printers[-1].start()
            codes: list[int | None] = [None]
            told = False
            while None in codes:
                time.sleep(0.05)
                codes = [_exit_code(process) for process in processes]
                failed = next((failed for failed in codes if failed), 0)
                if failed and not code:
                    code, kill_at = failed, time.monotonic() + self._grace  # the others find out themselves, and say so
                if not told and not code and (signals or stop() or time.monotonic() > deadline):
                    told, kill_at = True, time.monotonic() + 5 * self._grace
                    for process in processes:
                        os.kill(process.pid, signal.SIGTERM)
                if len(signals) > 1 or (code and signals) or time.monotonic() > kill_at:
                    _kill(processes)
            _kill(processes)  # what they left behind
            self.interrupted = bool(signals)
            for printer in printers:
                printer.join(1.0)
        return code or next((failed for failed in codes if failed), 0)

    def _start(
        self, host: int, command: list[str], output: int | IO[str], environment: dict[str, str] | None
    ) -> "subprocess.Popen[str]":
        cores = ",".join(str(core) for core in self._cores(host))
        command = [sys.executable, "-S", "-E", HOST, str(os.getpid()), cores, *command]
        return subprocess.Popen(
            self._namespaces.enter(host, command) if self._namespaces else command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | (environment or {}),
            start_new_session=True,  # a group of its own, which can be ended with all that it started
        )

    def _cores(self, host: int) -> list[int]:
        """Of a host, in equal shares; all if they are not pinned."""
        if not self._pin:
            return []
        cores, hosts = sorted(os.sched_getaffinity(0)), self.network.hosts
        if len(cores) < hosts:
            return [cores[host % len(cores)]]
        share = len(cores) // hosts
        return cores[host * share : (host + 1) * share]


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Fills the list with what arrives; nothing outside the main thread, where Python allows no handlers."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, lambda got, _: received.append(got)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# A process that has ended stays a zombie, and keeps its number and its group's, until all are over: no signal can reach
# another one by mistake.
def _exit_code(process: "subprocess.Popen[str]") -> int | None:
    """None while it runs; negative: the signal that killed it."""
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _kill(processes: "Sequence[subprocess.Popen[str]]") -> None:
    """With all that they started, which is their process group."""
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)


def _reap(processes: "Sequence[subprocess.Popen[str]]") -> None:
    _kill(processes)
    for process in processes:
        process.wait()


def _print(host: int, lines: IO[str]) -> None:
    for line in lines:
        sys.stdout.write(f"[{host}] {line}")
        sys.stdout.flush()
