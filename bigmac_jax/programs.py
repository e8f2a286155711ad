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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bigmac_jax import hosts
from bigmac_jax.config import Config
from bigmac_jax.data.batch import Batch
from bigmac_jax.decoding.cache import Cache, Decoder, decode, make_decoder, prefill
from bigmac_jax.decoding.sampling import Draws, draws, sample
from bigmac_jax.mesh import batch_ranks, batch_spec, placed, replicated_spec, tensor_ranks, token_spec
from bigmac_jax.model.transformer import Transformer, init_model
from bigmac_jax.training.loss import TokenScores, token_scores
from bigmac_jax.training.step import Trainer, make_trainer

PROMPTS = 16  # at a time, where nobody says otherwise


@hosts.Jit
def evaluate(model: Transformer, batch: Batch) -> TokenScores:
    """Scores of the targets, on every process; logits are not held whole."""
    return jax.sharding.reshard(token_scores(model, batch), replicated_spec(2))


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
      then: the function that takes what it gives.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    static: dict[str, Any]
    beside: Any = ()
    then: Any = None

    def lower(self) -> Any:
        return self.function.lower(*self.arguments, **self.static)


def make_program(name: str, config: Config, mesh: Mesh) -> Program:
    """One of `NAMES` on the current mesh, which may be of devices that are only compiled for.

    Evaluation scores a part of the step's batch. Prompts fill data.sequence_length and go `PROMPTS` at a time, greedy,
    as generate.py has them by default.
    """
    return _MAKERS[name](config, mesh)


def _init_program(config: Config, mesh: Mesh) -> Program:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Program("init", make_trainer(config, mesh).init, (key,), {})


def step_program(config: Config, mesh: Mesh, trainer: Trainer) -> Program:
    batch = _batch(config.data.batch_size, config, mesh)
    return Program("step", trainer.step, (trainer.abstract_state, batch), {})


def _step_program(config: Config, mesh: Mesh) -> Program:
    return step_program(config, mesh, make_trainer(config, mesh))


def _evaluate_program(config: Config, mesh: Mesh) -> Program:
    trainer = make_trainer(config, mesh)
    state, batch = trainer.abstract_state, _batch(evaluation_rows(config), config, mesh)
    beside = (state.opt_state, None if state.average is None else state.params)
    return Program("evaluate", evaluate, (trainer.model(state), batch), {}, beside)


def _prefill_program(config: Config, mesh: Mesh) -> Program:
    model = jax.eval_shape(lambda: init_model(config, jax.random.key(0)))
    made = make_decoding(placed(jax.eval_shape(functools.partial(make_decoder, config), model), mesh))
    shape, length = decoding_shape(PROMPTS), config.data.sequence_length
    drawn = Draws(*(_abstract(mesh, token_spec(2), *shape, dtype=v.dtype) for v in draws([], [], shape)))
    prompts = _abstract(mesh, token_spec(2), math.prod(shape), length)
    arguments = (made.weights, prompts, _abstract(mesh, batch_spec(2), *shape), drawn)
    return Program("prefill", made.prefill, arguments, {"room": length, "candidates": 1}, then=made.decode)


def _decode_program(config: Config, mesh: Mesh) -> Program:
    before = _prefill_program(config, mesh)
    weights, _, _, drawn = before.arguments
    started, _ = jax.eval_shape(functools.partial(before.function.function, **before.static), *before.arguments)
    return Program("decode", before.then, (weights, placed(started, mesh), drawn), {"candidates": 1})


_MAKERS = {
    "init": _init_program,
    "step": _step_program,
    "evaluate": _evaluate_program,
    "prefill": _prefill_program,
    "decode": _decode_program,
}
NAMES = tuple(_MAKERS)


def _abstract(mesh: Mesh, spec: P, *shape: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _batch(rows: int, config: Config, mesh: Mesh) -> Batch:
    """Of abstract arrays."""
    tokens_BL = _abstract(mesh, batch_spec(2), rows, config.data.sequence_length)
    return Batch(tokens_BL, tokens_BL, tokens_BL if config.data.documents == "masked" else None)
