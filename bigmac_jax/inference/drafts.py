"""Speculative decoding: when an engine drafts, and how many drafted tokens are accepted."""

import logging
from typing import Any

import jax

from bigmac_jax.inference.decoding import DecodePrograms, State
from bigmac_jax.inference.drafter import Speculation

_log = logging.getLogger(__name__)
_WINDOW = 512  # drafted tokens over which acceptance is measured
_PAUSE = 512  # steps without drafts after a window of too low acceptance


class Drafts:
    """Drafts and verifies for an engine, and pauses while too few drafted tokens are accepted.

    Attributes:
      programs: those of the draft model; of the model, if its next-token module drafts.
      tokens: length of a draft.
      drafted, accepted: number of tokens so far.
    """

    def __init__(self, programs: DecodePrograms, speculation: Speculation):
        self.programs, self.tokens, self._least = programs, speculation.tokens, speculation.least
        self.drafted = self.accepted = 0
        self._at_window_start = 0, 0  # the two
        self._pause = 0  # steps that remain

    def should_draft(self) -> bool:
        """Whether the next step drafts; to be called once a step. It follows from tokens, so all processes agree."""
        self._pause = max(0, self._pause - 1)
        return not self._pause

    def step(self, model: DecodePrograms, state: State, slots_SBX: jax.Array) -> tuple[State, jax.Array]:
        """Drafts tokens for every slot and verifies them → what `model.verify` returns; donates the state."""
        state, drafted_GSB = self.programs.draft(self.programs.weights, state, slots_SBX, tokens=self.tokens)
        result: Any = model.verify(model.weights, state, drafted_GSB, slots_SBX)
        return result

    def count(self, accepted: int, usable: int) -> None:
        """Counts the accepted tokens of one slot's draft, of which the request could use at most `usable`."""
        self.drafted += min(self.tokens, usable)
        self.accepted += accepted
        drafted, accepted = self.drafted - self._at_window_start[0], self.accepted - self._at_window_start[1]
        if drafted < _WINDOW:
            return
        self._at_window_start = self.drafted, self.accepted
        if accepted < self._least * drafted:
            self._pause = _PAUSE + 1
            _log.info(
                "of %d drafted tokens %.1f %% were accepted, fewer than %.1f %%: no drafts for the next %d steps",
                drafted, 100 * accepted / drafted, 100 * self._least, _PAUSE,
            )  # fmt: skip
