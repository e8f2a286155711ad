"""A server without a model: every prompt is answered with a's. What stands in its way is up to the test.

As a program, `python -m serving.fakes WHAT` in tests/, it serves until it is told to end: `template`, with one that
never ends where a message is "stuck"; `engine`, whose second step never ends. Its first line says at which port.
"""

import asyncio
import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import httpx

from bigmac_jax.data.chat_template import PLAIN, Chat
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.inference.jobs import CANCELLED, Job, Step
from bigmac_jax.inference.sampling import Sampling
from bigmac_jax.inference.text import Text
from bigmac_jax.runtime import signals
from bigmac_jax.serving import server
from bigmac_jax.serving.app import Service
from bigmac_jax.serving.dialogue import Dialogue
from bigmac_jax.serving.limits import Limits
from bigmac_jax.serving.prometheus import Metrics
from bigmac_jax.serving.worker import Worker

LONGEST = 64
ENDLESS = (
    "{% if messages[0].content == 'stuck' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}{% endif %}"
)


class Engine:
    """As `inference.Engine`; `stuck`: its second step does not end."""

    shards, slots, longest, drafts = 1, 2, LONGEST, None
    running, waiting, pages = 0, 0, ()

    def __init__(self, stuck: bool = False) -> None:
        self.jobs: list[Job] = []
        self.steps, self._stuck = 0, stuck

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def cancel(self, job: Job) -> None:
        job.text.finish_reason = CANCELLED
        self.jobs.remove(job)

    def step(self) -> list[Step]:
        self.steps += 1
        while self._stuck and self.steps > 1:
            time.sleep(1)
        pieces = [(job, job.text.add(ord("a"), 0.0)) for job in self.jobs]
        self.jobs = [job for job in self.jobs if not job.text.finish_reason]
        return [Step(job, piece, ord("a"), 0.0, (), job.text.finish_reason) for job, piece in pieces]


class Generator:
    """As `inference.Generator`."""

    vocab_size = 257

    def __init__(self) -> None:
        self.tokenizer = ByteTokenizer()

    def job(self, prompt: Sequence[int], sampling: Sampling, number: int = 0, begins: bool = False) -> Job:
        return Job(prompt, sampling, Text(self.tokenizer, sampling, () if begins else prompt), number, begins)


class Served:
    """A service inside the current event loop, and a client of it."""

    made: ClassVar[list["Served"]] = []

    def __init__(self, limits: Limits | None = None, key: str = "", hosts: Sequence[str] = (), template: str = PLAIN):
        self.chat, self.generator, self.engine = Chat(ByteTokenizer(), template), Generator(), Engine()
        engine: Any = self.engine
        generator: Any = self.generator
        self.worker = Worker(engine, limits or Limits(), Metrics(engine), lambda: None)
        self.service = Service(generator, self.worker, Dialogue(self.chat), "a", key, hosts)
        self.app = self.service.app()
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://127.0.0.1")
        self.made.append(self)

    @classmethod
    async def stop_all(cls) -> None:
        """Ends the engines' threads, which would deliver to a loop that is closed."""
        while cls.made:
            assert await cls.made.pop().worker.stop(20)

    async def ask(self, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any]:
        get = self._client.get(path, headers=headers) if body is None else self.post(path, body, headers)
        answer = await get
        return answer.status_code, answer.json()

    async def post(self, path: str, body: Any, headers: Any = None) -> httpx.Response:
        """Posts an object, or the bytes of a body, which may come in parts."""
        if isinstance(body, dict):
            return await self._client.post(path, json=body, headers=headers)
        given = {"content-type": "application/json"} | (headers or {})
        return await self._client.post(path, content=body, headers=given)


@contextlib.contextmanager
def held(of: Any, name: str) -> Iterator[tuple[threading.Event, list[Any]]]:
    """A method that waits, inside, until the event is set; and the first argument of each call."""
    release, calls, method = threading.Event(), [], getattr(of, name)

    def waiting(*given: Any, **named: Any) -> Any:
        calls.append(given[0])
        assert release.wait(60)
        return method(*given, **named)

    setattr(of, name, waiting)
    try:
        yield release, calls
    finally:
        release.set()


def main(what: str) -> int:
    signals.install()
    signals._ONE = 0.2  # or a test would wait for a second
    server._GRACE = 0.5
    engine: Any = Engine(stuck=what == "engine")
    generator: Any = Generator()
    dialogue = Dialogue(Chat(ByteTokenizer(), ENDLESS + PLAIN if what == "template" else PLAIN))
    listening = socket.create_server(("127.0.0.1", 0))
    return asyncio.run(server.serve(generator, engine, dialogue, "a", Limits(drain=1), listening))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
