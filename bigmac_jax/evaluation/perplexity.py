"""Perplexity of a text: every token counted once, whatever the batch size and the mesh.

B batch, L length.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from bigmac_jax.data.batch import NO_TARGET
from bigmac_jax.data.pipeline import eval_batches, padded, parts_of_stream
from bigmac_jax.model.mesh import batch_ranks, batch_spec, place
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.training import programs
from bigmac_jax.training.loss import TokenScores


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

    @classmethod
    def of_all(cls, scores: Iterable["Score"]) -> "Score":
        """Of texts together, each scored by itself."""
        nll, tokens, words, num_bytes = (
            sum(values)
            for values in zip(*((s.loss * s.tokens, s.tokens, s.words, s.bytes) for s in scores), strict=True)
        )
        return cls.of(nll, int(tokens), int(words), int(num_bytes))

    def describe(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f}, {self.bits_per_byte:.4f} bits per byte, perplexity a word "
            f"{self.word_perplexity:,.1f} ({self.tokens:,} tokens, {self.words:,} words, {self.bytes:,} bytes)"
        )


class Reading(NamedTuple):
    """What a model made of a text. Y layers with experts, E experts; empty without experts."""

    score: Score
    load_YE: np.ndarray  # share of the choices that went to each expert
    entropy_Y: np.ndarray  # of the router's scores, mean over tokens, nats


class _Routers:
    """Means of what the routers did, over the tokens of a text."""

    def __init__(self) -> None:
        self._load: Any = 0.0
        self._entropy: Any = 0.0
        self._tokens = 0

    def add(self, scores: TokenScores) -> None:
        tokens = int(scores.tokens)
        self._load = self._load + np.asarray(scores.load_YE, np.float64) * tokens
        self._entropy = self._entropy + np.asarray(scores.entropy_Y, np.float64) * tokens
        self._tokens += tokens

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        return self._load / self._tokens, self._entropy / self._tokens


def evaluate(
    model: Transformer,
    stream: Any,
    sequence_length: int,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda tokens: None,
    stride: int = 0,
    documents: str = "",
) -> Score:
    """The score of `read`, whose arguments it takes; of a mixture each source is read by itself, as in training."""
    parts = parts_of_stream(stream).values()
    scores = [read(model, part, sequence_length, batch_size, on_batch, stride, documents).score for part in parts]
    return scores[0] if len(scores) == 1 else Score.of_all(scores)


def read(
    model: Transformer,
    stream: Any,
    sequence_length: int,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda tokens: None,
    stride: int = 0,
    documents: str = "",
) -> Reading:
    """Scores a token stream in windows of `sequence_length`, dropless, sums in float64 on the host.

    Batches are padded with rows without targets to a multiple of the mesh's batch shards.

    Args:
      stream: from `bigmac_jax.data`.
      on_batch: called with the number of tokens just counted.
      stride, documents: as for `eval_batches`; by default the model's data.documents.
    """
    rows = -(-batch_size // batch_ranks()) * batch_ranks()
    total, count, routers = 0.0, 0, _Routers()
    documents = documents or model.config.data.documents
    for batch in eval_batches(stream, sequence_length, batch_size, stride, documents):
        scores = programs.evaluate(model, place(padded(batch, rows), batch_spec(2)))
        counts_BL = batch.targets_BL != NO_TARGET
        nll_BL = np.asarray(scores.nll_BL, np.float64)[: len(counts_BL)]
        total += float(nll_BL[counts_BL].sum())
        count += int(counts_BL.sum())
        routers.add(scores)
        on_batch(int(counts_BL.sum()))
    return Reading(Score.of(total, count, stream.num_words, stream.num_bytes), *routers.means())
