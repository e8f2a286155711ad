"""Builds OpenAI's JSON of answers, whole or as the chunks of a stream. No network, no engine."""

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.inference.jobs import Job, Step
from bigmac_jax.serving.api import CompletionRequest, Fields

Name = tuple[str, list[int] | None]


def name_token(tokenizer: Tokenizer, token: int) -> Name:
    """A token's text with its space, or `bytes:\\xe2\\x82` if that is not whole characters; and its bytes, if known."""
    own = tokenizer.bytes_of(token)
    if own is None:
        return tokenizer.decode([token]), None
    try:
        return own.decode(), list(own)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own), list(own)


class Answer:
    """Builds the answer to one request.

    Args:
      jobs: the request's completions: n of its first prompt, then of the next.
      model: the name that the server calls its model by.
      token_name: gives the name of a token and its bytes, as `name_token`.
      opening: what a completion is without where it begins with that: the template writes it before the next turn's
        messages, too.
    """

    def __init__(
        self,
        request: CompletionRequest,
        jobs: Sequence[Job],
        model: str,
        token_name: Callable[[int], Name],
        opening: str = "",
    ):
        self.request, self._jobs, self._token_name, self._opening = request, jobs, token_name, opening
        self._head: Fields = {
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion" if request.chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._described = [0] * len(jobs)  # tokens of each completion whose log-probabilities are given out
        self._held: list[str | None] = [""] * len(jobs)  # beginnings that may be the opening's; None: it is past

    def build(self, steps: list[list[Step]]) -> Fields:
        """The whole answer, from all steps of each completion."""
        choices = []
        for i, (job, own) in enumerate(zip(self._jobs, steps, strict=True)):
            choice = {"index": i, "logprobs": self._logprobs(i, own), "finish_reason": own[-1].reason}
            text = job.text.text.removeprefix(self._opening)
            if self.request.chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = self._echo(i) + text
            choices.append(choice)
        return {**self._head, "choices": choices, "usage": self._usage()}

    def first_chunks(self) -> Iterable[Fields]:
        """The chunks that a stream begins with: the role of a chat's answers, or echoed prompts."""
        for i in range(len(self._jobs)):
            if self.request.chat:
                yield self._chunk({"index": i, "delta": {"role": "assistant", "content": ""}})
            elif self._echo(i):
                yield self._chunk({"index": i, "text": self._echo(i)})

    def chunk(self, i: int, step: Step) -> Fields | None:
        """The chunk for a step of completion `i`; None while its text is uncertain."""
        piece = self._without_opening(i, step)
        if not (piece or step.reason or self.request.logprobs):
            return None
        choice: Fields = {"index": i, "logprobs": self._logprobs(i, [step]), "finish_reason": step.reason or None}
        return self._chunk(choice | ({"delta": {"content": piece}} if self.request.chat else {"text": piece}))

    def last_chunks(self) -> Iterable[Fields]:
        """The chunks that a stream ends with: its usage, if the request wants it."""
        if self.request.usage:
            yield {**self._chunk({}), "choices": [], "usage": self._usage()}

    def _without_opening(self, i: int, step: Step) -> str:
        """What a step's chunk gives of completion `i`, whose beginning waits while it may be the opening's."""
        held = self._held[i]
        if held is None:
            return step.piece
        text = held + step.piece
        waits = not step.reason and len(text) < len(self._opening) and self._opening.startswith(text)
        self._held[i] = text if waits else None
        return "" if waits else text.removeprefix(self._opening)

    def _chunk(self, choice: Fields) -> Fields:
        kind = {"object": "chat.completion.chunk"} if self.request.chat else {}
        return {**self._head, **kind, "choices": [{"logprobs": None, "finish_reason": None} | choice]}

    def _echo(self, i: int) -> str:
        return self.request.echo[i // self.request.n]

    def _usage(self) -> Fields:
        firsts = self._jobs[:: self.request.n]  # one of each prompt
        prompt, new = sum(len(job.prompt) for job in firsts), sum(len(job.text.tokens) for job in self._jobs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(job.reused for job in firsts)},
        }

    def _logprobs(self, i: int, steps: list[Step]) -> Any:
        if not self.request.logprobs:
            return None
        if self.request.chat:
            return {"content": [self._describe_step(step) for step in steps], "refusal": None}
        start, before = self._described[i], len(self._echo(i))
        self._described[i] += len(steps)
        return {
            "tokens": [self._token_name(step.token)[0] for step in steps],
            "token_logprobs": [step.logprob for step in steps],
            "top_logprobs": [self._top_logprobs(step) for step in steps],
            "text_offset": [before + offset for offset in self._jobs[i].text.offsets[start : self._described[i]]],
        }

    def _top_logprobs(self, step: Step) -> dict[str, float]:
        """The most likely tokens by name; of equal names the most likely."""
        top: dict[str, float] = {}
        for token, value in step.alternatives:
            top.setdefault(self._token_name(token)[0], value)
        return top

    def _describe_step(self, step: Step) -> Fields:
        def describe(token: int, logprob: float) -> Fields:
            name, own = self._token_name(token)
            return {"token": name, "logprob": logprob, "bytes": own}

        alternatives = [describe(*alternative) for alternative in step.alternatives]
        return {**describe(step.token, step.logprob), "top_logprobs": alternatives}
