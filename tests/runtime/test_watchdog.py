"""What the watch concludes from what processes tell: a store in memory, and clocks that are set."""

import errno
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from typing import Any
from unittest import mock

import jax
import pytest

from bigmac_jax.config import ConfigError
from bigmac_jax.runtime import leases, watchdog
from bigmac_jax.runtime.clock import Clock, process_start
from bigmac_jax.runtime.watchdog import Watchdog, _is_alive, _join, _Peer

TIMEOUT = 100.0


class Store:
    """jax's, for as many processes as there are."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.requests = 0

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        self.requests += 1
        assert allow_overwrite
        self.values[key] = value

    def key_value_try_get(self, key: str) -> str:
        self.requests += 1
        return self.values[key]

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        self.requests += 1
        return [(name, value) for name, value in self.values.items() if name.startswith(key)]


class Job:
    """Processes of which each steps."""

    def __init__(self, count: int = 3) -> None:
        self.store = Store()
        self.clocks = [Clock() for _ in range(count)]
        self.watches = [Watchdog(TIMEOUT, self.store, me, count, clock) for me, clock in enumerate(self.clocks)]
        for clock in self.clocks:
            clock.begin("steps")
            clock.start_step(7)

    def tell(self, *silent: int) -> None:
        """Beats of all but the silent ones, until process 0 has heard them and they have heard it."""
        for watch in (self.watches[0], *self.watches[1:], self.watches[0], *self.watches[1:]):
            if watch._me not in silent:
                watch._exchange()

    def idle(self, seconds: float, *processes: int) -> None:
        for process in processes or range(len(self.clocks)):
            self.clocks[process].last_tick -= seconds

    def line(self, me: int = 0) -> str:
        return self.watches[me]._find_reason()


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(time, "process_time", lambda: 0.0)  # none of them computes
    made = Job()
    made.tell()
    return made


def test_two_requests_a_beat(job: Job) -> None:
    before = job.store.requests
    for watch in job.watches:
        watch._exchange()
    assert job.store.requests - before == 2 * len(job.watches)


def test_all_is_well(job: Job) -> None:
    assert [job.line(me) for me in range(3)] == ["", "", ""]


def test_a_silent_process_is_named(job: Job) -> None:
    job.tell(2)
    job.watches[0]._peers[2].heard_at -= TIMEOUT
    assert "process 2 (" in job.line() and "step 7) has given no sign of life for 100 s" in job.line()


def test_process_0_is_missed_by_the_others(job: Job) -> None:
    job.watches[1]._peers[0].heard_at -= TIMEOUT
    assert "process 0 (" in job.line(1) and "no sign of life for 100 s" in job.line(1)


def test_a_lost_store_is_the_death_of_process_0(job: Job) -> None:
    job.watches[1]._lost = 2
    assert "process 0 (" in job.line(1) and job.line(1).endswith("has died")


def test_process_0_is_seen_to_have_died_beside_this_one_or_behind_an_error(job: Job) -> None:
    first = job.watches[1]._peers[0]
    first.state = first.state | {"pid": 1 << 22 | 1}  # above pid_max
    assert "process 0 (" in job.line(1) and job.line(1).endswith("has died")
    job.watches[2]._error = "JaxRuntimeError: connection closed"
    assert job.line(2) == ""
    job.watches[2]._peers[0].heard_at -= 20
    assert "process 0 (" in job.line(2) and job.line(2).endswith("has died")


def test_a_process_beside_this_one_is_seen_to_have_died(job: Job) -> None:
    state = json.loads(job.store.values["bigmac/watch/of/2"]) | {"pid": 1 << 22 | 1, "beat": 99}  # above pid_max
    job.store.values["bigmac/watch/of/2"] = json.dumps(state)
    job.tell(2)
    assert job.line().startswith("process 2 (") and job.line().endswith("step 7) has died")


def test_who_did_not_start_the_step_holds_it_up(job: Job) -> None:
    for process in (0, 2):
        job.clocks[process].start_step(8)
    job.tell()
    assert job.line() == ""
    job.idle(TIMEOUT + 1)
    job.tell()
    assert job.line().startswith("no step has ended for 101 s: process 1 (")
    assert job.line().endswith("step 7) did not start step 8")


def test_one_that_still_moves_is_waited_for(job: Job) -> None:
    """Where it computes alone for the others, too."""
    job.idle(TIMEOUT + 1, 0, 1)
    job.tell()
    assert job.line() == ""


@pytest.mark.parametrize(
    ("phase", "patience"), [("steps", 100), ("data wait", 100), ("save", 1000), ("tokenise", 1000)]
)
def test_what_is_no_step_may_take_longer(job: Job, phase: str, patience: float) -> None:
    for clock in job.clocks:
        clock.switch(phase)
    job.idle(patience - 1)
    job.tell()
    assert job.line() == ""
    job.idle(2)
    job.tell()
    told = "no step has ended for" if patience == TIMEOUT else "nothing has moved for 1001 s: process 0 ("
    assert job.line().startswith(told) and (patience == TIMEOUT or f", {phase})" in job.line()), job.line()


def test_a_busy_processor_is_movement_but_not_for_ever(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for clock in job.clocks:
        clock.switch("compile")
    job.idle(5000)
    job.tell()
    assert job.line() != ""
    busy = iter(range(0, 10**6, 10**3))
    monkeypatch.setattr(time, "process_time", lambda: float(next(busy)))
    job.tell()
    assert job.line() == ""
    job.idle(2000)  # six times the patience of a thousand seconds
    job.tell()
    assert "nothing has moved for 7000 s" in job.line()


def test_behind_an_error_stands_the_process_that_is_silent(job: Job) -> None:
    job.watches[1]._error = "JaxRuntimeError: connection closed"
    job.tell(2)
    job.watches[0]._peers[2].heard_at -= 20
    assert job.line().startswith("process 2 (") and job.line().endswith("has died")


def test_an_error_of_its_own_is_told_after_a_while(job: Job) -> None:
    job.watches[1]._error = "ValueError: no"
    job.tell()
    assert job.line() == ""
    job.watches[0]._failed_at -= 60
    assert job.line() == "process 1 failed: ValueError: no"


def test_an_error_while_another_is_behind_is_that_ones(job: Job) -> None:
    for process in (0, 1):
        job.clocks[process].start_step(8)
    job.watches[1]._error = "timeout"
    job.tell()
    assert job.line() == ""
    job.watches[0]._failed_at -= 60
    assert "process 2 (" in job.line() and "did not start step 8: timeout" in job.line()


def test_the_verdict_reaches_all(job: Job) -> None:
    job.watches[0]._verdict = "process 2 has died"
    job.tell()
    assert [job.line(me) for me in range(3)] == ["process 2 has died"] * 3


def test_who_has_ended_is_not_missed(job: Job) -> None:
    job.watches[2]._ended = True
    job.tell()
    job.watches[0]._peers[2].heard_at -= 10 * TIMEOUT
    assert job.line() == ""


def test_who_goes_on_long_after_process_0_ends(job: Job) -> None:
    """As where that has met an error alone: it tells its end, waits for the others, and says no more."""
    job.watches[0]._ended = True
    job.tell()
    first = job.watches[1]._peers[0]
    first.heard_at -= 14
    assert job.line(1) == ""
    first.heard_at -= 2
    assert job.line(1) == "process 0 has ended; its line says why"
    job.watches[1]._error = "OSError: its own"
    assert job.line(1) == ""


def test_a_large_job_beats_slowly() -> None:
    jobs = ((2, 2), (120, 2), (20, 256), (600, 8))
    assert [Watchdog(timeout, Store(), 0, count).beat for timeout, count in jobs] == [1.0, 5.0, 4.0, 5.0]


def test_how_long_silence_is_borne() -> None:
    """A beat and a look less than the timeout; two beats at least, and five seconds."""
    jobs = ((100, 2), (20, 2), (6, 2), (5, 2), (600, 2), (10, 640))
    assert [Watchdog(timeout, Store(), 0, count)._silence for timeout, count in jobs] == [94.5, 18.5, 5, 5, 594.5, 20]


def test_how_long_a_phase_is_borne() -> None:
    for timeout, long in ((100, 1000), (60, 600), (20, 600)):
        watch = Watchdog(timeout, Store(), 0, 2)
        assert [watch._patience(phase) for phase in ("steps", "data wait", "save", "")] == [
            timeout,
            timeout,
            long,
            long,
        ]


def test_the_processor_is_busy_from_a_fifth_of_a_beat_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a phase that is no step; of a beat of five seconds more than one."""
    used, now = [0.0], [1000.0]
    monkeypatch.setattr(time, "process_time", lambda: used[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock()
    clock.begin("save")
    watch = Watchdog(TIMEOUT, Store(), 0, 2, clock)
    assert watch.beat == 5
    idle = []
    for busy in (1.0, 1.01, 0.5):
        used[0], now[0] = used[0] + busy, now[0] + 20
        idle.append(json.loads(watch._state())["idle"])
    assert idle == [20, 0, 20]
    clock.phase, clock.last_tick, now[0] = "steps", 1000.0, 1100.04
    used[0] += 50
    state = json.loads(watch._state())
    assert state["idle"] == 100 and (state["step"], state["started"], state["ended"], state["error"]) == (
        0,
        0,
        False,
        "",
    )
    assert state["pid"] == os.getpid() and state["beat"] == 0


def test_at_most_three_processes_are_named() -> None:
    peers = [_Peer(i) for i in range(5)]
    assert [_join(peers[:n]) for n in (1, 2, 3, 4, 5)] == [
        "process 0", "process 0 and process 1", "process 0 and process 1 and process 2",
        "process 0, process 1, process 2 and 1 more",
        "process 0, process 1, process 2 and 2 more",
    ]  # fmt: skip


def test_where_a_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step, its phase unless that is of a step, and what it is a part of."""
    peer = _Peer(3)
    told = {"pid": 7, "host": "here", "step": 0, "phase": "", "of": ["replica 1"]}
    wheres = []
    for change in ({}, {"phase": "compile"}, {"step": 4, "phase": "steps"}, {"step": 4, "phase": "save", "of": []}):
        peer.state = told | change
        wheres.append(str(peer))
    assert wheres == [
        "process 3 (7 on here, replica 1, start)", "process 3 (7 on here, replica 1, compile)",
        "process 3 (7 on here, replica 1, step 4)", "process 3 (7 on here, step 4, save)",
    ]  # fmt: skip
    peer.state = {}
    assert (str(peer), peer.started, peer.phase, peer.ended, peer.died()) == ("process 3", 0, "", False, False)
    monkeypatch.setattr(time, "monotonic", lambda: peer.heard_at + 4)
    peer.state = {"idle": 3.0}
    assert peer.idle() == 7 and peer.silent() == 4
    peer.state = {"idle": 3.0, "ended": True}
    assert peer.idle() == float("inf")
    before = peer.heard_at
    peer.hear('{"step": 1}')
    assert peer.heard_at == before + 4 and peer.state == {"step": 1}
    peer.hear('{"step": 1}')  # the same again is no sign of life
    assert peer.heard_at == before + 4


class Time:
    """Which passes where one sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.slept = 1000.0, list[float]()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> Time:
    """Time that stands still, from before the job on."""
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    return Time(monkeypatch)


def test_silence_at_its_limits(still: Time) -> None:
    """Process 0 is missed after 94.5 s, after 10 where there is an error, and where two requests were lost."""
    job = Job()
    job.tell()
    still.now += 94.5
    assert job.line(1) == job.line(0) == ""
    still.now += 0.1
    assert "no sign of life for 95 s" in job.line(1) and "process 1 (" in job.line(0)
    job.tell()
    job.watches[1]._error, job.watches[2]._lost = "broken", 1
    still.now += 10
    assert job.line(1) == job.line(2) == ""
    still.now += 0.1
    assert job.line(1).endswith("has died") and job.line(2) == ""
    job.watches[2]._lost = 2
    assert job.line(2).endswith("has died")


def test_what_is_behind_an_error_at_its_limits(still: Time) -> None:
    """The error itself after 15 s, or who was silent for more than 10."""
    for silent in (2, None):
        job = Job()
        job.tell()
        job.watches[1]._error = "broken"
        job.tell()
        assert job.line() == ""
        still.now += 10
        assert job.line() == ""
        for process in (1, 2):
            if process != silent:
                job.watches[0]._peers[process].heard_at = still.now
        still.now += 4.9
        assert job.line().endswith("has died") if silent else job.line() == ""
        still.now += 0.1
        assert silent or job.line() == "process 1 failed: broken"


def test_no_progress_at_its_limit(still: Time) -> None:
    job = Job()
    still.now += TIMEOUT
    job.tell()
    assert job.line() == ""
    still.now += 0.1
    job.tell()
    assert job.line().startswith("no step has ended for 100 s: all started step 7")


def test_process_0_waits_for_the_others_when_it_ends(still: Time) -> None:
    """Until they have ended or died, ten seconds at most, and tells and hears every tenth of a second."""
    for ended, slept in (((1, 2), 0), ((1,), 100), ((), 100)):
        job = Job()
        job.tell()
        for process in ended:
            job.watches[process]._ended = True
        job.tell()
        job.watches[0]._threads, still.slept[:] = [], []
        before = job.store.requests
        job.watches[0].__exit__(None, None, None)
        assert len(still.slept) == pytest.approx(slept, abs=1) and set(still.slept) <= {0.1}
        assert job.store.requests - before == 2 * (1 + len(still.slept)) and job.watches[0]._closing.is_set()
        job.watches[1]._threads, still.slept[:] = [], []
        job.watches[1].__exit__(None, None, None)
        assert not still.slept  # which others need not


def test_process_0_stays_until_its_verdict_was_heard(still: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two beats and a look; less where all others have ended, and no time in them."""
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    for me, ended, seconds in ((0, (), 10.5), (0, (1, 2), 0), (0, (1,), 10.5), (1, (), 0)):
        job = Job()
        for process in ended:
            job.watches[process]._ended = True
        job.tell()
        still.slept[:] = []
        job.watches[me]._end("a line")
        assert sum(still.slept) == seconds and (job.watches[me]._verdict == "a line") == (me == 0)
    assert codes == [3] * 4


def test_it_ends_where_nothing_can_be_printed(still: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk, or where the terminal has gone: or who has lost a lease would train on beside another job."""
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    job = Job()
    job.tell()
    with open("/dev/full", "w") as out, open("/dev/full", "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        print("before", end="")
        job.watches[1]._end("process 1 failed: a line")
        leases._end("a line")
        monkeypatch.undo()
        for stream in (out, err):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for what it still holds
    assert codes == [3, 3]


def test_requests_that_are_lost_are_counted_until_one_is_not(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, lost = job.watches[1], []
    answers = iter([OSError, OSError, None, OSError])

    def exchange() -> None:
        if error := next(answers):
            raise error

    def wait(seconds: float) -> bool:
        lost.append(watch._lost)
        if len(lost) == 4:
            watch._closing.set()
        assert seconds == watch.beat
        return False

    monkeypatch.setattr(watch, "_exchange", exchange)
    monkeypatch.setattr(watch._hurry, "wait", wait)
    watch._talk()
    assert lost == [1, 2, 0, 1]


def test_who_stood_still_hears_the_others_first(still: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than half of the silence that is borne: then they were heard as long ago as that."""
    job = Job()
    job.tell()
    watch, dumped, steps = job.watches[0], list[Any](), iter([0.5, 47.25, 47.5, None])

    def wait(_: float) -> bool:
        step = next(steps)
        still.now += step or 0
        return step is None

    monkeypatch.setattr(
        watchdog.faulthandler, "dump_traceback_later", lambda *given, exit: dumped.append((*given, exit))
    )
    monkeypatch.setattr(watch, "_end", lambda line: pytest.fail(line))
    monkeypatch.setattr(watch._closing, "wait", wait)
    watch._judge()
    assert dumped == [(210, True)] * 3
    assert [peer.heard_at for peer in watch._peers] == [1048.0] * 3


def test_a_job_of_several_processes_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog.hosts, "coordination_store", Store)
    monkeypatch.setattr(watchdog.jax, "process_index", lambda: 1)
    monkeypatch.setattr(watchdog.jax, "process_count", lambda: 3)
    for several, timeout, watched in ((True, 7, True), (True, 0, False), (False, 7, False)):
        monkeypatch.setattr(watchdog.hosts, "is_distributed", lambda several=several: several)
        watch = watchdog.watch_job(timeout)
        assert isinstance(watch, Watchdog) == watched
    monkeypatch.setattr(watchdog.hosts, "is_distributed", lambda: True)
    assert {name: getattr(watchdog.watch_job(9), name) for name in ("_timeout", "_me")} == {"_timeout": 9, "_me": 1}
    assert len(watchdog.watch_job(9)._peers) == 3  # type: ignore[attr-defined]


def test_seconds_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock()

    def passes(seconds: float) -> None:
        now[0] += seconds

    passes(5)
    clock.begin("start", since=2)
    passes(1)
    with clock.timed("data"):
        passes(10)
        with clock.timed("tokenise"):
            passes(100)
        passes(20)
    clock.begin("again")
    clock.switch("steps")
    passes(1000)
    assert clock.seconds() == {"tokenise": 100, "data": 30, "start": 4, "steps": 1000}
    assert clock.seconds() == clock.seconds() and sum(clock.seconds().values()) == now[0] - 2
    clock.reset()
    assert clock.seconds() == {} and clock.phase == ""


def test_waiting_lasts_while_something_changes() -> None:
    """A look that fails is no progress, and does not end the looking."""
    ticks, own, last = list[int](), Clock(), threading.Event()
    own.tick = lambda: ticks.append(looks)  # type: ignore[method-assign]
    looks, seen = 0, [3, 3, OSError("away"), 3, 4, 4]

    def look() -> int:
        nonlocal looks
        looks += 1
        if looks > len(seen):
            last.set()
        found = seen[min(looks, len(seen)) - 1]
        if isinstance(found, OSError):
            raise found
        return found

    with own.watching(look, every=0.001):
        assert last.wait(5)
    assert ticks == [5]


def test_the_process_started_before_its_modules() -> None:
    assert 0 < time.monotonic() - process_start() < 24 * 3600


def test_when_the_process_started_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 s after the machine did, which is up for 80.5; now, where the system tells nothing of it."""
    ticks = 50 * os.sysconf("SC_CLK_TCK")
    files = {"/proc/self/stat": f"7 (a) b) S {' '.join(['3'] * 18)} {ticks} 9 9", "/proc/uptime": "80.5 700\n"}
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path: files[str(path)])
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    assert process_start() == 1000 - 30.5
    files["/proc/uptime"] = "20.5 700\n"  # of a container that began later than this process' machine
    assert process_start() == 1000
    for text in ("7 (a) S 3", f"7 (a) S {' '.join(['x'] * 30)}"):
        files["/proc/self/stat"] = text
        assert process_start() == 1000


def test_where_an_error_was_raised_is_told_only_by_whose_it_is(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A collective that breaks because another process has died is one line."""
    monkeypatch.setattr("os._exit", lambda _: None)
    for line in ("process 0 (4711 on here, step 7) has died", "process 1 failed: ValueError: Gloo AllGather failed"):
        watch = Watchdog(TIMEOUT, job.store, 1, 2, job.clocks[1])
        monkeypatch.setattr(watch, "blame", sys.exit)
        with pytest.raises(SystemExit, match="ValueError: Gloo AllGather failed"):
            watch.__exit__(ValueError, ValueError("Gloo AllGather failed"), None)
        assert capsys.readouterr().err == ""
        watch._end(line)
        told = capsys.readouterr().err
        assert told.endswith(f"error: {line}\n") and told.count("\n") == (1 if "died" in line else 2)


@pytest.mark.parametrize("me", [0, 1])
def test_who_has_an_error_waits_for_the_verdict_before_it_ends(
    still: Time, monkeypatch: pytest.MonkeyPatch, me: int
) -> None:
    """Twice the ten seconds in which process 0 finds out, and three beats of five; the others hear of it at once."""
    job = Job()
    monkeypatch.setattr(job.watches[me], "_end", sys.exit)
    with pytest.raises(SystemExit, match=f"^process {me} failed: ValueError: no$"):
        job.watches[me].blame("ValueError: no")
    assert sum(still.slept) == pytest.approx(35, abs=0.2) and job.watches[me]._hurry.is_set()
    job.tell()
    assert job.watches[0]._peers[me].state["error"] == "ValueError: no"


def test_a_config_error_of_another_process_is_told_by_process_0(still: Time) -> None:
    """Which says nothing of it where it ends by itself: then it has the same error, and prints that."""
    for ended, slept in ((False, 85), (True, 0)):
        job = Job()
        job.watches[0]._ended = ended
        job.tell()
        job.watches[1]._threads, still.slept[:] = [], []
        job.watches[1].__exit__(ConfigError, ConfigError("no rows; give some"), None)
        assert sum(still.slept) == pytest.approx(slept, abs=0.2)
        job.tell()
        assert job.line() == ""
        still.now += 15
        job.tell()
        assert job.line() == ""  # process 0 may be on its way out with the same error
        still.now += 50
        job.tell()
        assert ended or job.line() == "process 1 failed: no rows; give some"


def test_a_known_error_is_one_line(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    exhausted = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")
    away = type("ClientError", (OSError,), {"__module__": "aiohttp"})("503")
    full = OSError(errno.ENOSPC, "No space left on device")
    named = OSError(errno.EDQUOT, "Disk quota exceeded", "runs/x")
    many = OSError(errno.EMFILE, "Too many open files", "runs/x")
    lines = {
        exhausted: "memory does not suffice (an array of 7 bytes)",
        away: "a store can't be read",
        full: "a file cannot be written (No space left on device); free space",
        named: "runs/x cannot be written (Disk quota exceeded); free space",
        many: "runs/x cannot be read or written (Too many open files); raise the limit of open files (ulimit -n)",
    }
    for error, line in lines.items():
        watch = Watchdog(TIMEOUT, job.store, 1, 2, job.clocks[1])
        monkeypatch.setattr(watch, "_tell", lambda _: None)
        monkeypatch.setattr(watch, "_threads", [], raising=False)
        watch.__exit__(type(error), error, None)
        told = capsys.readouterr().err
        assert told.startswith(f"error: process 1 failed: {line}") and told.count("\n") == 1
    assert codes == [3] * 5


def test_a_reader_that_leaves_ends_the_job_quietly(
    still: Time, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, ended = Job(), mock.Mock(side_effect=SystemExit)
    monkeypatch.setattr("os._exit", ended)
    monkeypatch.setattr(watchdog.signals, "discard_output", mock.Mock())
    with pytest.raises(SystemExit):
        job.watches[0].__exit__(BrokenPipeError, BrokenPipeError(), None)
    assert ended.call_args.args == (141,) and capsys.readouterr().err == ""
    job.tell()
    assert job.line(1) == "nobody reads what process 0 prints any more"


def test_a_process_that_ended_is_not_alive_though_nobody_waited_for_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert _is_alive(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays, as a zombie
    assert os.path.exists(f"/proc/{child.pid}") and not _is_alive(child.pid)
    child.wait()
    assert not _is_alive(child.pid)
