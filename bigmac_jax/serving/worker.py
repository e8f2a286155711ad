"""Runs the engine in a thread of its own, for requests that come from the event loop.

The thread alone touches the engine. Requests and cancellations reach it between two steps, when other processes of the
job are told of them, too, and all tokens of a step go back in one call.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bigmac_jax.inference.engine import Engine
from bigmac_jax.inference.jobs import Job, Step
from bigmac_jax.serving.limits import ApiError, Limits
from bigmac_jax.serving.lockstep import ABORT, END, IDLE, TICK, Leader
from bigmac_jax.serving.prometheus import Metrics

_log = logging.getLogger(__name__)


class Ticket:
    """A submitted request, and where its completions arrive token by token.

    Attributes:
      steps: a queue of steps, each with the number of its completion, or of the error that ends the request.
      started: when the request arrived, in seconds of the monotonic clock.
    """

    def __init__(self, jobs: Sequence[Job], started: float):
        self.jobs = jobs
        self.steps: asyncio.Queue[tuple[int, Step] | ApiError] = asyncio.Queue()
        self.started = started
        self.last = [0.0] * len(jobs)  # when each completion had its last token; 0 = none yet


class _Command(NamedTuple):
    """To submit a job, or to cancel it."""

    job: Job
    cancel: bool = False


class Worker:
    """Runs an engine until it is stopped. Must be made inside the event loop that its requests come from.

    Args:
      on_failure: called in the event loop if the engine raises; every request is answered 500 then.
    """

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics, on_failure: Callable[[], object]):
        self.engine, self.limits, self.metrics = engine, limits, metrics
        self.failed, self.over = False, asyncio.Event()  # set once the server ends
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._leader = Leader()
        self._tickets: dict[Job, Ticket] = {}  # of completions that have not ended; the event loop's alone
        self._alive = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def capacity(self) -> int:
        """Number of completions that may be in the engine: those that wait for a slot, beside one in each."""
        return self.limits.queue + self.engine.shards * self.engine.slots

    @property
    def silent_seconds(self) -> float:
        """How long the engine's thread has given no sign of life: it does with every step, and every `TICK` if idle."""
        return time.monotonic() - self._alive

    def full(self, why: str) -> ApiError:
        """Makes the error for a request that finds the server full: 429, with the seconds to wait."""
        return ApiError(429, f"{why}; come again later", code="queue_full", retry=self.metrics.retry_seconds())

    def check_queue(self, completions: int) -> None:
        """Raises ApiError if there is no room for so many more completions, or the engine has failed."""
        if self.failed:
            raise _failed()
        if self.over.is_set():
            raise ended()
        if len(self._tickets) + completions > self.capacity:
            raise self.full(f"{len(self._tickets)} completions run or wait, and {self.capacity} may")

    def submit(self, jobs: Sequence[Job], arrived: float) -> Ticket:
        """Submits the completions of a request; raises ApiError like `check_queue`.

        Args:
          arrived: when the request did, in seconds of the monotonic clock.
        """
        self.check_queue(len(jobs))
        ticket = Ticket(jobs, arrived)
        for job in jobs:
            self._tickets[job] = ticket
            self._inbox.put(_Command(job))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Cancels those completions of a request that have not ended."""
        for job in ticket.jobs:
            if self._tickets.pop(job, None):
                self._inbox.put(_Command(job, cancel=True))

    def end_requests(self) -> None:
        """Answers what runs or waits with the error that the server ends, and takes nothing more."""
        self.over.set()
        for ticket in set(self._tickets.values()):
            ticket.steps.put_nowait(ended())
            self.cancel(ticket)

    async def stop(self, seconds: float) -> bool:
        """Ends the engine's thread → whether it did within so many seconds."""
        self._inbox.put(None)
        end = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._take_commands():
                if steps := self.engine.step():
                    self._loop.call_soon_threadsafe(self._deliver, steps)
            self._leader.send(END)
        except Exception as error:
            _log.error("the engine failed: %s: %s", type(error).__name__, " ".join(str(error).split()))
            self._loop.call_soon_threadsafe(self._fail)
            self._leader.send(ABORT)

    def _take_commands(self) -> bool:
        """Applies the commands that have come in; waits while there is nothing to do. False: stop."""
        commands: list[_Command] = []
        while True:
            self._alive = time.monotonic()
            try:
                command = self._inbox.get(block=not (commands or self.engine.busy), timeout=TICK)
            except queue.Empty:
                if commands or self.engine.busy:
                    break
                self._leader.send(IDLE)
                continue
            if command is None:
                return False
            commands.append(command)
        submitted = [command.job for command in commands if not command.cancel]
        # A job may have ended before its cancellation came.
        cancelled = [command.job for command in commands if command.cancel and not command.job.text.finish_reason]
        self._leader.send_step(submitted, cancelled)
        for job in submitted:
            self.engine.submit(job)
        for job in cancelled:
            self.engine.cancel(job)
        return True

    def _deliver(self, steps: list[Step]) -> None:
        """In the event loop: hands out the tokens of a step."""
        now = time.monotonic()
        for step in steps:
            ticket = self._tickets.get(step.job)
            if ticket is None:
                continue
            number = ticket.jobs.index(step.job)
            if last := ticket.last[number]:
                self.metrics.between_tokens.observe(now - last)
            else:
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
        for ticket in set(self._tickets.values()):
            ticket.steps.put_nowait(_failed())
        self._tickets.clear()
        self._on_failure()


def ended() -> ApiError:
    """Makes the error for a request that the server's end cuts off."""
    return ApiError(503, "the server ends; ask another one, or come again later")


def _failed() -> ApiError:
    return ApiError(500, "the engine has failed; the server's log says why")
