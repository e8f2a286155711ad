"""Pieces of documents → arrays of tokens, and what they count.

Convention, for training and evaluation alike: one end-of-text token, then every document followed by one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from bigmac_jax.data.documents import PIECE, pieces
from bigmac_jax.data.tokenizer import Tokenizer

_BATCH = 8 * PIECE  # characters that are encoded at a time
_SHORT = 200  # characters, of which str.split makes words faster
# Of ASCII, what str.split takes for white space.
_SPACE = np.zeros(128, bool)
_SPACE[[9, 10, 11, 12, 13, 28, 29, 30, 31, 32]] = True


@dataclass
class Counts:
    tokens: int = 0
    documents: int = 0
    bytes: int = 0  # of the text as UTF-8
    words: int = 0  # len(text.split())

    def add(self, other: "Counts") -> None:
        self.tokens += other.tokens
        self.documents += other.documents
        self.bytes += other.bytes
        self.words += other.words


class Words:
    """Counts the words of texts that come in pieces; one that a forced cut halved counts once."""

    def __init__(self) -> None:
        self._inside = False  # of a word that the next piece may go on

    def count(self, piece: str, encoded: bytes, last: bool) -> int:
        """Of the next piece and its UTF-8."""
        if not piece:
            return 0
        if len(encoded) == len(piece) > _SHORT:
            space = _SPACE[np.frombuffer(encoded, np.uint8)]
            found = int(np.count_nonzero(space[:-1] & ~space[1:])) + (not space[0])
        else:
            found = len(piece.split())
        found -= self._inside and not piece[0].isspace()
        self.pass_over(piece, last)
        return found

    def pass_over(self, piece: str, last: bool) -> None:
        """One that was counted before."""
        self._inside = not last and not piece[-1:].isspace()


def encode_stream(docs: Iterable[str], tokenizer: Tokenizer, counts: Counts) -> Iterator[np.ndarray]:
    """Yields the stream of whole texts as arrays of bounded length and adds up `counts` on the way."""
    counts.tokens += 1
    yield np.array([tokenizer.eos_id], np.uint32)
    for array, _ in encode(with_last(docs), tokenizer, counts):
        yield array


def with_last(docs: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The pieces of texts, each with whether it is its text's last."""
    for doc in docs:
        start = 0
        for piece in pieces(doc):
            start += len(piece)
            yield piece, start == len(doc)


def encode(
    parts: Iterable[tuple[str, bool]], tokenizer: Tokenizer, counts: Counts, inside: Words | None = None
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields tokens and of how many pieces they are, about _BATCH characters at a time."""
    eos = np.array([tokenizer.eos_id], np.uint32)
    words = inside or Words()
    batch: list[tuple[str, bool]] = []
    size = 0

    def encoded() -> np.ndarray:
        arrays: list[np.ndarray] = []
        for ids, (piece, last) in zip(tokenizer.arrays([text for text, _ in batch]), batch, strict=True):
            content = piece.encode()
            counts.bytes += len(content)
            counts.words += words.count(piece, content, last)
            counts.documents += last
            arrays.append(ids)
            if last:
                arrays.append(eos)
        joined = np.concatenate(arrays)
        counts.tokens += len(joined)
        return joined

    for part in parts:
        batch.append(part)
        size += len(part[0])
        if size >= _BATCH:
            yield encoded(), len(batch)
            batch, size = [], 0
    if batch:
        yield encoded(), len(batch)
