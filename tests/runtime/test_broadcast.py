"""Values of process 0 reach all processes whole, however long they are."""

import contextlib
import hashlib
import json
import logging
import types

import jax
import numpy as np
import pytest

from bigmac_jax.config import ConfigError
from bigmac_jax.runtime import hosts


@pytest.mark.parametrize("length", [0, 1000, 1022, 1023, 5000, 100_000])
def test_broadcast_is_never_cut(monkeypatch, length):
    """Of two processes that are simulated here: what the other one sends is what process 0 would have got."""
    value = {"é": "x" * length}

    def gather(message):
        return [message.encode()[: hosts._MESSAGE].decode(errors="ignore"), "null"]

    def allgather(array):
        assert array.size.bit_count() == 1  # of few sizes
        return np.stack([array, array * 0])

    monkeypatch.setattr(hosts, "is_distributed", lambda: True)
    monkeypatch.setattr(hosts, "gather", gather)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", allgather)
    assert hosts.broadcast(value) == value
    assert hosts.broadcast(list(range(length // 5))) == list(range(length // 5))
    assert json.dumps(hosts.broadcast(float("nan"))) == "NaN"


@pytest.mark.parametrize(
    ("arguments", "asks"),
    [
        (("", 0, -1, False), False),
        (("", 0, -1, True), True),
        (("host:1", 2, 0, False), True),
        (("host:1", 2, 1, False), True),
        (("host:65535", 1, 0, False), True),
        (("[::1]:80", 1, 0, False), True),
        (("host:1", 2, 0, True), "drop it, or --coordinator"),
        (("host:1", 0, -1, False), "^--num_processes, --process_id missing"),
        (("", 1, 0, False), "^--coordinator missing"),
        (("host:1", 1, -1, False), "^--process_id missing"),
        (("host:1", 2, 2, False), "--process_id=2 must be below --num_processes=2"),
        (("host:0", 1, 0, False), "must be HOST:PORT with a port"),
        (("host:65536", 1, 0, False), "must be HOST:PORT with a port"),
        (("host", 1, 0, False), "must be HOST:PORT with a port"),
        ((":80", 1, 0, False), "must be HOST:PORT with a port"),
        (("host:x", 1, 0, False), "must be HOST:PORT with a port"),
        (("host:٣", 1, 0, False), "must be HOST:PORT with a port"),
    ],
)
def test_what_asks_for_several_processes(arguments, asks):
    if isinstance(asks, bool):
        assert hosts._asks_for_processes(*arguments) is asks
    else:
        with pytest.raises(ConfigError, match=asks):
            hosts._asks_for_processes(*arguments)


def three_processes(monkeypatch, change):
    """Process 0 of three, of which the others send what `change` makes of its own array."""
    monkeypatch.setattr(hosts, "is_distributed", lambda: True)
    allgather = lambda array: np.stack([array, *(change(number, array.copy()) for number in (1, 2))])  # noqa: E731
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", allgather)


def test_messages_are_gathered_and_cut(monkeypatch):
    three_processes(monkeypatch, lambda number, array: np.roll(array, 0) if number == 1 else array * 0)
    assert hosts.gather("hällo") == ["hällo", "hällo", ""]
    assert hosts.gather("é" * 1000) == ["é" * 512, "é" * 512, ""]
    assert hosts.gather("x" + "é" * 1000)[0] == "x" + "é" * 511  # no half of one
    monkeypatch.setattr(hosts, "is_distributed", lambda: False)
    assert hosts.gather("é" * 1000) == ["é" * 1000]


@pytest.mark.parametrize(
    ("place", "other", "said"),
    [
        (1, "a=7", "process 2 was started with a=7, process 0 with a=1; start all with the same"),
        (3, "c=7", "process 2 was started with c=7, process 0 with c=x; start all with the same"),
        (0, "", "process 2 was started with , process 0 with another version of the program"),
        (None, "", ""),
    ],
)
def test_fields_that_differ_are_named(monkeypatch, place, other, said):
    """Of three fields that all processes compare, the third process has one otherwise."""

    def change(number, array):
        if array.dtype == np.uint8:
            return np.frombuffer(other.encode().ljust(len(array), b"\0"), np.uint8)
        if number == 2 and place is not None:
            array[place] += 1
        return array

    three_processes(monkeypatch, change)
    with pytest.raises(ConfigError, match=said) if said else contextlib.nullcontext():
        hosts.check_same({"a": 1, "b": 2, "c": "x"})


def test_a_digest_stays_a_digest_of_the_value():
    assert hosts.digest(["a", 1]) == hashlib.sha256(b"['a', 1]").hexdigest()[:12]


class Connecting:
    """What `connect` asks of jax and others, in order, and whom it lets end this process."""

    def __init__(self, monkeypatch, initialize=None, process=0):
        self.asked, self.ends = [], []

        def note(name, fails=None):
            def ask(*arguments, **options):
                self.asked.append((name, *arguments, *([options] if options else [])))
                if fails and (error := fails()):
                    raise error

            return ask

        told = types.SimpleNamespace(
            config=types.SimpleNamespace(update=note("set")),
            distributed=types.SimpleNamespace(initialize=note("initialize", initialize)),
            process_index=lambda: process,
        )
        monkeypatch.setattr(hosts, "jax", told)
        monkeypatch.setattr(hosts, "atexit", types.SimpleNamespace(register=note("at exit")))
        monkeypatch.setattr(hosts, "on_abort", self.ends.append)
        monkeypatch.setattr(hosts, "_end", lambda line: line)
        monkeypatch.setattr(hosts, "_number", lambda: 7)
        monkeypatch.setattr(hosts.rendezvous, "meet", note("meet"))
        monkeypatch.setattr(hosts.stderr, "start_filter", note("filter"))


@pytest.mark.parametrize("process", [0, 2])
@pytest.mark.parametrize(
    ("timeout", "waits", "leaves"), [(0, 300, None), (10, 30, 60), (15, 30, 60), (16, 32, 60), (45, 90, 90)]
)
def test_how_long_jax_waits_for_processes(monkeypatch, timeout, waits, leaves, process):
    """Twice as long as the watchdog, at least half a minute; a minute at the end, in which process 0 reports."""
    times = {"initialization_timeout": waits, "heartbeat_timeout_seconds": waits, "shutdown_timeout_seconds": leaves}
    times = times if timeout else {}
    settings = [("set", "jax_enable_preemption_service", False), ("set", "jax_cpu_collectives_implementation", "gloo")]
    given = Connecting(monkeypatch, process=process)
    logging.getLogger("bigmac_jax").setLevel(logging.INFO)
    hosts.connect("host:1", 4, process, False, timeout)
    where = {"coordinator_address": "host:1", "num_processes": 4, "process_id": process}
    assert given.asked == [
        *settings, ("filter",), ("meet", "host:1", 4, process, waits),
        ("initialize", where | {"cluster_detection_method": "deactivate"} | times), ("at exit", hosts.on_abort, None),
    ]  # fmt: skip
    assert [end() for end in given.ends] == [
        f"process {process} did not reach all others within {waits} s; start all of them, or raise --peer_timeout",
        "process 7 aborted: another one is gone, or the lines above say why",
    ]
    assert logging.getLogger("bigmac_jax").level == (logging.WARNING if process else logging.INFO)
    given = Connecting(monkeypatch)
    hosts.connect("", 0, -1, True, timeout)
    initialize = ("initialize", times) if timeout else ("initialize",)
    assert given.asked == [*settings, ("filter",), initialize, ("at exit", hosts.on_abort, None)]
    assert given.ends[0]().startswith(f"this process of the cluster did not reach all others within {waits} s")
    given = Connecting(monkeypatch)
    hosts.connect("", 0, -1, False, timeout)
    assert not given.asked and not given.ends


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (RuntimeError("Failed to start RPC server: in use"), ConfigError, "the coordinator's port cannot be used on "),
        (RuntimeError("late\nmore"), hosts.PeerError, r"^process 1 did not .* within 40 s \(late\); start all of them"),
        (hosts.rendezvous.MissingError("2 was late"), hosts.PeerError, r"^2 was late, 40 s; start all of them, or"),
        (ValueError("of jax"), ValueError, "^of jax$"),
    ],
)
def test_why_processes_do_not_connect(monkeypatch, raised, kind, said):
    given = Connecting(monkeypatch, initialize=lambda: raised)
    with pytest.raises(kind, match=said):
        hosts.connect("host:1", 2, 1, False, 20)
    assert len(given.ends) == 1 and given.asked[-1][0] == "initialize"


def test_a_vote_counts_two_steps_later(monkeypatch):
    """Of one device's process or of all, and never before the step after the next; alone a process knows at once."""
    with jax.set_mesh(jax.make_mesh((4, 2), ("a", "b"))):
        wanted: list[int] = []
        vote = hosts.StopVote(wanted)
        wanted.append(15)
        vote.cast()
        assert vote.passed()
        wanted.clear()
        assert not vote.passed()
        monkeypatch.setattr(hosts, "is_distributed", lambda: True)
        found = []
        for step in range(4):
            wanted[:] = [15] if step == 1 else []
            vote.cast()
            found.append(vote.passed())
    assert found == [False, False, True, False]
