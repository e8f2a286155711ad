"""What a row says that a model is tuned on: its texts or messages, and where what is learned begins.

A row is a line of JSON. For tuning.objective=sft it has `prompt` and `completion`, or all `messages`; for dpo `prompt`,
`chosen` and `rejected`. A list of messages is TRL's, or ShareGPT's under any of the names, and a text beside one is a
message.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from bigmac_jax.data.documents import decode
from bigmac_jax.data.readers import parse_row

_FORMS = {
    "sft": "prompt and completion, messages, or ShareGPT's conversations",
    "dpo": "prompt, chosen and rejected, or the last two as conversations",
}
# Fields of a row, by OpenAI, TRL and ShareGPT, that would change what the model reads before an answer.
_UNREAD = ("tools", "functions", "images", "image", "videos", "audio", "chat_template_kwargs")
# What a message may say beside its content, by them and servers of models that reason; templates don't get it.
_UNREAD_OF_MESSAGE = (
    "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal", "audio", "images",
)  # fmt: skip
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
Messages = list[dict[str, str]]


class Dialogue(NamedTuple):
    messages: Messages
    shared: int = 0  # so many stand at the beginning that are no answers to learn


class Texts(NamedTuple):
    prompt: str
    answer: str


class BadRowError(ValueError):
    """What is wrong with a row: a reason that others share, the words for this one, and `fix` if all rows need it."""

    def __init__(self, reason: str, message: str, fix: str = ""):
        super().__init__(message)
        self.reason, self.fix = reason, fix


def parse_line(line: bytes) -> dict[str, Any]:
    """The fields of a line that say something; raises BadRowError if it is no object of JSON in UTF-8."""
    try:
        row, whole = parse_row(line)
    except ValueError as error:
        raise BadRowError("that are not JSON", f"it {error}") from None
    if not whole or "\ufffd" in line.decode(errors="replace"):
        raise BadRowError("that are not UTF-8", "it is not UTF-8, or holds U+FFFD")
    return {name: value for name, value in row.items() if value is not None}


def read_row(row: dict[str, Any], objective: str) -> list[Texts | Dialogue]:
    """What is encoded of a row: one for tuning.objective=sft, and for dpo what ends in the chosen answer, and in the
    rejected. Raises BadRowError for a row of another form, or one of which something would not be read."""
    pairs = objective == "dpo"
    names = ("chosen", "rejected") if pairs else ("completion",)
    _check_all_is_read(row)
    if not pairs:
        for name in ("messages", "conversations"):
            if name in row:
                return [Dialogue(_system(row) + _messages(row[name], name))]
    if pairs and "conversations" in row:  # ShareGPT's name of a prompt
        row = row | {"prompt": _messages(row["conversations"], "conversations")}
    _check_form(row, names, objective)
    if pairs and row["chosen"] == row["rejected"]:
        raise BadRowError("with two answers alike", "chosen and rejected are alike")
    if not any(isinstance(row.get(name), list | dict) for name in ("prompt", *names)):
        if row.get("system"):
            raise BadRowError(
                "with system beside texts", "'system' is not joined with texts; put it in front of 'prompt'"
            )
        return [Texts(_text(row, "prompt"), _text(row, name)) for name in names]
    prompt = _turns(row, "prompt", "user") if "prompt" in row else []
    whole = [_system(row) + _begin_with(prompt, _turns(row, name, "assistant"), name) for name in names]
    shared = _count_shared(*whole) if pairs else len(_system(row) + prompt)
    return [Dialogue(messages, shared) for messages in whole]


def _check_form(row: dict[str, Any], names: Sequence[str], objective: str) -> None:
    """Raises BadRowError if a row lacks a field; two conversations may begin with their prompt."""
    pairs = objective == "dpo"
    whole = pairs and all(isinstance(row.get(name), list) for name in names)
    lacking = [name for name in ("prompt", *names) if name not in row and not (name == "prompt" and whole)]
    if not lacking:
        return
    compared, fix = {"chosen", "rejected"} & set(row), f"a row of tuning.objective={objective} has {_FORMS[objective]}"
    if pairs and not compared and {"messages", "conversations", "completion"} & set(row):
        fix = "such rows are for tuning.objective=sft"
    elif not pairs and len(compared) == 2:
        fix = "such rows are for tuning.objective=dpo"
    reason = "without a prompt" if lacking == ["prompt"] else "without an answer"
    raise BadRowError(reason, f"it has no {lacking[0]!r}; it has {', '.join(row) or 'nothing'}", fix)


def _text(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise BadRowError("with a field that is no text", f"{name!r} is a {type(value).__name__}, not a text")
    return decode(value)[0]


def _turns(row: dict[str, Any], name: str, role: str) -> Messages:
    """The messages of a field: a list of them, one, or a text that is said by `role`."""
    value = row[name]
    if isinstance(value, list | dict):
        return _messages(value if isinstance(value, list) else [value], name)
    return [{"role": role, "content": _text(row, name)}]


def _system(row: dict[str, Any]) -> Messages:
    """The message of a field `system`, which a row of messages may have, as ShareGPT's do."""
    return [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []


def _check_all_is_read(row: dict[str, Any]) -> None:
    """Raises BadRowError if an answer would be learned without what belongs before it, or against its label."""
    if unread := _first_said(row, _UNREAD):
        raise BadRowError(f"with {unread}, which is not read", f"its {unread!r} is not read")
    if row.get("label") is False:  # TRL's unpaired preferences
        raise BadRowError("with label false", "its label is false, and every answer is learned")


def _first_said(fields: dict[str, Any], names: Sequence[str]) -> str:
    """The first of these fields that says something; "" if none does."""
    return next((name for name in names if fields.get(name)), "")


def _begin_with(prompt: Messages, answer: Messages, name: str) -> Messages:
    """A whole conversation, of an answer that may be one already."""
    if answer[: len(prompt)] == prompt:
        return answer
    if answer[0]["role"] != "assistant":
        raise BadRowError(
            "whose prompt is another",
            f"{name!r} begins neither with the messages of 'prompt' nor with an answer to them",
        )
    return prompt + answer


def _count_shared(chosen: Messages, rejected: Messages) -> int:
    """The number of messages before the first that differs, which must be an answer in both."""
    pairs = zip(chosen, rejected, strict=False)
    shared = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))
    if [m[shared]["role"] for m in (chosen, rejected) if shared < len(m)] != ["assistant", "assistant"]:
        raise BadRowError("that differ in no answer", "chosen and rejected do not differ first in an answer")
    return shared


def _messages(value: Any, name: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise BadRowError("without messages", f"{name!r} is no list of messages")
    found = []
    for i, message in enumerate(value):
        keys = ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
        fields = [message.get(key) for key in keys] if isinstance(message, dict) else [None]
        if isinstance(message, dict) and (unread := _first_said(message, _UNREAD_OF_MESSAGE)):
            raise BadRowError(f"with {unread}, which is not read", f"{name}[{i}] has {unread!r}, which is not read")
        if not all(isinstance(field, str) for field in fields):
            raise BadRowError("with a message that is no text", f"{name}[{i}] has no texts for {' and '.join(keys)}")
        role, content = map(str, fields)
        role, weight = _ROLES.get(role, role), message.get("weight")
        if role == "assistant" and weight not in (None, 1):  # OpenAI's: 0 is an answer that isn't learned
            raise BadRowError("with a weight", f"{name}[{i}] has weight={weight!r}, and every answer is learned whole")
        found.append({"role": role, "content": decode(content)[0]})
    return found
