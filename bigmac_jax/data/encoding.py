"""Pieces of documents → arrays of tokens, and the counts of both.

A stream of tokens begins with an end-of-text token and has one after every document, in training and evaluation alike.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from bigmac_jax.data.documents import PIECE, Sums, cut_text, mark_last
from bigmac_jax.data.tokenizer import Tokenizer

_BATCH = 8 * PIECE  # characters that are encoded at a time
_SHORT = 200  # characters up to which str.split counts words faster
# The ASCII characters that str.split takes for white space.
_SPACE = np.zeros(128, bool)
_SPACE[[9, 10, 11, 12, 13, 28, 29, 30, 31, 32]] = True


@dataclass
class Counts(Sums):
    """The size of a stream: `bytes` of its text as UTF-8, `words` as `str.split` finds them."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    words: int = 0


class WordCounter:
    """Counts the words of texts that come in pieces; a word that a forced cut halved counts once."""

    def __init__(self) -> None:
        self._inside = False  # a word that the next piece may continue

    def count(self, piece: str, encoded: bytes, last: bool) -> int:
        """Number of words that begin in the next piece, of which `encoded` is the UTF-8."""
        if not piece:
            return 0
        if len(encoded) == len(piece) > _SHORT:
            space = _SPACE[np.frombuffer(encoded, np.uint8)]
            found = int(np.count_nonzero(space[:-1] & ~space[1:])) + (not space[0])
        else:
            found = len(piece.split())
        found -= self._inside and not piece[0].isspace()
        self.skip(piece, last)
        return found

    def skip(self, piece: str, last: bool) -> None:
        """Passes over a piece that was counted before."""
        self._inside = not last and not piece[-1:].isspace()


def encode_stream(docs: Iterable[str], tokenizer: Tokenizer, counts: Counts) -> Iterator[np.ndarray]:
    """Yields the token stream of whole texts as arrays of bounded length; adds to `counts` on the way."""
    counts.tokens += 1
    yield np.array([tokenizer.eos_id], np.uint32)
    parts = (part for doc in docs for part in mark_last(cut_text(doc)))
    for array, _ in encode_pieces(parts, tokenizer, counts, WordCounter()):
        yield array


def encode_pieces(
    parts: Iterable[tuple[str, bool]], tokenizer: Tokenizer, counts: Counts, words: WordCounter
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (tokens, number of pieces in them) for (piece, is it its document's last), about _BATCH characters at a
    time; adds to `counts` on the way."""
    eos = np.array([tokenizer.eos_id], np.uint32)
    batch: list[tuple[str, bool]] = []
    size = 0

    def encode_batch() -> np.ndarray:
        arrays: list[np.ndarray] = []
        for ids, (piece, last) in zip(tokenizer.arrays([text for text, _ in batch]), batch, strict=True):
            content = piece.encode()
            counts.bytes += len(content)
            counts.words += words.count(piece, content, last)
            counts.documents += last
            arrays += [ids, eos] if last else [ids]
        tokens = np.concatenate(arrays)
        counts.tokens += len(tokens)
        return tokens

    for part in parts:
        batch.append(part)
        size += len(part[0])
        if size >= _BATCH:
            yield encode_batch(), len(batch)
            batch, size = [], 0
    if batch:
        yield encode_batch(), len(batch)
