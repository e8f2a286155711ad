"""The HTTP side of the server: routes, the key, bodies, streams, errors. What a request means is in `api`."""

import asyncio
import functools
import hmac
import importlib.resources
import ipaddress
import json
import logging
import socket
import time
import urllib.parse
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
from bigmac_jax.serving.answers import Answer
from bigmac_jax.serving.dialogue import Dialogue
from bigmac_jax.serving.limits import ApiError, Limits
from bigmac_jax.serving.prometheus import Metrics
from bigmac_jax.serving.work_threads import SHORT, Check, Readers, forget_frames
from bigmac_jax.serving.worker import Ticket, Worker

_log = logging.getLogger(__name__)
_GONE = 499  # nobody reads it: the client has closed the connection
Handler = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


class Service:
    """The endpoints around one worker.

    Args:
      model: the name that requests call it by.
      key: what /v1 and /metrics ask for as a bearer token; "" asks for nothing.
      hosts: names that the server may be called by, if it has no key, beside addresses, localhost and this machine's.
    """

    def __init__(
        self,
        generator: Generator,
        worker: Worker,
        chat: Dialogue,
        model: str,
        limits: Limits,
        metrics: Metrics,
        key: str = "",
        hosts: Sequence[str] = (),
    ):
        self._generator, self._worker, self._chat, self._model = generator, worker, chat, model
        self._limits, self._metrics = limits, metrics
        # A header has bytes, and of what is not ASCII some clients make UTF-8, others Latin-1.
        self._keys = _as_bytes(key)
        self._hosts = {"", "localhost", socket.gethostname().lower(), *map(str.lower, hosts)}
        self.readers, self._long = Readers(), 0  # bytes of long requests that have not been read
        self._created = int(time.time())
        self._show = functools.lru_cache(1 << 16)(lambda token: generator.tokenizer.decode([token]))

    def app(self) -> Starlette:
        def route(path: str, handler: Handler, method: str = "GET", open_to_all: bool = False) -> Route:
            return Route(path, self._guarded(path, handler, open_to_all), methods=[method])

        return Starlette(
            routes=[
                route("/v1/completions", functools.partial(self._complete, chat=False), "POST"),
                route("/v1/chat/completions", functools.partial(self._complete, chat=True), "POST"),
                route("/v1/models", self._models),
                route("/v1/models/{name:path}", self._one_model),
                route("/metrics", self._text_of_metrics),
                route("/health", self._health, open_to_all=True),
                route("/", self._page, open_to_all=True),
            ],
            exception_handlers={HTTPException: self._no_route},
        )

    def _guarded(self, path: str, handler: Handler, open_to_all: bool) -> Handler:
        """With the key checked, and errors as JSON."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_host(request, path)
                if not open_to_all:
                    self._check_key(request)
                response = await handler(request)
            except ApiError as error:
                response = _failed(error)
                forget_frames(error)
            except ClientDisconnect as error:
                response = Response(status_code=_GONE)
                forget_frames(error)
            except Exception as error:
                _log.error("%s failed: %s: %s", path, type(error).__name__, " ".join(str(error).split())[:500])
                response = _failed(ApiError(500, "the server failed at this request; its log says more"))
                forget_frames(error)
            self._metrics.requests.labels(path, str(response.status_code)).inc()
            return response

        return guarded

    async def _no_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self._metrics.requests.labels("other", str(error.status_code)).inc()
        return _failed(ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}"))

    def _check_key(self, request: Request) -> None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        found = [hmac.compare_digest(given.encode("latin-1"), key) for key in self._keys]
        if self._keys and not (kind.lower() == "bearer" and any(found)):
            raise ApiError(401, "this server wants its key: Authorization: Bearer KEY", code="invalid_api_key")

    def _check_host(self, request: Request, path: str) -> None:
        """Without a key: a page of another site may give its own name this address (DNS rebinding), and the browser
        then lets it read what the server answers. It can't do that with an address, or with a name of this machine."""
        if self._keys or path == "/health":
            return
        given = request.headers.get("host", "")
        try:
            name = urllib.parse.urlsplit(f"//{given}").hostname or ""
        except ValueError:
            name = given
        if name not in self._hosts and not name.endswith(".localhost") and not _is_address(name):
            raise ApiError(
                403, f"this server does not go by {name[:80]!r}; --allow_host={name[:80]} lets it", code="unknown_host"
            )

    async def _complete(self, request: Request, chat: bool) -> Response:
        arrived = time.monotonic()
        self._worker.check_queue(1)
        asked = await self._within(arrived, self._asked(request, chat))
        jobs = [
            self._generator.job(prompt, asked.sampling, number) for prompt in asked.prompts for number in range(asked.n)
        ]
        answer, ticket = Answer(asked, self._model, self._show), self._worker.submit(jobs, arrived)
        if asked.stream:
            return _Events(self._events(answer, ticket), lambda: self._end(ticket))
        try:
            return Response(await _unless_gone(request, self._whole(answer, ticket)), media_type="application/json")
        finally:
            self._end(ticket)

    async def _within(self, arrived: float, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, if it is there in the time of a request; raises ApiError."""
        try:
            async with asyncio.timeout(arrived + self._limits.seconds - time.monotonic()):
                return await work
        except TimeoutError:
            raise ApiError(
                504, f"the request took longer than {self._limits.seconds:g} s", code="request_timeout"
            ) from None

    async def _asked(self, request: Request, chat: bool) -> api.Asked:
        """What a request asks for, read beside the event loop, unless the client leaves."""
        long = 0

        def took(more: int) -> None:
            nonlocal long
            if self._long + more > self._limits.long * self._limits.body:
                raise self._worker.full(f"{self._long} bytes of long requests are being read")
            self._long, long = self._long + more, long + more

        try:
            body = await self._body(request, took)
            if self.readers.waiting >= self._worker.room:
                raise self._worker.full(f"{self.readers.waiting} requests wait to be read")
            work = functools.partial(self._read, body, chat)
            return await _unless_gone(request, self.readers.do(len(body), work))
        finally:
            self._long -= long

    def _read(self, body: bytes, chat: bool, check: Check) -> api.Asked:
        fields = api.parse(body)
        if (name := fields.get("model")) is not None and name != self._model:
            raise self._no_model(name) if isinstance(name, str) else ApiError(400, "model must be a text", "model")
        generator, longest = self._generator, self._worker.engine.longest
        return api.asked(
            fields,
            self._chat if chat else None,
            generator.tokenizer,
            generator.vocab_size,
            longest,
            self._limits,
            check,
        )

    async def _body(self, request: Request, took: Callable[[int], None]) -> bytes:
        """Args: what is told how many bytes there are more, beyond the first `SHORT`."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what another site's page can't send here unasked
            raise ApiError(415, f"the body's content-type must be application/json, not {kind[:80]!r}")
        most = ApiError(413, f"the body must be at most {self._limits.body} bytes")
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._limits.body:
            raise most
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.arrival):
                async for part in request.stream():
                    body += part
                    if len(body) > self._limits.body:
                        raise most
                    if len(body) > SHORT:
                        took(min(len(part), len(body) - SHORT))
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self._limits.arrival:g} s") from None
        return bytes(body)

    async def _whole(self, answer: Answer, ticket: Ticket) -> bytes:
        steps = await self._all(ticket)
        tokens = sum(map(len, steps))
        size = 100 * tokens * (1 + answer.asked.sampling.logprobs)

        def written(check: Check) -> bytes:
            whole = answer.whole(steps, _used(answer.asked, ticket))
            return json.dumps(whole, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()

        return await self._within(ticket.started, self.readers.do(size, written))

    async def _all(self, ticket: Ticket) -> list[list[Step]]:
        found: list[list[Step]] = [[] for _ in ticket.jobs]
        async for number, step in self._steps(ticket):
            found[number].append(step)
        return found

    async def _steps(self, ticket: Ticket) -> AsyncIterator[tuple[int, Step]]:
        """Until the last completion ends.

        Raises:
          ApiError: the time is over, the engine has failed, or the model gives no numbers.
        """
        left = len(ticket.jobs)
        while left:
            got = await self._within(ticket.started, ticket.steps.get())
            if got is None:
                raise ApiError(500, "the engine has failed; the server's log says why")
            if got[1].reason == BROKEN:
                raise ApiError(500, "the model gives no numbers for this prompt: its activations overflow")
            left -= bool(got[1].reason)
            yield got

    async def _events(self, answer: Answer, ticket: Ticket) -> AsyncIterator[str]:
        """Server-sent events."""
        try:
            for piece in answer.opening():
                yield _event(piece)
            async for number, step in self._steps(ticket):
                if more := answer.piece(number, step):
                    yield _event(more)
            for piece in answer.closing(_used(answer.asked, ticket)):
                yield _event(piece)
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)

    def _end(self, ticket: Ticket) -> None:
        self._worker.cancel(ticket)
        self._metrics.ended(time.monotonic() - ticket.started)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _one_model(self, request: Request) -> Response:
        if (name := request.path_params["name"]) != self._model:
            raise self._no_model(name)
        return JSONResponse(self._described())

    def _no_model(self, name: str) -> ApiError:
        return ApiError(404, f"there is no model {name[:80]!r}, but {self._model!r}", "model", "model_not_found")

    def _described(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": self._created, "owned_by": "bigmac_jax",
                "max_model_len": self._worker.engine.longest}  # fmt: skip

    async def _text_of_metrics(self, request: Request) -> Response:
        engine, metrics = self._worker.engine, self._metrics
        if engine.drafts:
            metrics.drafts(engine.drafts.drafted, engine.drafts.accepted)
        metrics.running.set(engine.running)
        metrics.waiting.set(engine.waiting)
        metrics.slots.set(engine.shards * engine.slots)
        metrics.pages.set(sum(pages.number for pages in engine.pages))
        metrics.pages_used.set(sum(pages.in_use for pages in engine.pages))
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    async def _health(self, request: Request) -> Response:
        """Whether requests are served: also if the event loop answers, what it hands them to may not go on."""
        if self._worker.failed:
            raise ApiError(503, "the engine has failed")
        for what, silence in (("engine", self._worker.silence), ("reading of a request", self.readers.silence)):
            if silence > self._limits.silence:
                raise ApiError(503, f"the {what} has not come to an end of its step for {silence:.0f} s")
        return JSONResponse({"status": "ok"})

    async def _page(self, request: Request) -> Response:
        page = importlib.resources.files("bigmac_jax.serving") / "web" / "chat.html"
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(page.read_text(), headers={"Content-Security-Policy": policy})


class _Events(StreamingResponse):
    """A stream that ends what it is of, however it ends: also if nobody ever read from it."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], object]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; raises ClientDisconnect as soon as the client has closed the connection."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


def _as_bytes(key: str) -> list[bytes]:
    if not key:
        return []
    try:
        return [key.encode(), key.encode("latin-1")]
    except UnicodeEncodeError:
        return [key.encode()]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _used(asked: api.Asked, ticket: Ticket) -> api.Fields:
    prompts = [len(prompt) for prompt in asked.prompts]
    reused = sum(job.reused for job in ticket.jobs[:: asked.n])
    return api.usage(prompts, reused, sum(len(job.text.tokens) for job in ticket.jobs))


def _event(piece: dict[str, Any]) -> str:
    return f"data: {json.dumps(piece, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"


def _failed(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)
