"""HTTP connections whose requests have to arrive in time."""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from bigmac_jax.serving.limits import ApiError, Limits

_READ = 1 << 14  # bytes that are taken from a connection at a time: of the shortest chunks they take 15 ms
_BESIDE = 1 << 17  # bytes of a request in chunks that are not of its body: its head, their sizes, what nobody takes


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
        _beside = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.max_size = _READ
            self._wait()

        def data_received(self, data: bytes) -> None:
            of_last, cycle, before = self._answered, self.cycle, self._arrived
            super().data_received(data)
            self._beside += len(data) - self._arrived + (before if self.cycle is cycle else 0)
            if self._beside > _BESIDE and any(name == b"transfer-encoding" for name, _ in self.headers or ()):
                self.transport.abort()
            begun = self.conn.their_state is h11.IDLE and (not of_last or bool(self.conn.trailing_data[0]))
            if begun or self._answered:
                self._wait()
            else:
                self._forget()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._beside = 0
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

        @property
        def _arrived(self) -> int:
            """Bytes of the body that nobody has taken yet."""
            return len(self.cycle.body) if self.cycle else 0

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
            if self.transport.is_closing():
                return
            if self._answered:
                return self.transport.abort()
            error = ApiError(408, f"the request did not arrive within {seconds:g} s")
            body = json.dumps(error.body).encode()
            headers = [
                ("content-type", "application/json"),
                ("connection", "close"),
                ("content-length", str(len(body))),
            ]
            events = h11.Response(status_code=408, headers=headers), h11.Data(data=body), h11.EndOfMessage()
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
            self.transport.close()

    return Timed
