"""The rows that a model is tuned on: conversations, whose answers alone are learned, and preferences between answers.

A row is a line of JSON. For tuning.objective=sft it has `prompt` and `completion`, or all `messages`; for dpo `prompt`,
`chosen` and `rejected`. If all of these are texts they are joined as they are, and followed by the end of text. A list
of messages (TRL's, or ShareGPT's under any of the names) goes through a chat template, and a text beside one is a
message. S sequences, L window length.
"""

import datetime
import functools
import hashlib
import itertools
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data import kinds
from bigmac_jax.data.batch import NO_TARGET
from bigmac_jax.data.chat_template import ChatError, Piece, load_chat, say_template
from bigmac_jax.data.corpus import open_documents
from bigmac_jax.data.documents import ReadCounts, Slice, decode, log_once
from bigmac_jax.data.encoding import Counts
from bigmac_jax.data.local_files import FileDocuments
from bigmac_jax.data.packing import PackedWindows
from bigmac_jax.data.readers import parse_row, read_lines
from bigmac_jax.data.splits import text_key
from bigmac_jax.data.tokenizer import Tokenizer

_ROWS = 1024  # that are encoded at a time
_PLACES = 5  # of bad rows that are named
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


class RefusedRowError(ConfigError):
    """A row that tuning.bad_rows=stop does not take.

    Args:
      what: which, and what is wrong with it.
      fix: what to do about it, where the run has not begun.
    """

    def __init__(self, what: str, fix: str):
        super().__init__(f"{what}; {fix}")
        self.what = what


class _BadRowError(ValueError):
    """What is wrong with a row: a reason that others share, the words for this one, and `fix` if all rows need it."""

    def __init__(self, reason: str, message: str, fix: str = ""):
        super().__init__(message)
        self.reason, self.fix = reason, fix


def _check_sources(config: Config) -> None:
    """That all sources may have rows, before one of them is opened."""
    aim, data = config.tuning.objective, config.data
    if data.mixture:
        raise ConfigError(
            f"data.mixture is of texts, and tuning.objective={aim} reads one source of rows; use data.source"
        )
    for name in ("source", "validation_source"):
        place = getattr(data, name)
        if place == "sotu" or place.startswith("tfds:"):
            raise ConfigError(
                f"data.{name}={place} has texts, and tuning.objective={aim} needs conversations; give a .jsonl file"
            )


class Conversations:
    """The rows of a split, encoded and held in memory. `text` is the fingerprint of the files that they come from.

    Args:
      date: ISO, what a template is told that has none of its run yet; by default now.

    Raises:
      ConfigError: a source is no file of JSON lines, a row is bad (with tuning.bad_rows=stop), or no row is good; or
        the tokenizer doesn't encode a text piece by piece, so that no answer can be told from its prompt.
    """

    def __init__(self, config: Config, split: str, tokenizer: Tokenizer, date: str = ""):
        _check_sources(config)
        docs = open_documents(config.data, split, config.cache_dir)
        if not isinstance(docs, FileDocuments):
            raise ConfigError(
                f"{docs.name} has texts, and tuning.objective={config.tuning.objective} needs a .jsonl file"
            )
        if tokenizer.decode(tokenizer.encode("a") + tokenizer.encode("b")) != "ab":
            raise ConfigError(
                f"data.tokenizer={config.data.tokenizer} adds a space to each text that it is given, so that no answer "
                f"can be cut from its prompt; tune with a byte-level tokenizer"
            )
        self._docs, self._config, self.split = docs, config, split
        self._any = False  # a row that was good
        self._any_messages = False  # a row that the template made a text of
        self.name, self.text, self.eos_id = docs.name, docs.fingerprint, tokenizer.eos_id
        date = date or datetime.datetime.now().isoformat()
        template, setting = config.tuning.chat_template, "tuning.chat_template"
        self.chat = load_chat(tokenizer, template, config.data.tokenizer, setting, date=date)
        self.pairs = config.tuning.objective == "dpo"  # sequences 2i and 2i + 1 are the two of row i
        # int32 [2, n] each: inputs and targets, NO_TARGET where none counts.
        self.sequences: list[np.ndarray] = []
        self.counts = Counts()  # rows, and what is learned: tokens, words and bytes of (for dpo, chosen) answers
        self._read()
        if not (self._any_messages or self.chat.files.place):  # a model of texts, to which our template would be news
            self.chat.files = self.chat.files._replace(template="")

    @property
    def rows(self) -> str:
        """The fingerprint of `sequences`, which depend on files, templates and dates."""
        digest = hashlib.sha256()
        for sequence in self.sequences:
            digest.update(len(sequence[0]).to_bytes(8) + np.ascontiguousarray(sequence, "<i4").tobytes())
        return digest.hexdigest()

    @property
    def num_tokens(self) -> int:
        return self.counts.tokens

    @functools.cache  # noqa: B019  a run has few
    def pack(self, length: int) -> "PackedConversations":
        """Makes windows of whole conversations; raises ConfigError for one that is longer."""
        return PackedConversations(self.sequences, 1 + self.pairs, length, self.eos_id, self.name)

    def _read(self) -> None:
        bad: dict[str, list[str]] = defaultdict(list)
        longest = self._config.data.sequence_length
        rows = self._read_rows(bad)
        while batch := list(itertools.islice(rows, _ROWS)):
            texts = [piece.text for _, sequences in batch for pieces in sequences for piece in pieces]
            encoded = iter(self.chat.encode_batch(texts))
            for place, sequences in batch:
                tokens = [[next(encoded) for _ in pieces] for pieces in sequences]
                try:
                    made = list(map(self._encode_sequence, sequences, tokens))
                    size = sum(sequence.shape[1] for sequence in made)
                    if size > longest:
                        message = f"its {size} tokens are more than data.sequence_length={longest}"
                        raise _BadRowError("longer than data.sequence_length", message)
                except _BadRowError as error:
                    self._note_bad_row(bad, place, error)
                    continue
                self.sequences += made
                # The end of an answer is a token, but as little text as the end of a document.
                answers = [part for piece in sequences[0] if piece.answer for part in self.chat.split_names(piece.text)]
                self.counts.documents += 1
                self.counts.tokens += int(np.count_nonzero(made[0][1] != NO_TARGET))
                self.counts.words += sum(len(text.split()) for text in answers)
                self.counts.bytes += sum(len(text.encode()) for text in answers)
        if bad:
            reasons = "; ".join(f"{len(places)} {reason} ({_list_places(places)})" for reason, places in bad.items())
            log_once(logging.WARNING, f"{self.name}: {sum(map(len, bad.values())):,} rows left out: {reasons}")
        if not self.sequences:
            raise ConfigError(f"{self.name} has no row to learn from; give rows with answers")

    def _read_rows(self, bad: dict[str, list[str]]) -> Iterator[tuple[str, list[list[Piece]]]]:
        """Yields (place, sequences of pieces) for each good row of the split; for dpo, the chosen sequence first."""
        held = self._docs.choose_held_out((text_key(_text_of_line(row)), len(row)) for _, row in self._lines())
        if held.sizes is not None:
            raise ConfigError(
                f"{self._docs.setting} has {len(held.sizes)} rows, too few to hold some out; set "
                f"data.validation_source and data.test_source to rows of their own"
            )
        for place, line in self._lines():
            if held.portion(_text_of_line(line), self.split) is None:
                continue
            try:
                made = self._make_sequences(_parse(line))
                self._any = True
                yield place, made
            except _BadRowError as error:
                self._note_bad_row(bad, place, error)

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        for path in self._docs.files:
            kind = kinds.guess_kind(path)
            if kind is None or kind.name != "jsonl":
                raise ConfigError(
                    f"{path} is no .jsonl file, and tuning reads rows; write it with a JSON object a line"
                )
            try:
                yield from ((where(), line) for where, line in read_lines(path, kind, Slice(0), ReadCounts()))
            except kinds.read_errors() as error:
                raise kinds.explain_error(path, error) from None

    def _note_bad_row(self, bad: dict[str, list[str]], place: str, error: _BadRowError) -> None:
        if self._config.tuning.bad_rows == "stop":
            fix, skip = error.fix or "mend the row", ", or leave such rows out with tuning.bad_rows=skip"
            raise RefusedRowError(f"{place}: {error}", fix + ("" if error.fix and not self._any else skip))
        bad[error.reason].append(place)

    def _make_sequences(self, row: dict[str, Any]) -> list[list[Piece]]:
        row = {name: value for name, value in row.items() if value is not None}
        names = ("chosen", "rejected") if self.pairs else ("completion",)
        _check_all_is_read(row)
        try:
            if not self.pairs:
                for name in ("messages", "conversations"):
                    if name in row:
                        return [self._render(_system(row) + _messages(row[name], name))]
            if self.pairs and "conversations" in row:  # ShareGPT's name of a prompt
                row = row | {"prompt": _messages(row["conversations"], "conversations")}
            self._check_form(row, names)
            if self.pairs and row["chosen"] == row["rejected"]:
                raise _BadRowError("with two answers alike", "chosen and rejected are alike")
            if not any(isinstance(row.get(name), list | dict) for name in ("prompt", *names)):
                if row.get("system"):
                    raise _BadRowError(
                        "with system beside texts", "'system' is not joined with texts; put it in front of 'prompt'"
                    )
                return [self._join(_text(row, "prompt"), _text(row, name)) for name in names]
            prompt = _turns(row, "prompt", "user") if "prompt" in row else []
            whole = [_system(row) + _begin_with(prompt, _turns(row, name, "assistant"), name) for name in names]
            shared = _count_shared(*whole) if self.pairs else len(_system(row) + prompt)
            return [self._render(messages, shared) for messages in whole]
        except ChatError as error:
            reason = "that the template refuses" if error.index is None else "with a message that no template takes"
            raise _BadRowError(reason, str(error)) from None

    def _join(self, prompt: str, answer: str) -> list[Piece]:
        if not answer:
            raise _BadRowError("without an answer", "its answer is empty")
        for text, name in ((prompt, "the prompt"), (answer, "the answer")):
            self.chat.check_text(text, name, 0)
        return [Piece(prompt, False), Piece(answer + self.chat.end, True)]

    def _check_form(self, row: dict[str, Any], names: Sequence[str]) -> None:
        """Raises _BadRowError if a row lacks a field; two conversations may begin with their prompt."""
        whole = self.pairs and all(isinstance(row.get(name), list) for name in names)
        lacking = [name for name in ("prompt", *names) if name not in row and not (name == "prompt" and whole)]
        if not lacking:
            return
        objective, compared = self._config.tuning.objective, {"chosen", "rejected"} & set(row)
        fix = f"a row of tuning.objective={objective} has {_FORMS[objective]}"
        if self.pairs and not compared and {"messages", "conversations", "completion"} & set(row):
            fix = "such rows are for tuning.objective=sft"
        elif not self.pairs and len(compared) == 2:
            fix = "such rows are for tuning.objective=dpo"
        reason = "without a prompt" if lacking == ["prompt"] else "without an answer"
        raise _BadRowError(reason, f"it has no {lacking[0]!r}; it has {', '.join(row) or 'nothing'}", fix)

    def _render(self, messages: Messages, shared: int = 0) -> list[Piece]:
        """`shared`: so many messages stand at the beginning that are no answers to learn."""
        if not messages or messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
            raise _BadRowError("without an answer", "its last message is no answer of the assistant")
        if not self._any_messages:
            say_template(self.chat)
            self._any_messages = True
        pieces = self.chat.pieces(messages)
        numbers = [n for n, piece in enumerate(pieces) if piece.answer]
        if not numbers:
            raise _BadRowError("that the template refuses", "the chat template shows no answer of its messages")
        if not shared:
            return pieces
        own = sum(message["role"] == "assistant" for message in messages[shared:])
        return [Piece(piece.text, n in numbers[-own:]) for n, piece in enumerate(pieces)]

    def _encode_sequence(self, pieces: Sequence[Piece], encoded: Sequence[list[int]]) -> np.ndarray:
        """int32 [2, n] up to the last token of an answer; an answer that begins a text follows an end of text."""
        tokens = np.array([token for ids in encoded for token in ids], np.int32)
        answer = np.repeat([piece.answer for piece in pieces], [len(ids) for ids in encoded]).astype(bool)
        if not answer.any():
            raise _BadRowError("without an answer", "the tokenizer makes no token of its answer")
        if answer[0]:
            tokens, answer = np.insert(tokens, 0, self.eos_id), np.insert(answer, 0, False)
        stop = int(np.flatnonzero(answer)[-1]) + 1
        return np.stack([tokens[: stop - 1], np.where(answer[1:stop], tokens[1:stop], NO_TARGET)])


class PackedConversations(PackedWindows):
    """Windows of whole conversations. In windows of preferences, segment 2p is the chosen answer of pair p with its
    prompt, and 2p + 1 the rejected one. The bits of `reference`, float32 [W, L], become a fourth row of windows."""

    def __init__(self, sequences: Sequence[np.ndarray], per_row: int, length: int, eos_id: int, name: str):
        self._all, self._per_row = sequences, per_row
        self.reference: np.ndarray | None = None
        size_N = np.array([sequence.shape[1] for sequence in sequences], np.int64).reshape(-1, per_row).sum(1)
        if (longest := int(size_N.max())) > length:
            raise ConfigError(f"{name}: its longest row has {longest} tokens, more than the {length} of a window")
        super().__init__(size_N, length, eos_id)

    def _sequences(self, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return ((inputs, targets) for inputs, targets in self._all[n * self._per_row : (n + 1) * self._per_row])

    def __getitem__(self, w: int) -> np.ndarray:
        window = super().__getitem__(w)
        if self.reference is None:
            return window
        return np.concatenate([window, self.reference[w].view(np.int32)[None]])

    def describe(self) -> str:
        """How many windows and rows and how much padding there are, for the log."""
        return f"{len(self):,} windows of {len(self._size_N):,} rows, {self.padding:.2%} padding"


def _text_of_line(line: bytes) -> str:
    return line.strip().decode(errors="replace")


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row, whole = parse_row(line)
    except ValueError as error:
        raise _BadRowError("that are not JSON", f"it {error}") from None
    if not whole or "\ufffd" in line.decode(errors="replace"):
        raise _BadRowError("that are not UTF-8", "it is not UTF-8, or holds U+FFFD")
    return row


def _text(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise _BadRowError("with a field that is no text", f"{name!r} is a {type(value).__name__}, not a text")
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
    """Raises _BadRowError if an answer would be learned without what belongs before it, or against its label."""
    if unread := _first_said(row, _UNREAD):
        raise _BadRowError(f"with {unread}, which is not read", f"its {unread!r} is not read")
    if row.get("label") is False:  # TRL's unpaired preferences
        raise _BadRowError("with label false", "its label is false, and every answer is learned")


def _first_said(fields: dict[str, Any], names: Sequence[str]) -> str:
    """The first of these fields that says something; "" if none does."""
    return next((name for name in names if fields.get(name)), "")


def _begin_with(prompt: Messages, answer: Messages, name: str) -> Messages:
    """A whole conversation, of an answer that may be one already."""
    if answer[: len(prompt)] == prompt:
        return answer
    if answer[0]["role"] != "assistant":
        raise _BadRowError(
            "whose prompt is another",
            f"{name!r} begins neither with the messages of 'prompt' nor with an answer to them",
        )
    return prompt + answer


def _count_shared(chosen: Messages, rejected: Messages) -> int:
    """The number of messages before the first that differs, which must be an answer in both."""
    pairs = zip(chosen, rejected, strict=False)
    shared = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))
    if [m[shared]["role"] for m in (chosen, rejected) if shared < len(m)] != ["assistant", "assistant"]:
        raise _BadRowError("that differ in no answer", "chosen and rejected do not differ first in an answer")
    return shared


def _messages(value: Any, name: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise _BadRowError("without messages", f"{name!r} is no list of messages")
    found = []
    for i, message in enumerate(value):
        keys = ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
        fields = [message.get(key) for key in keys] if isinstance(message, dict) else [None]
        if isinstance(message, dict) and (unread := _first_said(message, _UNREAD_OF_MESSAGE)):
            raise _BadRowError(f"with {unread}, which is not read", f"{name}[{i}] has {unread!r}, which is not read")
        if not all(isinstance(field, str) for field in fields):
            raise _BadRowError("with a message that is no text", f"{name}[{i}] has no texts for {' and '.join(keys)}")
        role, content = map(str, fields)
        role, weight = _ROLES.get(role, role), message.get("weight")
        if role == "assistant" and weight not in (None, 1):  # OpenAI's: 0 is an answer that isn't learned
            raise _BadRowError("with a weight", f"{name}[{i}] has weight={weight!r}, and every answer is learned whole")
        found.append({"role": role, "content": decode(content)[0]})
    return found


def _list_places(places: Sequence[str]) -> str:
    more = f" and {len(places) - _PLACES} more" if len(places) > _PLACES else ""
    return ", ".join(places[:_PLACES]) + more
