"""The choice of the next token. S batch shards, B rows of one, V vocabulary, C candidates."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bigmac_jax.config import ConfigError
from bigmac_jax.mesh import on_each_rank, token_spec

_SEEDS = 1 << 32
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Sampling:
    """How a completion is drawn, and where it ends.

    Raises:
      ConfigError: a value out of its range.
    """

    max_tokens: int = 64
    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # only of the k most likely tokens; 0 = of all
    top_p: float = 1.0  # only of the fewest most likely tokens that have this probability together
    stop: tuple[str, ...] = ()  # texts that end it; none is part of it
    ignore_eos: bool = False  # goes on behind the end-of-text token
    seed: int = 0

    def __post_init__(self) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise ConfigError(message)

        for name, kind in (("max_tokens", int), ("top_k", int), ("seed", int), ("ignore_eos", bool)):
            require(
                type(getattr(self, name)) is kind, f"{name}={getattr(self, name)!r} must be of type {kind.__name__}"
            )
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            require(type(value) in (int, float) and abs(value) <= _LARGEST, f"{name}={value!r} must be a finite number")
        if isinstance(self.stop, str | list):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        require(self.max_tokens >= 1, f"max_tokens={self.max_tokens} must be at least 1")
        require(self.temperature >= 0, f"temperature={self.temperature} must be at least 0 (greedy)")
        require(0 <= self.top_k < 1 << 31, f"top_k={self.top_k} must lie in [0, 2**31); 0 takes all tokens")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]; use 1 for all tokens")
        require(0 <= self.seed < _SEEDS, f"seed={self.seed} must lie in [0, 2**32)")
        texts = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        require(texts, f"stop={self.stop!r} must be texts that are not empty")


class Draws(NamedTuple):
    """The sampling of each row, [S, B]."""

    temperature: Array
    top_k: Array
    top_p: Array
    seed: Array  # uint32
    request: Array  # int32; its number, so that a text depends on neither its neighbours nor the batch size


def draws(samplings: Sequence[Sampling], requests: Sequence[int], shape: tuple[int, int]) -> Draws:
    """On the host; rows behind the last request are greedy."""

    def column(values: Sequence[float], dtype: type) -> Any:
        return np.asarray([*values, *[0] * (math.prod(shape) - len(values))], dtype).reshape(shape)

    return Draws(
        column([s.temperature for s in samplings], np.float32),
        column([s.top_k for s in samplings], np.int32),
        column([s.top_p for s in samplings], np.float32),
        column([s.seed for s in samplings], np.uint32),
        column(requests, np.int32),
    )


def candidates(samplings: Sequence[Sampling], vocab_size: int) -> int:
    """C, how many of the most likely tokens the rows choose from; 0: from all, and none has to be sorted out."""
    drawn = [s for s in samplings if s.temperature > 0]
    if drawn and all(s.top_k == 0 and s.top_p == 1 for s in drawn):
        return 0
    most = max((s.top_k or vocab_size for s in drawn), default=1)
    return min(vocab_size, 1 << (most - 1).bit_length())  # few sizes, few programs


def sample(logits_SBV: Array, draws: Draws, position_SB: Array, candidates: int) -> tuple[Array, Array]:
    """Tokens_SB, and their log-probabilities under the model (as it is, at temperature 1).

    Args:
      position_SB: where the tokens will stand; with seed and request it makes the random number.
      candidates: C.
    """
    arrays = (logits_SBV, *draws, jax.sharding.reshard(position_SB, token_spec(2)))
    choose = functools.partial(_choose, candidates)
    return on_each_rank(
        lambda *values: jax.vmap(jax.vmap(choose))(*values), arrays, out_specs=(token_spec(2), token_spec(2))
    )


def _choose(
    candidates: int,
    logits_V: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    seed: Array,
    request: Array,
    position: Array,
) -> tuple[Array, Array]:
    best = jnp.argmax(logits_V).astype(jnp.int32)
    if candidates == 1:
        return best, jax.nn.log_softmax(logits_V)[best]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), request), position)
    # From the best one down: divided by a small temperature, several above 0 would be infinite alike.
    scaled_V = (logits_V - logits_V[best]) / jnp.where(temperature > 0, temperature, 1)
    if candidates == 0:
        token = jax.random.categorical(key, scaled_V)
    else:
        scaled_C, token_C = jax.lax.top_k(scaled_V, candidates)
        rank_C = jnp.arange(candidates)
        scaled_C = jnp.where((top_k == 0) | (rank_C < top_k), scaled_C, -jnp.inf)
        shares_C = jax.nn.softmax(scaled_C)
        # The mass before it, so that the most likely token always stays.
        scaled_C = jnp.where((jnp.cumsum(shares_C) - shares_C < top_p) | (rank_C == 0), scaled_C, -jnp.inf)
        token = token_C[jax.random.categorical(key, scaled_C)]
    token = jnp.where(temperature > 0, token, best).astype(jnp.int32)
    return token, jax.nn.log_softmax(logits_V)[token]
