"""Hosts as network namespaces, joined by bridges, each link shaped in both directions. Root and iproute2 are needed.

Bridges and the switches' ends of the links stand in a namespace of their own: the machine's network is never touched,
and what belongs to a cluster is gone with its namespaces. Their names hold the process that made them; what a dead one
has left is removed when the next cluster starts.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

HOSTS_FOLDER, NAMESPACES = pathlib.Path("/etc/netns"), pathlib.Path("/run/netns")
# A link's queue is never full: nothing is lost on it. It holds what the receivers' windows let on the way.
QUEUE = "64mb"


class ClusterError(RuntimeError):
    """What the machine lacks for a cluster, or what could not be set up; one line."""


@dataclass(frozen=True)
class Network:
    """Attributes:
    hosts: how many.
    rate: bits a second, in each direction, of a host's link; with several hosts a machine, of the machine's to the
      others. 0 = not shaped: loopback, no namespaces.
    machine: hosts a machine; they are numbered machine by machine.
    fast_rate: bits a second of a host's link inside its machine.
    delay: milliseconds that a link adds in each direction; needs the kernel's netem.
    """

    hosts: int
    rate: float = 0
    machine: int = 1
    fast_rate: float = 0
    delay: float = 0

    def __post_init__(self) -> None:
        hosts, machine = self.hosts, self.machine
        if hosts < 1:
            raise ClusterError(f"--hosts={hosts} must be at least 1")
        if machine < 1 or hosts % machine:
            raise ClusterError(f"--hosts={hosts} must be a multiple of --machine={machine}")
        if self.shaped and machine > 1 and not self.fast_rate:
            raise ClusterError(f"--machine={machine} needs the rate of the links inside one, as in --fast_rate=1gbit")

    @property
    def shaped(self) -> bool:
        return self.rate > 0

    @property
    def sysctls(self) -> dict[str, str]:
        """Of a host. Buffers hold 10 ms of the slow links, at least 64 KiB, so that a message of any size meets them in
        one way; gloo's all-to-all otherwise takes 1.3 times the bytes over the rate for small ones, 1.9 times for large
        ones, and so 1.7 times for all: a rank's leave to send to it waits behind the rows that it sends."""
        window = max(1 << 16, int(self.rate / 8 * 0.01))
        return {
            "tcp_congestion_control": "reno",  # nothing is ever lost: what is sent is bounded by the windows alone
            "tcp_slow_start_after_idle": "0",  # or every exchange would start slowly after the computation before it
            "tcp_rmem": f"4096 {window // 2} {window}",
            "tcp_wmem": f"4096 {window // 4} {window // 4}",
        }

    def address(self, host: int) -> str:
        return f"10.71.{host // 250}.{host % 250 + 1}" if self.shaped else "127.0.0.1"


def bits_per_second(text: str) -> float:
    """As tc spells rates: 100mbit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", text.lower())
    if not match or not float(match[1]):
        raise ClusterError(f"rate {text!r} must be a number of bit, kbit, mbit or gbit a second, as in 100mbit")
    return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]]


class Namespaces:
    """The namespaces of a shaped network, there inside a `with`."""

    def __init__(self, network: Network):
        self.network = network
        self._prefix = f"bigmac-{os.getpid()}-{_started(os.getpid())}-"

    def name(self, host: int) -> str:
        return f"{self._prefix}host{host}"

    def __enter__(self) -> "Namespaces":
        require_tools()
        remove_leftovers()
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in [name for name in _ours() if name.startswith(self._prefix)]:
            remove(name)

    def enter(self, host: int, command: Sequence[str]) -> list[str]:
        """The command inside a host: its network, and its own host name, by which gloo finds its address."""
        into = 'hostname "$0" && exec "$@"'
        return ["ip", "netns", "exec", self.name(host), "unshare", "--uts", "sh", "-c", into, f"host{host}", *command]

    def sent_bytes(self, host: int) -> int:
        """That left through the host's link, as the kernel counts them, headers included."""
        return _transmitted(self.name(host), "eth0")

    def sent_by_machine(self, machine: int) -> int:
        """As `sent_bytes`, of the link that joins a machine of several hosts with the others."""
        return _transmitted(f"{self._prefix}switch", f"up{machine}")

    def _build(self) -> None:
        network, switch = self.network, f"{self._prefix}switch"
        addresses = "".join(f"{network.address(host)} host{host}\n" for host in range(network.hosts))
        _ip("netns", "add", switch)
        machines = range(network.hosts // network.machine if network.machine > 1 else 0)
        for bridge in ("core", *(f"machine{m}" for m in machines)):
            _ip("-n", switch, "link", "add", bridge, "type", "bridge")
            _ip("-n", switch, "link", "set", bridge, "up")
        for m in machines:
            _ip("-n", switch, "link", "add", f"up{m}", "type", "veth", "peer", "name", f"down{m}")
            self._end_of_link(switch, f"up{m}", network.rate, f"machine{m}")
            self._end_of_link(switch, f"down{m}", network.rate, "core")
        for host in range(network.hosts):
            name, port = self.name(host), f"port{host}"
            folder = HOSTS_FOLDER / name
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{addresses}")
            _ip("netns", "add", name)
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            rate = network.fast_rate if machines else network.rate
            self._end_of_link(switch, port, rate, f"machine{host // network.machine}" if machines else "core")
            self._end_of_link(name, "eth0", rate)
            _ip("-n", name, "address", "add", f"{network.address(host)}/16", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            set_all = "; ".join(f"echo {value} > /proc/sys/net/ipv4/{key}" for key, value in network.sysctls.items())
            _ip("netns", "exec", name, "sh", "-ec", set_all)

    def _end_of_link(self, namespace: str, device: str, rate: float, bridge: str = "") -> None:
        """Takes an end of a link up, shaped for what leaves through it."""
        # What an idle link takes at once: two milliseconds, at least 16 kB, which make up for a timer that comes late.
        # Not much more than a few packets: small messages would gain by it.
        burst = max(16_000, rate / 8 * 2e-3)
        _ip("-n", namespace, "link", "set", device, *(["master", bridge] if bridge else []), "up")
        shape = ["tc", "-n", namespace, "qdisc", "add", "dev", device]
        _run([*shape, "root", "handle", "1:", "tbf", "rate", f"{rate:.0f}bit", "burst", f"{burst:.0f}", "limit", QUEUE])
        if self.network.delay:
            try:
                _run([*shape, "parent", "1:1", "netem", "delay", f"{self.network.delay}ms", "limit", "100000"])
            except ClusterError as error:
                raise ClusterError(f"a delay needs the kernel's netem ({error}); leave --delay out") from None


def require_tools() -> None:
    """Raises ClusterError where this process cannot make namespaces."""
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if os.geteuid() or missing:
        what = f"{', '.join(missing)} (iproute2, util-linux)" if missing else "root"
        raise ClusterError(f"shaped links between hosts need {what}; --unshaped runs over loopback")


def remove_leftovers() -> None:
    """Removes the namespaces of owners that are dead, and ends what still runs in them."""
    for name in _ours():
        _, owner, started, _ = name.split("-")
        if _started(int(owner)) != started:
            remove(name)


def remove(name: str) -> None:
    for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, start_new_session=True)
    shutil.rmtree(HOSTS_FOLDER / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        HOSTS_FOLDER.rmdir()  # if it is empty


def _ours() -> Iterator[str]:
    """Names of clusters' namespaces, of any owner."""
    names = {path.name for folder in (NAMESPACES, HOSTS_FOLDER) if folder.exists() for path in folder.iterdir()}
    yield from sorted(name for name in names if re.fullmatch(r"bigmac-\d+-\d+-\w+", name))


def _started(pid: int) -> str:
    """When a process started, in ticks, "" if there is none: a number may be given again, both together are not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _transmitted(namespace: str, device: str) -> int:
    command = ["ip", "-n", namespace, "-json", "-statistics", "link", "show", device]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, start_new_session=True).stdout
    return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(command: Sequence[str]) -> None:
    # In a session of its own: ctrl-C is for this program, which then takes the network down.
    run = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    if run.returncode:
        raise ClusterError(f"{' '.join(command)}: {' '.join(run.stderr.split())}")
