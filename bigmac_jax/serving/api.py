"""OpenAI's JSON: what a request asks for, and what it is answered. No network, no engine."""

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bigmac_jax.config import ConfigError
from bigmac_jax.data.chat_template import Room
from bigmac_jax.data.tokenizer import Tokenizer, TooLongError, encode_at_most
from bigmac_jax.inference.sampling import ALTERNATIVES, Sampling
from bigmac_jax.serving.dialogue import Dialogue
from bigmac_jax.serving.limits import ApiError, Limits

Fields = dict[str, Any]
_LARGEST = 1e38
_DEFAULT_TOKENS = 16  # OpenAI's, of a completion
_STOPS, _STOP = 16, 256  # texts that end a completion, and characters of one: each token is held against all of them
# Taken and without effect, because they say nothing of the text.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
# What has no other value here.
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


@dataclass(frozen=True)
class Asked:
    """A request, checked.

    Attributes:
      prompts: token ids of each.
      echo: what stands before each prompt's completions.
      sampling: of every completion; its logprobs is how many alternatives are shown.
    """

    chat: bool
    prompts: list[list[int]]
    echo: list[str]
    sampling: Sampling
    n: int
    stream: bool
    usage: bool  # a last piece of a stream says what was used
    logprobs: bool


def parse(body: bytes) -> Fields:
    """The object of a request's body."""
    try:
        fields = json.loads(body.decode(), parse_constant=_no_constant)
        if b"\\ud" in body.lower():
            json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()  # half of a surrogate pair is no text
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not valid UTF-8 (byte {error.start + 1})") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds half of a surrogate pair, which is no text") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object")
    return fields


def asked(
    fields: Fields,
    chat: Dialogue | None,
    tokenizer: Tokenizer,
    vocab_size: int,
    longest: int,
    limits: Limits,
    check: Callable[[], object] = lambda: None,
) -> Asked:
    """What a request's fields ask for. What is quick to check comes first, and nothing is encoded that is too long.

    Args:
      chat: how messages become a prompt; None for /v1/completions.
      longest: tokens of prompt and completion.
      check: called between parts of longer work.

    Raises:
      ApiError: 400, which names the field.
    """
    known = (*_SHARED, *(_OF_COMPLETIONS if chat is None else _OF_CHAT))
    given = {name: value for name, value in fields.items() if value is not None}
    for name in given:
        if name not in known:
            raise ApiError(400, f"unknown field {name[:80]!r}", name[:80], "unknown_parameter")
    for name, only in _ONLY.items():
        if name in given and not _same(given[name], only):
            known_as = json.dumps(only, allow_nan=False)
            raise ApiError(400, f"{name} must be {known_as}: nothing else is supported here", name)
    n = _integer(given, "n", 1, 1, limits.choices)
    if type(given.get("best_of", n)) is not int or given.get("best_of", n) != n:
        raise ApiError(400, "best_of must be n: nothing else is supported here", "best_of")
    stream, usage, echo = _boolean(given, "stream"), _usage(given), _boolean(given, "echo")
    tokens = _integer(given, "max_tokens", 0 if chat else _DEFAULT_TOKENS, 1, longest)
    if chat is None:
        shown = _integer(given, "logprobs", -1, 0, ALTERNATIVES)
        logprobs = shown >= 0
    else:
        tokens = _integer(given, "max_completion_tokens", tokens, 1, longest)
        logprobs, shown = _boolean(given, "logprobs"), _integer(given, "top_logprobs", 0, 0, ALTERNATIVES)
        if shown and not logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    if echo and logprobs:
        raise ApiError(400, "echo with logprobs is not supported: the prompt's are not kept", "echo")
    sampling = _sampling(given, tokens or 1, max(0, shown), chat.stop if chat else ())
    try:
        room = Room(longest, check)
        if chat is None:
            prompts, texts = _prompts(given.get("prompt"), tokenizer, vocab_size, n, limits.choices, room)
        else:
            prompts, texts = [chat.prompt(_messages(given.get("messages")), room)], [""]
            tokens = tokens or max(1, longest - len(prompts[0]))
    except TooLongError:
        raise ApiError(
            400,
            f"the prompt has more than {longest} tokens, which are the most of prompt and completion; use a shorter "
            f"prompt",
            "messages" if chat else "prompt",
            "context_length_exceeded",
        ) from None
    for ids in prompts:
        if len(ids) + tokens > longest:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens, which with max_tokens={tokens} are {len(ids) + tokens}, and must "
                f"be at most {longest}; use a shorter prompt or fewer max_tokens",
                "max_tokens" if len(ids) < longest else "messages" if chat else "prompt",
                "context_length_exceeded",
            )
    return Asked(
        chat is not None,
        prompts,
        texts if echo else [""] * len(prompts),
        replace(sampling, max_tokens=tokens),
        n,
        stream,
        usage,
        logprobs,
    )


def _same(value: Any, only: Any) -> bool:
    """Equal, and of its type: false is not 0, which 0.0 is."""
    kinds = (int, float) if type(only) is int else (type(only),)
    return type(value) in kinds and bool(value == only)


def _usage(given: Fields) -> bool:
    options = given.get("stream_options", {})
    names = ("include_usage", "include_obfuscation")
    if not isinstance(options, dict) or set(options) - set(names):
        raise ApiError(400, "stream_options must be an object with include_usage", "stream_options")
    options = {name: value for name, value in options.items() if value is not None}
    for name in names:
        if type(options.get(name, False)) is not bool:
            raise ApiError(400, f"stream_options.{name} must be true or false", "stream_options")
    return bool(options.get("include_usage", False))


def _sampling(given: Fields, tokens: int, alternatives: int, stop: tuple[str, ...]) -> Sampling:
    own = given.get("stop", [])
    own = [own] if isinstance(own, str) else own
    if not isinstance(own, list) or len(own) > _STOPS or not all(isinstance(text, str) for text in own):
        raise ApiError(400, f"stop must be a text, or up to {_STOPS} of them", "stop")
    if any(len(text) > _STOP for text in own):
        raise ApiError(400, f"stop must be texts of at most {_STOP} characters", "stop")
    seed = given.get("seed", secrets.randbits(32))
    if type(seed) is not int:
        raise ApiError(400, "seed must be an integer", "seed")
    fields = {name: given[name] for name in ("top_k", "top_p", "ignore_eos") if name in given}
    for name in ("temperature", "top_p"):
        if type(given.get(name, 1)) not in (int, float) or not abs(given.get(name, 1)) <= _LARGEST:
            raise ApiError(400, f"{name} must be a number", name)
    try:
        return Sampling(
            tokens,
            float(given.get("temperature", 1.0)),
            stop=(*stop, *own),
            seed=seed % (1 << 32),
            logprobs=alternatives,
            **fields,
        )
    except ConfigError as error:
        raise ApiError(400, str(error), str(error).partition("=")[0]) from None


def _prompts(
    prompt: Any, tokenizer: Tokenizer, vocab_size: int, n: int, most: int, room: Room
) -> tuple[list[list[int]], list[str]]:
    """Token ids of each prompt, and its text where that was given; raises TooLongError for one that has no room."""
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
            texts.append(one)
            ids.append(encode_at_most(tokenizer.encode_batch, [one], room.tokens, tokenizer.token_bytes, room.check))
        elif isinstance(one, list):
            if len(one) > room.tokens:
                raise TooLongError(room.tokens)
            if not all(type(token) is int and 0 <= token < vocab_size for token in one):
                raise _no_prompt(vocab_size)
            texts.append("")
            ids.append(one)
        else:
            raise _no_prompt(vocab_size)
        if not ids[-1]:
            raise ApiError(400, "prompt is empty; give at least one character", "prompt")
    return ids, texts


def _no_prompt(vocab_size: int) -> ApiError:
    return ApiError(400, f"prompt must be a text, token ids in [0, {vocab_size}), or a list of either", "prompt")


def _messages(messages: Any) -> list[dict[str, str]]:
    """With content as one text each."""
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list of at least one message", "messages")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user", "assistant"):
            raise ApiError(
                400, f"messages[{i}] must be an object whose role is system, developer, user or assistant", "messages"
            )
        content = message.get("content")
        if isinstance(content, list):
            parts = [
                part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
            ]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
        if not isinstance(content, str):
            raise ApiError(400, f"messages[{i}].content must be a text, or a list of parts of text", "messages")
        found.append({"role": message["role"], "content": content})
    return found


def _integer(given: Fields, name: str, default: int, least: int, most: int) -> int:
    value = given.get(name, default)
    if name in given and (type(value) is not int or not least <= value <= most):
        raise ApiError(400, f"{name} must be an integer in [{least}, {most}]", name)
    return value


def _boolean(given: Fields, name: str) -> bool:
    value = given.get(name, False)
    if type(value) is not bool:
        raise ApiError(400, f"{name} must be true or false", name)
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def usage(prompts: Sequence[int], reused: int, new: int) -> Fields:
    """Args: tokens of each prompt; of all together those that the cache held; those that were generated."""
    total = sum(prompts)
    return {
        "prompt_tokens": total,
        "completion_tokens": new,
        "total_tokens": total + new,
        "prompt_tokens_details": {"cached_tokens": reused},
    }
