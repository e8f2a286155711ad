"""Parses requests in OpenAI's JSON and checks them. No network, no engine."""

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bigmac_jax.config import ConfigError
from bigmac_jax.data.chat_template import PromptLimit
from bigmac_jax.data.tokenizer import Tokenizer, TooLongError, encode_at_most
from bigmac_jax.inference.requests import parse_json
from bigmac_jax.inference.sampling import ALTERNATIVES, Sampling
from bigmac_jax.serving.dialogue import Dialogue
from bigmac_jax.serving.limits import ApiError, Limits

Fields = dict[str, Any]
_DEFAULT_TOKENS = 16  # OpenAI's default of a completion's max_tokens
_STOPS, _STOP = 16, 256  # stop texts, and characters of one: each token is compared with all of them
# Accepted and ignored, because they don't change the text.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
# Accepted with this value only.
_ONLY: Fields = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "suffix": "",
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
_SHARED = ("model", "n", "stream", "stream_options", "max_tokens", "temperature", "top_p", "top_k", "stop", "seed",
           "ignore_eos", "logprobs", *_IGNORED, *_ONLY)  # fmt: skip
_OF_COMPLETIONS = ("prompt", "echo", "best_of")
_OF_CHAT = ("messages", "max_completion_tokens", "top_logprobs")
_TOO_LONG = "context_length_exceeded"  # OpenAI's code
_ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request to /v1/completions or /v1/chat/completions.

    Attributes:
      prompts: token ids of each.
      echo: the text before each prompt's completions; "" unless the request wants its prompt back.
      sampling: of every completion; its logprobs is the number of alternatives to return.
      n: completions of each prompt.
    """

    chat: bool
    prompts: list[list[int]]
    echo: list[str]
    sampling: Sampling
    n: int
    stream: bool
    usage: bool  # whether a stream ends with a chunk of usage
    logprobs: bool


def parse_body(body: bytes) -> Fields:
    """Parses the JSON object of a request's body; raises ApiError if it is none."""
    try:
        fields = parse_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object")
    return fields


def parse_request(
    fields: Fields,
    chat: Dialogue | None,
    tokenizer: Tokenizer,
    vocab_size: int,
    longest: int,
    limits: Limits,
    check: Callable[[], object],
) -> CompletionRequest:
    """Checks a request's fields and encodes its prompts. What is quick to check comes first, and nothing too long is
    encoded.

    Args:
      chat: turns messages into a prompt; None for /v1/completions.
      longest: tokens of prompt and completion, at most.
      check: called between parts of longer work, which end if it raises.

    Raises:
      ApiError: 400, which names the field.
    """
    fields = _check_names(fields, _SHARED + (_OF_COMPLETIONS if chat is None else _OF_CHAT))
    n = _integer(fields, "n", 1, 1, limits.choices)
    if type(fields.get("best_of", n)) is not int or fields.get("best_of", n) != n:
        raise ApiError(400, "best_of must be n: nothing else is supported here", "best_of")
    stream, echo = _boolean(fields, "stream"), _boolean(fields, "echo")
    usage = _usage(fields, stream)
    new = _integer(fields, "max_tokens", 0 if chat else _DEFAULT_TOKENS, 1, longest)
    new = _integer(fields, "max_completion_tokens", new, 1, longest)
    alternatives = _alternatives(fields, chat is not None)
    if echo and alternatives >= 0:
        raise ApiError(400, "echo with logprobs is not supported: the prompt's are not kept", "echo")
    sampling = _sampling(fields, max(0, alternatives), chat.stop if chat else ())
    field, limit = "messages" if chat else "prompt", PromptLimit(longest, check)
    try:
        if chat is None:
            prompts, texts = _prompts(fields.get("prompt"), tokenizer, vocab_size, n, limits.choices, limit, echo)
        else:
            prompts, texts = [chat.prompt(_messages(fields.get("messages")), limit)], [""]
            if not prompts[0]:
                message = "the chat template makes no text of these messages; end with a user's message of some text"
                raise ApiError(400, message, "messages")
            new = new or max(1, longest - len(prompts[0]))
    except TooLongError:
        message = f"the prompt has more than the {longest} tokens of prompt and completion; use a shorter one"
        raise ApiError(400, message, field, _TOO_LONG) from None
    tokens = max(map(len, prompts))
    if tokens + new > longest:
        message = (
            f"the prompt has {tokens} tokens, which with max_tokens={new} are {tokens + new}, and must be at most "
            f"{longest}; use a shorter prompt or fewer max_tokens"
        )
        raise ApiError(400, message, "max_tokens" if tokens < longest else field, _TOO_LONG)
    return CompletionRequest(
        chat is not None,
        prompts,
        texts,
        replace(sampling, max_tokens=new),
        n,
        stream,
        usage,
        alternatives >= 0,
    )


def _check_names(fields: Fields, known: tuple[str, ...]) -> Fields:
    """The fields that are not null, all of them known, those with one supported value at that."""
    present = {name: value for name, value in fields.items() if value is not None}
    for name, value in present.items():
        if name not in known:
            raise ApiError(400, f"unknown field {name[:80]!r}", name[:80], "unknown_parameter")
        if name in _ONLY and not _is_same(value, _ONLY[name]):
            only = json.dumps(_ONLY[name], allow_nan=False)
            raise ApiError(400, f"{name} must be {only}: nothing else is supported here", name)
    return present


def _is_same(value: Any, only: Any) -> bool:
    """Whether it is equal and of the same type: false is not 0, but 0.0 is."""
    kinds = (int, float) if type(only) is int else (type(only),)
    return type(value) in kinds and bool(value == only)


def _usage(fields: Fields, stream: bool) -> bool:
    """Whether the stream ends with a chunk of usage."""
    options = fields.get("stream_options", {})
    names = ("include_usage", "include_obfuscation")
    if not isinstance(options, dict) or set(options) - set(names):
        raise ApiError(400, "stream_options must be an object with include_usage", "stream_options")
    for name in names:
        if not isinstance(options.get(name), bool | None):
            raise ApiError(400, f"stream_options.{name} must be true or false", "stream_options")
    if "stream_options" in fields and not stream:
        raise ApiError(400, "stream_options needs stream to be true", "stream_options")
    return bool(options.get("include_usage"))


def _alternatives(fields: Fields, chat: bool) -> int:
    """How many of the most likely tokens are wanted with each token; -1 if no log-probabilities are."""
    if not chat:
        return _integer(fields, "logprobs", -1, 0, ALTERNATIVES)
    logprobs, alternatives = _boolean(fields, "logprobs"), _integer(fields, "top_logprobs", 0, 0, ALTERNATIVES)
    if alternatives and not logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    return alternatives if logprobs else -1


def _sampling(fields: Fields, alternatives: int, stop: tuple[str, ...]) -> Sampling:
    own = fields.get("stop", [])
    own = [own] if isinstance(own, str) else own
    if not isinstance(own, list) or len(own) > _STOPS or not all(isinstance(text, str) for text in own):
        raise ApiError(400, f"stop must be a text, or up to {_STOPS} of them", "stop")
    if any(len(text) > _STOP for text in own):
        raise ApiError(400, f"stop must be texts of at most {_STOP} characters", "stop")
    seed = fields.get("seed", secrets.randbits(32))
    if type(seed) is not int:
        raise ApiError(400, "seed must be an integer", "seed")
    values = {"temperature": 1.0} | {
        name: fields[name] for name in ("temperature", "top_k", "top_p", "ignore_eos") if name in fields
    }
    try:
        return Sampling(stop=(*stop, *own), seed=seed % (1 << 32), logprobs=alternatives, **values)
    except ConfigError as error:
        raise ApiError(400, str(error)[:500], str(error).partition("=")[0]) from None


def _prompts(
    prompt: Any, tokenizer: Tokenizer, vocab_size: int, n: int, most: int, limit: PromptLimit, echo: bool
) -> tuple[list[list[int]], list[str]]:
    """Token ids of each prompt, and its text, "" without `echo`; raises TooLongError for one that is too long."""
    many = [prompt]
    if isinstance(prompt, list) and prompt and not all(type(token) is int for token in prompt):
        many = prompt
    if len(many) > most:
        raise ApiError(400, f"prompt has {len(many)} prompts, of which {most} may be in a request", "prompt")
    if len(many) * n > most:
        raise ApiError(400, f"{len(many)} prompts × n={n} must be at most {most} completions", "n")
    ids, texts = [], []
    for one in many:
        if isinstance(one, str):
            texts.append(one if echo else "")
            ids.append(encode_at_most(tokenizer.encode_batch, [one], limit.tokens, tokenizer.token_bytes, limit.check))
        elif isinstance(one, list) and len(one) > limit.tokens:
            raise TooLongError(limit.tokens)
        elif isinstance(one, list) and all(type(token) is int and 0 <= token < vocab_size for token in one):
            texts.append(tokenizer.decode(one) if echo else "")
            ids.append(one)
        else:
            message = f"prompt must be a text, token ids in [0, {vocab_size}), or a list of either"
            raise ApiError(400, message, "prompt")
        if not ids[-1]:
            raise ApiError(400, "prompt is empty; give at least one character", "prompt")
    return ids, texts


def _messages(messages: Any) -> list[dict[str, str]]:
    """Checks messages and joins the parts of each one's content."""
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list of at least one message", "messages")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ApiError(
                400, f"messages[{i}] must be an object whose role is system, developer, user or assistant", "messages"
            )
        _check_read(message, ("role", "content"), f"messages[{i}]")
        content = message.get("content")
        if isinstance(content, list):
            for j, part in enumerate(content):
                if isinstance(part, dict) and part.get("type") == "text":
                    _check_read(part, ("type", "text"), f"messages[{i}].content[{j}]")
            texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
            whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
            content = "".join(texts) if whole else None  # type: ignore[arg-type]
        if not isinstance(content, str):
            raise ApiError(400, f"messages[{i}].content must be a text, or a list of parts of text", "messages")
        checked.append({"role": message["role"], "content": content})
    return checked


def _check_read(given: Fields, names: tuple[str, ...], where: str) -> None:
    """Raises ApiError for a field of a message or a part that says something and that no template gets; OpenAI's client
    sends what an answer did not have as null or empty."""
    for name, value in given.items():
        if name not in names and value not in (None, "", [], {}):
            message = f"{where} has the field {name[:80]!r}, of which nothing is read; leave it out"
            raise ApiError(400, message, "messages", "unknown_parameter")


def _integer(fields: Fields, name: str, default: int, least: int, most: int) -> int:
    value = fields.get(name, default)
    if name in fields and (type(value) is not int or not least <= value <= most):
        raise ApiError(400, f"{name} must be an integer in [{least}, {most}]", name)
    return value


def _boolean(fields: Fields, name: str) -> bool:
    value = fields.get(name, False)
    if type(value) is not bool:
        raise ApiError(400, f"{name} must be true or false", name)
    return value
