"""What a server takes on, and how it says no."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of a server."""

    body: int = 4 << 20  # bytes of a request
    queue: int = 256  # requests that wait for a slot; one more is answered 429
    choices: int = 16  # completions of one request: prompts × n
    seconds: float = 600.0  # from a request's arrival to its last token
    arrival: float = 30.0  # for its head to arrive, and for its body
    drain: float = 20.0  # seconds that running requests get when the server is told to end
    long: int = 16  # bodies' worth of bytes of requests longer than `reading.SHORT` that wait to be read, at most
    silence: float = 60.0  # seconds without a step of the engine, or at reading one request, until /health says so


class ApiError(Exception):
    """A request that is answered with an error, as OpenAI's clients read it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int = 0):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry = retry  # seconds; 0 = it isn't said

    @property
    def body(self) -> dict[str, object]:
        kinds = {401: "authentication_error", 408: "timeout", 429: "rate_limit_error", 504: "timeout"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        closing = {"Connection": "close"} if self.status == 408 else {}  # the rest of it may yet come
        return closing | ({"Retry-After": str(self.retry)} if self.retry else {})
