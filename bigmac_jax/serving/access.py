"""Who may use a server: by its key, or without one by the name that it is called."""

import contextlib
import hmac
import ipaddress
import socket
import urllib.parse
from collections.abc import Sequence

from starlette.requests import Request

from bigmac_jax.serving.limits import ApiError


class Access:
    """Checks who sends a request.

    Args:
      key: the bearer token that requests must bring; "" asks for none.
      hosts: names that a server without a key may be called by, beside addresses, localhost and this machine's name.
    """

    def __init__(self, key: str, hosts: Sequence[str]):
        self._keys: set[bytes] = set()
        for coding in ("utf-8", "latin-1") if key else ():  # clients differ in how they write what is not ASCII
            with contextlib.suppress(UnicodeEncodeError):
                self._keys.add(key.encode(coding))
        self._hosts = {"", "localhost", socket.gethostname().lower(), *map(str.lower, hosts)}

    def check_key(self, request: Request) -> None:
        """Raises ApiError if the key is missing or wrong."""
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        equal = [hmac.compare_digest(key.encode("latin-1"), own) for own in self._keys]
        if self._keys and not (kind.lower() == "bearer" and any(equal)):
            raise ApiError(401, "this server wants its key: Authorization: Bearer KEY", code="invalid_api_key")

    def check_host(self, request: Request) -> None:
        """Raises ApiError if a server without a key is called by a foreign name.

        A page of another site may point its own name at this address (DNS rebinding), and the browser then lets it read
        what the server answers. It can't do that with an address, or with a name of this machine.
        """
        if self._keys:
            return
        host = request.headers.get("host", "")
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = host
        if name in self._hosts or name.endswith(".localhost"):
            return
        try:
            ipaddress.ip_address(name)
        except ValueError:
            message = f"this server does not go by {name[:80]!r}; --allow_host={name[:80]} lets it"
            raise ApiError(403, message, code="unknown_host") from None
