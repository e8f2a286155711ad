"""What a server accepts, and the errors that it answers."""

import math
from dataclasses import dataclass

from bigmac_jax.config import ConfigError


@dataclass(frozen=True)
class Limits:
    """How much a server accepts, and how long it waits."""

    body: int = 4 << 20  # bytes of a request's body
    queue: int = 256  # completions that wait beside those that the slots hold; a request with more is answered 429
    choices: int = 16  # completions of one request: prompts × n
    seconds: float = 600.0  # from a request's arrival to its last token
    arrival: float = 30.0  # seconds for a request's head to arrive, and for its body
    drain: float = 20.0  # seconds that running requests get when the server is told to end
    long: int = 16  # bodies' worth of bytes that wait to be read, of requests longer than `work_threads.SHORT`
    silence: float = 60.0  # seconds of one engine step, or of reading one request, after which /health answers 503


def finite_seconds(flag: str, value: float) -> float:
    """The value of a flag; ConfigError for what is no number of seconds."""
    if not math.isfinite(value):
        raise ConfigError(f"--{flag}={value} must be a number of seconds, as 30")
    return value


class ApiError(Exception):
    """An error that a request is answered with, in OpenAI's format.

    Args:
      param: the field of the request that is wrong.
      retry: seconds after which the client should ask again; 0 = not said.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int = 0):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    @property
    def body(self) -> dict[str, object]:
        """The JSON object of the answer."""
        kinds = {401: "authentication_error", 408: "timeout", 429: "rate_limit_error", 504: "timeout"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of the answer."""
        closing = {"Connection": "close"} if self.status == 408 else {}  # the rest of the request may yet come
        return closing | ({"Retry-After": str(self.retry)} if self.retry else {})
