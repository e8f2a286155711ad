"""HTTP connections that are closed on slow and wasteful clients."""

import asyncio
import json
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from bigmac_jax.serving.limits import ApiError, Limits

# Bytes read from a connection at a time: _FEW where they may be many chunks, which take 10 µs each, else _MANY.
_FEW, _MANY = 1 << 11, 1 << 16
# Bytes that may frame a body's chunks beyond a quarter of its own bytes; and in all, once the request was answered.
_FRAMING, _FRAMING_UNREAD = 1 << 10, 1 << 17
# Bytes that may come while a request is answered: the next ones of the connection. Unread, they would hide its end.
_AHEAD = 1 << 16


def make_protocol(limits: Limits) -> type[H11Protocol]:
    """The protocol class for uvicorn: it closes a connection whose request does not arrive in time, whose answer nobody
    takes, or whose body comes in chunks of a few bytes. (uvicorn itself bounds only the time between requests.)

    A request's head has `limits.arrival` seconds: the first one's from the connection's beginning, others' from their
    first byte. So has the rest of a body whose request was answered before.
    """

    class Limited(_LimitedProtocol):
        pass

    Limited.limits = limits
    return Limited


class _LimitedProtocol(H11Protocol):
    limits: ClassVar[Limits]
    _arrival_timer: asyncio.TimerHandle | None = None
    _writing_timer: asyncio.TimerHandle | None = None
    _body = _framing = 0  # bytes of the current body, and of what frames its chunks

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._read_at_most(_FEW)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        was_answered, cycle, before = self._answered, self.cycle, self._unread
        super().data_received(data)
        if len(self.conn.trailing_data[0]) > _AHEAD:
            return self.transport.abort()
        if self.conn.their_state is h11.DONE:
            self.flow.resume_reading()  # or nobody would see that the client has left
        if self.cycle is not cycle:
            self._body = self._framing = 0
        elif self._chunked:
            self._body += self._unread - before
            self._framing += len(data) - self._unread + before
            if self._framing > (_FRAMING_UNREAD if was_answered else _FRAMING + self._body // 4):
                return self._refuse(ApiError(400, "the body's chunks have a few bytes each; send it in longer ones"))
        idle = self.conn.their_state is h11.IDLE
        self._read_at_most(_FEW if self._chunked or idle else _MANY)
        if self._answered or (idle and (not was_answered or self.conn.trailing_data[0])):
            self._start_timer()
        else:
            self._stop_timer()
            if idle and was_answered:  # uvicorn starts it with an answer, and stops it with any byte
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._body = self._framing = 0
        # The beginning of the next request may have come with the last one.
        if self._answered or (self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]):
            self._start_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing_timer = self.loop.call_later(self.limits.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing_timer is not None:
            self._writing_timer.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._writing_timer is not None:
            self._writing_timer.cancel()
        super().connection_lost(exc)

    @property
    def _unread(self) -> int:
        """Bytes of the body that the application has not taken yet."""
        return len(self.cycle.body) if self.cycle else 0

    @property
    def _chunked(self) -> bool:
        return any(name == b"transfer-encoding" for name, _ in self.headers or ())

    @property
    def _answered(self) -> bool:
        """Whether the request was answered before its body has arrived."""
        return self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE

    def _read_at_most(self, size: int) -> None:
        transport: Any = self.transport
        transport.max_size = size

    def _start_timer(self) -> None:
        if self._arrival_timer is None and not self.transport.is_closing():
            self._arrival_timer = self.loop.call_later(self.limits.arrival, self._end)

    def _stop_timer(self) -> None:
        if self._arrival_timer is not None:
            self._arrival_timer.cancel()
            self._arrival_timer = None

    def _end(self) -> None:
        self._refuse(ApiError(408, f"the request did not arrive within {self.limits.arrival:g} s"))

    def _refuse(self, error: ApiError) -> None:
        """Answers instead of the application, and closes the connection."""
        if self.transport.is_closing():
            return
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return self.transport.abort()
        body = json.dumps(error.body, allow_nan=False).encode()
        headers = [("content-type", "application/json"), ("connection", "close"), ("content-length", str(len(body)))]
        events = h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()
