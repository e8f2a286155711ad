"""Turns tokens into text as they arrive (incremental detokenization), and finds where it ends."""

import math
from collections.abc import Sequence

from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.inference.sampling import Sampling

BROKEN = "broken"  # finish reason: the logits were NaN or infinite
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_UNFINISHED = 3  # bytes, at most, of a UTF-8 character that goes on; decoders give a _BROKEN for each, or for all
_WINDOW = 16  # tokens: more bytes than decide how the next ones are read


class Text:
    """The text of one completion, which grows token by token.

    Args:
      context: tokens of the text that it continues: a tokenizer may drop the space before the first word of a text.

    Attributes:
      text: what is certain so far: whole characters, and no beginning of a stop text.
      tokens, logprobs: all so far.
      offsets: where each token begins in the text, a character of several tokens counting for each of them.
      finish_reason: "" until it ends, then stop, length or BROKEN.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, context: Sequence[int] = ()):
        self.text, self.finish_reason = "", ""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.offsets: list[int] = []
        self._tokenizer, self._sampling = tokenizer, sampling
        self._held = ""  # whole characters, but perhaps the beginning of a stop text
        # Tokens that are decoded together with the next one, and what is certain of their text.
        self._window, self._known = _shortest_context(tokenizer, context)
        self._whole = len(self._window)  # of these tokens: up to the last one that ended a character

    def add(self, token: int, logprob: float) -> str:
        """Appends a token and returns the text that it makes certain; may set `finish_reason`."""
        if not math.isfinite(logprob):
            self._held += self._decode(last=True)
            return self._give(len(self._held), BROKEN)
        self.offsets.append(len(self.text) + len(self._held))
        self.tokens.append(token)
        self.logprobs.append(logprob)
        ended = token == self._tokenizer.eos_id and not self._sampling.ignore_eos
        if not ended:
            self._window.append(token)
        reason = "stop" if ended else "length" if len(self.tokens) == self._sampling.max_tokens else ""
        self._held += self._decode(last=bool(reason))
        stops = self._sampling.stop
        # The stop text that is complete first, however many characters a token has.
        if ends := [(at + len(stop), at) for stop in stops if (at := self._held.find(stop)) >= 0]:
            self._held = self._held[: min(ends)[1]]
            return self._give(len(self._held), "stop")
        begun = 0 if reason else max((_overlap(self._held, stop) for stop in stops), default=0)
        return self._give(len(self._held) - begun, reason)

    def _give(self, size: int, reason: str) -> str:
        """Moves so many characters from what is held to the text, and returns them."""
        piece, self._held = self._held[:size], self._held[size:]
        self.text, self.finish_reason = self.text + piece, reason
        return piece

    def _decode(self, last: bool) -> str:
        """What is certain of the window's text and was not known; if no token follows, all of it is certain."""
        text = self._tokenizer.decode(self._window)
        if self._whole and not text.startswith(self._known):
            # Byte fallback: one wrong byte breaks the characters of all bytes before it, which are given out already.
            self._window, self._known, self._whole = self._window[self._whole :], "", 0
            text = self._tokenizer.decode(self._window)
        unfinished = 0 if last else min(len(text) - len(text.rstrip(_BROKEN)), _UNFINISHED)
        certain = max(len(text) - unfinished, len(self._known))
        piece, self._known = text[len(self._known) : certain], text[:certain]
        if not last:
            self._shorten_window(text, unfinished)
        return piece

    def _shorten_window(self, text: str, unfinished: int) -> None:
        """Drops tokens of the window that do not change how the next ones are read."""
        if not unfinished:
            rest, self._whole = self._window[self._whole :], len(self._window)
            if known := self._tokenizer.decode(rest):  # without text they may not keep the next one's space
                self._window, self._known, self._whole = rest, known, len(rest)
        elif len(self._window) > 2 * _WINDOW:  # tokens may go on and on without one that ends a character
            rest = self._window[-_WINDOW:]
            same = self._tokenizer.decode(rest)
            if same.endswith(text[-_UNFINISHED - 1 :]):
                self._window, self._known, self._whole = rest, same[: len(same) - unfinished], 0


def _shortest_context(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[list[int], str]:
    """The fewest of the last tokens that are a text of whole characters, and that text."""
    for count in range(1, min(len(tokens), _WINDOW) + 1):
        last = list(tokens[-count:])
        if (text := tokenizer.decode(last)) and _BROKEN not in text:
            return last, text
    return [], ""


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
