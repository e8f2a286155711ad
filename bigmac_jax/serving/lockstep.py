"""Serves with several processes as one: process 0 answers requests, and the others take the same steps.

Before each of its steps process 0 writes what came in to the key-value store of jax's coordination service (as the
watchdog does), and the others read it. Tokens follow from the requests and their order, so nothing else is sent.
"""

import dataclasses
import itertools
import json
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from jax.errors import JaxRuntimeError

from bigmac_jax.inference import Generator
from bigmac_jax.inference.engine import Engine
from bigmac_jax.inference.jobs import Job
from bigmac_jax.inference.sampling import Sampling
from bigmac_jax.runtime import hosts
from bigmac_jax.runtime.clock import clock
from bigmac_jax.runtime.signals import stop_signals

TICK = 5.0  # seconds after which an idle process 0 says that it is alive
_KEY = "bigmac/serving/"
_PART = 1 << 20  # characters of a value, of which the service takes a few million
_KEPT = 256  # values after which those that all have read are deleted
_WAIT = 3_600_000  # milliseconds; the watchdog ends a wait for a process that died much earlier
IDLE, END, ABORT = "idle", "end", "abort"  # what process 0 does instead of a step
_STEP = "step"


class Leader:
    """Tells the other processes what process 0 does; does nothing in a job of one process."""

    def __init__(self) -> None:
        self._store = hosts.coordination_store() if hosts.is_distributed() else None
        self._sent = 0
        self._numbers: weakref.WeakKeyDictionary[Job, int] = weakref.WeakKeyDictionary()
        self._counter = itertools.count()

    def send_step(self, submitted: Sequence[Job], cancelled: Sequence[Job]) -> None:
        """Tells the others to submit and cancel these requests, and then to take a step."""
        self._numbers.update({job: next(self._counter) for job in submitted})
        self.send(
            _STEP,
            [
                [self._numbers[job], list(job.prompt), dataclasses.asdict(job.sampling), job.number, job.begins]
                for job in submitted
            ],
            [self._numbers[job] for job in cancelled],
        )

    def send(self, *message: Any) -> None:
        """Tells the others that process 0 is IDLE, is at its END, or must ABORT, perhaps in the middle of a message."""
        if self._store is None:
            return
        clock.tick()
        text = json.dumps(message, allow_nan=False)
        parts = [text[start : start + _PART] for start in range(0, len(text), _PART)]
        for number, part in enumerate(parts):
            self._store.key_value_set(f"{_KEY}{self._sent}", f"{number} {len(parts) - number - 1} {part}")
            self._sent += 1
            if self._sent % _KEPT == 0:
                _meet(self._store, self._sent)
                for old in range(self._sent - _KEPT, self._sent):
                    self._store.key_value_delete(f"{_KEY}{old}")


def follow(generator: Generator, engine: Engine) -> int:
    """Repeats the steps of process 0 in another process until that one ends → the exit code.

    Raises:
      PeerError: the engine of process 0 has failed.
    """
    jobs: dict[int, Job] = {}
    # Whoever ends a job signals all of its processes: process 0 lets requests end, and needs these until then.
    with stop_signals():
        for kind, *message in _messages():
            clock.tick()
            if kind == END:
                break
            if kind == ABORT:
                raise hosts.PeerError("the engine of process 0 failed; its log says why")
            if kind == IDLE:
                continue
            submitted, cancelled = message
            for number, prompt, sampling, *rest in submitted:
                jobs[number] = generator.job(prompt, Sampling(**sampling), *rest)
                engine.submit(jobs[number])
            for number in cancelled:
                engine.cancel(jobs[number])
            engine.step()
            jobs = {number: job for number, job in jobs.items() if not job.text.finish_reason}
    return 0


def _messages() -> Iterator[list[Any]]:
    store = hosts.coordination_store()
    received, text = 0, ""
    while True:
        try:
            # In short waits, so that signals are seen.
            value = store.blocking_key_value_get(f"{_KEY}{received}", int(1000 * TICK))
        except JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            continue
        number, left, part = value.split(" ", 2)
        received, text = received + 1, (text if int(number) else "") + part  # a message before it may be incomplete
        if received % _KEPT == 0:
            _meet(store, received)
        if left == "0":
            yield json.loads(text)


def _meet(store: Any, values: int) -> None:
    """Waits until all processes have read so many values."""
    store.wait_at_barrier(f"{_KEY}read/{values}", _WAIT)
