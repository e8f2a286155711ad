"""The stores of one machine: they end when what has started them does."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from training.tools import ROOT

from benchmarks import stores

STARTER = (
    "import subprocess, sys; child = subprocess.Popen([sys.executable, '-m', 'benchmarks.stores', sys.argv[1]]); "
    "print(child.pid, flush=True); child.wait()"
)


def is_open(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def children(pid: int) -> list[int]:
    return list(map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux'")
@pytest.mark.parametrize(
    "killed", ["the starter", pytest.param("the program", marks=pytest.mark.full), "the program, by SIGTERM"]
)
def test_a_store_ends_with_what_started_it(killed: str, tmp_path: pathlib.Path) -> None:
    """Nothing listens any more, and no process is left; where it can still tidy up, no folder either."""
    env = os.environ | {"TMPDIR": str(tmp_path)}
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, "gs"], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout
    program = int(starter.stdout.readline())
    port = int(starter.stdout.readline().rpartition(":")[2])
    while not starter.stdout.readline().startswith("# gs://bucket is there"):
        pass
    (server,) = children(program)
    assert is_open(port) and list(tmp_path.iterdir())
    if killed == "the starter":
        starter.kill()
    else:
        os.kill(program, signal.SIGKILL if killed == "the program" else signal.SIGTERM)
    starter.wait()
    end = time.monotonic() + 20
    while is_open(port) or pathlib.Path(f"/proc/{server}").exists() or pathlib.Path(f"/proc/{program}").exists():
        assert time.monotonic() < end, f"{killed}: the store is still there"
        time.sleep(0.05)
    assert killed == "the program" or not list(tmp_path.iterdir())


def test_a_store_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind, said in (
        ("s3", "error: s3 needs the package moto; pip install -e '.[dev]'"),
        ("gcs", "must be one of gs, s3"),
    ):
        monkeypatch.setattr(sys, "argv", ["stores", kind])
        with pytest.raises(SystemExit, match=re.escape(said)):
            stores.main()
