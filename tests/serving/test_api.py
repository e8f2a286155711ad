"""What the fields of a request mean, and which values are refused: without a server."""

import dataclasses
from typing import Any

import pytest

from bigmac_jax.data.chat_template import PLAIN, Chat
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.inference.sampling import Sampling
from bigmac_jax.serving import api
from bigmac_jax.serving.api import CompletionRequest
from bigmac_jax.serving.dialogue import Dialogue
from bigmac_jax.serving.limits import ApiError, Limits

LONGEST, CHOICES = 64, 6
TEXT: dict[str, Any] = {"prompt": "ab", "seed": 5}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "seed": 5}
PROMPT = list(b"User: a\nAssistant:")
OF_TEXT = CompletionRequest(False, [[97, 98]], [""], Sampling(16, 1.0, seed=5), 1, False, False, False)
OF_CHAT = CompletionRequest(
    True, [PROMPT], [""], Sampling(LONGEST - len(PROMPT), 1.0, stop=("\nUser:",), seed=5), 1, False, False, False
)
NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "suffix": "", "tools": [], "tool_choice": "none",
    "functions": [], "response_format": {"type": "text"}, "modalities": ["text"], "user": "u", "n": None, "none": None,
}  # fmt: skip


def parsed(fields: dict[str, Any]) -> CompletionRequest:
    tokenizer = ByteTokenizer()
    chat = Dialogue(Chat(tokenizer, PLAIN)) if "messages" in fields else None
    return api.parse_request(fields, chat, tokenizer, 257, LONGEST, Limits(choices=CHOICES), lambda: None)


def said(content: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


@pytest.mark.parametrize(
    ("fields", "sampling", "others"),  # what differs from OF_TEXT
    [
        ({}, {}, {}),
        (NEUTRAL, {}, {}),
        ({"max_tokens": LONGEST - 2}, {"max_tokens": LONGEST - 2}, {}),
        ({"prompt": "a" * (LONGEST - 1), "max_tokens": 1}, {"max_tokens": 1}, {"prompts": [[97] * (LONGEST - 1)]}),
        ({"n": CHOICES, "best_of": CHOICES}, {}, {"n": CHOICES}),
        ({"prompt": ["a", "b", "c"], "n": 2}, {}, {"prompts": [[97], [98], [99]], "echo": [""] * 3, "n": 2}),
        ({"prompt": ["a"] * CHOICES}, {}, {"prompts": [[97]] * CHOICES, "echo": [""] * CHOICES}),
        ({"prompt": [0, 256]}, {}, {"prompts": [[0, 256]]}),
        ({"prompt": [[1], "a"], "echo": True}, {}, {"prompts": [[1], [97]], "echo": ["\x01", "a"]}),
        ({"prompt": [0] * (LONGEST - 1), "max_tokens": 1}, {"max_tokens": 1}, {"prompts": [[0] * (LONGEST - 1)]}),
        ({"stream": True}, {}, {"stream": True}),
        ({"stream": True, "stream_options": {"include_usage": True}}, {}, {"stream": True, "usage": True}),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, {}, {"stream": True}),
        ({"logprobs": 0}, {}, {"logprobs": True}),
        ({"logprobs": 20}, {"logprobs": 20}, {"logprobs": True}),
        ({"temperature": 0, "top_k": 3, "top_p": 0.5, "ignore_eos": True},
         {"temperature": 0, "top_k": 3, "top_p": 0.5, "ignore_eos": True}, {}),
        ({"seed": -1}, {"seed": 2**32 - 1}, {}),
        ({"seed": 2**32}, {"seed": 0}, {}),
        ({"stop": "x"}, {"stop": ("x",)}, {}),
        ({"stop": ["a" * 256] * 16}, {"stop": ("a" * 256,) * 16}, {}),
    ],
)  # fmt: skip
def test_what_a_completion_asks_for(fields: dict[str, Any], sampling: dict[str, Any], others: dict[str, Any]) -> None:
    asked = dataclasses.replace(OF_TEXT.sampling, **sampling)
    assert parsed(TEXT | fields) == dataclasses.replace(OF_TEXT, sampling=asked, **others)


@pytest.mark.parametrize(
    ("fields", "sampling", "others"),  # what differs from OF_CHAT
    [
        ({}, {}, {}),
        (NEUTRAL, {}, {}),
        ({"max_tokens": 3}, {"max_tokens": 3}, {}),
        ({"max_tokens": 3, "max_completion_tokens": 1}, {"max_tokens": 1}, {}),
        ({"messages": said("a" * (LONGEST - len(PROMPT)))}, {"max_tokens": 1},
         {"prompts": [list(b"User: " + b"a" * (LONGEST - len(PROMPT)) + b"\nAssistant:")]}),
        ({"messages": said([{"type": "text", "text": text} for text in "ab"])}, {"max_tokens": LONGEST - 19},
         {"prompts": [list(b"User: ab\nAssistant:")]}),
        ({"logprobs": True}, {}, {"logprobs": True}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}, {"logprobs": True}),
        ({"logprobs": False, "top_logprobs": 0}, {}, {}),
        ({"stop": ["x"]}, {"stop": ("\nUser:", "x")}, {}),
    ],
)  # fmt: skip
def test_what_a_chat_asks_for(fields: dict[str, Any], sampling: dict[str, Any], others: dict[str, Any]) -> None:
    asked = dataclasses.replace(OF_CHAT.sampling, **sampling)
    assert parsed(CHAT | fields) == dataclasses.replace(OF_CHAT, sampling=asked, **others)


LONG = "context_length_exceeded"
REFUSED: list[tuple[dict[str, Any], str, str | None]] = [  # a request, the field that is named, a code
    (TEXT | {"max_tokens": LONGEST - 1}, "max_tokens", LONG),
    (TEXT | {"prompt": "a" * (LONGEST - 1), "max_tokens": 2}, "max_tokens", LONG),
    (TEXT | {"prompt": "a" * LONGEST}, "prompt", LONG),
    (TEXT | {"prompt": [0] * (LONGEST + 1)}, "prompt", LONG),
    (CHAT | {"messages": said("a" * (LONGEST + 1 - len(PROMPT)))}, "messages", LONG),
    *((TEXT | {"max_tokens": size}, "max_tokens", None) for size in (0, LONGEST + 1, True)),
    *((CHAT | {"max_completion_tokens": size}, "max_completion_tokens", None) for size in (0, LONGEST + 1)),
    *((TEXT | {"n": n}, "n", None) for n in (0, CHOICES + 1, True)),
    (TEXT | {"n": 2, "best_of": 1}, "best_of", None),
    (TEXT | {"prompt": ["a"] * 2, "n": 4}, "n", None),
    (TEXT | {"prompt": ["a"] * (CHOICES + 1)}, "prompt", None),
    *((TEXT | {"prompt": prompt}, "prompt", None) for prompt in ([257], [-1], [True], [["a"]], [[1], []], 3, "", [])),
    *((TEXT | {"logprobs": count}, "logprobs", None) for count in (-1, 21, True)),
    (TEXT | {"echo": True, "logprobs": 0}, "echo", None),
    (CHAT | {"logprobs": 1}, "logprobs", None),
    (CHAT | {"top_logprobs": 1}, "top_logprobs", None),
    *((CHAT | {"logprobs": True, "top_logprobs": count}, "top_logprobs", None) for count in (-1, 21)),
    *((TEXT | {"stop": stop}, "stop", None) for stop in ("a" * 257, ["a"] * 17, [1], 1)),
    *((TEXT | {"seed": seed}, "seed", None) for seed in (True, 1.0)),
    *((TEXT | {name: value}, name, None) for name, value in (("top_p", 0), ("temperature", -1), ("top_k", -1))),
    *((TEXT | {name: value}, name, None) for name, value in (
        ("presence_penalty", 1), ("logit_bias", {"1": 2}), ("tool_choice", "auto"), ("tools", [{}]), ("suffix", "b"),
        ("response_format", {"type": "json_object"}), ("frequency_penalty", False), ("modalities", ["audio"]))),
    (TEXT | {"max_completion_tokens": 2}, "max_completion_tokens", "unknown_parameter"),
    (CHAT | {"prompt": "a"}, "prompt", "unknown_parameter"),
    *((CHAT | {"messages": m}, "messages", None) for m in (
        [], "hi", [3], said("a", "king"), said(3), said([]) + said(None), said([{"type": "image_url"}]),
        said([{"type": "text", "text": "a"}, "b"]), said([{"type": "text", "text": 1}]))),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "code"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_no_request_may_ask_for(fields: dict[str, Any], param: str, code: str | None) -> None:
    with pytest.raises(ApiError) as refused:
        parsed(fields)
    assert (refused.value.status, refused.value.param, refused.value.code) == (400, param, code)
