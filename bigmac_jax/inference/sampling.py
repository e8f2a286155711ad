"""Chooses the next token of each row. S batch shards, B rows of one, V vocabulary, C candidates of a row."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bigmac_jax.config.errors import require
from bigmac_jax.model.gathering import on_each_rank
from bigmac_jax.model.mesh import token_spec

ALTERNATIVES = 20  # most likely tokens that can be returned with each sampled one
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a completion are chosen, and where it ends.

    Raises:
      ConfigError: a value out of its range.
    """

    max_tokens: int = 64
    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # draw from the k most likely tokens; 0 = from all
    top_p: float = 1.0  # draw from the fewest most likely tokens whose probabilities sum to this
    stop: tuple[str, ...] = ()  # texts that end the completion; they are not part of it
    ignore_eos: bool = False  # go on after the end-of-text token
    seed: int = 0
    logprobs: int = 0  # how many of the most likely tokens are returned with each sampled one

    def __post_init__(self) -> None:
        kinds = {"max_tokens": int, "top_k": int, "seed": int, "ignore_eos": bool, "logprobs": int}
        for name, kind in kinds.items():
            value = getattr(self, name)
            require(type(value) is kind, f"{name}={value!r} must be of type {kind.__name__}")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            require(type(value) in (int, float) and abs(value) <= _LARGEST, f"{name}={value!r} must be a finite number")
        if isinstance(self.stop, str | list):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        texts = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        require(self.max_tokens >= 1, f"max_tokens={self.max_tokens} must be at least 1")
        require(self.temperature >= 0, f"temperature={self.temperature} must be at least 0 (greedy)")
        require(0 <= self.top_k < 1 << 31, f"top_k={self.top_k} must lie in [0, 2**31); 0 takes all tokens")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]; use 1 for all tokens")
        require(0 <= self.logprobs <= ALTERNATIVES, f"logprobs={self.logprobs} must lie in [0, {ALTERNATIVES}]")
        require(0 <= self.seed < 1 << 32, f"seed={self.seed} must lie in [0, 2**32)")
        require(texts, f"stop={self.stop!r} must be texts that are not empty")


class RowSampling(NamedTuple):
    """The sampling settings of every row, as arrays [S, B]."""

    temperature: Array
    top_k: Array
    top_p: Array
    seed: Array  # uint32
    request: Array  # the request's number: with seed and position it makes the random number, whatever the batch
    alternatives: Array  # how many of the most likely tokens are wanted


class Sampled(NamedTuple):
    """The chosen tokens [S, B], and log-probabilities of the model itself (temperature 1)."""

    token: Array
    logprob: Array
    top_tokens: Array  # [S, B, ALTERNATIVES], the most likely ones; zeros where no row wants them
    top_logprobs: Array


# How a rank's rows are sampled, from the cheapest; with a top_k of at most _FEW the vocabulary is not sorted.
_GREEDY, _UNFILTERED, _FROM_FEW, _FROM_ALL = range(4)
_FEW = 64


def sample(logits_SBV: Array, rows: RowSampling, position_SB: Array) -> Sampled:
    """Chooses the next token of every row.

    A row's token depends on its own logits, settings and position alone. The cost follows what the rows of a rank ask
    for: nothing is drawn if all are greedy, and the vocabulary is sorted only for rows that need it.

    Args:
      position_SB: where the tokens will stand; with seed and request it makes the random number.
    """
    arrays = (logits_SBV, *(jax.sharding.reshard(v, token_spec(2)) for v in (*rows, position_SB)))

    def on_rank(logits_SBV: Array, *values: Array) -> tuple[Array, ...]:
        *settings, position_SB = values
        return _sample_on_rank(logits_SBV, RowSampling(*settings), position_SB)

    specs = token_spec(2), token_spec(2), token_spec(3), token_spec(3)
    return Sampled(*on_each_rank(on_rank, arrays, out_specs=specs))


def _sample_on_rank(logits_SBV: Array, rows: RowSampling, position_SB: Array) -> tuple[Array, ...]:
    V = logits_SBV.shape[-1]
    drawn = rows.temperature > 0
    filtered = drawn & ((rows.top_k > 0) | (rows.top_p < 1))
    few = (rows.top_k > 0) & (rows.top_k <= _FEW) | (V <= _FEW)
    need = jnp.where(filtered, jnp.where(few, _FROM_FEW, _FROM_ALL), jnp.where(drawn, _UNFILTERED, _GREEDY))

    def choose_from(candidates: int | None) -> Callable[..., Array]:
        return jax.vmap(jax.vmap(functools.partial(_choose, candidates)))

    branches = [choose_from(candidates) for candidates in (None, 0, min(_FEW, V), V)]
    token_SB = jax.lax.switch(need.max(), branches, logits_SBV, rows, position_SB)
    total_SB = jax.nn.logsumexp(logits_SBV, axis=-1)
    logprob_SB = jnp.take_along_axis(logits_SBV, token_SB[..., None], axis=-1)[..., 0] - total_SB
    size = min(ALTERNATIVES, V)

    def most_likely(logits_SBV: Array) -> tuple[Array, Array]:
        values, tokens = jax.lax.top_k(logits_SBV, size)
        return tokens.astype(jnp.int32), values - total_SB[..., None]

    def zeros(logits_SBV: Array) -> tuple[Array, Array]:
        part = logits_SBV[..., :size]
        return jnp.zeros_like(part, jnp.int32), jnp.zeros_like(part)

    wanted = (rows.alternatives > 0).any()
    return token_SB, logprob_SB, *jax.lax.cond(wanted, most_likely, zeros, logits_SBV)


def _choose(candidates: int | None, logits_V: Array, row: RowSampling, position: Array) -> Array:
    """The token of one row.

    Args:
      candidates: the number of most likely tokens that top_k and top_p choose from; 0 if no row of the rank has either,
        None if all rows are greedy.
    """
    best = _argmax(logits_V)
    if candidates is None:
        return best
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(row.seed), row.request), position)
    # A number for each token, whatever it is chosen from (Gumbel-max: the largest sum is a draw from the softmax).
    noise_V = jax.random.gumbel(key, logits_V.shape)
    # Below the best one: divided by a small temperature, several logits above 0 would all be infinite.
    scaled_V = (logits_V - logits_V[best]) / jnp.where(row.temperature > 0, row.temperature, 1)
    token = _argmax(scaled_V + noise_V)
    if candidates:
        scaled_C, token_C = jax.lax.top_k(scaled_V, candidates)
        rank_C = jnp.arange(candidates)
        scaled_C = jnp.where((row.top_k == 0) | (rank_C < row.top_k), scaled_C, -jnp.inf)
        shares_C = jax.nn.softmax(scaled_C)
        # The mass before a token counts, so that the most likely one always stays.
        scaled_C = jnp.where((jnp.cumsum(shares_C) - shares_C < row.top_p) | (rank_C == 0), scaled_C, -jnp.inf)
        filtered = (row.top_k > 0) | (row.top_p < 1)
        token = jnp.where(filtered, token_C[jnp.argmax(scaled_C + noise_V[token_C])], token)
    return jnp.where(row.temperature > 0, token, best)


def _argmax(v_V: Array) -> Array:
    """The first index of the largest value, int32. In two reductions that XLA:CPU vectorises; jnp.argmax is one that it
    does not, and took 40 % of a small model's step."""
    place_V = jnp.arange(v_V.shape[0], dtype=jnp.int32)
    return jnp.min(jnp.where(v_V == v_V.max(), place_V, v_V.shape[0] - 1))
