"""Makes the programs of a run with abstract arguments, on a mesh whose devices may only be compiled for.

init      → the state a run begins with
step      → the next state
evaluate  → scores of tokens, beside the optimizer's state of a training run
prefill   → parts of prompts read into the cache, and the next token of each prompt that ends
decode    → one more token in every slot
draft     → some tokens in every slot, by what each rank holds: nothing is sent
verify    → those of them that decode would have chosen, and one more

prefill_mtp, decode_mtp, draft_mtp and verify_mtp are those of a model whose next-token module drafts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config
from bigmac_jax.inference.decoding import (
    DRAFTED,
    PAGE_SIZE,
    PROMPTS,
    ROW_PAGES,
    DecodePrograms,
    State,
    make_decode_programs,
    make_state,
    slots_per_shard,
)
from bigmac_jax.inference.drafter import Speculation, make_drafter
from bigmac_jax.inference.kv_cache import Decoder, make_decoder
from bigmac_jax.inference.packed_rows import packed_size
from bigmac_jax.model.mesh import batch_ranks, batch_spec, placed
from bigmac_jax.model.resident import placed_in_host
from bigmac_jax.model.transformer import Transformer, init_model
from bigmac_jax.training.programs import Program, abstract, abstract_batch, evaluate, evaluation_rows, step_program
from bigmac_jax.training.step import make_trainer


def make_program(name: str, config: Config, mesh: Mesh) -> Program:
    """Makes one of the programs above on `mesh`, which is the current one.

    Evaluation scores a part of the step's batch. Prompts fill data.sequence_length and go `PROMPTS` at a time, as in
    generate.py by default.
    """
    return _MAKERS[name](config, mesh)


def _init_program(config: Config, mesh: Mesh) -> Program:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Program("init", make_trainer(config, mesh).init, (key,), {})


def _step_program(config: Config, mesh: Mesh) -> Program:
    return step_program(config, mesh, make_trainer(config, mesh))


def _evaluate_program(config: Config, mesh: Mesh) -> Program:
    trainer = make_trainer(config, mesh)
    state, batch = trainer.abstract_state, abstract_batch(evaluation_rows(config), config, mesh)
    beside = (state.opt_state, None if state.average is None else state.params)
    return Program("evaluate", evaluate, (trainer.model(state), batch), {}, beside)


def _prefill_program(config: Config, mesh: Mesh, by_module: bool = False) -> Program:
    made, state, pages = _serving(config, mesh, by_module)
    rows, row_size = slots_per_shard(PROMPTS) * -(-pages // ROW_PAGES), ROW_PAGES * PAGE_SIZE
    packed = abstract(mesh, batch_spec(3), batch_ranks(), rows, packed_size(pages, row_size))
    return Program("prefill", made.prefill, (made.weights, state, packed), {"row_size": row_size})


def _decode_program(config: Config, mesh: Mesh, by_module: bool = False) -> Program:
    made, state, pages = _serving(config, mesh, by_module)
    packed = abstract(mesh, batch_spec(3), *state.token_SB.shape, packed_size(pages))
    return Program("decode", made.decode, (made.weights, state, packed), {})


def _draft_program(config: Config, mesh: Mesh) -> Program:
    _, state, pages = _serving(config, mesh)
    model = jax.eval_shape(lambda: init_model(config, jax.random.key(0)))

    def drafter(model: Transformer) -> Decoder:
        return make_drafter(make_decoder(config, model, gathered=True), Speculation(DRAFTED))

    made = make_decode_programs(_place_decoder(jax.eval_shape(drafter, model), mesh))
    packed = abstract(mesh, batch_spec(3), *state.token_SB.shape, packed_size(pages))
    return Program("draft", made.draft, (made.weights, state, packed), {"tokens": DRAFTED})


def _draft_by_module_program(config: Config, mesh: Mesh) -> Program:
    made, state, pages = _serving(config, mesh, by_module=True)
    packed = abstract(mesh, batch_spec(3), *state.token_SB.shape, packed_size(pages))
    return Program("draft", made.draft, (made.weights, state, packed), {"tokens": DRAFTED})


def _verify_program(config: Config, mesh: Mesh, by_module: bool = False) -> Program:
    made, state, pages = _serving(config, mesh, by_module)
    packed = abstract(mesh, batch_spec(3), *state.token_SB.shape, packed_size(pages))
    drafted = abstract(mesh, P(None, *batch_spec(2)), DRAFTED, *state.token_SB.shape)
    return Program("verify", made.verify, (made.weights, state, drafted, packed), {})


def _serving(config: Config, mesh: Mesh, by_module: bool = False) -> tuple[DecodePrograms, State, int]:
    """(the programs, the state of slots for `PROMPTS` prompts of data.sequence_length, pages of a slot)."""
    model = jax.eval_shape(lambda: init_model(config, jax.random.key(0)))
    make = functools.partial(make_decoder, config, gathered=True, next_tokens=by_module)
    decoder = _place_decoder(jax.eval_shape(make, model), mesh)
    slots, pages = slots_per_shard(PROMPTS), -(-config.data.sequence_length // PAGE_SIZE)

    def make_empty(store: Any) -> State:
        return make_state(dataclasses.replace(decoder, store=store), slots, slots * pages, PAGE_SIZE)

    return make_decode_programs(decoder), placed(jax.eval_shape(make_empty, decoder.store), mesh), pages


def _place_decoder(decoder: Decoder, mesh: Mesh) -> Decoder:
    """An abstract decoder on `mesh`: its store in the host memory."""
    store = placed_in_host(decoder.store, mesh)
    return dataclasses.replace(placed(dataclasses.replace(decoder, store=None), mesh), store=store)


_MAKERS: dict[str, Callable[[Config, Mesh], Program]] = {
    "init": _init_program,
    "step": _step_program,
    "evaluate": _evaluate_program,
    "prefill": _prefill_program,
    "decode": _decode_program,
    "draft": _draft_program,
    "verify": _verify_program,
    "prefill_mtp": functools.partial(_prefill_program, by_module=True),
    "decode_mtp": functools.partial(_decode_program, by_module=True),
    "draft_mtp": _draft_by_module_program,
    "verify_mtp": functools.partial(_verify_program, by_module=True),
}
SERVING = ("prefill", "decode")  # those of a run whose experts stand in host memory: no step trains it there
NAMES = ("init", "step", "evaluate", "prefill", "decode")  # the programs of every run
