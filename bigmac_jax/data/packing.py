"""Windows of whole documents: which document stands where.

A document is an end-of-text token and the tokens up to the next one, which is its last target. If it is longer than a
window, it is cut into pieces from its start on; whatever fits stays whole. L window length, N pieces, W windows.
"""

import abc
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bigmac_jax.data.batch import NO_TARGET, PADDING
from bigmac_jax.data.token_cache import TokenStream

_SCANNED = 1 << 22  # tokens that are searched at a time


def best_fit(size_N: np.ndarray, length: int) -> list[list[int]]:
    """Fills windows with pieces, the longest first, each into the fullest window that has room for it (Ding et al.
    2024, "Fewer Truncations Improve Language Modeling"); of equal ones the first."""
    windows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # windows by the room that is left in them
    rooms = 0  # bit r: there are windows with room r
    for n in np.argsort(-size_N, kind="stable").tolist():
        size = int(size_N[n])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            window = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
            windows[window].append(n)
        else:
            room, window = length, len(windows)
            windows.append([n])
        if room > size:
            with_room[room - size].append(window)
            rooms |= 1 << (room - size)
    return windows


class PackedWindows(abc.ABC):
    """Windows of whole sequences: window w is int32 [3, L], the inputs, targets and segments of `Batch`. Piece n has
    size_N[n] tokens, and may be several sequences."""

    def __init__(self, size_N: np.ndarray, length: int, eos_id: int):
        self._size_N, self._length, self._eos_id = size_N, length, eos_id
        # A window's pieces stand in their order, and windows in the order of their first ones.
        self._windows = sorted(sorted(window) for window in best_fit(size_N, length))

    @abc.abstractmethod
    def _sequences(self, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (inputs, targets) of each sequence of piece n."""

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, w: int) -> np.ndarray:
        inputs, targets, segments = window = np.empty((3, self._length), np.int32)
        inputs[:], targets[:], segments[:] = max(self._eos_id, 0), NO_TARGET, PADDING
        at, sequences = 0, (sequence for n in self._windows[w] for sequence in self._sequences(n))
        for number, (own_inputs, own_targets) in enumerate(sequences):
            here = slice(at, at + len(own_inputs))
            inputs[here], targets[here], segments[here] = own_inputs, own_targets, number
            at = here.stop
        return window

    @property
    def padding(self) -> float:
        """The share of tokens that are padding."""
        return float(1 - self._size_N.sum() / max(1, len(self) * self._length))


class Pieces(NamedTuple):
    """N pieces of documents: where each starts in the stream of tokens, how many inputs it has, and which piece of its
    document it is, from 0."""

    start_N: np.ndarray
    size_N: np.ndarray
    number_N: np.ndarray


def cut_documents(stream: TokenStream, length: int, stride: int) -> Pieces:
    """Cuts each document of a stream into pieces of at most `length` inputs. Each begins `stride` tokens after the one
    before; 0: they do not overlap."""
    step = stride or length
    start_D = _find_starts(stream)
    size_D = np.diff(start_D, append=stream.num_tokens - 1)
    start_D, size_D = start_D[size_D > 0], size_D[size_D > 0]  # behind the last end-of-text token there is nothing
    count_D = 1 + np.maximum(0, -(-(size_D - length) // step))
    document_N = np.repeat(np.arange(len(start_D)), count_D)
    number_N = np.arange(len(document_N)) - np.repeat(np.cumsum(count_D) - count_D, count_D)
    size_N = np.minimum(length, size_D[document_N] - number_N * step)
    return Pieces(start_D[document_N] + number_N * step, size_N, number_N)


def _find_starts(stream: TokenStream) -> np.ndarray:
    """Where documents begin; a text without an end-of-text token is one."""
    found = [np.zeros(1, np.int64)]
    for start in range(0, stream.num_tokens, _SCANNED):
        tokens = stream.tokens(start, min(start + _SCANNED, stream.num_tokens))
        found.append(start + np.flatnonzero(tokens == stream.eos_id))
    return np.unique(np.concatenate(found))


class PackedDocuments(PackedWindows):
    """Windows of a stream's documents, cut as by `cut_documents`; each target counts once, in its first piece."""

    def __init__(self, stream: TokenStream, length: int, stride: int = 0):
        self._stream, self._pieces = stream, cut_documents(stream, length, stride)
        self._again = length - (stride or length)  # targets that a piece shares with the one before it
        super().__init__(self._pieces.size_N, length, stream.eos_id)

    def _sequences(self, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        start, size, number = (int(values[n]) for values in self._pieces)
        tokens = self._stream.tokens(start, start + size + 1)
        targets = tokens[1:].copy()
        targets[: self._again if number else 0] = NO_TARGET
        yield tokens[:-1], targets

    def describe(self) -> str:
        """How many windows, how much padding and how many cuts there are, for the log."""
        cuts = np.count_nonzero(self._pieces.number_N)
        return (
            f"{len(self):,} windows of whole documents, {self.padding:.2%} padding, {cuts:,} cuts in longer documents"
        )
