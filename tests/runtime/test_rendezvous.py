"""Processes that were told different things, do not come, or find the address taken: named before jax connects them."""

import contextlib
import pathlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from forks import ENVIRONMENT
from training.tools import ROOT, write_config

from benchmarks.ports import free_port
from bigmac_jax.config import ConfigError
from bigmac_jax.runtime import rendezvous


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_GRACE", 0.5)
    monkeypatch.setattr(rendezvous, "_HELLO", 0.5)


def met(processes: Sequence[tuple[int, int]], seconds: float = 10.0, apart: float = 0.0) -> list[str]:
    """What became of each (process_id, num_processes), started in this order."""
    coordinator, ends = f"127.0.0.1:{free_port()}", ["hangs"] * len(processes)

    def run(place: int, process: int, count: int) -> None:
        try:
            rendezvous.meet(coordinator, count, process, seconds)
            ends[place] = "met"
        except (ConfigError, rendezvous.MissingError) as error:
            ends[place] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=run, args=(i, *told), daemon=True) for i, told in enumerate(processes)]
    for thread in threads:
        thread.start()
        time.sleep(apart)
    for thread in threads:
        thread.join(20)
    return ends


def test_all_are_there() -> None:
    assert met([(i, 20) for i in reversed(range(20))]) == ["met"] * 20
    assert met([(0, 1)]) == ["met"]


@pytest.mark.parametrize("told", [(2, 3), (3, 2)])
def test_two_numbers_of_processes(told: tuple[int, int]) -> None:
    line = f"ConfigError: process 1 was told --num_processes={told[1]}, process 0 {told[0]}; start all with the same"
    assert met(list(enumerate(told))) == [line] * 2


def test_one_too_many() -> None:
    """It comes before the last, and all hear of it; or after that, and it alone does."""
    line = "ConfigError: process 2 was told --num_processes=3, process 0 2; start all with the same"
    assert met([(0, 2), (2, 3), (1, 2)], apart=0.1) == [line] * 3


def test_one_comes_too_late() -> None:
    """Another server has the port then: jax's."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak() -> None:
            while True:
                connection, _ = server.accept()
                connection.sendall(b"PRI * HTTP/2.0\r\n")
                connection.close()

        threading.Thread(target=speak, daemon=True).start()
        with pytest.raises(ConfigError, match=r"process 2 was told --num_processes=3, and the job at .* has begun"):
            rendezvous.meet("127.0.0.1:{1}".format(*server.getsockname()), 3, 2, 10)


def test_one_number_twice() -> None:
    ends = met([(0, 3), (1, 3), (1, 3)])
    assert all(end.startswith("ConfigError: two processes were told --process_id=1; give each its own") for end in ends)


def test_one_is_missing() -> None:
    line = "MissingError: process 1 of 3 was not there in time"
    assert met([(0, 3), (2, 3)], seconds=1) == [line] * 2
    assert met([(1, 3)], seconds=0.5)[0].startswith("MissingError: process 1 did not reach process 0 at 127.0.0.1:")


def test_nobody_is_waited_for_once_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a moment: the clock stands at the end, and there is nothing to listen at or to reach."""
    monkeypatch.setattr(rendezvous, "time", SimpleNamespace(monotonic=lambda: 5.0))
    absent: Any = None
    with contextlib.ExitStack() as stack:
        heard, answer = rendezvous._gather(absent, stack, 3, 5.0)
    assert (heard, answer) == ([], {"missing": "process 1 of 3 was not there in time"})
    assert rendezvous._report(absent, absent, 3, 2, 5.0)["missing"].startswith("process 2 did not reach process 0 at")


def test_strangers_and_those_who_left_do_not_count() -> None:
    port, ends = free_port(), []

    def first() -> None:
        rendezvous.meet(f"127.0.0.1:{port}", 2, 0, 10)
        ends.append("met")

    thread = threading.Thread(target=first, daemon=True)
    thread.start()
    time.sleep(0.2)
    for hello in (b"GET / HTTP/1.1\r\n\r\n", b"", b'{"process": 7}\n', b"[1]\n", b"\xff\n"):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(hello)
    assert not ends
    rendezvous.meet(f"127.0.0.1:{port}", 2, 1, 10)
    thread.join(5)
    assert ends == ["met"]


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--coordinator: port {port} cannot be used here .* give another one"):
            rendezvous.meet(f"127.0.0.1:{port}", 2, 0, 10)


@pytest.mark.full
def test_two_jobs_at_one_address(tmp_path: pathlib.Path) -> None:
    """Two services of jax would share the port, and their clients meet the wrong one; other servers end the process."""
    file, coordinator = write_config(tmp_path), f"127.0.0.1:{free_port()}"
    command = [sys.executable, "train.py", f"--config={file}", "--cpu_devices=1", f"--coordinator={coordinator}",
               "--num_processes=2", "--process_id=0"]  # fmt: skip
    first = subprocess.Popen([*command, f"--workdir={tmp_path}/1"], cwd=ROOT, env=ENVIRONMENT)
    try:
        time.sleep(8)
        second = subprocess.run(
            [*command, f"--workdir={tmp_path}/2"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
        )
        assert second.returncode == 2 and second.stderr.count("\n") == 1, second
        assert second.stderr.startswith(f"error: --coordinator: port {coordinator.rpartition(':')[2]} cannot be used")
    finally:
        first.kill()
        first.wait()
