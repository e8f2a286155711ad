"""What it costs to watch a large job: python -m benchmarks.watchers [--counts=8,32,128,256 --seconds=20].

Two processes with jax's coordination service between them: one is process 0 of a job of N, the other simulates the
N − 1 others, each with the threads, states and requests of `watchdog.Watchdog`. After `seconds` one of those falls
silent. A JSON line a count: requests a second of a process, processor time of process 0 as a share of a core, and the
seconds until the silent one is named.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import threading
import time
from typing import Any, NoReturn

import jax
from absl import app, flags

from benchmarks.ports import free_port
from bigmac_jax.runtime.clock import Clock
from bigmac_jax.runtime.hosts import coordination_store
from bigmac_jax.runtime.watchdog import Watchdog

_COUNTS = flags.DEFINE_list("counts", ["8", "32", "128", "256"], "Processes of the job.")
_SECONDS = flags.DEFINE_float("seconds", 20.0, "Before one falls silent.")
_PEER_TIMEOUT = flags.DEFINE_float("peer_timeout", 20.0, "As of train.py.")
_ROLE = flags.DEFINE_string("role", "", "Of the two processes that this starts: N:PORT:0 or N:PORT:1.")
ROOT = pathlib.Path(__file__).parents[1]


class _Counting:
    """The store of several watchers, with a count of requests."""

    def __init__(self) -> None:
        self.requests = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(coordination_store(), name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.requests += 1
            return method(*arguments, **keywords)

        return call


class _Watcher(Watchdog):
    """One that does not end its process, which others share, and starts at its own moment."""

    line, end = "", 0.0

    def _end(self, line: str) -> NoReturn:
        if not self.line:
            self.line, self.end = line, time.monotonic()
        self._closing.set()
        raise SystemExit  # of its thread

    def _talk(self) -> None:
        time.sleep(random.random() * self.beat)
        super()._talk()


def simulate(count: int, me: int) -> None:
    """Either of the two processes."""
    store, seconds, clock = _Counting(), _SECONDS.value, Clock()
    clock.begin("steps")
    numbers = [0] if me == 0 else range(1, count)
    watchers = [_Watcher(_PEER_TIMEOUT.value, store, number, count, clock) for number in numbers]
    for watcher in watchers:
        watcher.__enter__()
    stepping = threading.Event()
    threading.Thread(target=_step, args=(clock, stepping), daemon=True).start()
    time.sleep(2 * watchers[0].beat)
    start, busy, asked = time.monotonic(), time.process_time(), store.requests
    time.sleep(seconds)
    share, rate = [(now - then) / (time.monotonic() - start) for now, then in
                   ((time.process_time(), busy), (store.requests, asked))]  # fmt: skip
    if me:
        watchers[-1]._closing.set()
        print(json.dumps({"requests_a_second": round(rate / len(watchers), 2)}), flush=True)
        return time.sleep(4 * _PEER_TIMEOUT.value)  # until process 0 has found out, which ends this one
    fell = time.monotonic()
    while not watchers[0].line and time.monotonic() < fell + 3 * _PEER_TIMEOUT.value:
        time.sleep(0.01)
    record = {"name": "watchers", "count": count, "process_0_requests_a_second": round(rate, 2),
              "process_0_share_of_a_core": round(share, 4), "seconds_to_line": round(watchers[0].end - fell, 1),
              "line": watchers[0].line}  # fmt: skip
    print(json.dumps(record), flush=True)


def _step(clock: Clock, stop: threading.Event) -> None:
    step = 0
    while not stop.wait(0.5):
        clock.start_step(step := step + 1)


def measure(count: int) -> dict[str, Any]:
    """Both processes' figures."""
    port = free_port()
    flags_ = [f"--seconds={_SECONDS.value}", f"--peer_timeout={_PEER_TIMEOUT.value}"]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.watchers", f"--role={count}:{port}:{me}", *flags_],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for me in (0, 1)
    ]  # fmt: skip
    try:
        first = both[0].communicate(timeout=120 + _SECONDS.value)[0]
    finally:
        for process in both:
            process.kill()
    second = both[1].communicate()[0]
    return json.loads(first.splitlines()[-1]) | json.loads(second.splitlines()[-1])


def main(_: list[str]) -> None:
    if _ROLE.value:
        count, port, me = map(int, _ROLE.value.split(":"))
        jax.config.update("jax_platforms", "cpu")
        jax.distributed.initialize(f"127.0.0.1:{port}", 2, me, cluster_detection_method="deactivate")
        simulate(count, me)
        sys.stdout.flush()
        os._exit(0)  # without a word to the other, which may be gone
    for count in _COUNTS.value:
        print(json.dumps(measure(int(count))), flush=True)


if __name__ == "__main__":
    app.run(main)
