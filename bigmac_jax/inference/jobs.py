"""What goes into an engine and comes out of it: requests, and their tokens one by one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bigmac_jax.inference.sampling import Sampling
from bigmac_jax.inference.text import Text

CANCELLED = "cancelled"


@dataclass(eq=False)
class Job:
    """A request to an engine, and its completion so far.

    Attributes:
      text: the completion, which grows with every step.
      number: of the request; random numbers follow from it and the seed.
      begins: whether the completion is a new text, as an answer in a chat, and does not continue the prompt's.
      reused: tokens of the prompt that the cache held when it began.
    """

    prompt: Sequence[int]
    sampling: Sampling
    text: Text
    number: int = 0
    begins: bool = False
    reused: int = 0

    @property
    def positions(self) -> int:
        """Number of cache positions that it takes; its last token is never read."""
        return len(self.prompt) + self.sampling.max_tokens - 1


class Step(NamedTuple):
    """One generated token of a request."""

    job: Job
    piece: str  # text that this token completes; "" while that is uncertain
    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]  # the most likely tokens and their logprobs, sampling.logprobs of them
    reason: str  # why the request ends with it: stop, length or BROKEN; "" if it goes on
