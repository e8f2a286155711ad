"""Perplexity of a text: every token counted once, whatever the batch size and the mesh.

B batch, L length.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from bigmac_jax import programs
from bigmac_jax.data.pipeline import eval_batches
from bigmac_jax.mesh import batch_ranks, batch_spec, place
from bigmac_jax.model.transformer import Transformer


class Score(NamedTuple):
    """Loss in nats a token; the others follow from the same sum."""

    loss: float
    perplexity: float
    word_perplexity: float
    bits_per_byte: float
    tokens: int
    words: int
    bytes: int

    @classmethod
    def of(cls, nll: float, tokens: int, words: int, num_bytes: int) -> "Score":
        """`nll`: the sum over all tokens of -log p, nats."""

        def exp(value: float) -> float:
            return math.exp(min(value, 700.0))  # an untrained model's perplexity a word leaves the floats

        loss = nll / tokens
        bits = nll / math.log(2) / max(1, num_bytes)
        return cls(loss, exp(loss), exp(nll / max(1, words)), bits, tokens, words, num_bytes)

    def describe(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f}, {self.bits_per_byte:.4f} bits per byte, perplexity a word "
            f"{self.word_perplexity:,.1f} ({self.tokens:,} tokens, {self.words:,} words, {self.bytes:,} bytes)"
        )


def evaluate(
    model: Transformer,
    stream: Any,
    sequence_length: int,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda tokens: None,
    stride: int = 0,
) -> Score:
    """Scores a token stream in windows of `sequence_length`, dropless, sums in float64 on the host.

    Batches are padded with masked rows to a multiple of the mesh's batch shards.

    Args:
      stream: from `bigmac_jax.data`; each token after the first is predicted once, from those before it in its window.
      on_batch: called with the number of tokens just counted.
      stride: 0: windows do not overlap. Otherwise they slide on by so many tokens, and those alone are counted that the
        window before did not have: all but the first are predicted from `sequence_length` - stride others at least.
    """
    rows = -(-batch_size // batch_ranks()) * batch_ranks()
    total, count = 0.0, 0
    batches = eval_batches(stream, sequence_length, batch_size)
    if stride:
        batches = sliding_batches(stream, sequence_length, batch_size, stride)
    for tokens_BL, mask_BL in batches:
        padded_BL = np.zeros((rows, tokens_BL.shape[1]), np.int32)
        padded_BL[: len(tokens_BL)] = tokens_BL
        scores = programs.evaluate(model, place(padded_BL, batch_spec(2)))
        nll_BL = np.asarray(scores.nll_BL, np.float64)[: len(tokens_BL)]
        total += float(nll_BL[mask_BL].sum())
        count += int(mask_BL.sum())
        on_batch(int(mask_BL.sum()))
    return Score.of(total, count, stream.num_words, stream.num_bytes)


def sliding_batches(
    stream: Any, sequence_length: int, batch_size: int, stride: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As `eval_batches`, of windows that begin every `stride` tokens; mask [B, L] marks what the one before had not."""
    targets = stream.num_tokens - 1
    starts = range(0, max(1, targets - sequence_length + stride), stride)
    for first in range(0, len(starts), batch_size):
        tokens_BL = np.zeros((batch_size, sequence_length + 1), np.int32)
        mask_BL = np.zeros((batch_size, sequence_length), bool)
        for row, start in enumerate(starts[first : first + batch_size]):
            window_L = stream.tokens(start, min(start + sequence_length + 1, stream.num_tokens))
            tokens_BL[row, : len(window_L)] = window_L
            mask_BL[row, (sequence_length - stride if start else 0) : len(window_L) - 1] = True
        yield tokens_BL, mask_BL
