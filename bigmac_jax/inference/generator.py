"""Completes prompts and scores texts with a model. B texts of L tokens."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.config.errors import require
from bigmac_jax.data.batch import batch_from_windows
from bigmac_jax.data.tokenizer import Tokenizer, load_tokenizer
from bigmac_jax.inference.decoding import PROMPTS, make_decode_programs, round_up_length, slots_per_shard
from bigmac_jax.inference.drafter import Speculation, make_drafter
from bigmac_jax.inference.drafts import Drafts
from bigmac_jax.inference.engine import Engine
from bigmac_jax.inference.jobs import Job, Step
from bigmac_jax.inference.kv_cache import make_decoder
from bigmac_jax.inference.sampling import Sampling
from bigmac_jax.inference.text import BROKEN, Text
from bigmac_jax.model.counts import parameters
from bigmac_jax.model.mesh import batch_ranks, batch_spec, place, tensor_ranks
from bigmac_jax.model.resident import check_resident, hold, is_resident
from bigmac_jax.model.transformer import Transformer, check_length
from bigmac_jax.runtime import hosts
from bigmac_jax.training.programs import evaluate

Prompt = str | tuple[int, ...]  # text, or token ids
_CHUNK = 8192  # tokens of prompts in a step of `generate`, where nobody waits for the next token


@dataclass(frozen=True)
class Request:
    """A prompt, and how its completion is sampled."""

    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Completion:
    """The completion of a prompt."""

    text: str
    tokens: tuple[int, ...]  # with the end-of-text token, or those of a stop text
    logprobs: tuple[float, ...]  # of each token, in nats, at temperature 1
    finish_reason: str  # stop (end of text, or a stop text) | length (max_tokens)
    prompt_tokens: int


@dataclass(frozen=True)
class Score:
    """How likely a text is as the beginning of a document."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each token given those before it, in nats
    bytes: int  # length of the text in UTF-8

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood in bits, per byte of the text."""
        return -math.fsum(self.logprobs) / math.log(2) / max(1, self.bytes)


class Generator:
    """Completes and scores texts with a model on the current mesh; completions run in a continuous batch.

    Args:
      config, model: from `bigmac_jax.restore`.
      max_length: tokens of prompt and completion together; 0 = data.sequence_length. Learned positions allow no more.
      batch_size: prompts at a time.
      tokenizer: by default the config's.
      exchange: the strategy of the MoE layers; `auto` is the fastest by the bytes and latencies of a step.
      consume: frees the model on the way, where memory is too short for two copies; then nothing can be scored. What
        mesh.fsdp has split is gathered once, not for every token, where it takes at most half of a device's memory.
      weights: float32, bfloat16 or int8 (a scale for every channel); by default as execution.dtype. Scores always use
        the model as it is.
      speculate: settings of speculative decoding, for a model with a next-token module or experts on several ranks; by
        default there are no drafts.

    Attributes:
      drafts: counts drafted and accepted tokens; None without drafts.

    Raises:
      ConfigError: max_length exceeds the learned positions, or batch_size is below 1; the tokenizer cannot be loaded;
        drafts would save nothing, or there is no module that could draft.
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
        weights: str = "",
        speculate: Speculation | None = None,
    ):
        speculate = speculate or Speculation()
        speculate.check(config)
        require(max_length >= 0, f"max_length={max_length} must be at least 0 (data.sequence_length)")
        check_length("max_length", max_length, config)
        require(batch_size >= 1, f"batch_size={batch_size} must be at least 1")
        self.max_length = max_length or config.data.sequence_length
        self.batch_size = batch_size
        self.tokenizer = tokenizer or load_tokenizer(config)
        self.mesh = jax.sharding.get_mesh()
        even = config.context_length // tensor_ranks() * tensor_ranks()
        self._positions = even if config.model.positions == "learned" else math.inf  # of a text that is scored
        self.vocab_size = config.model.vocab_size
        check_resident(config, self.mesh)
        self._model = None if consume else hold(config, model)
        by_module = speculate.by_module(config)
        gathered = consume and _fits_gathered(config, weights, by_module)
        self._decoder = make_decoder(config, model, exchange, consume, weights, gathered, next_tokens=by_module)
        self._programs = make_decode_programs(self._decoder)
        self.drafts: Drafts | None = None
        if speculate.tokens:
            own = None if by_module else make_decode_programs(make_drafter(self._decoder, speculate))
            self.drafts = Drafts(own or self._programs, speculate)

    def generate(
        self,
        prompts: Sequence[Prompt | Request],
        on_done: Callable[[int, Completion], None] | None = None,
        first: int = 0,
        may_overflow: bool = False,
        **sampling: Any,
    ) -> list[Completion]:
        """Completes each prompt.

        Args:
          on_done: called with the number of a prompt and its completion as soon as that has ended.
          first: number of the first prompt, if earlier calls had those before it; random draws depend on numbers.
          may_overflow: a completion where the model's activations overflow ends there, with finish_reason `BROKEN`.
          **sampling: fields of `Sampling`, for prompts that are no `Request`.

        Raises:
          ConfigError: a prompt is empty, not valid Unicode, or with its max_tokens longer than `max_length`; or the
            model's activations overflow.
        """
        jobs = self._make_jobs(prompts, sampling, first)
        for step in self._run(jobs, may_overflow):
            if step.reason and on_done:
                on_done(step.job.number, _completion(step.job))
        return list(map(_completion, jobs))

    def stream(self, prompt: Prompt | Request, **sampling: Any) -> Iterator[str]:
        """Completes one prompt and yields the text piece by piece; arguments and errors as for `generate`."""
        for step in self._run(self._make_jobs([prompt], sampling)):
            yield step.piece

    def score(self, texts: Sequence[Prompt]) -> list[Score]:
        """Computes the log-probability of each token of each text, after an end-of-text token. Dropless, as evaluation.

        Args:
          texts: texts, or their token ids.

        Raises:
          ConfigError: a text is empty, broken, or longer than max_length; or the model was consumed.
        """
        if self._model is None:
            raise ConfigError("Generator(consume=True) has freed the model that scores; make it with consume=False")
        require(not isinstance(texts, str), "texts must be a list; put the one text into brackets")
        token_ids = _encode(texts, "text", self.tokenizer, self.vocab_size)
        for number, ids in enumerate(token_ids, 1):
            require(
                len(ids) <= self._positions,
                f"text {number} has {len(ids)} tokens, which must be at most {self._positions}, the learned positions "
                f"that mesh.tensor splits evenly; score it in parts",
            )
            require(
                len(ids) <= self.max_length,
                f"text {number} has {len(ids)} tokens, which must be at most max_length={self.max_length}; score it in "
                f"parts, or with a longer max_length",
            )
        order = sorted(range(len(texts)), key=lambda i: -len(token_ids[i]))
        scores: dict[int, Score] = {}
        with jax.set_mesh(self.mesh):
            rows = -(-min(self.batch_size, len(texts)) // batch_ranks()) * batch_ranks()
            for start in range(0, len(order), rows or 1):
                batch = order[start : start + rows]
                padded = int(min(round_up_length(len(token_ids[batch[0]]), tensor_ranks()), self._positions))
                tokens_BL = np.zeros((rows, padded + 1), np.int32)
                tokens_BL[:, 0] = self.tokenizer.eos_id
                for row, i in enumerate(batch):
                    tokens_BL[row, 1 : len(token_ids[i]) + 1] = token_ids[i]
                nll_BL = np.asarray(evaluate(self._model, place(batch_from_windows(tokens_BL), batch_spec(2))).nll_BL)
                for nll_L, i in zip(nll_BL, batch, strict=False):
                    ids, text = token_ids[i], texts[i]
                    size = len((text if isinstance(text, str) else self.tokenizer.decode(ids)).encode())
                    scores[i] = Score(tuple(ids), tuple((-nll_L[: len(ids)]).tolist()), size)
        return [scores[i] for i in range(len(texts))]

    def engine(self, slots: int, jobs: Sequence[Job] = (), positions: int = 0, **sizes: Any) -> Engine:
        """Makes an engine of this model.

        Args:
          slots: how many requests are decoded at a time.
          jobs: the encoded requests, if all are known: slots and cache are no larger than they need.
          positions: tokens that the cache has room for; 0 = enough for `slots` of the longest requests.
          **sizes: `chunk`, `page_size` and `reuse` of `Engine`.
        """
        with jax.set_mesh(self.mesh):
            longest = self.max_length
            if jobs:
                slots = min(slots, len(jobs))
                longest = round_up_length(max(job.positions for job in jobs) + 1)
                # Rounded up, so that few programs are compiled.
                most, unit = sorted(round_up_length(job.positions) for job in jobs)[-slots:], batch_ranks() * longest
                positions = -(-sum(most) // unit) * unit
                sizes = {"chunk": _CHUNK} | sizes
            positions = positions or slots_per_shard(slots) * batch_ranks() * longest
            return Engine(self._decoder, self._programs, slots, positions, longest, drafts=self.drafts, **sizes)

    def job(self, prompt: Sequence[int], sampling: Sampling, number: int = 0, begins: bool = False) -> Job:
        """Makes a request for an engine, without checking its tokens; `begins` as for `Job`."""
        return Job(prompt, sampling, Text(self.tokenizer, sampling, () if begins else prompt), number, begins)

    def _make_jobs(self, prompts: Sequence[Prompt | Request], sampling: dict[str, Any], first: int = 0) -> list[Job]:
        require(not isinstance(prompts, str), "prompts must be a list; put the one text into brackets")
        requests = [
            prompt if isinstance(prompt, Request) else Request(prompt, Sampling(**sampling)) for prompt in prompts
        ]
        encoded = encode_requests(requests, self.tokenizer, self.vocab_size, self.max_length, first)
        pairs = zip(encoded, requests, strict=True)
        return [self.job(ids, request.sampling, number) for number, (ids, request) in enumerate(pairs, first)]

    def _run(self, jobs: Sequence[Job], may_overflow: bool = False) -> Iterator[Step]:
        if not jobs:
            return
        engine = self.engine(self.batch_size, jobs)
        # The longest first, so that none runs alone at the end.
        for job in sorted(jobs, key=lambda job: -job.positions):
            engine.submit(job)
        while engine.busy:
            for step in engine.step():
                number, token = step.job.number + 1, len(step.job.text.tokens) + 1
                require(
                    may_overflow or step.reason != BROKEN,
                    f"prompt {number}: the model gives NaN for token {token}, for its activations overflow; use "
                    f"--weights=float32 with execution.dtype=float32, or another checkpoint",
                )
                yield step


def encode_requests(
    requests: Sequence[Request], tokenizer: Tokenizer, vocab_size: int, max_length: int, first: int = 0
) -> list[list[int]]:
    """The token ids of each prompt; raises the ConfigErrors of `Generator.generate` that need no model."""
    encoded = _encode([request.prompt for request in requests], "prompt", tokenizer, vocab_size, first)
    for number, (ids, request) in enumerate(zip(encoded, requests, strict=True), first + 1):
        new = request.sampling.max_tokens
        require(
            len(ids) + new <= max_length,
            f"prompt {number} has {len(ids)} tokens, which with max_tokens={new} are {len(ids) + new}, and must be at "
            f"most max_length={max_length}; use a shorter prompt, fewer max_tokens, or a longer max_length",
        )
    return encoded


def _encode(
    texts: Sequence[Prompt], what: str, tokenizer: Tokenizer, vocab_size: int, first: int = 0
) -> list[list[int]]:
    """The token ids of each text, at least one, all in the vocabulary; errors count texts from first + 1."""
    for number, text in enumerate(texts, first + 1):
        _check_text(f"{what} {number}", text, vocab_size)
    encoded = iter(tokenizer.encode_batch([text for text in texts if isinstance(text, str)]))
    token_ids = [next(encoded) if isinstance(text, str) else list(text) for text in texts]
    for number, ids in enumerate(token_ids, first + 1):
        require(bool(ids), f"{what} {number} has no tokens; give text that the tokenizer keeps")
    return token_ids


def _check_text(name: str, text: Prompt, vocab_size: int) -> None:
    require(bool(text), f"{name} is empty; give at least one character")
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{name} is not valid UTF-8 (character {error.start + 1}); give it as UTF-8 text"
            ) from None
    elif unknown := [token for token in text if not 0 <= token < vocab_size]:
        raise ConfigError(f"{name} has the token {unknown[0]}, which must lie in [0, {vocab_size})")


def _completion(job: Job) -> Completion:
    text = job.text
    return Completion(text.text, tuple(text.tokens), tuple(text.logprobs), text.finish_reason, len(job.prompt))


def _fits_gathered(config: Config, weights: str, by_module: bool) -> bool:
    """Whether a device's weights take at most half of its memory where mesh.fsdp splits none, in all processes; a line
    says if not. `by_module` as in `Speculation`."""
    if not config.mesh.fsdp:
        return True
    numbers = _numbers_on_device(config, by_module)
    size = numbers * {"float32": 4, "int8": 1}.get(weights or config.execution.dtype, 2)
    own = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    memory = min(map(float, hosts.gather(str(own))))  # or they would compile other programs
    if size > memory / 2:
        hosts.say(
            f"weights stay split over ranks (mesh.fsdp), and are gathered for every token: whole they take "
            f"{size / 2**30:.1f} GiB of a device",
            sys.stderr,  # completions stand on the other one
        )
    return size <= memory / 2


def _numbers_on_device(config: Config, by_module: bool) -> int:
    """Parameters of a decoder that a rank's device holds where mesh.fsdp splits none: of experts in host memory those
    of the layers in the ring, or of the slots."""
    m, mesh, execution = config.model, config.mesh, config.execution
    model = dataclasses.replace(m, mtp_modules=int(by_module), mtp_blocks=m.mtp_blocks if by_module else "")
    whole = dataclasses.replace(config, model=model, mesh=dataclasses.replace(mesh, fsdp=False))
    count = parameters(whole, jax.sharding.get_mesh().shape)
    if not is_resident(config):
        return count.of_a_rank
    ranks = mesh.expert_ranks * (mesh.tensor if mesh.split_experts else 1)
    of_layer = count.parts["experts"] // model.count_trained("E") // ranks
    layers = m.moe_layers * execution.resident_experts // m.expert_count or max(2, execution.resident_layers)
    return count.of_a_rank - (m.moe_layers - layers) * of_layer
