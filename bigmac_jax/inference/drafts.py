"""Drafts of an engine: when they are made, and what of them is accepted."""

import logging
from typing import Any

import jax

from bigmac_jax.inference.decoding import Decoding, Drafting, State
from bigmac_jax.inference.drafter import Speculation

_log = logging.getLogger(__name__)
_WINDOW = 512  # drafted tokens after which it is decided
_PAUSE = 512  # steps without drafts, before they are tried again


class Drafts:
    """Attributes:
    programs: of the drafter.
    tokens: of a draft.
    drafted, accepted: tokens so far.
    """

    def __init__(self, programs: Drafting, how: Speculation):
        self.programs, self._least = programs, how.least
        self.tokens = how.tokens
        self.drafted = self.accepted = 0
        self._since = 0, 0  # of the two, when the window began
        self._pause = 0

    def due(self) -> bool:
        """Whether the next step drafts; to be asked once for each. It follows from tokens, so all processes agree."""
        self._pause = max(0, self._pause - 1)
        return not self._pause

    def step(self, verifying: Decoding, state: State, slots_SBX: jax.Array) -> tuple[State, jax.Array]:
        """Drafts and verifies, as `Decoding.verify`; the state is donated."""
        state, drafted_GSB = self.programs.draft(self.programs.weights, state, slots_SBX, tokens=self.tokens)
        result: Any = verifying.verify(verifying.weights, state, drafted_GSB, slots_SBX)
        return result

    def count(self, accepted: int, room: int) -> None:
        """What became of a slot's draft, of which `room` tokens could have been used."""
        self.drafted += min(self.tokens, room)
        self.accepted += accepted
        drafted, of_these = self.drafted - self._since[0], self.accepted - self._since[1]
        if drafted < _WINDOW:
            return
        self._since = self.drafted, self.accepted
        if of_these < self._least * drafted:
            self._pause = _PAUSE + 1
            _log.info(
                "of %d drafted tokens %.1f %% were accepted, fewer than %.1f %%: no drafts for the next %d steps",
                drafted, 100 * of_these / drafted, 100 * self._least, _PAUSE,
            )  # fmt: skip
