"""Perplexity: the same for every batch size and mesh, equal to a computation by hand, and dropless."""

import math
from typing import Any

import jax
import numpy as np
import pytest
from model.tools import on_mesh, random_model, split_tokens, tiny
from training.tools import text

from bigmac_jax.data.batch import NO_TARGET
from bigmac_jax.data.pipeline import eval_batches, text_stream
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.evaluation.perplexity import Score, evaluate

LENGTH = 16
TEXT = "".join(text(3, seed=5))
CONFIG = {"length": LENGTH, "num_layers": 1, "hidden_size": 16}


@pytest.fixture(scope="module")
def stream() -> Any:
    return text_stream(TEXT, ByteTokenizer())


@pytest.fixture(scope="module")
def by_hand(stream: Any) -> float:
    """Sum of -log p over windows, in float64, by a model that was configured without a capacity limit."""
    tokens = stream.tokens(0, stream.num_tokens)
    windows = -(-(len(tokens) - 1) // LENGTH)
    config = tiny(batch=windows, capacity_factor=math.inf, **CONFIG)
    padded_WL = np.zeros((windows, LENGTH), np.int32)
    padded_WL.flat[: len(tokens) - 1] = tokens[:-1]
    with on_mesh(config):
        call = jax.jit(lambda model, tokens_BL: model(tokens_BL)[0])
        logits_WLV = np.asarray(call(random_model(config), split_tokens(padded_WL)), np.float64)
    total = 0.0
    for logits_LV, start in zip(logits_WLV, range(0, len(tokens) - 1, LENGTH), strict=True):
        targets_L = tokens[start + 1 : start + 1 + LENGTH]
        for logits_V, target in zip(logits_LV, targets_L, strict=False):
            total += np.log(np.exp(logits_V - logits_V.max()).sum()) + logits_V.max() - logits_V[target]
    return total


@pytest.mark.parametrize(
    ("mesh", "batch_size"),
    [
        ((1, 1, 1), 7),
        ((2, 1, 4), 32),
        *(pytest.param((1, 1, 1), size, marks=pytest.mark.full) for size in (1, 32)),
        pytest.param((2, 1, 4), 7, marks=pytest.mark.full),
        pytest.param((1, 2, 2), 1, marks=pytest.mark.full),
    ],
)
def test_every_batch_size_and_mesh(stream: Any, by_hand: float, mesh: tuple[int, int, int], batch_size: int) -> None:
    """A capacity factor at which half the choices would be dropped changes nothing either."""
    config, counted = tiny(mesh, capacity_factor=0.5, **CONFIG), []
    with on_mesh(config):
        score = evaluate(random_model(config), stream, LENGTH, batch_size, counted.append).score
    assert (score.tokens, score.bytes, score.words) == (stream.num_tokens - 1, len(TEXT), len(TEXT.split()))
    assert score.tokens == len(TEXT) + 1  # the first text token is predicted from the end-of-text before it
    assert sum(counted) == score.tokens
    assert score.loss == pytest.approx(by_hand / score.tokens, rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(by_hand / score.tokens), rel=1e-6)


def test_drops_would_change_it(stream: Any) -> None:
    """What makes the comparison above a test of droplessness."""
    config = tiny(capacity_factor=0.5, **CONFIG)
    rows = config.data.batch_size
    tokens = stream.tokens(0, rows * LENGTH).reshape(rows, LENGTH)
    with on_mesh(config):
        call = jax.jit(lambda model, tokens_BL: model(tokens_BL)[1].drop_rate)
        assert call(random_model(config), split_tokens(tokens)).min() > 0.3


@pytest.mark.parametrize(("stride", "batch_size"), [(16, 7), (5, 7), (3, 32)])
def test_sliding_windows(stream: Any, by_hand: float, stride: int, batch_size: int) -> None:
    """Each token once, from the `LENGTH` - stride before it at least; a stride of whole windows is none."""
    counted: list[tuple[int, int]] = []  # token, tokens before it in its window
    for inputs_BL, targets_BL, *_ in eval_batches(stream, LENGTH, batch_size, stride):
        for row in range(batch_size):
            counts_L = targets_BL[row] != NO_TARGET
            if counts_L.any():
                start = counted[-1][0] - int(counts_L.argmax()) if counted else 0
                expected = stream.tokens(start, min(start + LENGTH + 1, stream.num_tokens))
                assert (inputs_BL[row, : len(expected) - 1] == expected[:-1]).all()
                assert (targets_BL[row][counts_L] == expected[1:][counts_L[: len(expected) - 1]]).all()
                counted += [(start + 1 + int(at), int(at) + 1) for at in np.flatnonzero(counts_L)]
    assert [token for token, _ in counted] == list(range(1, stream.num_tokens))
    assert all(before >= min(token, LENGTH - stride + 1) for token, before in counted)
    if stride == LENGTH:
        config = tiny((1, 1, 1), **CONFIG)
        with on_mesh(config):
            score = evaluate(random_model(config), stream, LENGTH, batch_size, stride=stride).score
        assert score.loss == pytest.approx(by_hand / score.tokens, rel=1e-6)


def test_score_by_hand() -> None:
    """Four tokens of a quarter each: 8 bits over 2 words and 8 bytes."""
    score = Score.from_sums(nll=4 * math.log(4), tokens=4, words=2, num_bytes=8)
    assert score == pytest.approx((math.log(4), 4.0, 16.0, 1.0, 4, 2, 8))
    assert Score.from_sums(4 * math.log(4), 4, 1, 1) == pytest.approx((math.log(4), 4.0, 256.0, 8.0, 4, 1, 1))
    fields = ("loss", "perplexity", "word_perplexity", "bits_per_byte", "tokens", "words", "bytes")
    assert tuple(score._asdict()) == fields


def test_score_of_an_untrained_model_is_finite() -> None:
    score = Score.from_sums(nll=1e9, tokens=10, words=0, num_bytes=0)
    assert all(math.isfinite(value) for value in score)


def test_scores_of_several_texts_add_up() -> None:
    """Of eight and two tokens: 16 and 20 bits over 3 + 2 words and 12 + 6 bytes."""
    first = Score.from_sums(nll=16 * math.log(2), tokens=8, words=3, num_bytes=12)
    second = Score.from_sums(nll=20 * math.log(2), tokens=2, words=2, num_bytes=6)
    expected = (3.6 * math.log(2), 2**3.6, 2**7.2, 2.0, 10, 5, 18)
    assert Score.combine([first, second]) == pytest.approx(expected)
    assert Score.combine([second]) == pytest.approx(second)
