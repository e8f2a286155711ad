"""Who waits for whom in a server, and who is let in: without a model."""

import asyncio
import functools
import gc
import http.client
import json
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import uvicorn
from training.runs import LIMIT

from bigmac_jax.inference.sampling import Sampling
from bigmac_jax.serving import api
from bigmac_jax.serving.limits import ApiError, Limits
from bigmac_jax.serving.prometheus import Metrics
from bigmac_jax.serving.protocol import make_protocol
from bigmac_jax.serving.work_threads import SHORT as SHORT_WORK
from bigmac_jax.serving.work_threads import WorkThreads

from .fakes import LONGEST, Served, held

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SHORT = {"prompt": "a", "max_tokens": 2}
MESSAGES = [{"role": "user", "content": "a"}]
LONG = {"prompt": "a", "max_tokens": 2, "user": "u" * 100_000}


def alone(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """In an event loop of its own; a test that hangs fails."""

    async def and_stop(**given: Any) -> None:
        try:
            await asyncio.wait_for(test(**given), 30)
        finally:
            await Served.stop_all()

    @functools.wraps(test)
    def run(**given: Any) -> None:
        asyncio.run(and_stop(**given))

    return run


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@alone
async def test_an_answer() -> None:
    status, answer = await Served().ask(COMPLETIONS, SHORT)
    assert (status, answer["choices"][0]["text"], answer["usage"]["total_tokens"]) == (200, "aa", 3)


@alone
async def test_completions_of_a_request_draw_for_themselves() -> None:
    """Prompts times n: each has its own number, of which its draws are made."""
    served, numbers = Served(), list[tuple[int, int]]()
    made = served.generator.job
    served.generator.job = lambda prompt, sampling, number=0, begins=False: (  # type: ignore[method-assign]
        numbers.append((prompt[-1], number)) or made(prompt, sampling, number, begins)
    )
    assert (await served.ask(COMPLETIONS, SHORT | {"prompt": ["a", "a", "b"], "n": 2}))[0] == 200
    a, b = ord("a"), ord("b")
    assert numbers == [(a, 0), (a, 1), (a, 2), (a, 3), (b, 4), (b, 5)]


@alone
async def test_an_echo_of_texts_and_tokens() -> None:
    body = SHORT | {"prompt": ["é", list("é".encode())]}
    for echo, text in ((True, "éaa"), (False, "aa")):
        _, answer = await Served().ask(COMPLETIONS, body | {"echo": echo})
        assert [choice["text"] for choice in answer["choices"]] == [text] * 2


@alone
async def test_an_answer_begins_a_text_and_a_completion_goes_on() -> None:
    """Which decides whether the space before its first word is its own."""
    served, begun = Served(), list[bool]()
    submit = served.engine.submit
    served.engine.submit = lambda job: (begun.append(job.begins), submit(job))[1]  # type: ignore[method-assign]
    assert (await served.ask(COMPLETIONS, SHORT))[0] == 200
    assert (await served.ask(CHAT, {"messages": MESSAGES, "max_tokens": 2}))[0] == 200
    assert begun == [False, True]


@alone
async def test_who_leaves_takes_the_body_along() -> None:
    """While a thread is busy: what nobody waits for is neither held nor counted."""
    threads, release, bodies = WorkThreads(), threading.Event(), [np.zeros(10) for _ in range(5)]
    busy = asyncio.create_task(threads.run(SHORT_WORK + 1, lambda _: release.wait(30)))
    await until(lambda: threads.busy_seconds)
    assert await threads.run(SHORT_WORK, lambda _: "short") == "short"  # in the other thread, as long as it may be
    kept = [weakref.ref(body) for body in bodies]
    tasks = [asyncio.create_task(threads.run(SHORT_WORK + 1, lambda _, body=body: body.sum())) for body in bodies]
    last = asyncio.create_task(threads.run(SHORT_WORK + 2, lambda _: "done"))
    await until(lambda: threads.waiting == 6)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    del bodies, tasks, task
    await until(lambda: threads.waiting == 1)
    gc.collect()
    assert not any(body() is not None for body in kept)
    release.set()
    assert await busy and await last == "done" and threads.waiting == 0


@alone
async def test_tokens_are_counted_and_timed() -> None:
    """The first of a completion from its request's arrival, the others from the one before."""
    served = Served()
    arrived = time.monotonic()
    for fields in ({}, {"n": 2, "prompt": "abc", "max_tokens": 4}):
        assert (await served.ask(COMPLETIONS, SHORT | fields))[0] == 200
    passed, metrics = time.monotonic() - arrived, dict[str, float]()
    for line in served.worker.metrics.text().decode().splitlines():
        if not line.startswith("#"):
            metrics[line.split()[0].removeprefix("bigmac_")] = float(line.split()[1])
    assert (metrics["prompt_tokens_total"], metrics["new_tokens_total"]) == (1 + 2 * 3, 2 + 2 * 4)
    assert metrics["first_token_seconds_count"] == 3 and metrics["between_tokens_seconds_count"] == 1 + 2 * 3
    # All of them within these requests, and the second one's completions side by side.
    assert 0 < metrics["first_token_seconds_sum"] + metrics["between_tokens_seconds_sum"] <= 2 * passed
    assert not served.worker._tickets


@alone
async def test_what_is_too_long_is_refused_before_it_is_rendered_or_encoded() -> None:
    served, done = Served(), []
    served.chat._render = lambda *given: done.append(given) or ""  # type: ignore[func-returns-value,method-assign]
    served.generator.tokenizer.encode_batch = done.append  # type: ignore[assignment,method-assign]
    many = [{"role": ("user", "assistant")[i % 2], "content": ""} for i in range(LONGEST + 1)]
    for path, body in (
        (CHAT, {"messages": many}),
        (COMPLETIONS, {"prompt": "a" * (LONGEST + 1)}),
        (COMPLETIONS, {"prompt": ["a", "a" * 100_000][::-1]}),
        (COMPLETIONS, {"prompt": [1] * 100_000}),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 2, "top_k": "3"}),
    ):
        status, answer = await served.ask(path, body)
        assert status == 400 and not done, answer
        code = None if "top_k" in body else "context_length_exceeded"
        assert answer["error"]["code"] == code


@alone
async def test_messages_without_a_token_are_refused() -> None:
    """A template may write nothing of its own."""
    served = Served(template="{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    system = {"role": "system", "content": "Be brief."}
    status, answer = await served.ask(CHAT, {"messages": [system], "max_tokens": 2})
    assert status == 400 and answer["error"]["param"] == "messages" and "no text of these" in answer["error"]["message"]
    assert (await served.ask(CHAT, {"messages": [system, *MESSAGES], "max_tokens": 2}))[0] == 200


@alone
async def test_the_clock_runs_from_arrival() -> None:
    served = Served(Limits(seconds=0.2))
    with held(served.chat, "_render"):
        status, answer = await served.ask(CHAT, {"messages": [{"role": "user", "content": "a"}]})
        assert (status, answer["error"]["code"]) == (504, "request_timeout")


@alone
async def test_a_client_that_leaves_ends_what_is_done_for_it() -> None:
    """Work that is under way ends at its next part, and what waits does not begin."""
    served, left = Served(), asyncio.Event()
    body = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}).encode()

    async def request() -> None:
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            for part in parts:
                return part
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
        await served.app(scope, receive, send)

    with held(served.chat, "_render") as (release, renders):
        requests = [asyncio.create_task(request()) for _ in range(3)]
        await until(lambda: renders and served.service.threads.waiting == 2)
        left.set()
        await asyncio.gather(*requests)
        release.set()
        await until(lambda: not served.service.threads.waiting)
        assert (await served.ask(COMPLETIONS, SHORT))[0] == 200  # behind them
    assert len(renders) == 1 and served.engine.steps == 2


@alone
async def test_short_requests_do_not_wait_for_long_ones() -> None:
    served = Served(Limits(long=2, body=101_000))  # of a request 34 kB are beyond 64 KiB
    with held(served.service, "_parse") as (release, _):
        long = [asyncio.create_task(served.ask(COMPLETIONS, LONG)) for _ in range(5)]
        await until(lambda: served.service.threads.waiting == 4)
        status, answer = await served.ask(COMPLETIONS, LONG)
        assert status == 429 and "bytes of long requests" in answer["error"]["message"]
        short = asyncio.create_task(served.ask(COMPLETIONS, SHORT))
        await until(lambda: served.service.threads._since[0])
        release.set()
        assert [(await answer)[0] for answer in (short, *long)] == [200] * 6
    assert (await served.ask(COMPLETIONS, LONG))[0] == 200


@alone
async def test_the_shortest_is_read_first() -> None:
    served, order = Served(), []
    threads = served.service.threads
    block = asyncio.Event()
    loop = asyncio.get_running_loop()
    first = asyncio.create_task(threads.run(1, lambda _: asyncio.run_coroutine_threadsafe(block.wait(), loop).result()))
    await asyncio.sleep(0)
    later = [asyncio.create_task(threads.run(size, lambda _, size=size: order.append(size))) for size in (9, 5, 7)]
    await until(lambda: threads.waiting == 3)
    block.set()
    await asyncio.gather(first, *later)
    assert order == [5, 7, 9]


@alone
async def test_a_full_queue_is_told_before_anything_is_read() -> None:
    """Two slots and a place: who has a token still holds a slot, and who leaves makes room."""
    served, steps = Served(Limits(queue=1)), threading.Semaphore()
    step, tickets = served.engine.step, served.worker._tickets
    served.engine.step = lambda: steps.acquire() and step()  # type: ignore[method-assign,assignment,return-value]
    asked = [asyncio.create_task(served.ask(COMPLETIONS, SHORT))]
    await until(lambda: any(ticket.last[0] for ticket in tickets.values()))
    asked += [asyncio.create_task(served.ask(COMPLETIONS, SHORT)) for _ in range(2)]
    await until(lambda: len(tickets) == 3)
    with held(served.service, "_parse") as (_, calls):
        status, answer = await served.ask(COMPLETIONS, b"{" * 1000)
    assert (status, answer["error"]["code"], calls) == (429, "queue_full", [])
    asked.pop().cancel()
    await until(lambda: len(tickets) == 2)
    asked.append(asyncio.create_task(served.ask(COMPLETIONS, SHORT)))
    await until(lambda: len(tickets) == 3)
    steps.release(10)
    assert [(await answer)[0] for answer in asked] == [200] * 3 and not tickets


@pytest.mark.parametrize(("fields", "param"), [({"n": 4}, "n"), ({"prompt": ["a"] * 4}, "prompt")])
@alone
async def test_what_has_more_completions_than_slots_and_places_never_fits(fields: dict[str, Any], param: str) -> None:
    """So it is not told to come again."""
    served = Served(Limits(queue=1))
    status, answer = await served.ask(COMPLETIONS, SHORT | fields)
    assert (status, answer["error"]["param"]) == (400, param) and "3" in answer["error"]["message"]
    assert (await served.ask(COMPLETIONS, SHORT | {"n": 3}))[0] == 200


@alone
async def test_nothing_of_a_refused_request_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not until Python's collector comes round, either."""
    served, kept, parse = Served(), [], api.parse_body

    class Fields(dict[str, Any]):
        """A dictionary that can be watched."""

    def parsed(body: bytes) -> Fields:
        fields = Fields(parse(body))
        kept.append(weakref.ref(fields))
        return fields

    monkeypatch.setattr(api, "parse_body", parsed)
    gc.disable()
    try:
        assert (await served.ask(COMPLETIONS, {"prompt": "a" * 1000}))[0] == 400
        assert (await served.ask(CHAT, {"messages": MESSAGES, "top_k": -1}))[0] == 400
        assert (await served.ask(COMPLETIONS, SHORT))[0] == 200
        await asyncio.sleep(0.1)
        assert [fields() for fields in kept] == [None] * 3
    finally:
        gc.enable()


@alone
async def test_an_engine_that_fails_answers_all_that_wait() -> None:
    """Each request once, however many completions it has; whoever asks later is refused."""
    served, told = Served(), list[bool]()

    def broken() -> Any:
        raise RuntimeError("out of memory")

    served.engine.step, worker = broken, served.worker  # type: ignore[method-assign]
    worker._on_failure = lambda: told.append(worker.failed)
    jobs = [served.generator.job([1], Sampling()) for _ in range(3)]
    tickets = [worker.submit(jobs[:2], 0.0), worker.submit(jobs[2:], 0.0)]
    assert not worker.failed
    await until(lambda: told)
    assert told == [True] and not worker._tickets
    for ticket in tickets:
        error = ticket.steps.get_nowait()
        assert ticket.steps.empty() and isinstance(error, ApiError) and error.status == 500
    with pytest.raises(ApiError, match="the engine has failed") as raised:
        worker.check_queue(1)
    assert raised.value.status == 500 and (await served.ask(COMPLETIONS, SHORT))[0] == 500


@alone
async def test_an_engine_gets_so_long_for_its_last_step() -> None:
    served = Served()
    with held(served.engine, "submit") as (release, jobs):
        asked = asyncio.create_task(served.ask(COMPLETIONS, SHORT))
        await until(lambda: jobs)
        assert await served.worker.stop(0.05) is False
        release.set()
        assert await served.worker.stop(20) is True
    asked.cancel()


@alone
async def test_the_servers_end_is_told_to_every_request() -> None:
    """Whatever it waits for: its body, to be read, for the engine; also to who comes later."""

    async def never() -> AsyncIterator[bytes]:
        yield b'{"prompt": '
        await asyncio.sleep(60)

    served = Served()
    with held(served.engine, "submit") as (release, jobs), held(served.service, "_parse") as (read, texts):
        kinds: list[Any] = [never(), SHORT, SHORT | {"stream": True}]
        asked = [asyncio.ensure_future(served.post(COMPLETIONS, kind)) for kind in kinds]
        await until(lambda: len(texts) == 1)
        read.set()
        await until(lambda: len(served.worker._tickets) == 2 and jobs)
        read.clear()
        asked.append(asyncio.ensure_future(served.post(COMPLETIONS, SHORT)))
        await until(lambda: len(texts) == 3)
        served.service.end()
        answers = [*[await answer for answer in asked], await served.post(COMPLETIONS, SHORT | {"max_tokens": 1})]
        release.set()
    streamed = answers.pop(2)
    assert streamed.text.startswith('data: {"error":{"message":"the server ends; ask another one')
    for answer in answers:
        assert answer.status_code == 503 and answer.json()["error"]["message"].startswith("the server ends; ")
    await until(lambda: not served.engine.jobs and not served.worker._tickets)


def test_an_answer_that_nobody_takes_ends_its_connection() -> None:
    """After the seconds that a request has; not once the client reads on."""
    asked, cancelled = [], []

    def call_later(seconds: float, call: Any) -> Any:
        asked.append((seconds, call))
        return SimpleNamespace(cancel=lambda: cancelled.append(len(asked)))

    made = make_protocol(Limits(seconds=7.0, arrival=3.0))
    protocol: Any = made.__new__(made)
    protocol.transport = SimpleNamespace(abort=lambda: None)
    protocol.loop, paused = SimpleNamespace(call_later=call_later), []
    protocol.flow = SimpleNamespace(
        pause_writing=lambda: paused.append(True), resume_writing=lambda: paused.append(False)
    )
    protocol.resume_writing()
    assert (asked, cancelled, paused) == ([], [], [False])
    for number in (1, 2):
        protocol.pause_writing()
        assert asked[number - 1 :] == [(7.0, protocol.transport.abort)] and len(cancelled) == number - 1
        protocol.resume_writing()
        assert cancelled == list(range(1, number + 1))
    assert paused == [False, True, False, True, False]


@alone
async def test_health_looks_at_what_serves() -> None:
    served = Served(Limits(silence=0.2))
    assert await served.ask("/health") == (200, {"status": "ok"})
    served.worker._alive -= 10
    status, answer = await served.ask("/health")
    assert status == 503 and "the engine has not" in answer["error"]["message"]
    served.worker._alive = time.monotonic() + 10
    with held(served.chat, "_render") as (_, calls):
        chat = asyncio.create_task(served.ask(CHAT, {"messages": [{"role": "user", "content": "a"}]}))
        await until(lambda: calls and served.service.threads.busy_seconds > 0.2)
        status, answer = await served.ask("/health")
        assert status == 503 and "reading of a request" in answer["error"]["message"]
    assert (await chat)[0] == 200 and (await served.ask("/health"))[0] == 200


class Transport:
    """What a server's connection is written to; `given` are calls."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.max_size = 0

    def get_extra_info(self, name: str) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name)

    def is_closing(self) -> bool:
        return "close" in self.given or "abort" in self.given

    def write(self, data: bytes) -> None:
        self.given.append(data)

    def __getattr__(self, name: str) -> Any:  # close, abort, pause_reading, …
        return lambda: self.given.append(name)


class Connection:
    """A connection of `make_protocol` to an application that answers without reading the body, or never."""

    def __init__(self, answers: bool = False):
        async def app(scope: Any, receive: Any, send: Any) -> None:
            if not answers:
                await asyncio.sleep(60)
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body"})

        config = uvicorn.Config(app, http=make_protocol(Limits(arrival=3.0)), log_config=None, lifespan="off")
        config.load()
        self.protocol: Any = config.http_protocol_class(config, uvicorn.server.ServerState(), {})
        self.transport = Transport()
        self.protocol.connection_made(self.transport)

    @property
    def state(self) -> tuple[int, bool]:
        """Bytes read at a time, and whether the time of arrival runs."""
        return self.transport.max_size, self.protocol._arrival_timer is not None

    async def take(self, data: bytes) -> tuple[int, bool]:
        self.protocol.data_received(data)
        for _ in range(5):
            await asyncio.sleep(0)  # the application's turn
        return self.state

    @property
    def refusal(self) -> bytes:
        """The status that the protocol itself has answered, once it has closed; b"" if it has not."""
        if self.transport.given[-1:] != ["close"]:
            return b""
        return next(given for given in self.transport.given if isinstance(given, bytes)).split()[1]


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
FEW, MANY = (1 << 11), (1 << 16)


@alone
async def test_a_request_has_its_seconds_from_its_first_byte_to_its_last() -> None:
    connection = Connection()
    when = connection.protocol._arrival_timer.when() - asyncio.get_running_loop().time()
    assert connection.state == (FEW, True) and 2 < when <= 3
    assert await connection.take(HEAD) == (FEW, True)  # the first one's run from the connection's beginning
    # Once the head is there, the application has the request; its body comes in large parts.
    assert await connection.take(b"Content-Length: 10\r\n\r\n12345") == (MANY, False)
    assert await connection.take(b"67890") == (MANY, False)
    assert not connection.transport.given
    connection.protocol.connection_lost(None)


@alone
async def test_the_rest_of_an_answered_request_has_its_seconds_too() -> None:
    connection = Connection(answers=True)
    assert await connection.take(HEAD + b"Content-Length: 10\r\n\r\n12345") == (MANY, True)
    assert b"HTTP/1.1 403 " in connection.transport.given[0]
    timer = connection.protocol._arrival_timer
    assert await connection.take(b"678") == (MANY, True) and connection.protocol._arrival_timer is timer
    assert await connection.take(b"90") == (FEW, False)  # all is there: the next request may take its time to begin
    assert await connection.take(HEAD) == (FEW, True) and connection.protocol._arrival_timer is not timer
    assert await connection.take(b"Content-Length: 10\r\n\r\n") == (MANY, True)
    assert await connection.take(b"1234567890" + HEAD) == (FEW, True)  # with the beginning of the next one
    connection.protocol._end()  # its seconds are over
    assert connection.transport.given[-1] == "close"
    connection.protocol.connection_lost(None)
    assert connection.protocol._arrival_timer is None


@alone
async def test_a_request_that_does_not_arrive_is_refused() -> None:
    connection = Connection()
    await connection.take(HEAD)
    connection.protocol._end()
    assert connection.refusal == b"408"
    written = len(connection.transport.given)
    connection.protocol._end()  # once
    assert len(connection.transport.given) == written


def chunks(size: int, count: int) -> bytes:
    return (b"%x\r\n" % size + b" " * size + b"\r\n") * count


@pytest.mark.parametrize(
    ("size", "count", "status"),
    [(1, 215, b""), (1, 216, b"400"), (16, 512, b""), (16, 513, b"400"), (24, 3000, b""), (100, 3000, b"")],
)
@alone
async def test_chunks_may_have_a_quarter_of_a_body_around_them(size: int, count: int, status: bytes) -> None:
    """And a KiB: a byte has five around it, 16 have six."""
    connection = Connection()
    assert await connection.take(HEAD + b"Transfer-Encoding: chunked\r\n\r\n") == (FEW, False)
    for part in (count // 2, count - count // 2 - 1, 1):
        assert not connection.transport.is_closing()
        await connection.take(chunks(size, part))
    assert connection.refusal == status
    connection.protocol.connection_lost(None)


@pytest.mark.parametrize("more", [0, 1])
@alone
async def test_of_an_answered_request_128_kib_are_read_in_chunks(more: int) -> None:
    """Of each of them."""
    connection = Connection(answers=True)
    for _ in range(2):
        assert await connection.take(HEAD + b"Transfer-Encoding: chunked\r\n\r\n") == (FEW, True)
        assert await connection.take(chunks(1, 20_000)) == (FEW, True)
        assert (await connection.take(b"0\r\n\r\n"))[1] is False
    await connection.take(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    parts = chunks(1, 21_844), chunks(3 + more, 1)
    assert sum(map(len, parts)) == 2**17 + more
    for part in parts:
        assert not connection.transport.is_closing()
        await connection.take(part)
    assert (connection.transport.given[-1] == "abort") == connection.transport.is_closing() == bool(more)
    connection.protocol.connection_lost(None)


@alone
async def test_chunks_are_counted_for_their_own_request() -> None:
    """The rest of a body that was answered early is none of the next one's."""
    connection = Connection(answers=True)
    for _ in range(3):
        await connection.take(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        await connection.take(chunks(4096, 20) + b"0\r\n\r\n")
    assert connection.protocol._framing == 20 * (4096 + 8) + 5
    connection.protocol.app, body = Connection().protocol.app, HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    await connection.take(body)
    await connection.take(chunks(4096, 1))
    assert not connection.transport.is_closing()
    connection.protocol.connection_lost(None)


@alone
async def test_a_connection_waits_for_its_next_request_for_a_time_after_any_answer() -> None:
    """Also after one that came before the request's end."""
    connection = Connection(answers=True)
    await connection.take(HEAD + b"Content-Length: 3\r\n\r\n")
    assert connection.protocol._arrival_timer
    await connection.take(b"abc")
    assert connection.protocol._arrival_timer is None and connection.protocol.timeout_keep_alive_task
    connection.protocol.timeout_keep_alive_handler()
    assert connection.transport.is_closing()
    connection.protocol.connection_lost(None)


@alone
async def test_who_sends_more_while_an_answer_is_made_is_still_seen_to_leave() -> None:
    connection = Connection()
    await connection.take(HEAD + b"Content-Length: 0\r\n\r\n")
    await connection.take(HEAD)
    reading = [given for given in connection.transport.given if given in ("pause_reading", "resume_reading")]
    assert reading[-2:] == ["pause_reading", "resume_reading"]
    await connection.take(b"a" * (2**16 - len(HEAD)))
    assert not connection.transport.is_closing()
    await connection.take(b"a")  # at most so much of it
    assert connection.transport.given[-1] == "abort"
    connection.protocol.connection_lost(None)


@pytest.mark.parametrize("bad", [b"zzz\r\n", b"no request\r\n\r\n"])
@alone
async def test_what_is_no_http_ends_its_connection_and_is_no_error_of_the_server(bad: bytes) -> None:
    connection = Connection(answers=True)
    if bad.startswith(b"z"):  # in a body that was answered before
        await connection.take(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    await connection.take(bad)
    assert connection.transport.is_closing()
    if not bad.startswith(b"z"):
        assert connection.refusal == b"400" and b'{"error": {' in connection.transport.given[0]
    connection.protocol.connection_lost(None)


@pytest.mark.parametrize("together", [True, False])
@alone
async def test_a_request_that_comes_with_the_last_one_has_its_seconds_too(together: bool) -> None:
    connection = Connection(answers=True)
    size, runs = await connection.take(HEAD + b"Content-Length: 0\r\n\r\n" + HEAD[: 20 * together])
    assert (size, runs) == (MANY, together)
    assert await connection.take(HEAD[20 * together :]) == (FEW, True)
    assert await connection.take(b"Content-Length: 0\r\n\r\n") == (MANY, False)
    assert b"".join(given for given in connection.transport.given if isinstance(given, bytes)).count(b" 403 ") == 2
    connection.protocol.connection_lost(None)


def test_drafted_tokens_are_counted_once_however_often_they_are_read() -> None:
    engine: Any = SimpleNamespace(drafts=SimpleNamespace(drafted=0, accepted=0), running=1, waiting=2, shards=2,
                                  slots=4, pages=[SimpleNamespace(number=7, in_use=3)] * 2)  # fmt: skip
    metrics = Metrics(engine)
    for drafted, accepted in ((3, 1), (3, 1), (10, 6)):
        engine.drafts.drafted, engine.drafts.accepted = drafted, accepted
        lines = metrics.text().decode().splitlines()
        expected = {
            "drafted_tokens_total": drafted, "accepted_tokens_total": accepted, "completions_running": 1,
            "completions_waiting": 2, "slots": 8, "cache_pages": 14, "cache_pages_used": 6,
        }  # fmt: skip
        assert {f"bigmac_{name} {value:.1f}" for name, value in expected.items()} <= set(lines)
    engine.drafts = None
    assert "bigmac_drafted_tokens_total 10.0" in metrics.text().decode()


@pytest.mark.parametrize(
    ("seconds", "expected"), [([], 1), ([0.5] * 9, 1), ([11.0], 2), ([11.5], 3), ([5.0] * 99, 5), ([1e6], 60)]
)
def test_who_is_turned_away_waits_as_long_as_recent_requests(seconds: list[float], expected: int) -> None:
    engine: Any = SimpleNamespace()
    metrics = Metrics(engine)
    for second in seconds:
        metrics.count_request(second)
    assert metrics.retry_seconds() == expected


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("localhost", 200), ("LOCALHOST:80", 200), ("a.localhost", 200),
        (socket.gethostname(), 200), ("chat.example", 200), ("evil.example:8000", 403), ("localhost.evil.example", 403),
        ("[", 403),
    ],
)  # fmt: skip
@alone
async def test_a_page_that_gives_its_own_name_to_this_address_is_refused(host: str, status: int) -> None:
    """DNS rebinding: without a key nothing else would keep it out."""
    served = Served(hosts=["Chat.Example"])
    for path, body in (("/v1/models", None), (COMPLETIONS, SHORT)):
        found, answer = await served.ask(path, body, {"host": host})
        assert found == status and (status == 200 or answer["error"]["code"] == "unknown_host")
    assert (await served.ask("/health", headers={"host": host}))[0] == 200
    assert (await Served(key="key").ask("/v1/models", headers={"host": host, "authorization": "Bearer key"}))[0] == 200


@pytest.mark.parametrize("path", ["/v1/completions/", "/health/", "//evil.example/"])
@alone
async def test_a_path_with_another_slash_is_none(path: str) -> None:
    """And not one of the host that the request names."""
    served = Served()
    for body in (None, SHORT):
        status, answer = await served.ask(f"http://127.0.0.1{path}", body, {"host": "evil.example"})
        assert status == 404 and answer["error"]["message"].endswith(f"{path}: Not Found")
    (samples,) = (family.samples for family in served.worker.metrics.requests.collect())
    assert [(sample.labels, sample.value) for sample in samples if sample.name.endswith("_total")] == [
        ({"path": "other", "status": "404"}, 2)
    ]


@pytest.mark.parametrize(("key", "codings"), [("clé", ("utf-8", "latin-1")), ("ключ", ("utf-8",)), ("key", ("ascii",))])
@alone
async def test_a_key_may_be_any_text(key: str, codings: tuple[str, ...]) -> None:
    served = Served(key=key)
    for coding in codings:
        assert (await served.ask("/v1/models", headers={"authorization": b"Bearer " + key.encode(coding)}))[0] == 200
    for other in (b"", b"cl", "clè".encode(), b"cl\xe8"):
        assert (await served.ask("/v1/models", headers={"authorization": b"Bearer " + other}))[0] == 401
    assert (await served.ask("/health"))[0] == 200  # which a load balancer asks


@pytest.mark.parametrize("whole", [True, False])
@alone
async def test_bodies_at_their_limits(whole: bool) -> None:
    """As long as may be, and a byte longer, whether the head says so or not; and of another kind."""
    body = json.dumps(SHORT, allow_nan=False).encode()
    served = Served(Limits(body=len(body)))

    async def parts(content: bytes) -> AsyncIterator[bytes]:
        yield content[:3]
        yield content[3:]

    for content, expected in ((body, 200), (body + b" ", 413)):
        answer = await served.post(COMPLETIONS, content if whole else parts(content))
        assert answer.status_code == expected
    for kind, status in (("Application/JSON; charset=utf-8", 200), ("text/plain", 415), ("", 415)):
        answer = await served.post(COMPLETIONS, body, {"content-type": kind})
        assert answer.status_code == status
    assert served.service._long == 0 and not served.service._arriving


@alone
async def test_a_stream_is_events_until_it_is_done() -> None:
    served = Served()
    answer = await served.post(CHAT, {"messages": MESSAGES, "max_tokens": 2, "stream": True})
    assert (answer.headers["content-type"].split(";")[0], answer.headers["cache-control"]) == (
        "text/event-stream",
        "no-store",
    )
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "aa"
    assert "bigmac_request_seconds_count 1.0" in served.worker.metrics.text().decode()


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (408, "timeout"), (429, "rate_limit_error"),
     (499, "invalid_request_error"), (500, "server_error"), (503, "server_error"), (504, "timeout")],
)  # fmt: skip
def test_kinds_of_errors(status: int, kind: str) -> None:
    """As OpenAI's client reads them; seconds to wait are a header, and who sends too slowly loses the connection."""
    error = ApiError(status, "why", "n", "code", retry=status % 2 * 7)
    assert error.body == {"error": {"message": "why", "type": kind, "param": "n", "code": "code"}}
    waits = {"Retry-After": "7"} if status % 2 else {}
    assert error.headers == waits | ({"Connection": "close"} if status == 408 else {})


BAD: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {"stream_options": {"include_usage": "no"}}, "stream_options"),
    (CHAT, {"stream_options": {"include_obfuscation": 1}}, "stream_options"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETIONS, {"stream_options": {}, "stream": False}, "stream_options"),
    (COMPLETIONS, {"presence_penalty": False}, "presence_penalty"),
    (COMPLETIONS, {"best_of": True}, "best_of"),
    (COMPLETIONS, {"best_of": 1.0}, "best_of"),
    (CHAT, {"max_tokens": "9", "max_completion_tokens": 2}, "max_tokens"),
    (COMPLETIONS, {"stop": "a" * 257}, "stop"),
    (COMPLETIONS, {"model": ["a"]}, "model"),
    (COMPLETIONS, {"ignore_eos": 1}, "ignore_eos"),
]


@pytest.mark.parametrize(("path", "fields", "param"), BAD)
@alone
async def test_values_of_another_type_are_refused(path: str, fields: dict[str, Any], param: str) -> None:
    body = {"prompt": "a"} if path == COMPLETIONS else {"messages": MESSAGES}
    status, answer = await Served().ask(path, body | fields)
    assert status in (400, 404) and answer["error"]["param"] == param, answer


@pytest.mark.parametrize(
    "given", [{"name": "Bob"}, {"prefix": False}, {"reasoning_content": "b"}, {"tool_calls": [{}]}]
)
@alone
async def test_what_is_not_read_of_a_message_is_refused(given: dict[str, Any]) -> None:
    """What says nothing is taken: OpenAI's client gives an answer back with every field that it knows."""
    served, (name,) = Served(), given
    text = {"type": "text", "text": "a"}
    nothing = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    for message, place in (
        (MESSAGES[0] | given, "messages[1]"),
        ({"role": "user", "content": [text, text | given]}, "messages[1].content[1]"),
    ):
        body = {"messages": [{"role": "assistant", "content": "b"} | nothing, message], "max_tokens": 1}
        status, answer = await served.ask(CHAT, body)
        said = f"{place} has the field '{name}', of which nothing is read; leave it out"
        assert (status, answer["error"]["message"], answer["error"]["param"]) == (400, said, "messages")
    body["messages"][1]["content"][1] = text | {"cache_control": None}  # type: ignore[index]
    assert (await served.ask(CHAT, body))[0] == 200


class Fake:
    """`serving.fakes` as a process, inside a `with`."""

    def __init__(self, what: str):
        command = [sys.executable, "-m", "serving.fakes", what]
        self.process = subprocess.Popen(
            command, cwd=pathlib.Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Fake":
        assert self.process.stdout
        self.port = int(self.process.stdout.readline().rpartition(":")[2])
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def send(self, path: str, body: dict[str, Any]) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection


@pytest.mark.parametrize(("what", "code"), [("template", 0), pytest.param("engine", 1, marks=pytest.mark.full)])
def test_a_drained_server_ends_whatever_is_stuck(what: str, code: int) -> None:
    """In a time that is known: that of --drain, and a few seconds of grace; 30 in all by default."""
    with Fake(what) as fake:
        connection = fake.send(CHAT, {"messages": [{"role": "user", "content": "stuck"}], "max_tokens": 20})
        time.sleep(0.5)
        fake.process.send_signal(signal.SIGTERM)
        answer = connection.getresponse()
        assert answer.status == 503 and json.load(answer)["error"]["message"].startswith("the server ends; ")
        connection.close()
        assert fake.process.wait(30) == code
        assert "Traceback" not in fake.process.communicate()[1]
    assert Limits.drain + 5 < 30


@pytest.mark.parametrize("second", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_a_second_signal_ends_it_at_once(second: signal.Signals) -> None:
    with Fake("engine") as fake:
        connection = fake.send(COMPLETIONS, SHORT | {"max_tokens": 20})
        time.sleep(0.5)
        fake.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        fake.process.send_signal(second)
        _, said = fake.process.communicate(timeout=LIMIT)
        assert fake.process.returncode == 128 + second and said.endswith("ted\n"), said
        connection.close()
