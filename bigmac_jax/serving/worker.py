"""The engine in a thread of its own, and the requests that come to it from the event loop.

The thread alone touches the engine. Requests and cancellations reach it between two steps, where other processes of the
job are told of them, and all tokens of a step go back in one call.
"""

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bigmac_jax.inference.engine import Engine
from bigmac_jax.inference.jobs import Job, Step
from bigmac_jax.serving.limits import ApiError, Limits
from bigmac_jax.serving.lockstep import TICK, Schedule
from bigmac_jax.serving.prometheus import Metrics

_log = logging.getLogger(__name__)


class Ticket:
    """The completions of one request, token by token.

    Attributes:
      steps: each with the number of its completion; None where the engine has failed.
      started: when the request arrived, in seconds of the monotonic clock.
    """

    def __init__(self, jobs: Sequence[Job], started: float):
        self.jobs = list(jobs)
        self.number = {job: i for i, job in enumerate(jobs)}
        self.steps: asyncio.Queue[tuple[int, Step] | None] = asyncio.Queue()
        self.started = started
        self.last = [0.0] * len(self.jobs)  # when each had its last token


class _Command(NamedTuple):
    """To submit a job, or to cancel it."""

    job: Job
    cancel: bool = False


class Worker:
    """Runs an engine until it is stopped. To be made inside the event loop that its requests come from.

    Args:
      on_failure: called in the event loop if the engine raises; every request is answered 500 then.
    """

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics, on_failure: Callable[[], object]):
        self.engine, self.limits, self.metrics = engine, limits, metrics
        self.failed = False
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._schedule, self._counter = Schedule(), itertools.count()
        self._numbers: dict[Job, int] = {}  # of the thread: jobs that have not ended, as other processes know them
        self._tickets: dict[Job, Ticket] = {}  # of the event loop: completions that have not ended
        self._waiting = 0  # completions that have no token yet
        self._seen = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def room(self) -> int:
        """Completions that may wait for their first token."""
        return self.limits.queue + self.engine.shards * self.engine.slots

    @property
    def silence(self) -> float:
        """Seconds since the engine's thread has last come round, which it does with every step, or every `TICK`."""
        return time.monotonic() - self._seen

    def full(self, why: str) -> ApiError:
        return ApiError(429, f"{why}; come again later", code="queue_full", retry=self.metrics.seconds_to_wait())

    def check_queue(self, jobs: int) -> None:
        """Raises ApiError: the queue has no place for so many, or the engine has failed."""
        if self.failed:
            raise ApiError(500, "the engine has failed; the server's log says why")
        if self._waiting + jobs > self.room:
            raise self.full(f"{self._waiting} completions are waiting, and {self.limits.queue} may")

    def submit(self, jobs: Sequence[Job], arrived: float) -> Ticket:
        """As `check_queue`. `arrived`: when their request did, in seconds of the monotonic clock."""
        self.check_queue(len(jobs))
        ticket = Ticket(jobs, arrived)
        for job in jobs:
            self._tickets[job] = ticket
            self._waiting += 1
            self._inbox.put(_Command(job))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends what of it has not ended."""
        for job in ticket.jobs:
            if self._forget(job):
                self._inbox.put(_Command(job, cancel=True))

    async def stop(self, seconds: float) -> bool:
        """Whether the engine's thread has ended by then."""
        self._inbox.put(None)
        end = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return not self._thread.is_alive()

    def _forget(self, job: Job) -> bool:
        ticket = self._tickets.pop(job, None)
        if ticket is None:
            return False
        self._waiting -= not ticket.last[ticket.number[job]]
        return True

    def _run(self) -> None:
        try:
            while self._take():
                steps = self.engine.step()
                for step in steps:
                    if step.reason:
                        del self._numbers[step.job]
                if steps:
                    self._loop.call_soon_threadsafe(self._deliver, steps)
            self._schedule.end()
        except Exception as error:
            _log.error("the engine failed: %s: %s", type(error).__name__, " ".join(str(error).split()))
            self._loop.call_soon_threadsafe(self._fail)
            self._schedule.abort()

    def _take(self) -> bool:
        """What has come in; waits while there is nothing to do. False: stop."""
        commands: list[_Command] = []
        while True:
            self._seen = time.monotonic()
            try:
                command = self._inbox.get(block=not (commands or self.engine.busy), timeout=TICK)
            except queue.Empty:
                if commands or self.engine.busy:
                    break
                self._schedule.idle()
                continue
            if command is None:
                return False
            commands.append(command)
        self._apply(commands)
        return True

    def _apply(self, commands: Sequence[_Command]) -> None:
        """Here and on the other processes, which submit first and cancel then."""
        submitted = [command.job for command in commands if not command.cancel]
        self._numbers |= {job: next(self._counter) for job in submitted}
        # One that has ended is no longer known.
        cancelled = [command.job for command in commands if command.cancel and command.job in self._numbers]
        self._schedule.step(
            [(self._numbers[job], job) for job in submitted], [self._numbers.pop(job) for job in cancelled]
        )
        for job in submitted:
            self.engine.submit(job)
        for job in cancelled:
            self.engine.cancel(job)

    def _deliver(self, steps: list[Step]) -> None:
        now = time.monotonic()
        for step in steps:
            ticket = self._tickets.get(step.job)
            if ticket is None:
                continue
            number = ticket.number[step.job]
            if last := ticket.last[number]:
                self.metrics.between_tokens.observe(now - last)
            else:
                self._waiting -= 1
                self.metrics.first_token.observe(now - ticket.started)
                self.metrics.prompt_tokens.inc(len(step.job.prompt))
                self.metrics.reused_tokens.inc(step.job.reused)
            ticket.last[number] = now
            self.metrics.new_tokens.inc()
            if step.reason:
                del self._tickets[step.job]
            ticket.steps.put_nowait((number, step))

    def _fail(self) -> None:
        self.failed = True
        for ticket in {id(ticket): ticket for ticket in self._tickets.values()}.values():
            ticket.steps.put_nowait(None)
        self._tickets.clear()
        self._on_failure()
