"""The programs that a run consists of, as values: what train.py, eval.py and generate.py run, and what plan.py compiles
for machines that are not there.

    init      → the state a run begins with
    step      → the next state
    evaluate  → scores of tokens, beside the optimizer's state of a run that goes on
    prefill   → a prompt's cache and its first token
    decode    → one more token of every row

B batch, L length, S batch shards, B rows of one, N = S·B, P prompt length, M room of the cache, C candidates.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bigmac_jax import hosts
from bigmac_jax.config import Config
from bigmac_jax.decoding.cache import Cache, Decoder, decode, make_decoder, prefill
from bigmac_jax.decoding.sampling import Draws, draws, sample
from bigmac_jax.mesh import batch_ranks, batch_spec, placed, replicated_spec, tensor_ranks, token_spec
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.training.loss import TokenScores, token_scores
from bigmac_jax.training.step import make_trainer

PROMPTS = 16  # at a time, where nobody says otherwise


@hosts.Jit
def evaluate(model: Transformer, tokens_BL: Array) -> TokenScores:
    """Scores of tokens 1 … L given those before, on every process; logits are not held whole. tokens_BL: [B, L + 1]."""
    return jax.sharding.reshard(token_scores(model, tokens_BL), replicated_spec(2))


def evaluation_rows(config: Config) -> int:
    """Sequences that an evaluation scores at a time: a part of the step's batch, as large as what a step computes."""
    return config.data.batch_size // config.train.accumulate_steps


State = tuple[Cache, Array]  # and the tokens to be read next
Chosen = tuple[Array, Array]  # tokens and their log-probabilities, on every process


class Decoding(NamedTuple):
    """A decoder's programs. They are given its weights as a list: flattening modules would take half as long as a small
    step."""

    weights: list[Array]
    prefill: Any  # (weights, tokens_NP, length_SB, draws, room=M, candidates=C) → (State, Chosen)
    decode: Any  # (weights, state, draws, candidates=C) → (State, Chosen); the state is donated


def make_decoding(decoder: Decoder) -> Decoding:
    weights, tree = jax.tree.flatten(decoder)
    return Decoding(
        weights,
        hosts.Jit(functools.partial(_prefill, tree)),
        hosts.Jit(functools.partial(_decode, tree), donate_argnames="state"),
    )


def _prefill(
    tree: Any, weights: list[Array], tokens_NP: Array, length_SB: Array, draws: Draws, *, room: int, candidates: int
) -> tuple[State, Chosen]:
    logits_SBV, cache = prefill(jax.tree.unflatten(tree, weights), tokens_NP, length_SB, room)
    return _chosen(logits_SBV, cache, draws, candidates)


def _decode(tree: Any, weights: list[Array], state: State, draws: Draws, *, candidates: int) -> tuple[State, Chosen]:
    logits_SBV, cache = decode(jax.tree.unflatten(tree, weights), *state)
    return _chosen(logits_SBV, cache, draws, candidates)


def _chosen(logits_SBV: Array, cache: Cache, draws: Draws, candidates: int) -> tuple[State, Chosen]:
    tokens, logprobs = sample(logits_SBV, draws, cache.position_SB, candidates)
    on_all = (jax.sharding.reshard(tokens, replicated_spec(2)), jax.sharding.reshard(logprobs, replicated_spec(2)))
    return (cache, tokens), on_all


def decoding_shape(rows: int) -> tuple[int, int]:
    """[S, B] that hold so many rows on the current mesh."""
    unit = batch_ranks() * tensor_ranks()
    return batch_ranks(), -(-rows // unit) * unit // batch_ranks()


def bucket(length: int, multiple: int) -> int:
    """A length that holds this one, of few, so that few programs are compiled."""
    step = math.lcm(16 if length <= 128 else 128, multiple)
    return -(-length // step) * step


class Program(NamedTuple):
    """A program before it is compiled.

    Attributes:
      function: jitted; what a run calls.
      arguments: abstract arrays on the mesh.
      static: keyword arguments.
      beside: abstract arrays that are in memory while it runs though it is not given them.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    static: dict[str, Any]
    beside: Any = ()

    def lower(self) -> Any:
        return self.function.lower(*self.arguments, **self.static)


def programs(config: Config, mesh: Mesh) -> Iterator[Program]:
    """All of `config`'s on the current mesh, which may be of devices that are only compiled for.

    Evaluation scores a part of the step's batch. Prompts fill data.sequence_length and go `PROMPTS` at a time, greedy,
    as generate.py has them by default.
    """
    data, trainer = config.data, make_trainer(config, mesh)

    def abstract(spec: P, *shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    state, length = trainer.abstract_state, data.sequence_length + 1
    key = jax.eval_shape(lambda: jax.random.key(0))
    yield Program("init", trainer.init, (key,), {})
    yield Program("step", trainer.step, (state, abstract(batch_spec(2), data.batch_size, length)), {})
    model = nnx.merge(trainer.graphdef, state.params, state.rest)
    yield Program(
        "evaluate", evaluate, (model, abstract(batch_spec(2), evaluation_rows(config), length)), {}, state.opt_state
    )

    decoder = jax.eval_shape(functools.partial(make_decoder, config), model)
    made = make_decoding(placed(decoder, mesh))
    shape = decoding_shape(PROMPTS)
    drawn = Draws(*(abstract(token_spec(2), *shape, dtype=v.dtype) for v in draws([], [], shape)))
    prompts = abstract(token_spec(2), math.prod(shape), data.sequence_length)
    arguments = (made.weights, prompts, abstract(batch_spec(2), *shape), drawn)
    static = {"room": data.sequence_length, "candidates": 1}
    yield Program("prefill", made.prefill, arguments, static)
    started, _ = jax.eval_shape(functools.partial(made.prefill.function, **static), *arguments)
    yield Program("decode", made.decode, (made.weights, placed(started, mesh), drawn), {"candidates": 1})
