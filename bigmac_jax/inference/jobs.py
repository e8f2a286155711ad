"""Requests of an engine, and what it says of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bigmac_jax.inference.pages import Lease
from bigmac_jax.inference.sampling import Sampling
from bigmac_jax.inference.text import Text

CANCELLED = "cancelled"


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
      number: of the request; with the seed it makes its random numbers.
      text: what follows the prompt, as it grows.
      reused: tokens of the prompt that were in the cache when it began.
    """

    prompt: Sequence[int]
    sampling: Sampling
    text: Text
    number: int = 0
    reused: int = 0
    _shard: int = -1
    _slot: int = -1
    _lease: Lease | None = None
    _read: int = 0  # tokens of the prompt, of steps that were dispatched
    _asked: int = 0  # tokens that follow, of the same; of drafts, how many there are at least

    @property
    def positions(self) -> int:
        """That it takes in the cache: the last token is not read."""
        return len(self.prompt) + self.sampling.max_tokens - 1


class Step(NamedTuple):
    """One more token of a request."""

    job: Job
    piece: str  # the text that it makes certain
    token: int
    logprob: float
    likely: tuple[tuple[int, float], ...]  # the most likely tokens, as many as sampling.logprobs
    reason: str  # why the request ends with it: stop, length or BROKEN; "" if it goes on
