"""Draws follow the distribution that temperature, top-k and top-p leave, whatever else is in the batch."""

from typing import Any

import jax
import numpy as np
import pytest
from model.tools import on_mesh, split_batch, split_tokens, tiny

from bigmac_jax.config import ConfigError
from bigmac_jax.inference.sampling import RowSampling, Sampled, Sampling, sample

SHARES = np.array([0.1, 0.5, 0.05, 0.3, 0.05])  # by token; sorted: 1, 3, 0, then two alike
N = 4000


RUN = jax.jit(sample)


def chosen(samplings: list[Sampling], requests: list[int], positions: np.ndarray, logits_V: np.ndarray) -> Sampled:
    """A row each, all with the same logits."""
    with on_mesh(tiny()):
        logits = split_tokens(np.broadcast_to(logits_V.astype(np.float32), (1, len(samplings), len(logits_V))))
        rows = [
            (s.temperature, s.top_k, s.top_p, s.seed, request, s.logprobs)
            for s, request in zip(samplings, requests, strict=True)
        ]
        dtypes = (np.float32, np.int32, np.float32, np.uint32, np.int32, np.int32)
        columns = zip(*rows, strict=True)
        settings = RowSampling(*(split_batch(np.array([v], t)) for v, t in zip(columns, dtypes, strict=True)))
        return Sampled(*(np.asarray(v)[0] for v in RUN(logits, settings, split_batch(positions.reshape(1, -1)))))


def drawn(
    samplings: list[Sampling], requests: list[int], positions: np.ndarray, shift: float = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probabilities, a row each, all from SHARES."""
    out = chosen(samplings, requests, positions, np.log(SHARES) + shift)
    return out.token, out.logprob


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"temperature": 1.0}, SHARES),
        ({"temperature": 0.5}, SHARES**2 / (SHARES**2).sum()),
        ({"temperature": 1.0, "top_k": 2}, np.array([0, 0.5, 0, 0.3, 0]) / 0.8),
        # The mass before the third token is 0.8: it stays below 0.85, and is out at 0.8.
        ({"temperature": 1.0, "top_p": 0.85}, np.array([0.1, 0.5, 0, 0.3, 0]) / 0.9),
        ({"temperature": 1.0, "top_p": 0.79}, np.array([0, 0.5, 0, 0.3, 0]) / 0.8),
        # Of three, 0.5 / 0.9 = 0.56 come before the second, 0.89 before the third.
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.6}, np.array([0, 0.5, 0, 0.3, 0]) / 0.8),
        ({"temperature": 1.0, "top_p": 1e-6}, np.array([0, 1.0, 0, 0, 0])),
        ({"temperature": 0.0, "top_k": 3}, np.array([0, 1.0, 0, 0, 0])),
    ],
)
def test_frequencies(sampling: dict[str, Any], expected: np.ndarray) -> None:
    """Of 4,000 requests; five standard deviations are 0.04."""
    tokens, logprobs = drawn([Sampling(**sampling)] * N, list(range(N)), np.full(N, 7, np.int32))
    frequencies = np.bincount(tokens, minlength=len(SHARES)) / N
    np.testing.assert_allclose(frequencies, expected, atol=0.04)
    assert (frequencies[expected == 0] == 0).all()
    np.testing.assert_allclose(logprobs, np.log(SHARES)[tokens], rtol=1e-5)  # of the model, not of what is left


def test_rows_do_not_see_each_other() -> None:
    """A draw depends on seed, request and position alone; greedy rows stay greedy beside others."""
    one = Sampling(temperature=1.0, seed=3)
    positions = np.arange(40, dtype=np.int32)
    alone, _ = drawn([one] * 40, [5] * 40, positions)
    mixed = [s for _ in range(40) for s in (one, Sampling(), Sampling(temperature=2.0, top_k=2, seed=9))]
    beside, _ = drawn(mixed, [5] * 120, np.repeat(positions, 3))
    repeated, _ = drawn([one, one], [5, 5], positions[[4, 4]])
    assert (beside[1::3] == 1).all()
    assert set(beside[2::3]) == {1, 3}
    assert repeated[0] == repeated[1] == alone[4]
    others = [drawn([s] * 40, [r] * 40, positions)[0] for s, r in ((one, 6), (Sampling(temperature=1.0, seed=4), 5))]
    assert len(set(alone)) > 1 and all((other != alone).any() for other in others)


def test_a_filter_that_keeps_all_draws_the_same_as_none() -> None:
    """With candidates sorted out or not, from the same distribution."""
    with_filter = [Sampling(temperature=1.0, top_p=0.999999)] * N
    tokens, _ = drawn(with_filter, list(range(N)), np.zeros(N, np.int32))
    np.testing.assert_allclose(np.bincount(tokens) / N, SHARES, atol=0.04)


def test_the_smallest_temperatures_are_greedy() -> None:
    """Logits over them would be infinite."""
    for sampling in (Sampling(temperature=2e-38), Sampling(temperature=2e-38, top_k=4)):
        tokens, _ = drawn([sampling] * 8, list(range(8)), np.zeros(8, np.int32), shift=30)
        assert (tokens == 1).all()


def test_a_draw_does_not_follow_how_the_batch_is_computed() -> None:
    """Greedy, unfiltered, from few candidates and from a sorted vocabulary: beside all others as alone."""
    kinds = [
        Sampling(),
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=1.0, top_k=5, seed=2),
        Sampling(temperature=1.0, top_k=5, top_p=0.7, seed=2),
        Sampling(temperature=1.0, top_k=90, seed=3),
        Sampling(temperature=1.0, top_p=0.5, seed=4),
    ]
    logits_V = np.random.default_rng(0).standard_normal(200)
    positions, requests = np.arange(30, dtype=np.int32), [7] * 30
    together = chosen(
        [kind for _ in range(30) for kind in kinds], requests * len(kinds), np.repeat(positions, len(kinds)), logits_V
    )
    for i, kind in enumerate(kinds):
        alone = chosen([kind] * 30, requests, positions, logits_V)
        assert (alone.token == together.token[i :: len(kinds)]).all(), kind
        assert kind.temperature == 0 or len(set(alone.token)) > 3
    assert len(set(chosen([kinds[2]] * 30, requests, positions, logits_V).token)) == 5


def test_the_most_likely_tokens() -> None:
    asked = [Sampling(logprobs=3), Sampling()]
    out = chosen(asked, [0, 0], np.zeros(2, np.int32), logits_V := np.random.default_rng(0).standard_normal(200))
    best = np.argsort(-logits_V)[:3]
    assert (out.top_tokens[0, :3] == best).all()
    np.testing.assert_allclose(out.top_logprobs[0, :3], (logits_V - np.log(np.exp(logits_V).sum()))[best], rtol=1e-5)
    assert not chosen(asked[1:], [0], np.zeros(1, np.int32), logits_V).top_tokens.any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("max_tokens", 1.5), ("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1),
        ("top_p", 0.0), ("top_p", 1.1), ("seed", -1), ("seed", 1 << 32), ("stop", ("",)), ("stop", (1,)),
        ("top_p", "a"), ("ignore_eos", 1), ("top_k", 1 << 31), ("temperature", 10**400), ("temperature", 1e39),
        ("logprobs", 21),
    ],
)  # fmt: skip
def test_values_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        Sampling(**{field: value})


def test_stop_may_be_one_text() -> None:
    assert Sampling(stop="end").stop == ("end",) and Sampling(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_the_ends_of_ranges_are_allowed() -> None:
    most = Sampling(max_tokens=1, top_k=(1 << 31) - 1, top_p=1, seed=(1 << 32) - 1, logprobs=20, temperature=3e38)
    assert (most.top_k, most.logprobs, most.ignore_eos) == (2**31 - 1, 20, False)
    least = Sampling(temperature=0, top_k=0, top_p=1e-9, seed=0, logprobs=0)
    assert least == Sampling(top_p=1e-9) and least.stop == ()
    assert (Sampling().max_tokens, Sampling().temperature, Sampling().top_p) == (64, 0.0, 1.0)


def test_the_first_of_equal_logits_is_taken() -> None:
    logits_V = np.where(np.arange(200) % 7 == 5, 2.0, 1.0)
    assert chosen([Sampling()] * 2, [0, 1], np.zeros(2, np.int32), logits_V).token.tolist() == [5, 5]
