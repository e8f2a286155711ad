"""Requests and completions as JSON lines."""

import codecs
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from bigmac_jax.config import ConfigError
from bigmac_jax.config.objects import is_too_deep
from bigmac_jax.inference.generator import Completion, Request
from bigmac_jax.inference.sampling import Sampling
from bigmac_jax.runtime import hosts, storage

Row = dict[str, Any]
# A line's answer has log-probabilities of its own tokens alone.
_FIELDS = tuple(field.name for field in dataclasses.fields(Sampling) if field.name != "logprobs")


def parse_json(content: bytes) -> Any:
    """Parses JSON from untrusted bytes; refuses NaN, and texts that could not be written again as UTF-8.

    Raises:
      ValueError: what is wrong, as a predicate: "is not JSON: …".
    """
    try:
        text = content.decode()
        value = json.loads(text, parse_constant=_refuse_constant)
        if is_too_deep(text, value):
            raise RecursionError("it is nested too deeply")
        if b"\\ud" in content.lower():
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not valid UTF-8 (byte {error.start + 1})") from None
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no text") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {' '.join(str(error).split())[:200]}") from None
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def read_requests(source: str, sampling: Sampling) -> list[tuple[Row, Request]]:
    """Reads a file of JSON lines, or standard input (`-`) → each line's object and its request.

    Of several processes the first alone has a standard input; `share_requests` gives the others what it held.

    Args:
      sampling: settings where a line has none of its own.

    Raises:
      ConfigError: no such file, or a line that is no request; the message names it.
    """
    if source == "-" and not hosts.is_first():
        return []
    name = "standard input" if source == "-" else f"--prompts={source}"
    try:
        content = sys.stdin.buffer.read() if source == "-" else storage.locate(source, "--prompts").read_bytes()
    except storage.errors() as error:
        raise ConfigError(f"{name} cannot be read ({storage.reason(error)}); give a file of JSON lines") from None
    requests = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ConfigError(f"{name}, line {number} {error}; fix it") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ConfigError(f'{name}, line {number} must be an object with a text "prompt"; fix it')
        try:
            requests.append((row, _make_request(row, sampling)))
        except ConfigError as error:
            raise ConfigError(f"{name}, line {number}: {error}") from None
    if not requests:
        raise ConfigError(f'{name} holds no prompt; give an object with "prompt" a line')
    return requests


def share_requests(source: str, requests: list[tuple[Row, Request]], sampling: Sampling) -> list[tuple[Row, Request]]:
    """What `read_requests` gave, the same in all processes: a standard input is the first one's, a file is compared.
    Waits for the last process.

    Raises:
      ConfigError: in all processes, where one has read other prompts.
    """
    rows = [row for row, _ in requests]
    if source == "-":
        return [(row, _make_request(row, sampling)) for row in hosts.broadcast(rows)]
    hosts.check_same({"the prompts": hosts.digest(rows)})
    return requests


def _make_request(row: Row, sampling: Sampling) -> Request:
    own = dataclasses.replace(sampling, **{field: row[field] for field in _FIELDS if field in row})
    return Request(row["prompt"], own)


def make_answer(row: Row, request: Request, completion: Completion) -> Row:
    """The output line of a request: the fields of its own line, and those of the completion."""
    return {**row, "prompt": request.prompt, **dataclasses.asdict(completion)}


def check_output(target: str, source: str) -> None:
    """Raises ConfigError, before work begins, if answers cannot be written to `target` or would overwrite `source`."""
    if target == "-":
        return
    path = storage.locate(target, "--output")
    prompts = storage.locate(source, "--prompts")
    on_disk = not (storage.is_store(path) or storage.is_store(prompts))
    if source != "-" and (path.is_file() and path.samefile(prompts) if on_disk else path == prompts):
        raise ConfigError(f"--output={target} is the file of prompts, which would be lost; choose another path")
    if not storage.is_store(path):  # to which nothing can be appended
        with _open(target, "a"):
            pass


@contextlib.contextmanager
def open_output(target: str) -> Iterator[TextIO]:
    """Opens the file that answers are written to, or standard output (`-`); raises ConfigError if it can't be."""
    if target == "-":
        yield sys.stdout
    else:
        with _open(target, "w") as file:
            yield file


def _open(target: str, mode: str) -> TextIO:
    try:
        path = storage.locate(target, "--output")
        # Line by line on a disk: whoever is interrupted leaves whole lines.
        buffering = {} if storage.is_store(path) else {"buffering": 1}
        return path.open(mode, encoding="utf-8", **buffering)  # type: ignore[call-overload]
    except storage.errors() as error:
        raise ConfigError(
            f"--output={target} cannot be written ({storage.reason(error)}); choose another path"
        ) from None
