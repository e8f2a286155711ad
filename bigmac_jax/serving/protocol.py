"""HTTP connections whose requests have to arrive in time."""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from bigmac_jax.serving.limits import ApiError


def protocol(seconds: float) -> type[H11Protocol]:
    """Connections that are closed where the head of a request does not arrive within `seconds`: of the first from the
    beginning, of others from their first byte. uvicorn bounds what lies between two requests alone."""

    class Timed(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._forget()
            else:
                self._wait()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            # The beginning of the next request may have come with the last one.
            if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

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
            error = ApiError(408, f"the request did not arrive within {seconds:g} s")
            body = json.dumps(error.body, allow_nan=False).encode()
            headers = [
                ("content-type", "application/json"),
                ("connection", "close"),
                ("content-length", str(len(body))),
            ]
            events = h11.Response(status_code=408, headers=headers), h11.Data(data=body), h11.EndOfMessage()
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
            self.transport.close()

    return Timed
