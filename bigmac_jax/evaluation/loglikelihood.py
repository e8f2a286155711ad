"""Log-likelihood of texts given what stands before them, in batches of like length. B batch, L length, W windows.

Requests are encoded, cut and scored as lm-evaluation-harness does it, so that figures can be compared: the pair is
encoded whole and split where the context's tokens end, a context that is too long loses its beginning, and an empty
one is the end-of-text token.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.batch import batch_from_windows
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.evaluation.score_log import ScoreLog
from bigmac_jax.model.mesh import batch_ranks, batch_spec, place, tensor_ranks
from bigmac_jax.model.transformer import Transformer, check_length
from bigmac_jax.runtime.progress import Progress
from bigmac_jax.training import programs

_SHORTEST = 16  # inputs of the smallest bucket


class Request(NamedTuple):
    context: Sequence[int]  # at least one token
    continuation: Sequence[int]


class Result(NamedTuple):
    loglikelihood: float  # nats, of the whole continuation
    greedy: bool  # whether each of its tokens is the likeliest, so that greedy decoding would give it
    tokens: int


class Window(NamedTuple):
    tokens: np.ndarray  # int32 [l + 1]: the inputs are all but the last, the targets all but the first
    scored: int  # how many of the targets count: the last ones


def check_windows(config: Config, length: int, stride: int, name: str = "--length") -> int:
    """Tokens of a window: `length`, or data.sequence_length where that is 0. `name` is the setting of the length.

    Raises:
      ConfigError: more than there are learned positions, a stride that would leave tokens out, or windows that
        mesh.tensor cannot split.
    """
    trained, ranks = config.data.sequence_length, config.mesh.tensor
    check_length(name, length, config)
    if stride > (length or trained):
        raise ConfigError(f"--stride={stride} must be at most the {length or trained} tokens of a window; use fewer")
    if length % ranks:
        near = -(-length // ranks) * ranks
        near -= ranks * (config.model.positions == "learned" and near > config.context_length)
        raise ConfigError(f"{name}={length} must be a multiple of mesh.tensor={ranks}; use {near}")
    return length or trained


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """Tokens of (context, continuation) pairs; white space at a context's end goes to the continuation.

    Raises:
      ConfigError: a continuation without a token of its own.
    """
    before = [context.rstrip() for context, _ in pairs]
    whole = [context + continuation for context, continuation in pairs]
    texts = list(dict.fromkeys([*before, *whole]))
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    requests = []
    for start, text in zip(before, whole, strict=True):
        context, tokens = ids[start], ids[text]
        if len(tokens) <= len(context):
            answer = text[len(start) :][:40]
            raise ConfigError(f"{answer!r} after {start[-40:]!r} has no token of its own; every answer needs some text")
        requests.append(Request(context or [tokenizer.eos_id], tokens[len(context) :]))
    return requests


def cut_windows(request: Request, length: int, stride: int = 0) -> Iterator[Window]:
    """Cuts a request into windows of at most `length` inputs, so that each token of the continuation is scored once.

    A continuation of at most `length` tokens is one window, with as much of the context as fits. A longer one goes on
    `stride` tokens at a time (0 = `length`), and each window reaches back as far as it can: a token is given the last
    `length` - `stride` before it at least, or all where there are fewer.
    """
    stride = stride or length
    tokens = np.asarray([*request.context, *request.continuation], np.int32)
    before = len(request.context)
    end, scored = before, max(stride, length + 1 - before)
    while end < len(tokens):
        scored = min(scored, len(tokens) - end)
        end += scored
        yield Window(tokens[max(0, end - 1 - length) : end], scored)
        scored = stride


def score_requests(
    model: Transformer,
    requests: Sequence[Request],
    length: int,
    batch_size: int,
    stride: int = 0,
    log: ScoreLog | None = None,
    title: str = "",
) -> list[Result]:
    """Scores requests, dropless, with sums in float64 on the host.

    Windows go longest first, so that too little memory shows at once, in batches of one padded length each: a power
    of two, so that few programs are compiled. What follows a token does not change it, so padding stands at the end.

    Args:
      length, stride: as in `cut_windows`.
      batch_size: rows at a time; padded to a multiple of the mesh's batch shards.
      log: has the scores of an earlier run, and is given the new ones.
      title: of the progress bar; empty: none is shown.
    """
    cut = [[(_key(window), window) for window in cut_windows(request, length, stride)] for request in requests]
    windows = dict(itertools.chain.from_iterable(cut))  # equal windows are scored once
    scores = log.look_up(list(windows)) if log else {}
    left = sorted(windows.keys() - scores.keys(), key=lambda key: (-len(windows[key].tokens), key))
    with Progress(title, len(windows), "window", len(scores), silent=not title) as bar:
        for padded, bucket in itertools.groupby(left, lambda key: _bucket(len(windows[key].tokens) - 1, length)):
            keys = list(bucket)
            for start in range(0, len(keys), batch_size):
                batch = keys[start : start + batch_size]
                found = _score_batch(model, [windows[key] for key in batch], padded, batch_size)
                new = dict(zip(batch, found, strict=True))
                scores |= new
                if log:
                    log.add(new)
                bar.update(len(new))
    return [
        Result(sum(scores[key][0] for key, _ in own), all(scores[key][1] for key, _ in own), len(request.continuation))
        for own, request in zip(cut, requests, strict=True)
    ]


def _key(window: Window) -> str:
    return hashlib.sha256(window.tokens.tobytes() + str(window.scored).encode()).hexdigest()[:32]


def _bucket(inputs: int, length: int) -> int:
    """Padded length of a window: a power of two or `length`, and a multiple of mesh.tensor, which splits sequences."""
    size = min(max(_SHORTEST, 1 << (inputs - 1).bit_length()), length)
    return -(-size // tensor_ranks()) * tensor_ranks()


def _score_batch(model: Transformer, batch: Sequence[Window], padded: int, batch_size: int) -> list[tuple[float, bool]]:
    tokens_BL = np.zeros((-(-batch_size // batch_ranks()) * batch_ranks(), padded + 1), np.int32)
    for row_L, window in zip(tokens_BL, batch, strict=False):
        row_L[: len(window.tokens)] = window.tokens
    found = programs.evaluate(model, place(batch_from_windows(tokens_BL), batch_spec(2)))
    nll_BL, likeliest_BL = np.asarray(found.nll_BL), np.asarray(found.likeliest_BL)
    scores = []
    for window, nll_L, likeliest_L in zip(batch, nll_BL, likeliest_BL, strict=False):
        last = slice(len(window.tokens) - 1 - window.scored, len(window.tokens) - 1)
        scores.append((-float(nll_L[last].sum(dtype=np.float64)), bool(likeliest_L[last].all())))
    return scores
