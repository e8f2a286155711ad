"""Nine clients that ask a server for as much as they can. Standard library alone: they start beside it."""

import contextlib
import http.client
import itertools
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_POST = "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
_HELD = 50  # connections of a slow client
_AT_ONCE = 8  # requests of a flooding client
Seen = Counter[str]  # statuses, "cut" for a connection that ended without one


def _chat(messages: int) -> bytes:
    roles = itertools.cycle(("user", "assistant"))
    of = [{"role": next(roles), "content": "a"} for _ in range(messages)]
    return json.dumps({"messages": of, "max_tokens": 4}).encode()


def _ask(port: int, path: str, body: bytes, seen: Seen) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        seen[str(response.status)] += 1
    except (OSError, http.client.HTTPException):
        seen["cut"] += 1
    finally:
        connection.close()


def _again(path: str, *bodies: bytes) -> Callable[[int, float, Seen], None]:
    """Asks the same, one after the other."""

    def ask(port: int, end: float, seen: Seen) -> None:
        for body in itertools.cycle(bodies):
            if time.monotonic() > end:
                return
            _ask(port, path, body, seen)

    return ask


def _flood(port: int, end: float, seen: Seen) -> None:
    """Small requests, several at a time, as fast as they are answered."""
    ask = _again(COMPLETIONS, json.dumps({"prompt": "of the people", "max_tokens": 16}).encode())
    _side_by_side([lambda: ask(port, end, seen)] * _AT_ONCE)


def _leaving(port: int, end: float, seen: Seen) -> None:
    """Long answers that nobody waits for, and connections that say half a word."""
    body = json.dumps({"prompt": "of the people", "max_tokens": 200, "stream": True}).encode()
    head = f"{_POST.format(COMPLETIONS)}Content-Length: "
    for n in itertools.count():
        if time.monotonic() > end:
            return
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 60) as raw:
            raw.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body if n % 2 else head.encode())
            if n % 2:
                raw.recv(100)
            seen["left"] += 1


def _slow(head: str, part: bytes) -> Callable[[int, float, Seen], None]:
    """Bodies that arrive a part at a time, on many connections."""

    def send(port: int, end: float, seen: Seen) -> None:
        with contextlib.ExitStack() as stack:

            def opened() -> socket.socket:
                raw = stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
                raw.sendall(f"{_POST.format(CHAT)}{head}\r\n\r\n".encode())
                return raw

            held = [opened() for _ in range(_HELD)]
            while time.monotonic() < end:
                for i, raw in enumerate(held):
                    try:
                        raw.sendall(part)
                    except OSError:
                        seen["cut"] += 1
                        with contextlib.suppress(OSError):
                            held[i] = opened()
                time.sleep(0.5)

    return send


LONG = "of the people and the states " * 135_000  # 3.9 MB
CLIENTS: dict[str, Callable[[int, float, Seen], None]] = {
    "a chat of 100,000 messages": _again(CHAT, _chat(100_000)),
    "chats of 3,000 messages": _again(CHAT, _chat(3000)),
    "chats that just fit, and not": _again(CHAT, _chat(100), _chat(200), _chat(500), _chat(1000)),
    "a text of 3.9 MB": _again(COMPLETIONS, json.dumps({"prompt": LONG, "max_tokens": 4}).encode()),
    "ten texts of 0.4 MB": _again(COMPLETIONS, json.dumps({"prompt": [LONG[:390_000]] * 10}).encode()),
    "slow bodies": _slow("Content-Length: 4000000", b" " * 8192),
    "bodies of small chunks": _slow("Transfer-Encoding: chunked", b"1\r\n \r\n" * 1000),
    "a flood of small requests": _flood,
    "clients that leave": _leaving,
}  # fmt: skip


def run(port: int, seconds: float, answers: Any) -> None:
    """All of them at once; puts what each has seen, by its name."""
    end, seen = time.monotonic() + seconds, {name: Counter[str]() for name in CLIENTS}
    _side_by_side([lambda name=name, client=client: client(port, end, seen[name]) for name, client in CLIENTS.items()])  # type: ignore[misc]
    answers.put({name: dict(sorted(of.items())) for name, of in seen.items()})


def _side_by_side(work: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def latencies(port: int, seconds: float) -> Iterator[tuple[float, int]]:
    """The one who asks for two tokens, again and again: (seconds, status)."""
    end, body = time.monotonic() + seconds, json.dumps({"prompt": "the state of", "max_tokens": 2}).encode()
    while time.monotonic() < end:
        start = time.monotonic()
        seen = Seen()
        _ask(port, COMPLETIONS, body, seen)
        (status,) = seen
        yield time.monotonic() - start, int(status) if status.isdigit() else 0
        time.sleep(0.05)
