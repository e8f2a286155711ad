"""Checks, before jax connects the processes of a job, that all are there and agree on their number.

Process 0 listens at the coordinator's address until every process has said who it is, and then leaves the address to
jax's service, which would abort where the port is taken or there is a process too many.
"""

import contextlib
import json
import socket
import time
from typing import Any

from bigmac_jax.config import ConfigError

_GRACE = 5.0  # seconds for an earlier job at the same address to end
_HELLO = 2.0  # seconds for a process that connects to say who it is


class MissingError(RuntimeError):
    """A process did not come in time; the message says which."""


def meet(coordinator: str, num_processes: int, process_id: int, seconds: float) -> None:
    """Waits until all processes of the job are there.

    Args:
      coordinator: HOST:PORT of process 0.
      seconds: how long to wait.

    Raises:
      ConfigError: processes were given contradicting flags, or the port is taken.
      MissingError: one did not come in time.
    """
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + seconds
    if process_id:
        answer = _report(host.strip("[]"), int(port), num_processes, process_id, end)
    else:
        with _listen(int(port)) as server, contextlib.ExitStack() as stack:
            heard, answer = _gather(server, stack, num_processes, end)
            for connection in heard:
                with contextlib.suppress(OSError):
                    connection.settimeout(_HELLO)
                    connection.sendall(json.dumps(answer, allow_nan=False).encode() + b"\n")
                    connection.recv(1)  # it closes first, which leaves the port free
    if wrong := answer.get("wrong"):
        raise ConfigError(wrong)
    if missing := answer.get("missing"):
        raise MissingError(missing)


def _listen(port: int) -> socket.socket:
    end = time.monotonic() + _GRACE
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
            return socket.create_server(("", port), backlog=1024)
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"--coordinator: port {port} cannot be used here ({error.strerror or error}); end what uses it, "
                    f"or give another one to all processes"
                ) from None
            time.sleep(0.2)


def _gather(
    server: socket.socket, stack: contextlib.ExitStack, num_processes: int, end: float
) -> tuple[list[socket.socket], dict[str, str]]:
    """(the connections of the others, what to answer them)."""
    heard: list[socket.socket] = []
    there: dict[int, socket.socket] = {}  # by process
    answer: dict[str, str] = {}
    while True:
        if there.keys() >= set(range(1, num_processes)):
            there = {process: connection for process, connection in there.items() if _is_open(connection)}
        if there.keys() >= set(range(1, num_processes)):
            return heard, answer
        if (left := end - time.monotonic()) <= 0:
            absent = next(process for process in range(1, num_processes) if process not in there)
            return heard, answer or {"missing": f"process {absent} of {num_processes} was not there in time"}
        server.settimeout(left)
        try:
            connection = stack.enter_context(server.accept()[0])
            connection.settimeout(_HELLO)
            told = _read_line(connection)
            process, processes = int(told["process"]), int(told["processes"])
        except (OSError, ValueError, TypeError, KeyError):  # not a process of this job
            continue
        heard.append(connection)
        before, there[process] = there.get(process), connection
        if processes != num_processes:
            told_both = f"--num_processes={processes}, process 0 {num_processes}"
            answer = {"wrong": f"process {process} was told {told_both}; start all with the same"}
        elif before and _is_open(before):
            answer = {"wrong": f"two processes were told --process_id={process}; give each its own, from 0"}
        if answer:
            end = min(end, time.monotonic() + _GRACE)  # for the others to hear it


def _report(host: str, port: int, num_processes: int, process_id: int, end: float) -> dict[str, str]:
    """Tells process 0 who this is; returns its answer, which comes once it has heard all."""
    hello = json.dumps({"process": process_id, "processes": num_processes}, allow_nan=False).encode() + b"\n"
    strangers_until = None
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), min(left, _HELLO)) as connection:
                connection.sendall(hello)
                connection.settimeout(left + _GRACE)
                return dict(_read_line(connection))
        except OSError:  # it is not there yet
            time.sleep(0.1)
        except (ValueError, TypeError):
            strangers_until = strangers_until or time.monotonic() + _GRACE
            if time.monotonic() > strangers_until:
                return {"wrong": f"process {process_id} was told --num_processes={num_processes}, and the job at "
                                 f"{host}:{port} has begun without it; start all with the same, or give another "
                                 f"--coordinator"}  # fmt: skip
            time.sleep(0.2)
    return {"missing": f"process {process_id} did not reach process 0 at {host}:{port} in time"}


def _read_line(connection: socket.socket) -> Any:
    """Reads a line of JSON; ValueError where the other end is no process of ours, or hangs up."""
    with connection.makefile("rb") as file:
        return json.loads(file.readline(10_000).decode())


def _is_open(connection: socket.socket) -> bool:
    connection.settimeout(0)
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
