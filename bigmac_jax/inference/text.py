"""Turns tokens into text as they arrive (incremental detokenization), and finds where it ends."""

import math

from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.inference.sampling import Sampling

BROKEN = "broken"  # finish reason: the logits were NaN or infinite
_BROKEN = "\N{REPLACEMENT CHARACTER}"
# A UTF-8 character has at most four bytes: what looks unfinished after as many tokens is broken.
_LONGEST_CHARACTER = 4


class Text:
    """The text of one completion, which grows token by token.

    Attributes:
      text: what is certain so far: whole characters, and no beginning of a stop text.
      tokens, logprobs: all so far.
      finish_reason: "" until it ends, then stop, length or BROKEN.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling):
        self.text, self.finish_reason = "", ""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self._tokenizer, self._sampling = tokenizer, sampling
        self._held = ""  # decoded, but perhaps the beginning of a stop text
        # Tokens are decoded together with some before them: a tokenizer may drop the space before the first one.
        self._context, self._decoded = 0, 0

    def add(self, token: int, logprob: float) -> str:
        """Appends a token and returns the text that it makes certain; may set `finish_reason`."""
        if not math.isfinite(logprob):
            return self._finish(BROKEN, last=len(self.tokens))
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token == self._tokenizer.eos_id and not self._sampling.ignore_eos:
            return self._finish("stop", last=len(self.tokens) - 1)
        self._held += self._decode(len(self.tokens), whole=False)
        ends = [self._held.find(stop) for stop in self._sampling.stop if stop in self._held]
        if ends:
            self._held = self._held[: min(ends)]
            self._decoded = len(self.tokens)
            return self._finish("stop", last=len(self.tokens))
        if len(self.tokens) == self._sampling.max_tokens:
            return self._finish("length", last=len(self.tokens))
        sure = len(self._held) - max((_overlap(self._held, stop) for stop in self._sampling.stop), default=0)
        piece, self._held = self._held[:sure], self._held[sure:]
        self.text += piece
        return piece

    def _finish(self, reason: str, last: int) -> str:
        piece = self._held + self._decode(last, whole=True)
        self.text, self.finish_reason, self._held = self.text + piece, reason, ""
        return piece

    def _decode(self, stop: int, whole: bool) -> str:
        """Decodes the tokens up to `stop` that were not decoded yet.

        Args:
          whole: also if they end inside a character; else that gives "".
        """
        if stop <= self._decoded:
            return ""
        before = self._tokenizer.decode(self.tokens[self._context : self._decoded])
        text = self._tokenizer.decode(self.tokens[self._context : stop])
        if text.endswith(_BROKEN) and not whole:
            if stop - self._decoded < _LONGEST_CHARACTER:
                return ""
            # Broken, but the end may be the beginning of a whole character.
            for cut in range(self._decoded + 1, stop):
                head, tail = self._tokenizer.decode(self.tokens[self._context : cut]), self.tokens[cut:stop]
                if self._tokenizer.decode(tail) == _BROKEN and head + _BROKEN == text:
                    stop, text = cut, head
                    break
        self._context, self._decoded = self._decoded, stop
        return text[len(before) :]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
