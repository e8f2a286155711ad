"""Hosts of one machine: shaped as they say, and gone whatever happens. Nothing outside own namespaces and loopback."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from benchmarks.cluster import Cluster, ClusterError, Network, bits_per_second
from benchmarks.cluster import network as network_module
from benchmarks.cluster.network import HOSTS_FOLDER, NAMESPACES, Namespaces

ROOT = pathlib.Path(__file__).parents[2]
PEER = [sys.executable, str(pathlib.Path(__file__).with_name("peer.py"))]
RATE = 40e6


def left() -> set[str]:
    folders = [folder for folder in (NAMESPACES, HOSTS_FOLDER) if folder.exists()]
    return {path.name for folder in folders for path in folder.iterdir() if path.name.startswith("bigmac-")}


def running(marker: str) -> bool:
    """Whether a process has `marker` among its arguments."""
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False


def until(holds: Callable[[], bool], limit: float = 10.0) -> bool:
    end = time.monotonic() + limit
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def shaping() -> None:
    """Skips where this machine cannot have such a network."""
    try:
        with Namespaces(Network(1, RATE)):
            pass
    except ClusterError as error:
        pytest.skip(f"no shaped network here: {error}")


def rate_of(tmp_path: pathlib.Path, network: Network, size: int, links: dict[str, list[tuple[int, int]]]) -> dict:
    """Bits a second on each link, given as the (sender, receiver) that share it; all pairs send at the same time."""
    with Cluster(network) as cluster:
        code = cluster.run([*PEER, "HOST", str(network.hosts), str(size), str(tmp_path)], join=False, limit=30)
    assert code == 0 and not left()
    found = [json.loads((tmp_path / f"{host}.json").read_text()) for host in range(network.hosts)]
    rates = {}
    for link, pairs in links.items():
        firsts, lasts = zip(*(found[host][str(source)] for source, host in pairs), strict=True)
        rates[link] = 8 * size * len(pairs) / (max(lasts) - min(firsts))
    return rates


def settled(measure: Callable[[], dict[str, float]]) -> float:
    """The best of some tries: a busy machine may make a link seem slower, nothing makes it faster."""
    rates: list[float] = []
    while len(rates) < 5 and max(rates, default=0) < 0.85 * RATE:
        rates.extend(measure().values())
    return max(rates)


def test_a_link_has_its_rate_in_both_directions(shaping: None, tmp_path: pathlib.Path) -> None:
    links = {"up": [(0, 1)], "down": [(1, 0)]}
    rate = settled(lambda: rate_of(tmp_path, Network(2, RATE), 3_000_000, links))
    assert rate == pytest.approx(RATE, rel=0.15)


def test_machines_share_a_slow_link(shaping: None, tmp_path: pathlib.Path) -> None:
    """Each host sends to three: one over a fast link, two over the link that it shares with its neighbour."""
    links = {"slow": [(0, 2), (0, 3), (1, 2), (1, 3)], "back": [(2, 0), (3, 0), (2, 1), (3, 1)]}
    inside = {"fast": [(0, 1)]}
    network = Network(4, RATE, machine=2, fast_rate=20 * RATE)

    def measure() -> dict[str, float]:
        rates = rate_of(tmp_path, network, 600_000, links | inside)
        assert rates.pop("fast") > 3 * RATE
        return rates

    assert settled(measure) == pytest.approx(RATE, rel=0.15)


def test_a_failure_ends_all(shaping: None, tmp_path: pathlib.Path) -> None:
    marker = f"marker{os.getpid()}"
    # Host 0 waits with a child of its own, and is deaf to SIGTERM.
    script = 'trap "" TERM; if [ HOST = 1 ]; then sleep 0.2; exit 7; fi; sleep 60; true'
    with Cluster(Network(2, RATE), grace=0.3) as cluster:
        start = time.monotonic()
        assert cluster.run(["sh", "-c", script, marker], join=False) == 7
        assert time.monotonic() - start < 5
        assert not running(marker)
    assert not left()


def start(marker: str, *, network: tuple[str, ...] = ("--rate=100mbit",), script: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "benchmarks.cluster", "--hosts=2", *network, "--no-join", "--"]
    process = subprocess.Popen([*command, "sh", "-c", script, marker], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert process.stdout and all(process.stdout.readline() for _ in range(2))  # both hosts have spoken
    assert until(lambda: running(marker))
    return process


def test_what_a_killed_owner_leaves_goes_with_the_next_start(shaping: None) -> None:
    marker = f"killed{os.getpid()}"
    # Beside the host's process, one that left its group and is not told when the owner dies.
    process = start(marker, script="setsid sh -c 'sleep 60; true' $0-stray & echo there; sleep 60; true")
    mine = {name for name in left() if name.startswith(f"bigmac-{process.pid}-")}
    assert len(mine) == 3  # two hosts and the switch
    process.kill()
    process.wait()
    assert until(lambda: not running(marker)) and running(f"{marker}-stray") and mine <= left()
    with Namespaces(Network(1, RATE)) as namespaces:
        assert not mine & left() and namespaces.name(0) in left()
        assert until(lambda: not running(f"{marker}-stray"))
    assert not left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_hosts_and_the_network(shaping: None, number: signal.Signals) -> None:
    marker = f"signal{os.getpid()}"
    process = start(marker, script='trap "echo saving; exit 0" TERM; echo there; sleep 60 & wait')
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 0 and output.count("saving") == 2
    assert not running(marker) and not left()


def test_unshaped_needs_neither_root_nor_tools(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(network_module.shutil, "which", lambda tool: None)
    with Cluster(Network(2)) as cluster:
        assert cluster.run(["sh", "-c", 'echo "$@"', "sh"]) == 0
    lines = sorted(capfd.readouterr().out.splitlines())
    coordinator = lines[0].split()[1]
    assert lines == [f"[{i}] {coordinator} --num_processes=2 --process_id={i}" for i in range(2)]
    assert coordinator.startswith("--coordinator=127.0.0.1:")


def test_what_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_module.os, "geteuid", lambda: 1000)
    with pytest.raises(ClusterError, match="need root; --unshaped runs over loopback"), Cluster(Network(2, RATE)):
        pass
    monkeypatch.setattr(network_module.os, "geteuid", lambda: 0)
    monkeypatch.setattr(network_module.shutil, "which", lambda tool: None)
    with pytest.raises(ClusterError, match=r"need ip, tc, unshare \(iproute2"), Cluster(Network(2, RATE)):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hosts": 0}, "--hosts=0 must be at least 1"),
        ({"hosts": 3, "rate": 1.0, "machine": 2, "fast_rate": 1.0}, "--hosts=3 must be a multiple of --machine=2"),
        ({"hosts": 4, "rate": 1.0, "machine": 2}, "--machine=2 needs the rate of the links inside"),
    ],
)
def test_networks_that_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        Network(**arguments)


def test_rates() -> None:
    assert [bits_per_second(text) for text in ("100mbit", "1.5gbit", "64kbit", "9bit")] == [1e8, 1.5e9, 64e3, 9]
    for text in ("", "100", "fast", "0mbit", "-1mbit", "100MB"):
        with pytest.raises(ClusterError, match="as in 100mbit"):
            bits_per_second(text)
