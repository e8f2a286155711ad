"""Completions of prompts, in batches. S batch shards, B rows of one, N = S·B, P prompt length, M room of the cache."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.tokenizer import Tokenizer, load_tokenizer
from bigmac_jax.decoding.cache import make_decoder
from bigmac_jax.decoding.sampling import Draws, Sampling, candidates, draws
from bigmac_jax.inference.text import Text
from bigmac_jax.mesh import batch_spec, place, tensor_ranks, token_spec
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.programs import PROMPTS, bucket, decoding_shape, make_decoding

Prompt = str | tuple[int, ...]  # text, or token ids


@dataclass(frozen=True)
class Request:
    """A prompt and what is to follow it."""

    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Completion:
    """What followed a prompt."""

    text: str
    tokens: tuple[int, ...]  # the end-of-text token and those of a stop text included
    logprobs: tuple[float, ...]  # of each token, nats, at temperature 1
    finish_reason: str  # stop (end of text, or a stop text) | length (max_tokens)
    prompt_tokens: int


class Generator:
    """Completes prompts with a model on the current mesh.

    Args:
      config, model: as `bigmac_jax.restore` gives them.
      max_length: prompt and completion together; 0 = data.sequence_length. More needs positions that aren't learned.
      batch_size: prompts at a time.
      tokenizer: by default the config's.
      exchange: the strategy of the MoE layers; `auto` is the fastest by the bytes and latencies of a step.
      consume: frees the model on the way, where memory is too short for both.

    Raises:
      ConfigError: max_length exceeds the learned positions, or batch_size is below 1; the tokenizer cannot be loaded.
    """

    def __init__(
        self,
        config: Config,
        model: Transformer,
        max_length: int = 0,
        batch_size: int = PROMPTS,
        tokenizer: Tokenizer | None = None,
        exchange: str = "auto",
        consume: bool = False,
    ):
        trained = config.data.sequence_length
        if config.model.positions == "learned" and max_length > trained:
            raise ConfigError(
                f"max_length={max_length} must be at most the {trained} learned positions (data.sequence_length)"
            )
        if max_length < 0:
            raise ConfigError(f"max_length={max_length} must be at least 0 (data.sequence_length)")
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        self.max_length = max_length or trained
        self._longest_prefill = trained if config.model.positions == "learned" else math.inf
        self.batch_size = batch_size
        self.tokenizer = tokenizer or load_tokenizer(config)
        self.mesh = jax.sharding.get_mesh()
        self._vocab_size = config.model.vocab_size
        self._programs = make_decoding(make_decoder(config, model, exchange, consume))

    def generate(
        self,
        prompts: Sequence[Prompt | Request],
        on_done: Callable[[int, Completion], None] | None = None,
        first: int = 0,
        **sampling: Any,
    ) -> list[Completion]:
        """The completion of each prompt.

        Args:
          on_done: called with the number of a prompt and its completion as soon as that is there.
          first: number of the first prompt, where others went before it in another call; draws depend on numbers.
          **sampling: fields of `Sampling`, for prompts that are no `Request`.

        Raises:
          ConfigError: a prompt that is empty, broken text, or too long with its max_tokens.
        """
        requests = _requests(prompts, sampling)
        prompt_ids = self._encoded(requests, first)
        # Of like length together: a batch takes as long as its longest.
        order = sorted(range(len(requests)), key=lambda i: (-len(prompt_ids[i]), i))
        done: dict[int, Completion] = {}
        rows = min(self.batch_size, len(requests))
        for start in range(0, len(order), rows or 1):
            batch = order[start : start + rows]
            samplings = [requests[i].sampling for i in batch]
            texts = [Text(self.tokenizer, sampling) for sampling in samplings]
            numbers = [first + i for i in batch]
            for chosen in self.steps([prompt_ids[i] for i in batch], samplings, numbers, rows):
                for text, number, (token, logprob) in zip(texts, batch, chosen, strict=True):
                    if text.finish_reason:
                        continue
                    text.add(token, logprob)
                    if text.finish_reason:
                        done[number] = _completion(text, len(prompt_ids[number]))
                        if on_done:
                            on_done(first + number, done[number])
                if all(text.finish_reason for text in texts):
                    break
        return [done[i] for i in range(len(requests))]

    def stream(self, prompt: Prompt | Request, **sampling: Any) -> Iterator[str]:
        """The completion of one prompt, piece by piece as it is made; arguments and errors as for `generate`."""
        (request,) = _requests([prompt], sampling)
        (ids,) = self._encoded([request])
        text = Text(self.tokenizer, request.sampling)
        for ((token, logprob),) in self.steps([ids], [request.sampling], [0], 1):
            yield text.add(token, logprob)
            if text.finish_reason:
                return

    def check(self, prompts: Sequence[Prompt | Request], **sampling: Any) -> None:
        """Raises what `generate` would, before anything is made."""
        self._encoded(_requests(prompts, sampling))

    def steps(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], numbers: Sequence[int], rows: int
    ) -> Iterator[list[tuple[int, float]]]:
        """A batch token by token: the token and its log-probability of each prompt. The device is one step ahead.

        Args:
          prompts: token ids; none is checked.
          numbers: of the prompts, for their draws.
          rows: of the batch, at least the prompts.
        """
        with jax.set_mesh(self.mesh):
            shape = decoding_shape(rows)
            longest = max(map(len, prompts))
            steps = max(s.max_tokens for s in samplings)
            padded = int(min(bucket(longest, tensor_ranks()), self._longest_prefill))
            room = max(padded, bucket(max(len(p) + s.max_tokens for p, s in zip(prompts, samplings, strict=True)), 1))
            tokens_NP = np.zeros((math.prod(shape), padded), np.int32)
            length_N = np.ones(math.prod(shape), np.int32)
            for row, prompt in enumerate(prompts):
                tokens_NP[row, : len(prompt)], length_N[row] = prompt, len(prompt)

            drawn = Draws(*(place(v, token_spec(2)) for v in draws(samplings, numbers, shape)))
            C = candidates(samplings, self._vocab_size)
            state, out = self._programs.prefill(
                self._programs.weights,
                place(tokens_NP, token_spec(2)),
                place(length_N.reshape(shape), batch_spec(2)),
                drawn,
                room=room,
                candidates=C,
            )
            for step in range(steps):
                previous = out
                if step + 1 < steps:
                    state, out = self._programs.decode(self._programs.weights, state, drawn, candidates=C)
                tokens, logprobs = (np.asarray(v).reshape(-1)[: len(prompts)] for v in previous)
                yield list(zip(tokens.tolist(), logprobs.tolist(), strict=True))

    def _encoded(self, requests: Sequence[Request], first: int = 0) -> list[list[int]]:
        """The token ids of each prompt, checked."""
        for number, request in enumerate(requests, first + 1):
            _check_prompt(number, request.prompt, self._vocab_size)
        of_texts = iter(self.tokenizer.encode_batch([r.prompt for r in requests if isinstance(r.prompt, str)]))
        encoded = [next(of_texts) if isinstance(r.prompt, str) else list(r.prompt) for r in requests]
        for number, (ids, request) in enumerate(zip(encoded, requests, strict=True), first + 1):
            if not ids:
                raise ConfigError(f"prompt {number} has no tokens; give text that the tokenizer keeps")
            wanted = len(ids) + request.sampling.max_tokens
            if wanted > self.max_length:
                raise ConfigError(
                    f"prompt {number} has {len(ids)} tokens, which with max_tokens={request.sampling.max_tokens} are "
                    f"{wanted}, and must be at most max_length={self.max_length}; use a shorter prompt, fewer "
                    f"max_tokens, or a longer max_length"
                )
        return encoded


def _requests(prompts: Sequence[Prompt | Request], sampling: dict[str, Any]) -> list[Request]:
    if isinstance(prompts, str):
        raise ConfigError("prompts must be a list; put the one text into brackets")
    return [prompt if isinstance(prompt, Request) else Request(prompt, Sampling(**sampling)) for prompt in prompts]


def _check_prompt(number: int, prompt: Prompt, vocab_size: int) -> None:
    if not prompt:
        raise ConfigError(f"prompt {number} is empty; give at least one character")
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"prompt {number} is not valid UTF-8 (character {error.start + 1}); give it as UTF-8 text"
            ) from None
    elif unknown := [token for token in prompt if not 0 <= token < vocab_size]:
        raise ConfigError(f"prompt {number} has the token {unknown[0]}, which must lie in [0, {vocab_size})")


def _completion(text: Text, prompt_tokens: int) -> Completion:
    return Completion(text.text, tuple(text.tokens), tuple(text.logprobs), text.finish_reason, prompt_tokens)
