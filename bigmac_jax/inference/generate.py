"""Completions of prompts, in batches. S batch shards, B rows of one, N = S·B, P prompt length, M room of the cache."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.batch import of_windows
from bigmac_jax.data.tokenizer import Tokenizer, load_tokenizer
from bigmac_jax.decoding.cache import make_decoder
from bigmac_jax.decoding.sampling import Draws, Sampling, candidates, draws
from bigmac_jax.inference.text import Text
from bigmac_jax.mesh import batch_ranks, batch_spec, place, tensor_ranks, token_spec
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.programs import PROMPTS, bucket, decoding_shape, evaluate, make_decoding

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


@dataclass(frozen=True)
class Scored:
    """How likely a text is, as the beginning of a document."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each token behind those before it, nats
    bytes: int  # of the text in UTF-8

    @property
    def bits_per_byte(self) -> float:
        return -math.fsum(self.logprobs) / math.log(2) / max(1, self.bytes)


class Generator:
    """Completes and scores texts with a model on the current mesh.

    Args:
      config, model: as `bigmac_jax.restore` gives them.
      max_length: prompt and completion together; 0 = data.sequence_length. More needs positions that aren't learned.
      batch_size: prompts at a time.
      tokenizer: by default the config's.
      exchange: the strategy of the MoE layers; `auto` is the fastest by the bytes and latencies of a step.
      consume: frees the model on the way, where memory is too short for both; then nothing can be scored.

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
        self._model = None if consume else model
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

    def score(self, texts: Sequence[Prompt]) -> list[Scored]:
        """The log-probability of each token of each text, which stands behind an end-of-text token.

        Dropless, as evaluation is. A text may be token ids.

        Raises:
          ConfigError: a text that is empty, broken, or longer than max_length; or the model was consumed.
        """
        if self._model is None:
            raise ConfigError("Generator(consume=True) has freed the model that scores; make it with consume=False")
        if isinstance(texts, str):
            raise ConfigError("texts must be a list; put the one text into brackets")
        token_ids = self._token_ids(texts, "text", 1)
        for number, ids in enumerate(token_ids, 1):
            if len(ids) > self.max_length:
                raise ConfigError(
                    f"text {number} has {len(ids)} tokens, which must be at most max_length={self.max_length}; score "
                    f"it in parts, or with a longer max_length"
                )
        order = sorted(range(len(texts)), key=lambda i: -len(token_ids[i]))
        scored: dict[int, Scored] = {}
        with jax.set_mesh(self.mesh):
            rows = -(-min(self.batch_size, len(texts)) // batch_ranks()) * batch_ranks()
            for start in range(0, len(order), rows or 1):
                batch = order[start : start + rows]
                padded = int(min(bucket(len(token_ids[batch[0]]), tensor_ranks()), self._longest_prefill))
                tokens_BL = np.zeros((rows, padded + 1), np.int32)
                tokens_BL[:, 0] = self.tokenizer.eos_id
                for row, i in enumerate(batch):
                    tokens_BL[row, 1 : len(token_ids[i]) + 1] = token_ids[i]
                nll_BL = np.asarray(evaluate(self._model, place(of_windows(tokens_BL), batch_spec(2))).nll_BL)
                for nll_L, i in zip(nll_BL, batch, strict=False):
                    ids, text = token_ids[i], texts[i]
                    size = len((text if isinstance(text, str) else self.tokenizer.decode(ids)).encode())
                    scored[i] = Scored(tuple(ids), tuple((-nll_L[: len(ids)]).tolist()), size)
        return [scored[i] for i in range(len(texts))]

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
        encoded = self._token_ids([request.prompt for request in requests], "prompt", first + 1)
        for number, (ids, request) in enumerate(zip(encoded, requests, strict=True), first + 1):
            wanted = len(ids) + request.sampling.max_tokens
            if wanted > self.max_length:
                raise ConfigError(
                    f"prompt {number} has {len(ids)} tokens, which with max_tokens={request.sampling.max_tokens} are "
                    f"{wanted}, and must be at most max_length={self.max_length}; use a shorter prompt, fewer "
                    f"max_tokens, or a longer max_length"
                )
        return encoded

    def _token_ids(self, texts: Sequence[Prompt], what: str, first: int) -> list[list[int]]:
        """Those of each text, at least one, all of the vocabulary."""
        for number, text in enumerate(texts, first):
            _check_text(f"{what} {number}", text, self._vocab_size)
        encoded = iter(self.tokenizer.encode_batch([text for text in texts if isinstance(text, str)]))
        token_ids = [next(encoded) if isinstance(text, str) else list(text) for text in texts]
        for number, ids in enumerate(token_ids, first):
            if not ids:
                raise ConfigError(f"{what} {number} has no tokens; give text that the tokenizer keeps")
        return token_ids


def _requests(prompts: Sequence[Prompt | Request], sampling: dict[str, Any]) -> list[Request]:
    if isinstance(prompts, str):
        raise ConfigError("prompts must be a list; put the one text into brackets")
    return [prompt if isinstance(prompt, Request) else Request(prompt, Sampling(**sampling)) for prompt in prompts]


def _check_text(name: str, text: Prompt, vocab_size: int) -> None:
    if not text:
        raise ConfigError(f"{name} is empty; give at least one character")
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{name} is not valid UTF-8 (character {error.start + 1}); give it as UTF-8 text"
            ) from None
    elif unknown := [token for token in text if not 0 <= token < vocab_size]:
        raise ConfigError(f"{name} has the token {unknown[0]}, which must lie in [0, {vocab_size})")


def _completion(text: Text, prompt_tokens: int) -> Completion:
    return Completion(text.text, tuple(text.tokens), tuple(text.logprobs), text.finish_reason, prompt_tokens)
