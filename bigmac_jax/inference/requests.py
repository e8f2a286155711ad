"""Prompts and completions as JSON lines."""

import codecs
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from bigmac_jax.config import ConfigError
from bigmac_jax.inference.generator import Completion, Request
from bigmac_jax.inference.sampling import Sampling
from bigmac_jax.runtime import storage

Row = dict[str, Any]
# An answer has log-probabilities of its own tokens alone.
_FIELDS = tuple(field.name for field in dataclasses.fields(Sampling) if field.name != "logprobs")


def read_requests(source: str, sampling: Sampling) -> list[tuple[Row, Request]]:
    """The lines of a file, or of standard input (`-`), each with its request.

    Args:
      sampling: what a line does not say for itself.

    Raises:
      ConfigError: no such file, or a line that is no request; the message names it.
    """
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
            row = json.loads(line.decode())
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode()  # what is written in the end
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name}, line {number} is not valid UTF-8 (byte {error.start + 1}); fix it") from None
        except UnicodeEncodeError:
            raise ConfigError(
                f"{name}, line {number} holds half of a surrogate pair, which is no text; fix it"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{name}, line {number} is not JSON ({error}); fix it") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ConfigError(f'{name}, line {number} must be an object with a text "prompt"; fix it')
        try:
            own = dataclasses.replace(sampling, **{field: row[field] for field in _FIELDS if field in row})
        except ConfigError as error:
            raise ConfigError(f"{name}, line {number}: {error}") from None
        requests.append((row, Request(row["prompt"], own)))
    if not requests:
        raise ConfigError(f'{name} holds no prompt; give an object with "prompt" a line')
    return requests


def answer(row: Row, request: Request, completion: Completion) -> Row:
    """What is written for a request: its own fields, and those of the completion."""
    return {**row, "prompt": request.prompt, **dataclasses.asdict(completion)}


def check_answers_to(target: str, source: str) -> None:
    """Before work begins: raises ConfigError where `target` cannot be written, or is the file of prompts."""
    if target == "-":
        return
    path = storage.locate(target, "--output")
    prompts = storage.locate(source, "--prompts")
    on_disk = not (storage.is_store(path) or storage.is_store(prompts))
    if source != "-" and (path.is_file() and path.samefile(prompts) if on_disk else path == prompts):
        raise ConfigError(f"--output={target} is the file of prompts, which would be lost; choose another path")
    if not storage.is_store(path):  # to which nothing can be appended
        with _opened(target, "a"):
            pass


@contextlib.contextmanager
def answers_to(target: str) -> Iterator[TextIO]:
    """The file that answers are written to; standard output for `-`.

    Raises:
      ConfigError: it cannot be written.
    """
    if target == "-":
        yield sys.stdout
        return
    with _opened(target, "w") as file:
        yield file


def _opened(target: str, mode: str) -> TextIO:
    try:
        path = storage.locate(target, "--output")
        if storage.is_store(path):
            return path.open(mode, encoding="utf-8")  # type: ignore[return-value]
        # By lines: whoever is interrupted leaves whole ones.
        return path.open(mode, buffering=1, encoding="utf-8")  # type: ignore[return-value]
    except storage.errors() as error:
        raise ConfigError(
            f"--output={target} cannot be written ({storage.reason(error)}); choose another path"
        ) from None
