"""What a model is tuned on: conversations, of which the answers alone are learned, and preferences between answers.

A row is a line of JSON. For tuning.objective=sft it has `prompt` and `completion`, two texts that are joined as they
are, or `messages`, through a chat template. For dpo it has `prompt`, `chosen` and `rejected`: texts, or `prompt` is a
list of messages and the two are answers to it. A text is followed by the end of text. S sequences, L window length.
"""

import functools
import hashlib
import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.batch import NO_TARGET, PADDING
from bigmac_jax.data.chat_template import ChatError, Piece, load_chat
from bigmac_jax.data.corpus import documents
from bigmac_jax.data.documents import Seen, decode, once
from bigmac_jax.data.kinds import broken, kind_of, open_content
from bigmac_jax.data.kinds import errors as kind_errors
from bigmac_jax.data.local_files import LocalDocuments
from bigmac_jax.data.packing import best_fit
from bigmac_jax.data.splits import Held, hold_out, key_of
from bigmac_jax.data.tokenizer import Tokenizer

_ROWS = 1024  # that are encoded at a time
_PLACES = 5  # of bad rows that are named


class _BadRowError(ValueError):
    """What is wrong with a row: a reason that others share, and the words for this one."""

    def __init__(self, reason: str, message: str = ""):
        super().__init__(message or reason)
        self.reason = reason


class Example(NamedTuple):
    """One row: a sequence of pieces of text, or two of dpo, the chosen one first."""

    place: str
    sequences: list[list[Piece]]

    @property
    def answers(self) -> list[str]:
        return [piece.text for piece in self.sequences[0] if piece.answer]


class Conversations:
    """The rows of a split, encoded; all of them are held in memory.

    Attributes:
      text: the fingerprint of its files.
      num_tokens: of answers, which is what is learned, of dpo of those that were chosen; so are words and bytes.

    Raises:
      ConfigError: a source that is no file of JSON lines, a row that is bad (with tuning.bad_rows=stop), or no good
        one; a tokenizer whose tokens can't be cut at an answer.
    """

    def __init__(self, config: Config, split: str, tokenizer: Tokenizer):
        docs = documents(config.data, split, config.cache_dir)
        if not isinstance(docs, LocalDocuments):
            raise ConfigError(
                f"{docs.name} has texts, and tuning.objective={config.tuning.objective} needs a .jsonl file"
            )
        if tokenizer.decode(tokenizer.encode("a") + tokenizer.encode("b")) != "ab":
            raise ConfigError(
                f"data.tokenizer={config.data.tokenizer} adds a space to each text that it is given, so that no answer "
                f"can be cut from its prompt; tune with a byte-level tokenizer"
            )
        self._docs, self._config, self.split = docs, config, split
        self.name, self.text, self.eos_id = docs.name, docs.fingerprint, tokenizer.eos_id
        self.chat = load_chat(
            tokenizer, config.tuning.chat_template, config.data.tokenizer, "tuning.chat_template", dated=True
        )
        self.sequences: list[np.ndarray] = []  # int32 [2, n]: inputs and targets, NO_TARGET where none counts
        self.num_words = self.num_bytes = 0
        self._read()
        self.num_tokens = sum(
            int(np.count_nonzero(targets != NO_TARGET)) for _, targets in self.sequences[:: 1 + self.pairs]
        )

    @property
    def pairs(self) -> bool:
        """Whether sequences 2i and 2i + 1 are the two of row i."""
        return self._config.tuning.objective == "dpo"

    @property
    def rows(self) -> str:
        """The fingerprint of `sequences`: also of what encodes the files, as templates and dates do."""
        digest = hashlib.sha256()
        for sequence in self.sequences:
            digest.update(len(sequence[0]).to_bytes(8) + np.ascontiguousarray(sequence, "<i4").tobytes())
        return digest.hexdigest()

    @property
    def num_documents(self) -> int:
        return len(self.sequences) // (1 + self.pairs)

    @functools.cache  # noqa: B019  a run has few
    def packed(self, length: int) -> "Windows":
        """Windows of whole conversations; raises ConfigError for one that is longer."""
        return Windows(self.sequences, 1 + self.pairs, length, self.eos_id, self.name)

    def _read(self) -> None:
        bad: dict[str, list[str]] = defaultdict(list)
        longest = self._config.data.sequence_length
        rows = self._rows(bad)
        while batch := list(itertools.islice(rows, _ROWS)):
            pieces = [piece.text for example in batch for pieces in example.sequences for piece in pieces]
            encoded = iter(self.chat.encode_batch(pieces))
            for example in batch:
                tokens = [[next(encoded) for _ in pieces] for pieces in example.sequences]
                try:
                    made = [_sequence(*of, self.eos_id) for of in zip(example.sequences, tokens, strict=True)]
                except _BadRowError as error:
                    self._bad(bad, example.place, error)
                    continue
                size = sum(sequence.shape[1] for sequence in made)
                if size > longest:
                    told = f"its {size} tokens are more than data.sequence_length={longest}"
                    self._bad(bad, example.place, _BadRowError("longer than data.sequence_length", told))
                    continue
                self.sequences += made
                self.num_words += sum(len(text.split()) for text in example.answers)
                self.num_bytes += sum(len(text.encode()) for text in example.answers)
        if bad:
            reasons = "; ".join(f"{len(places)} {reason} ({_listed(places)})" for reason, places in bad.items())
            once(logging.WARNING, f"{self.name}: {sum(map(len, bad.values())):,} rows left out: {reasons}")
        if not self.sequences:
            raise ConfigError(f"{self.name} has no row to learn from; give rows with answers")

    def _rows(self, bad: dict[str, list[str]]) -> Iterator[Example]:
        """The split's good rows."""
        held = self._held()
        for place, line in self._lines():
            if held.portion(_beginning(line), self.split) is None:
                continue
            try:
                yield Example(place, self._example(_parsed(line)))
            except _BadRowError as error:
                self._bad(bad, place, error)

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        for path in self._docs.files:
            kind = kind_of(path)
            if kind is None or kind.name != "jsonl":
                raise ConfigError(f"{path} holds text, and tuning needs rows; give files that end in .jsonl")
            try:
                with open_content(path, kind, Seen()) as file:
                    yield from ((f"{path} line {n}", line) for n, line in enumerate(file, 1) if not line.isspace())
            except kind_errors() as error:
                raise broken(path, error) from None

    def _held(self) -> Held:
        """What is held out of the rows, by their text."""
        if not self._docs.held_out:
            return Held(())
        held, line = hold_out(((key_of(_beginning(row)), len(row)) for _, row in self._lines()), self._docs.held_out)
        if held.sizes is not None:
            raise ConfigError(
                f"{self._docs.setting} has {len(held.sizes)} rows, too few to hold some out; set "
                f"data.validation_source and data.test_source to rows of their own"
            )
        once(logging.INFO, f"{self._docs.setting}: {line}")
        return held

    def _bad(self, bad: dict[str, list[str]], place: str, error: _BadRowError) -> None:
        if self._config.tuning.bad_rows == "stop":
            raise ConfigError(f"{place}: {error}; mend the row, or leave such rows out with tuning.bad_rows=skip")
        bad[error.reason].append(place)

    def _example(self, row: dict[str, Any]) -> list[list[Piece]]:
        try:
            if not self.pairs and "messages" in row:
                return [self._turns(_messages(row["messages"], "messages"))]
            if not self.pairs:
                return [self._plain(_text(row, "prompt"), _text(row, "completion"))]
            answers = [_text(row, name) for name in ("chosen", "rejected")]
            if answers[0] == answers[1]:
                raise _BadRowError("with two answers alike", "chosen and rejected are alike")
            if isinstance(row.get("prompt"), str):
                return [self._plain(row["prompt"], answer) for answer in answers]
            turns = _messages(row.get("prompt"), "prompt")
            return [self._turns([*turns, {"role": "assistant", "content": text}], last=True) for text in answers]
        except ChatError as error:
            reason = "that the template refuses" if error.index is None else "with a message that no template takes"
            raise _BadRowError(reason, str(error)) from None

    def _plain(self, prompt: str, answer: str) -> list[Piece]:
        if not answer:
            raise _BadRowError("without an answer", "its answer is empty")
        for text, name in ((prompt, "the prompt"), (answer, "the answer")):
            self.chat.check_text(text, name, 0)
        return [Piece(prompt, False), Piece(answer + self.chat.end, True)]

    def _turns(self, messages: list[dict[str, str]], last: bool = False) -> list[Piece]:
        """`last`: the last answer alone is one."""
        if not messages or messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
            raise _BadRowError("without an answer", "its last message is no answer of the assistant")
        pieces = self.chat.pieces(messages)
        numbers = [n for n, piece in enumerate(pieces) if piece.answer]
        if not numbers:
            raise _BadRowError("that the template refuses", "the chat template shows no answer of its messages")
        if last:
            pieces = [Piece(piece.text, n == numbers[-1]) for n, piece in enumerate(pieces)]
        return pieces


class Windows:
    """Windows of whole conversations: window w is int32 [3, L], the inputs, targets and segments of `data.batch.Batch`.
    Of preferences, segment 2p is the chosen answer of pair p with its prompt, and 2p + 1 the other; where `reference`
    is set, float32 [W, L], its bits are a fourth row."""

    def __init__(self, sequences: Sequence[np.ndarray], of_row: int, length: int, eos_id: int, name: str):
        self._sequences, self._of_row, self._length, self._eos_id = sequences, of_row, length, eos_id
        self.reference: np.ndarray | None = None
        sizes = np.array([sequence.shape[1] for sequence in sequences], np.int64)
        self._size_N = sizes.reshape(-1, of_row).sum(1)  # of rows
        if (longest := int(self._size_N.max())) > length:
            raise ConfigError(f"{name}: its longest row has {longest} tokens, more than the {length} of a window")
        # A window's rows stand in their order, and windows in the order of their first ones.
        self._windows = sorted(sorted(window) for window in best_fit(self._size_N, length))

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, w: int) -> np.ndarray:
        inputs, targets, segments = window = np.empty((3, self._length), np.int32)
        at, step = 0, self._of_row
        own = [self._sequences[n * step + k] for n in self._windows[w] for k in range(step)]
        for number, sequence in enumerate(own):
            here = slice(at, at + sequence.shape[1])
            (inputs[here], targets[here]), segments[here] = sequence, number
            at += sequence.shape[1]
        inputs[at:], targets[at:], segments[at:] = max(self._eos_id, 0), NO_TARGET, PADDING
        if self.reference is None:
            return window
        return np.concatenate([window, self.reference[w].view(np.int32)[None]])

    def describe(self) -> str:
        padding = 1 - self._size_N.sum() / (len(self) * self._length)
        return f"{len(self):,} windows of {len(self._size_N):,} rows, {padding:.2%} padding"


def _sequence(pieces: Sequence[Piece], encoded: Sequence[list[int]], end: int) -> np.ndarray:
    """int32 [2, n], up to the last token of an answer; one that begins a text is predicted from the end of another.

    Raises:
      _BadRowError: no answer has a token.
    """
    tokens = np.array([token for ids in encoded for token in ids], np.int32)
    answer = np.repeat([piece.answer for piece in pieces], [len(ids) for ids in encoded]).astype(bool)
    if not answer.any():
        raise _BadRowError("without an answer", "the tokenizer makes no token of its answer")
    if answer[0]:
        tokens, answer = np.insert(tokens, 0, end), np.insert(answer, 0, False)
    stop = int(np.flatnonzero(answer)[-1]) + 1
    return np.stack([tokens[: stop - 1], np.where(answer[1:stop], tokens[1:stop], NO_TARGET)])


def _beginning(line: bytes) -> str:
    return line.strip().decode(errors="replace")


def _parsed(line: bytes) -> dict[str, Any]:
    text, whole = decode(line)
    try:
        row = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise _BadRowError("that are not JSON", f"it is not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise _BadRowError("that are not JSON", f"it is a JSON {type(row).__name__}, not an object")
    if not whole or "\ufffd" in text:
        raise _BadRowError("that are not UTF-8", "it is not UTF-8, or holds U+FFFD")
    return row


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        what = "without an answer" if name != "prompt" else "without a prompt"
        raise _BadRowError(what, f"it has no {name!r}; it has {', '.join(row) or 'nothing'}")
    if not isinstance(value, str):
        raise _BadRowError("with a field that is no text", f"{name!r} is a {type(value).__name__}, not a text")
    return decode(value)[0]


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _BadRowError("without messages", f"{name!r} is no list of messages")
    found = []
    for i, message in enumerate(value):
        fields = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise _BadRowError("with a message that is no text", f"{name}[{i}] has no texts for role and content")
        found.append({"role": str(fields[0]), "content": decode(str(fields[1]))[0]})
    return found


def _listed(places: Sequence[str]) -> str:
    more = f" and {len(places) - _PLACES} more" if len(places) > _PLACES else ""
    return ", ".join(places[:_PLACES]) + more
