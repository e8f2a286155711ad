"""Perplexity of a text: every token counted once, whatever the batch size and the mesh.

B batch, L length, Y layers with experts, E experts.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigmac_jax.data.batch import NO_TARGET
from bigmac_jax.data.pipeline import eval_batches, pad_batch, streams_by_source
from bigmac_jax.model.mesh import batch_ranks, batch_spec, place
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.training import programs


def exp(value: float) -> float:
    """e^value, at most e^700, because an untrained model's perplexity a word leaves the floats; NaN of NaN."""
    return math.exp(min(value, 700.0))  # in this order, for min(700.0, NaN) is 700


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
    def from_sums(cls, nll: float, tokens: int, words: int, num_bytes: int) -> "Score":
        """The score of a text; `nll` is the sum of -log p over its tokens, nats."""
        loss, bits = nll / tokens, nll / math.log(2) / max(1, num_bytes)
        return cls(loss, exp(loss), exp(nll / max(1, words)), bits, tokens, words, num_bytes)

    @classmethod
    def combine(cls, scores: Sequence["Score"]) -> "Score":
        """The score of several texts together, each of which was scored by itself."""
        nll = sum(score.loss * score.tokens for score in scores)
        tokens, words, num_bytes = (sum(getattr(s, name) for s in scores) for name in ("tokens", "words", "bytes"))
        return cls.from_sums(nll, tokens, words, num_bytes)

    def describe(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f}, {self.bits_per_byte:.4f} bits per byte, perplexity a word "
            f"{self.word_perplexity:,.1f} ({self.tokens:,} tokens, {self.words:,} words, {self.bytes:,} bytes)"
        )


class Evaluation(NamedTuple):
    """The score of a text, and what the routers did with its tokens; both arrays are empty without experts."""

    score: Score
    load_YE: np.ndarray  # share of the choices that went to each expert
    entropy_Y: np.ndarray  # of the router's scores, mean over tokens, nats


def evaluate(
    model: Transformer,
    stream: Any,
    sequence_length: int,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda tokens: None,
    stride: int = 0,
    documents: str = "",
) -> Evaluation:
    """Scores a text in windows of `sequence_length`, dropless, with sums in float64 on the host. No window reaches from
    one source of a mixture into the next, as in training.

    Args:
      stream: from `bigmac_jax.data`.
      batch_size: windows at a time; padded with empty rows to a multiple of the mesh's batch shards.
      on_batch: called after each batch with the number of tokens that it scored.
      stride, documents: as for `eval_batches`; by default the model's data.documents.
    """
    rows = -(-batch_size // batch_ranks()) * batch_ranks()
    documents = documents or model.config.data.documents
    nll, tokens = 0.0, 0
    load_YE, entropy_Y, routed = np.zeros(()), np.zeros(()), 0  # sums over the tokens that routers saw
    parts = streams_by_source(stream).values()
    for batch in itertools.chain(*(eval_batches(p, sequence_length, batch_size, stride, documents) for p in parts)):
        scores = programs.evaluate(model, place(pad_batch(batch, rows), batch_spec(2)))
        counts_BL = batch.targets_BL != NO_TARGET
        count, seen = int(counts_BL.sum()), int(scores.tokens)
        nll += float(np.asarray(scores.nll_BL, np.float64)[: len(counts_BL)][counts_BL].sum())
        tokens += count
        load_YE = load_YE + np.asarray(scores.load_YE, np.float64) * seen
        entropy_Y = entropy_Y + np.asarray(scores.entropy_Y, np.float64) * seen
        routed += seen
        on_batch(count)
    words, num_bytes = sum(part.counts.words for part in parts), sum(part.counts.bytes for part in parts)
    return Evaluation(Score.from_sums(nll, tokens, words, num_bytes), load_YE / routed, entropy_Y / routed)
