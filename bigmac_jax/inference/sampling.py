"""The choice of the next token. S batch shards, B rows of one, V vocabulary, C candidates of a row."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bigmac_jax.config import ConfigError
from bigmac_jax.model.mesh import on_each_rank, token_spec

ALTERNATIVES = 20  # tokens beside the chosen one, at most
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
    logprobs: int = 0  # of how many of the most likely tokens, beside the chosen one's

    def __post_init__(self) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise ConfigError(message)

        kinds = {"max_tokens": int, "top_k": int, "seed": int, "ignore_eos": bool, "logprobs": int}
        for name, kind in kinds.items():
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
        require(0 <= self.logprobs <= ALTERNATIVES, f"logprobs={self.logprobs} must lie in [0, {ALTERNATIVES}]")
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
    alternatives: Array  # int32; how many of the most likely tokens are asked for beside the chosen one


class Chosen(NamedTuple):
    """Tokens [S, B], and their log-probabilities under the model (as it is, at temperature 1)."""

    token: Array
    logprob: Array
    likely: Array  # [S, B, ALTERNATIVES]; the most likely tokens, zeros where no row asks for them
    likely_logprob: Array


# Of so many candidates or fewer, tokens are chosen without sorting the vocabulary.
_FEW = 64
_GREEDY, _UNFILTERED, _FROM_FEW, _FROM_ALL = range(4)


def draws_of(sampling: Sampling, request: int) -> tuple[float | int, ...]:
    """One row's, in the order of `Draws`."""
    return (
        sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed, request, sampling.logprobs
    )  # fmt: skip


def sample(logits_SBV: Array, draws: Draws, position_SB: Array) -> Chosen:
    """The next tokens.

    What a row draws depends on its own logits, sampling and position alone. How it is computed follows what the rows of
    a rank ask for: of greedy ones alone nothing is drawn, and the vocabulary is sorted for those that need it.

    Args:
      position_SB: where the tokens will stand; with seed and request it makes the random number.
    """
    arrays = (logits_SBV, *(jax.sharding.reshard(v, token_spec(2)) for v in (*draws, position_SB)))

    def on_rank(logits_SBV: Array, *values: Array) -> tuple[Array, ...]:
        *of_rows, position_SB = values
        return _on_rank(logits_SBV, Draws(*of_rows), position_SB)

    specs = token_spec(2), token_spec(2), token_spec(3), token_spec(3)
    return Chosen(*on_each_rank(on_rank, arrays, out_specs=specs))


def _on_rank(logits_SBV: Array, draws: Draws, position_SB: Array) -> tuple[Array, ...]:
    V = logits_SBV.shape[-1]
    drawn = draws.temperature > 0
    filtered = drawn & ((draws.top_k > 0) | (draws.top_p < 1))
    few = (draws.top_k > 0) & (draws.top_k <= _FEW) | (V <= _FEW)
    need = jnp.where(filtered, jnp.where(few, _FROM_FEW, _FROM_ALL), jnp.where(drawn, _UNFILTERED, _GREEDY))

    def choosing(candidates: int | None) -> Callable[..., Array]:
        return jax.vmap(jax.vmap(functools.partial(_choose, candidates)))

    branches = [choosing(candidates) for candidates in (None, 0, min(_FEW, V), V)]
    token_SB = jax.lax.switch(need.max(), branches, logits_SBV, draws, position_SB)
    total_SB = jax.nn.logsumexp(logits_SBV, axis=-1)
    logprob_SB = jnp.take_along_axis(logits_SBV, token_SB[..., None], axis=-1)[..., 0] - total_SB
    size = min(ALTERNATIVES, V)

    def most_likely(logits_SBV: Array) -> tuple[Array, Array]:
        values, tokens = jax.lax.top_k(logits_SBV, size)
        return tokens.astype(jnp.int32), values - total_SB[..., None]

    def nothing(logits_SBV: Array) -> tuple[Array, Array]:
        part = logits_SBV[..., :size]
        return jnp.zeros_like(part, jnp.int32), jnp.zeros_like(part)

    asked = (draws.alternatives > 0).any()
    return token_SB, logprob_SB, *jax.lax.cond(asked, most_likely, nothing, logits_SBV)


def _choose(candidates: int | None, logits_V: Array, draws: Draws, position: Array) -> Array:
    """One row's token. `candidates`: that top_k and top_p choose from, from the best one down; 0: no row has either;
    None: nor is any drawn."""
    best = _argmax(logits_V)
    if candidates is None:
        return best
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(draws.seed), draws.request), position)
    # A number for each token, whatever it is chosen from (Gumbel-max: the largest sum is a draw from the softmax).
    noise_V = jax.random.gumbel(key, logits_V.shape)
    # From the best one down: divided by a small temperature, several above 0 would be infinite alike.
    scaled_V = (logits_V - logits_V[best]) / jnp.where(draws.temperature > 0, draws.temperature, 1)
    token = _argmax(scaled_V + noise_V)
    if candidates:
        scaled_C, token_C = jax.lax.top_k(scaled_V, candidates)
        rank_C = jnp.arange(candidates)
        scaled_C = jnp.where((draws.top_k == 0) | (rank_C < draws.top_k), scaled_C, -jnp.inf)
        shares_C = jax.nn.softmax(scaled_C)
        # The mass before it, so that the most likely token always stays.
        scaled_C = jnp.where((jnp.cumsum(shares_C) - shares_C < draws.top_p) | (rank_C == 0), scaled_C, -jnp.inf)
        filtered = (draws.top_k > 0) | (draws.top_p < 1)
        token = jnp.where(filtered, token_C[jnp.argmax(scaled_C + noise_V[token_C])], token)
    return jnp.where(draws.temperature > 0, token, best)


def _argmax(v_V: Array) -> Array:
    """int32, the first of the largest. In two reductions, each of which XLA:CPU vectorises; jnp.argmax is one that it
    does not, and took 40 % of a small model's step."""
    place_V = jnp.arange(v_V.shape[0], dtype=jnp.int32)
    return jnp.min(jnp.where(v_V == v_V.max(), place_V, v_V.shape[0] - 1))
