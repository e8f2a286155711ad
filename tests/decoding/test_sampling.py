"""Draws follow the distribution that temperature, top-k and top-p leave, whatever else is in the batch."""

from typing import Any

import jax
import numpy as np
import pytest
from model.tools import QUICK, on_mesh, split_batch, split_tokens, tiny

from bigmac_jax.config import ConfigError
from bigmac_jax.decoding.sampling import Draws, Sampling, candidates, draws, sample

SHARES = np.array([0.1, 0.5, 0.05, 0.3, 0.05])  # by token; sorted: 1, 3, 0, then two alike
N = 4000


def drawn(
    samplings: list[Sampling], requests: list[int], positions: np.ndarray, shift: float = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probabilities, a row each, all from SHARES."""
    with on_mesh(tiny()):
        rows = len(samplings)
        logits = split_tokens(np.broadcast_to((np.log(SHARES) + shift).astype(np.float32), (1, rows, len(SHARES))))
        settings = Draws(*map(split_tokens, draws(samplings, requests, (1, rows))))
        run = jax.jit(sample, static_argnums=3, compiler_options=QUICK)
        out = run(logits, settings, split_batch(positions.reshape(1, -1)), candidates(samplings, len(SHARES)))
        tokens, logprobs = (np.asarray(v)[0] for v in out)
        return tokens, logprobs


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


def test_candidates() -> None:
    """As few as the rows need, in powers of two."""
    greedy, hot = Sampling(), Sampling(temperature=1.0)
    assert candidates([greedy, Sampling(top_k=5)], 100) == 1
    assert candidates([greedy, hot], 100) == 0
    assert candidates([hot, Sampling(temperature=1.0, top_k=5), Sampling(temperature=1.0, top_p=0.5)], 100) == 100
    assert candidates([Sampling(temperature=1.0, top_k=5), greedy], 100) == 8
    assert candidates([Sampling(temperature=1.0, top_k=500)], 100) == 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("max_tokens", 1.5), ("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1),
        ("top_p", 0.0), ("top_p", 1.1), ("seed", -1), ("seed", 1 << 32), ("stop", ("",)), ("stop", (1,)),
        ("top_p", "a"), ("ignore_eos", 1), ("top_k", 1 << 31), ("temperature", 10**400), ("temperature", 1e39),
    ],
)  # fmt: skip
def test_values_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        Sampling(**{field: value})


def test_stop_may_be_one_text() -> None:
    assert Sampling(stop="end").stop == ("end",) and Sampling(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
