"""The HTTP side of the server: routes, bodies, streams and errors. What a request means is in `api`."""

import asyncio
import contextlib
import dataclasses
import functools
import importlib.resources
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from bigmac_jax.inference import Generator
from bigmac_jax.inference.jobs import Step
from bigmac_jax.inference.text import BROKEN
from bigmac_jax.serving import api
from bigmac_jax.serving.access import Access
from bigmac_jax.serving.answers import Answer, name_token
from bigmac_jax.serving.dialogue import Dialogue
from bigmac_jax.serving.limits import ApiError
from bigmac_jax.serving.work_threads import SHORT, Check, WorkThreads, forget_frames
from bigmac_jax.serving.worker import Ticket, Worker, ended

_log = logging.getLogger(__name__)
_GONE = 499  # nobody reads it: the client has closed the connection
Handler = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


class Service:
    """The endpoints of a server. Must be made inside the event loop.

    Args:
      model: the name that requests call the model by.
      key, hosts: who may use it, as for `Access`; a key is for /v1 and /metrics.
    """

    def __init__(
        self, generator: Generator, worker: Worker, chat: Dialogue, model: str, key: str, hosts: Sequence[str]
    ):
        self._generator, self._worker, self._chat, self._model = generator, worker, chat, model
        choices = min(worker.limits.choices, worker.capacity)  # more would never fit
        self._limits, self._metrics = dataclasses.replace(worker.limits, choices=choices), worker.metrics
        self._access = Access(key, hosts)
        self.threads = WorkThreads()
        self._long = 0  # bytes of long requests that have not been read
        self._arriving: set[asyncio.Timeout] = set()  # the time that bodies still have
        self._created = int(time.time())
        self._token_name = functools.lru_cache(1 << 16)(functools.partial(name_token, generator.tokenizer))

    def app(self) -> Starlette:
        """The ASGI application."""

        def route(path: str, handler: Handler, method: str = "GET", public: bool = False) -> Route:
            return Route(path, self._guard(path, handler, public), methods=[method])

        app = Starlette(
            routes=[
                route("/v1/completions", functools.partial(self._complete, chat=False), "POST"),
                route("/v1/chat/completions", functools.partial(self._complete, chat=True), "POST"),
                route("/v1/models", self._list_models),
                route("/v1/models/{name:path}", self._show_model),
                route("/metrics", self._show_metrics),
                route("/health", self._check_health, public=True),
                route("/", self._show_page, public=True),
            ],
            exception_handlers={HTTPException: self._refuse_route},
        )
        app.router.redirect_slashes = False  # to wherever the Host header says, which nothing has checked there
        return app

    def end(self) -> None:
        """Ends all requests with the error that says so, those whose body arrives among them."""
        self._worker.end_requests()
        for left in self._arriving:
            if not left.expired():
                left.reschedule(0)

    def _guard(self, path: str, handler: Handler, public: bool) -> Handler:
        """The handler behind the checks of access, with errors as JSON."""

        async def guarded(request: Request) -> Response:
            try:
                if path != "/health":
                    self._access.check_host(request)
                if not public:
                    self._access.check_key(request)
                response = await handler(request)
            except Exception as error:
                response = _error_response(path, error)
                forget_frames(error)
            self._metrics.requests.labels(path, str(response.status_code)).inc()
            return response

        return guarded

    async def _refuse_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self._metrics.requests.labels("other", str(error.status_code)).inc()
        path = request.url.path[:200]
        return _error_response(path, ApiError(error.status_code, f"{request.method} {path}: {error.detail}"))

    async def _complete(self, request: Request, chat: bool) -> Response:
        arrived = time.monotonic()
        self._worker.check_queue(1)
        asked = await self._in_time(arrived, self._read(request, chat))
        # Each completion draws with its own number, so that equal prompts of a request don't give equal texts.
        prompts = [prompt for prompt in asked.prompts for _ in range(asked.n)]
        jobs = [self._generator.job(prompt, asked.sampling, number, chat) for number, prompt in enumerate(prompts)]
        answer = Answer(asked, jobs, self._model, self._token_name, self._chat.opening if chat else "")
        ticket = self._worker.submit(jobs, arrived)
        if asked.stream:
            return _EventStream(self._events(answer, ticket), lambda: self._end(ticket))
        try:
            whole = await _unless_gone(request, self._worker.over, self._whole(answer, ticket))
            return Response(whole, media_type="application/json")
        finally:
            self._end(ticket)

    async def _in_time(self, arrived: float, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; raises ApiError when the time of the request is over."""
        try:
            async with asyncio.timeout(arrived + self._limits.seconds - time.monotonic()):
                return await work
        except TimeoutError:
            message = f"the request took longer than {self._limits.seconds:g} s"
            raise ApiError(504, message, code="request_timeout") from None

    async def _read(self, request: Request, chat: bool) -> api.CompletionRequest:
        """Receives a request's body and parses it in a thread, unless the client leaves."""
        long = 0

        def count_long(size: int) -> None:
            nonlocal long
            if self._long + size > self._limits.long * self._limits.body:
                raise self._worker.full(f"{self._long} bytes of long requests are being read")
            self._long, long = self._long + size, long + size

        try:
            body = await self._receive(request, count_long)
            if self.threads.waiting >= self._worker.capacity:
                raise self._worker.full(f"{self.threads.waiting} requests wait to be read")
            parse = functools.partial(self._parse, body, chat)
            return await _unless_gone(request, self._worker.over, self.threads.run(len(body), parse))
        finally:
            self._long -= long

    async def _receive(self, request: Request, count_long: Callable[[int], None]) -> bytes:
        """The body; calls `count_long` with the size of each part beyond the first `SHORT` bytes."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what another site's page can't send here unasked
            raise ApiError(415, f"the body's content-type must be application/json, not {kind[:80]!r}")
        too_long = ApiError(413, f"the body must be at most {self._limits.body} bytes")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._limits.body:
            raise too_long
        body = bytearray()
        try:
            arrival = 0 if self._worker.over.is_set() else self._limits.arrival
            async with asyncio.timeout(arrival) as left, self._counted(left):
                async for part in request.stream():
                    body += part
                    if len(body) > self._limits.body:
                        raise too_long
                    if len(body) > SHORT:
                        count_long(min(len(part), len(body) - SHORT))
        except TimeoutError:
            if self._worker.over.is_set():
                raise ended() from None
            raise ApiError(408, f"the body did not arrive within {self._limits.arrival:g} s") from None
        return bytes(body)

    @contextlib.asynccontextmanager
    async def _counted(self, left: asyncio.Timeout) -> AsyncIterator[None]:
        self._arriving.add(left)
        try:
            yield
        finally:
            self._arriving.remove(left)

    def _parse(self, body: bytes, chat: bool, check: Check) -> api.CompletionRequest:
        fields = api.parse_body(body)
        if (name := fields.get("model")) is not None and name != self._model:
            raise self._unknown_model(name) if isinstance(name, str) else ApiError(400, "model must be a text", "model")
        generator, longest = self._generator, self._worker.engine.longest
        dialogue = self._chat if chat else None
        return api.parse_request(
            fields, dialogue, generator.tokenizer, generator.vocab_size, longest, self._limits, check
        )

    async def _whole(self, answer: Answer, ticket: Ticket) -> bytes:
        steps: list[list[Step]] = [[] for _ in ticket.jobs]
        async for number, step in self._steps(ticket):
            steps[number].append(step)
        size = 100 * sum(map(len, steps)) * (1 + answer.request.sampling.logprobs)  # about
        return await self._in_time(ticket.started, self.threads.run(size, lambda _: _json(answer.build(steps))))

    async def _steps(self, ticket: Ticket) -> AsyncIterator[tuple[int, Step]]:
        """The steps of a request until its last completion ends, each with the number of its completion.

        Raises:
          ApiError: the time is over, the engine has failed, or the logits are not finite.
        """
        left = len(ticket.jobs)
        while left:
            item = await self._in_time(ticket.started, ticket.steps.get())
            if isinstance(item, ApiError):
                raise item
            if item[1].reason == BROKEN:
                raise ApiError(500, "the model gives no numbers for this prompt: its activations overflow")
            left -= bool(item[1].reason)
            yield item

    async def _events(self, answer: Answer, ticket: Ticket) -> AsyncIterator[bytes]:
        """The server-sent events of a stream."""
        try:
            for chunk in answer.first_chunks():
                yield _event(chunk)
            async for number, step in self._steps(ticket):
                if more := answer.chunk(number, step):
                    yield _event(more)
            for chunk in answer.last_chunks():
                yield _event(chunk)
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)

    def _end(self, ticket: Ticket) -> None:
        self._worker.cancel(ticket)
        self._metrics.count_request(time.monotonic() - ticket.started)

    async def _list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._describe_model()]})

    async def _show_model(self, request: Request) -> Response:
        if (name := request.path_params["name"]) != self._model:
            raise self._unknown_model(name)
        return JSONResponse(self._describe_model())

    def _unknown_model(self, name: str) -> ApiError:
        return ApiError(404, f"there is no model {name[:80]!r}, but {self._model!r}", "model", "model_not_found")

    def _describe_model(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": self._created, "owned_by": "bigmac_jax",
                "max_model_len": self._worker.engine.longest}  # fmt: skip

    async def _show_metrics(self, request: Request) -> Response:
        return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _check_health(self, request: Request) -> Response:
        """Whether requests are served: the event loop may answer although the threads behind it are stuck."""
        if self._worker.failed:
            raise ApiError(503, "the engine has failed")
        threads = {"engine": self._worker.silent_seconds, "reading of a request": self.threads.busy_seconds}
        for name, seconds in threads.items():
            if seconds > self._limits.silence:
                raise ApiError(503, f"the {name} has not come to an end of its step for {seconds:.0f} s")
        return JSONResponse({"status": "ok"})

    async def _show_page(self, request: Request) -> Response:
        page = importlib.resources.files("bigmac_jax.serving") / "web" / "chat.html"
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(page.read_text(), headers={"Content-Security-Policy": policy})


class _EventStream(StreamingResponse):
    """A stream of events that calls `end` however it ends, also if nobody ever read from it."""

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], object]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def _unless_gone(request: Request, over: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; cancels it and raises ClientDisconnect when the client closes the connection, or the error
    of the server's end."""

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    others = leaving, _ = asyncio.ensure_future(wait_for_disconnect()), asyncio.ensure_future(over.wait())
    try:
        await asyncio.wait((working, *others), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect if leaving.done() else ended()
    finally:
        for task in (working, *others):
            task.cancel()


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + _json(chunk) + b"\n\n"


def _error_response(path: str, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=_GONE)
    if not isinstance(error, ApiError):
        _log.error("%s failed: %s: %s", path, type(error).__name__, " ".join(str(error).split())[:500])
        error = ApiError(500, "the server failed at this request; its log says more")
    return JSONResponse(error.body, error.status, error.headers)
