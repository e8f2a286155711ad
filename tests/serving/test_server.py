"""serve.py on loopback: OpenAI's client, and what nobody should send."""

import concurrent.futures
import http.client
import json
import math
import pathlib
import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from bigmac_jax.config import ConfigError
from bigmac_jax.serving.server import listen

from .running import KEY, Server, trained

LONGEST, QUEUE, CHOICES, BODY = 512, 6, 4, 20_000
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
ASKED: dict[str, Any] = {"prompt": "the state of", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serving")
    limits = (f"--queue={QUEUE}", f"--max_choices={CHOICES}", f"--max_body={BODY}", "--timeout=20", "--arrival=8")
    sizes = (f"--max_length={LONGEST}", "--batch_size=4", "--cache_tokens=1536", "--chunk=64", "--drain=60")
    with Server(trained(folder), *limits, *sizes) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


def idle(server: Server) -> None:
    """Until nobody holds a slot or a page."""
    end = time.monotonic() + 30
    while server.metric("bigmac_completions_") or server.metric("bigmac_cache_pages_used"):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.full
def test_the_openai_client_completes(client: openai.OpenAI) -> None:
    given: dict[str, Any] = {"model": "run", "prompt": "the state of", "max_tokens": 8, "seed": 3}
    one = client.completions.create(**given, temperature=0)
    assert one.object == "text_completion" and one.choices[0].finish_reason in ("length", "stop")
    assert one.usage and (one.usage.prompt_tokens, one.usage.total_tokens) == (12, 12 + one.usage.completion_tokens)
    three = client.completions.create(**given, n=3, temperature=2.0)
    again = client.completions.create(**given, n=3, temperature=2.0)
    assert [c.text for c in three.choices] == [c.text for c in again.choices]
    assert len({c.text for c in three.choices}) == 3 and [c.index for c in three.choices] == [0, 1, 2]
    two = client.completions.create(**given | {"prompt": ["the state of", [116, 104, 101]]}, temperature=0, echo=True)
    assert two.choices[0].text == "the state of" + one.choices[0].text and two.choices[1].text.startswith("the")


@pytest.mark.full
def test_the_openai_client_streams(client: openai.OpenAI) -> None:
    given: dict[str, Any] = {"model": "run", "max_tokens": 12, "seed": 3, "temperature": 1.5}
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Peace"}]
    whole = client.chat.completions.create(**given, messages=messages, n=2)
    parts = list(
        client.chat.completions.create(
            **given, messages=messages, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = ["", ""]
    reasons = [None, None]
    for part in parts[:-1]:
        (choice,) = part.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]  # type: ignore[call-overload]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert parts[-1].usage and whole.usage and parts[-1].usage.total_tokens == whole.usage.total_tokens
    streamed = client.completions.create(**given, prompt="the", stream=True)
    assert (
        "".join(part.choices[0].text for part in streamed)
        == client.completions.create(**given, prompt="the").choices[0].text
    )


def test_logprobs(client: openai.OpenAI) -> None:
    given: dict[str, Any] = {"model": "run", "max_tokens": 4, "temperature": 0, "extra_body": {"ignore_eos": True}}
    choice = client.completions.create(**given, prompt="of", logprobs=3).choices[0]
    assert choice.logprobs and choice.logprobs.token_logprobs and choice.logprobs.top_logprobs
    assert len(choice.logprobs.token_logprobs) == 4 and all(len(top) <= 3 for top in choice.logprobs.top_logprobs)
    assert choice.logprobs.token_logprobs[0] == max(choice.logprobs.top_logprobs[0].values())  # greedy
    chat = client.chat.completions.create(
        **given, messages=[{"role": "user", "content": "of"}], logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert content and len(content) == 4
    for token in content:
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1


def test_stop_ends_a_text(client: openai.OpenAI) -> None:
    given: dict[str, Any] = {"model": "run", "prompt": "of", "seed": 1, "temperature": 1.0,
                             "extra_body": {"ignore_eos": True}}  # fmt: skip
    text = client.completions.create(**given, max_tokens=40).choices[0].text
    stop = text[10:12]
    stopped = client.completions.create(**given, max_tokens=40, stop=[stop, "never"]).choices[0]
    assert stopped.text == text[: text.index(stop)] and stopped.finish_reason == "stop"


def test_models_health_metrics_and_page(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["run"] and client.models.retrieve("run").id == "run"
    assert server.ask("/health", headers={"Authorization": ""})[:2] == (200, {"status": "ok"})
    status, page, headers = server.ask("/", headers={"Authorization": ""})
    assert (
        status == 200
        and "<title>bigmac chat</title>" in page
        and "default-src 'none'" in headers["content-security-policy"]
    )
    before = server.metric("bigmac_new_tokens_total")
    server.ask(COMPLETIONS, ASKED)
    assert server.metric("bigmac_new_tokens_total") == before + 12
    assert server.metric("bigmac_first_token_seconds_count") > 0
    assert server.metric('bigmac_requests_total{path="/v1/completions",status="200"}') > 0
    assert server.metric("bigmac_cache_pages{") == 0 and server.metric("bigmac_cache_pages ") == 1536 / 16


def test_an_equal_beginning_is_not_computed_again(server: Server) -> None:
    prompt = "an equal beginning of forty characters, and"
    used = [server.ask(COMPLETIONS, ASKED | {"prompt": prompt + end})[1]["usage"] for end in (" one", " another")]
    assert [u["prompt_tokens_details"]["cached_tokens"] for u in used] == [0, 32]


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"frobnicate": 1}, "frobnicate", "unknown field"),
    ({"max_tokens": 0}, "max_tokens", r"must be an integer in [1, 512]"),
    ({"max_tokens": 501}, "max_tokens", "must be at most 512"),
    ({"max_tokens": True}, "max_tokens", "must be an integer"),
    ({"temperature": -1}, "temperature", "at least 0"),
    ({"temperature": "hot"}, "temperature", "must be a finite number"),
    ({"temperature": 10**400}, "temperature", "must be a"),
    ({"top_p": 2}, "top_p", "must lie in (0, 1]"),
    ({"n": 5}, "n", "[1, 4]"),
    ({"prompt": ["a"] * 3, "n": 2}, "n", "at most 4 completions"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": [1, 99999]}, "prompt", "token ids"),
    ({"prompt": {"a": 1}}, "prompt", "must be a text"),
    ({"prompt": None}, "prompt", "must be a text"),
    ({"prompt": []}, "prompt", "empty"),
    ({"stop": [1]}, "stop", "must be a text"),
    ({"stop": [""]}, "stop", "not empty"),
    ({"stop": ["a" * 257]}, "stop", "at most 256 characters"),
    ({"stop": ["a"] * 17}, "stop", "up to 16"),
    ({"seed": 1.5}, "seed", "integer"),
    ({"logprobs": 21}, "logprobs", "[0, 20]"),
    ({"echo": True, "logprobs": 1}, "echo", "not supported"),
    ({"presence_penalty": 0.5}, "presence_penalty", "nothing else is supported"),
    ({"best_of": 3}, "best_of", "nothing else is supported"),
    ({"stream_options": 3}, "stream_options", "object"),
    ({"messages": []}, "messages", "unknown field"),
]


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ["a" * 256] * 16},
        {"temperature": 0},
        {"top_p": 1},
        {"n": 4},
        {"logprobs": 0},
        {"logprobs": 20},
        {"max_tokens": 1},
    ],
    ids=lambda v: str(v)[:30],
)
def test_the_bounds_are_taken(server: Server, fields: dict[str, Any]) -> None:
    status, answer, _ = server.ask(COMPLETIONS, ASKED | {"max_tokens": 2} | fields)
    assert status == 200, answer
    assert len(answer["choices"]) == fields.get("n", 1)


@pytest.mark.parametrize(("fields", "param", "said"), BAD, ids=lambda v: str(v)[:30])
def test_fields_that_are_refused(server: Server, fields: dict[str, Any], param: str, said: str) -> None:
    status, answer, _ = server.ask(COMPLETIONS, ASKED | fields)
    error = answer["error"]
    assert status == 400 and error["type"] == "invalid_request_error", answer
    assert error["param"] == param and said in error["message"], answer


@pytest.mark.parametrize(
    "messages", [None, [], "hi", [3], [{"role": "king", "content": "a"}], [{"role": "user"}],
                 [{"role": "user", "content": [{"type": "image_url"}]}],
                 [{"role": "assistant", "content": "a", "tool_calls": [{}]}, {"role": "user", "content": "b"}]],
)  # fmt: skip
def test_messages_that_are_refused(server: Server, messages: Any) -> None:
    status, answer, _ = server.ask(CHAT, {"messages": messages})
    assert status == 400 and answer["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        (COMPLETIONS, b"{", {}, 400),
        (COMPLETIONS, b"[1]", {}, 400),
        (COMPLETIONS, b"\xff", {}, 400),
        (COMPLETIONS, b'{"prompt": "\\ud800"}', {}, 400),
        (COMPLETIONS, b'{"temperature": NaN}', {}, 400),
        (COMPLETIONS, b"[" * 10_000, {}, 400),
        (COMPLETIONS, b'{"prompt": "a"}', {"Content-Type": "text/plain"}, 415),
        (COMPLETIONS, b'{"prompt": "a"}', {"Authorization": "Bearer wrong"}, 401),
        (COMPLETIONS, b'{"prompt": "a"}', {"Authorization": ""}, 401),
        (COMPLETIONS, b'{"prompt": "a", "model": "gpt"}', {}, 404),
        (COMPLETIONS, b" " * (BODY + 1), {}, 413),
        (COMPLETIONS, None, {}, 405),
        ("/v1/none", None, {}, 404),
        ("/v1/models/none", None, {}, 404),
        ("/metrics", None, {"Authorization": ""}, 401),
    ],
)
def test_requests_that_are_refused(
    server: Server, path: str, body: bytes | None, headers: dict[str, str], status: int
) -> None:
    found, answer, _ = server.ask(path, body, headers)
    assert found == status and set(answer["error"]) == {"message", "type", "param", "code"}, answer


def test_a_body_without_end_is_cut(server: Server) -> None:
    """Said to be a gigabyte, and in chunks that never end."""
    for head in ("Content-Length: 1073741824", "Transfer-Encoding: chunked"):
        with socket.create_connection(("127.0.0.1", server.port), 30) as raw:
            given = "\r\n".join(f"{name}: {value}" for name, value in HEADERS.items())
            raw.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\n{given}\r\n{head}\r\n\r\n".encode())
            if "chunked" in head:
                raw.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n" + (b"1000\r\n" + b" " * 4096 + b"\r\n") * 5)
            assert raw.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(("size", "status"), [(1, b"400"), (100, b"413")])
def test_a_body_of_small_chunks_is_cut(server: Server, size: int, status: bytes) -> None:
    """Each of them costs more than its bytes; larger ones are read as far as a body goes."""
    with socket.create_connection(("127.0.0.1", server.port), 30) as raw:
        given = "\r\n".join(f"{name}: {value}" for name, value in HEADERS.items())
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\n{given}\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw.sendall(head.encode() + (f"{size:x}\r\n".encode() + b" " * size + b"\r\n") * (BODY // max(10, size) + 9))
        assert raw.recv(100).startswith(b"HTTP/1.1 " + status)


def test_a_short_body_may_come_in_small_chunks(server: Server) -> None:
    """Of three bytes each, which have 5 bytes around them: up to a KiB of these is nothing."""
    body = json.dumps(ASKED).encode()
    with socket.create_connection(("127.0.0.1", server.port), 30) as raw:
        given = "\r\n".join(f"{name}: {value}" for name, value in (HEADERS | {"Expect": "100-continue"}).items())
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\n{given}\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw.sendall(head.encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 100 ")  # it has read the head by itself
        parts = [body[i : i + 3] for i in range(0, len(body), 3)]
        raw.sendall(b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 200 ")


def test_what_is_no_http(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 30) as raw:
        raw.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400 ")
    assert server.ask("/health")[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_gives_its_slot_back(server: Server, stream: bool) -> None:
    """Its completions end early; on a busy machine they may have ended before it left, so it has five tries."""
    body = json.dumps(ASKED | {"max_tokens": 490, "stream": stream, "n": 3}, allow_nan=False)
    for _ in range(5):
        idle(server)
        before = server.metric("bigmac_new_tokens_total")
        connection = server.connection()
        connection.request("POST", COMPLETIONS, body, HEADERS)
        if stream:
            response = connection.getresponse()
            assert response.read(10)
            response.close()
        else:
            end = time.monotonic() + 20
            while server.metric("bigmac_new_tokens_total") == before:
                assert time.monotonic() < end
        connection.close()
        idle(server)
        made = server.metric("bigmac_new_tokens_total") - before
        if made < 3 * 490:
            break
    assert 0 < made < 3 * 490


def test_a_full_queue_says_come_later(server: Server) -> None:
    """4 slots and 6 places: of five requests for four long completions each, some are turned away; the others end."""
    body = ASKED | {"max_tokens": 250, "n": 4}
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda _: server.ask(COMPLETIONS, body), range(5)))
    refused = [answer for answer in answers if answer[0] == 429]
    assert refused and len(refused) < 5
    for _, answer, headers in refused:
        assert answer["error"]["type"] == "rate_limit_error" and 1 <= int(headers["retry-after"]) <= 60
    texts = {choice["text"] for status, answer, _ in answers if status == 200 for choice in answer["choices"]}
    assert len(texts) == 1
    idle(server)


@pytest.mark.full
def test_slow_clients(server: Server) -> None:
    """A head, a second one and a body that never end, and nothing at all: each is told, and nobody waits for them."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    key = f"Authorization: Bearer {KEY}\r\n".encode()
    whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    slow = {"nothing": b"", "head": head, "body": head + key + b"Content-Length: 99\r\n\r\n{", "second": whole + head}
    held = {name: socket.create_connection(("127.0.0.1", server.port), 30) for name in slow}
    for name, sent in slow.items():
        held[name].sendall(sent)
    start = time.monotonic()
    assert server.ask(COMPLETIONS, ASKED)[0] == 200
    for name, connection in held.items():
        with connection.makefile("rb") as answer:
            text = answer.read()
        assert b" 408 " in text and b"did not arrive within 8 s" in text, name
        assert (b"200 OK" in text) == (name == "second")
    assert 6 < time.monotonic() - start < 25
    idle(server)


@pytest.mark.parametrize("connections", [200, pytest.param(1000, marks=pytest.mark.full)])
def test_many_connections(server: Server, connections: int) -> None:
    """That say nothing, and one among them that does."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    held = [socket.create_connection(("127.0.0.1", server.port), 30) for _ in range(connections)]
    assert server.ask(COMPLETIONS, ASKED)[0] == 200
    for connection in held:
        connection.close()


def fuzzed(draw: random.Random) -> tuple[str, bytes]:
    """A request of fields that are often wrong."""
    values = [None, True, -1, 0, 1, 3, 0.5, 1e300, "", "a", [], ["a"], [1], [[1, 2], [3]], {}, {"a": []}, "é\x00"]
    names = [
        "prompt",
        "messages",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "n",
        "stop",
        "seed",
        "stream",
        "logprobs",
        "top_logprobs",
        "echo",
        "model",
        "stream_options",
        "ignore_eos",
        "logit_bias",
        "tools",
        "user",
        "x",
    ]
    path = draw.choice((COMPLETIONS, CHAT))
    start: dict[str, Any] = {"max_tokens": 3}
    start |= {"prompt": "a"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "a"}]}
    for _ in range(draw.randint(0, 3)):
        start[draw.choice(names)] = draw.choice(values)
    body = json.dumps(start).encode()
    if draw.random() < 0.2:
        body = bytearray(body)
        for _ in range(draw.randint(1, 4)):
            body[draw.randrange(len(body))] = draw.randrange(256)
    return path, bytes(body)


@pytest.mark.parametrize("requests", [60, pytest.param(2000, marks=pytest.mark.full)])
def test_fuzz(server: Server, requests: int) -> None:
    draw = random.Random(0)
    connection, counts = server.connection(), dict.fromkeys((200, 400, 404), 0)
    for _ in range(requests):
        path, body = fuzzed(draw)
        try:
            connection.request("POST", path, body, HEADERS)
            response = connection.getresponse()
        except (http.client.HTTPException, OSError):
            pytest.fail(f"no answer to {body!r}")
        content = response.read()
        assert response.status in counts, (body, response.status, content)
        assert b"Traceback" not in content
        counts[response.status] += 1
    assert counts[200] > requests / 10 and counts[400] > requests / 10
    idle(server)


@pytest.mark.full
def test_the_page_in_a_browser(server: Server) -> None:
    pytest.importorskip("PySide6.QtWebEngineCore", reason="pip install pyside6-webengine", exc_type=ImportError)
    command = [sys.executable, "-m", "serving.browser", f"http://127.0.0.1:{server.port}/", KEY]
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["messages"] == [] and seen["width"] <= 400 and "wants its key" in seen["locked"]
    assert [kind for kind, _ in seen["answered"]] == ["turn user", "turn assistant"] and seen["answered"][1][1]
    assert [kind for kind, _ in seen["stopped"]][2:] == ["turn user", "turn assistant"]
    assert 3 < len(seen["stopped"][-1][1]) < 400
    assert (seen["under way"], seen["sends"]) == ("Stop", "Send")
    assert seen["new"] == [[], []] and seen["anew"] == ["user", "assistant"]
    kind, text = seen["refused"][-1]
    assert kind == "turn error" and "wants its key" in text and seen["refused"][-2] == ["turn user", "<b>Hello</b>"]
    assert seen["bold"] == 0
    idle(server)


def test_nothing_was_a_traceback(server: Server) -> None:
    assert "Traceback" not in server.output and "failed" not in server.output, server.output


@pytest.mark.full
def test_sigterm_lets_running_requests_end(server: Server) -> None:
    """The last test of this server."""
    body = ASKED | {"max_tokens": 400}
    before = server.metric("bigmac_new_tokens_total")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.ask, COMPLETIONS, body)
        while server.metric("bigmac_new_tokens_total") == before:
            time.sleep(0.01)
        code = server.stop()
        status, found, _ = answer.result(60)
    assert (code, status, found["usage"]["completion_tokens"]) == (0, 200, 400)
    with pytest.raises(OSError):
        server.ask("/health")


def test_bad_flags_are_one_line(tmp_path: pathlib.Path, command: Any) -> None:
    serve = command("serve")
    with pytest.raises(ConfigError, match=r"api_key_file=.* cannot be read"):
        serve._key(str(tmp_path / "none"))
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="is empty; write a key into it"):
        serve._key(str(tmp_path / "empty"))
    (tmp_path / "two").write_text("one\nanother\n")
    with pytest.raises(ConfigError, match="must hold one line that a header can carry"):
        serve._key(str(tmp_path / "two"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="choose another"):
        listen("127.0.0.1", taken.getsockname()[1])
