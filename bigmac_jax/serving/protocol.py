"""HTTP connections whose requests have to arrive in time."""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from bigmac_jax.serving.limits import ApiError, Limits

# Bytes that are taken from a connection at a time: where they may be many chunks, of which each takes 10 µs, and else.
_FEW, _MANY = 1 << 11, 1 << 16
# Bytes between the chunks of a body, and a quarter as many as it has itself; and all, where nobody reads it any more.
_BETWEEN, _BEHIND = 1 << 10, 1 << 17


def protocol(limits: Limits) -> type[H11Protocol]:
    """Connections that are closed where a request does not arrive in time, or nobody takes the answer; uvicorn bounds
    what lies between two requests alone. So are those whose body comes in chunks of a few bytes.

    The head of a request has `arrival` seconds, of the first from the beginning, of others from their first byte; so
    has the rest of a body whose request was answered before.
    """
    seconds = limits.arrival

    class Timed(H11Protocol):
        _late: asyncio.TimerHandle | None = None
        _full: asyncio.TimerHandle | None = None
        _own = _between = 0  # bytes of a body, and of its chunks' sizes

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._take(_FEW)
            self._wait()

        def data_received(self, data: bytes) -> None:
            of_last, cycle, before = self._answered, self.cycle, self._arrived
            super().data_received(data)
            if self.cycle is cycle and self._chunked:
                self._own += self._arrived - before
                self._between += len(data) - self._arrived + before
                if self._between > (_BEHIND if of_last else _BETWEEN + self._own // 4):
                    return self._refuse(
                        ApiError(400, "the body's chunks have a few bytes each; send it in longer ones")
                    )
            self._take(_FEW if self._chunked or self.conn.their_state is h11.IDLE else _MANY)
            begun = self.conn.their_state is h11.IDLE and (not of_last or bool(self.conn.trailing_data[0]))
            if begun or self._answered:
                self._wait()
            else:
                self._forget()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._own = self._between = 0
            # The beginning of the next request may have come with the last one.
            if self._answered or (self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]):
                self._wait()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._full = self.loop.call_later(limits.seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._full is not None:
                self._full.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            if self._full is not None:
                self._full.cancel()
            super().connection_lost(exc)

        def _take(self, most: int) -> None:
            transport: Any = self.transport
            transport.max_size = most

        @property
        def _arrived(self) -> int:
            """Bytes of the body that nobody has taken yet."""
            return len(self.cycle.body) if self.cycle else 0

        @property
        def _chunked(self) -> bool:
            return any(name == b"transfer-encoding" for name, _ in self.headers or ())

        @property
        def _answered(self) -> bool:
            """Whether the body of a request is not there yet, which was answered before."""
            return self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE

        def _wait(self) -> None:
            if self._late is None and not self.transport.is_closing():
                self._late = self.loop.call_later(seconds, self._end)

        def _forget(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _end(self) -> None:
            self._refuse(ApiError(408, f"the request did not arrive within {seconds:g} s"))

        def _refuse(self, error: ApiError) -> None:
            """Instead of what the application would answer, and the last answer of the connection."""
            if self.transport.is_closing():
                return
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                return self.transport.abort()
            body = json.dumps(error.body, allow_nan=False).encode()
            headers = [
                ("content-type", "application/json"),
                ("connection", "close"),
                ("content-length", str(len(body))),
            ]
            events = h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
            self.transport.close()

    return Timed
