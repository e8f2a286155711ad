"""The JSON of answers: whole, and piece by piece. One `Answer` for a request; no network, no engine."""

import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

from bigmac_jax.inference.jobs import Step
from bigmac_jax.serving.api import Asked, Fields

Show = Callable[[int], str]  # a token's text


class Answer:
    """What a request is answered.

    Args:
      show: the text of a token.
    """

    def __init__(self, asked: Asked, model: str, show: Show):
        self.asked, self._show = asked, show
        kind = "chatcmpl" if asked.chat else "cmpl"
        self._head: Fields = {
            "id": f"{kind}-{secrets.token_hex(12)}",
            "object": "chat.completion" if asked.chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._offsets = [len(self._echo(i)) for i in range(len(asked.prompts) * asked.n)]

    def whole(self, steps: list[list[Step]], used: Fields) -> Fields:
        """Args: the steps of each completion."""
        choices = []
        for i, of_choice in enumerate(steps):
            text = of_choice[-1].job.text
            choice = {"index": i, "logprobs": self._logprobs(i, of_choice), "finish_reason": of_choice[-1].reason}
            if self.asked.chat:
                choice["message"] = {"role": "assistant", "content": text.text, "refusal": None}
            else:
                choice["text"] = self._echo(i) + text.text
            choices.append(choice)
        return {**self._head, "choices": choices, "usage": used}

    def opening(self) -> Iterable[Fields]:
        """What a stream begins with."""
        for i in range(len(self._offsets)):
            if self.asked.chat:
                yield self._piece({"index": i, "delta": {"role": "assistant", "content": ""}})
            elif self._echo(i):
                yield self._piece({"index": i, "text": self._echo(i)})

    def piece(self, i: int, step: Step) -> Fields | None:
        """What a step adds to a stream: nothing while its text is uncertain."""
        if not (step.piece or step.reason or self.asked.logprobs):
            return None
        choice: Fields = {"index": i, "logprobs": self._logprobs(i, [step]), "finish_reason": step.reason or None}
        return self._piece(choice | ({"delta": {"content": step.piece}} if self.asked.chat else {"text": step.piece}))

    def closing(self, used: Fields) -> Iterable[Fields]:
        if self.asked.usage:
            yield {**self._piece({}), "choices": [], "usage": used}

    def _piece(self, choice: Fields) -> Fields:
        whole = {"logprobs": None, "finish_reason": None} | choice
        kind = {"object": "chat.completion.chunk"} if self.asked.chat else {}
        return {**self._head, **kind, "choices": [whole]}

    def _echo(self, i: int) -> str:
        return self.asked.echo[i // self.asked.n]

    def _logprobs(self, i: int, steps: list[Step]) -> Any:
        if not self.asked.logprobs:
            return None
        if self.asked.chat:
            return {"content": [self._of_token(step) for step in steps], "refusal": None}
        offsets = []
        for step in steps:
            offsets.append(self._offsets[i])
            self._offsets[i] += len(self._show(step.token))
        return {
            "tokens": [self._show(step.token) for step in steps],
            "token_logprobs": [step.logprob for step in steps],
            "top_logprobs": [{self._show(token): value for token, value in step.alternatives} for step in steps],
            "text_offset": offsets,
        }

    def _of_token(self, step: Step) -> Fields:
        def described(token: int, logprob: float) -> Fields:
            text = self._show(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        likely = [described(*pair) for pair in step.alternatives]
        return {**described(step.token, step.logprob), "top_logprobs": likely}
