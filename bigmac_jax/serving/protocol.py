"""HTTP connections whose requests have to arrive in time."""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from bigmac_jax.serving.limits import ApiError


def protocol(seconds: float, taking: float) -> type[H11Protocol]:
    """Connections that are closed where a request does not arrive in time. uvicorn bounds what lies between two alone.

    Args:
      seconds: for the head of a request, of the first from the beginning, of others from their first byte; and for the
        rest of a body once its request was answered.
      taking: for a client to take something of an answer that is longer than buffers hold.
    """

    class Timed(H11Protocol):
        _late: asyncio.TimerHandle | None = None
        _full: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            of_last = self._answered
            super().data_received(data)
            begun = self.conn.their_state is h11.IDLE and (not of_last or bool(self.conn.trailing_data[0]))
            if begun or self._answered:
                self._wait()
            else:
                self._forget()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            # The beginning of the next request may have come with the last one.
            if self._answered or (self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]):
                self._wait()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._full = self.loop.call_later(taking, self.transport.abort)

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
