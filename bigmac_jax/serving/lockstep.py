"""Several processes serve as one: process 0 answers requests, and the others take the same steps.

Before each of its steps process 0 writes what came in to the key-value store of jax's coordination service (as the
watch does), and the others read it. Tokens follow from the requests and their order, so nothing else is told.
"""

import dataclasses
import json
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

TICK = 5.0  # seconds after which an idle process 0 says that it is there
_KEY = "bigmac/serving/"
_PART = 1 << 20  # characters of a message, of which the service takes a few million
_KEPT = 256  # messages until those that all have read are deleted
_WAIT = 3_600_000  # milliseconds, for what the watch bounds
_STEP, _IDLE, _END, _ABORT = "step", "idle", "end", "abort"


class Schedule:
    """What process 0 tells; a job of one process has nobody to tell."""

    def __init__(self) -> None:
        self._store = hosts.coordination_store() if hosts.is_distributed() else None
        self._told = 0

    def step(self, submitted: Sequence[tuple[int, Job]], cancelled: Sequence[int]) -> None:
        """A step, before which requests are submitted under numbers, and others cancelled."""
        self._tell(
            _STEP,
            [[number, list(job.prompt), dataclasses.asdict(job.sampling), job.number] for number, job in submitted],
            list(cancelled),
        )

    def idle(self) -> None:
        self._tell(_IDLE)

    def end(self) -> None:
        self._tell(_END)

    def abort(self) -> None:
        """The engine has failed, perhaps in the middle of a message."""
        self._tell(_ABORT)

    def _tell(self, *message: Any) -> None:
        if self._store is None:
            return
        clock.tick()
        text = json.dumps(message, allow_nan=False)
        parts = [text[start : start + _PART] for start in range(0, len(text), _PART)]
        for number, part in enumerate(parts):
            self._store.key_value_set(f"{_KEY}{self._told}", f"{number} {len(parts) - number - 1} {part}")
            self._told += 1
            if self._told % _KEPT == 0:
                _meet(self._store, self._told)
                for old in range(self._told - _KEPT, self._told):
                    self._store.key_value_delete(f"{_KEY}{old}")


def follow(generator: Generator, engine: Engine) -> int:
    """What the processes behind the first do, until that ends → the exit code.

    Raises:
      PeerError: its engine has failed.
    """
    jobs: dict[int, Job] = {}
    # Whoever ends a job tells all of its processes: process 0 lets requests end, and needs these until then.
    with stop_signals():
        for kind, *message in _messages():
            clock.tick()
            if kind == _END:
                break
            if kind == _ABORT:
                raise hosts.PeerError("the engine of process 0 failed; its log says why")
            if kind == _IDLE:
                continue
            submitted, cancelled = message
            for number, prompt, sampling, of_request in submitted:
                jobs[number] = generator.job(prompt, Sampling(**sampling), of_request)
                engine.submit(jobs[number])
            for number in cancelled:
                engine.cancel(jobs[number])
            engine.step()
            jobs = {number: job for number, job in jobs.items() if not job.text.finish_reason}
    return 0


def _messages() -> Iterator[list[Any]]:
    store = hosts.coordination_store()
    heard, text = 0, ""
    while True:
        try:
            # In short waits, so that signals are seen.
            told = store.blocking_key_value_get(f"{_KEY}{heard}", int(1000 * TICK))
        except JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            continue
        number, left, part = told.split(" ", 2)
        heard, text = heard + 1, (text if int(number) else "") + part  # one before it may have been broken off
        if heard % _KEPT == 0:
            _meet(store, heard)
        if left == "0":
            yield json.loads(text)


def _meet(store: Any, messages: int) -> None:
    """All processes have read so many."""
    store.wait_at_barrier(f"{_KEY}read/{messages}", _WAIT)
