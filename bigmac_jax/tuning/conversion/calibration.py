"""Walks a text through a model layer by layer, and records the inputs of each layer's experts.

B batch, L length, T tokens of the text, D hidden, K top-k.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from bigmac_jax.data.batch import NO_TARGET, Batch
from bigmac_jax.model.attention import Documents, find_documents
from bigmac_jax.model.mesh import batch_spec, place
from bigmac_jax.model.moe import MoE
from bigmac_jax.model.transformer import Block, TokenMixer, Transformer


class ExpertInputs(NamedTuple):
    """The inputs of a layer's experts at T tokens, on the host."""

    inputs_TD: np.ndarray
    gates_TK: np.ndarray
    experts_TK: np.ndarray


def walk(model: Transformer, batches: Sequence[Batch], visit: Callable[[int, Block, ExpertInputs], None]) -> None:
    """Calls `visit` with the number of each layer with experts, the layer, and its experts' inputs; dropless.

    The text's activations are on the devices for one layer at a time, the experts' inputs on the host.
    """
    on_mesh = [place(batch, batch_spec(2)) for batch in batches]
    documents = [None if b.segments_BL is None else find_documents(b.segments_BL) for b in on_mesh]
    counts = np.concatenate([(batch.targets_BL != NO_TARGET).reshape(-1) for batch in batches])
    xs = [
        model.embed(b.inputs_BL, None if of is None else of.position_BL)
        for b, of in zip(on_mesh, documents, strict=True)
    ]
    number = 0
    for layer in _layers(model):
        outputs = [_through(layer, x, of) for x, of in zip(xs, documents, strict=True)]
        xs = [x for x, *_ in outputs]
        if len(outputs[0]) == 1:
            continue
        seen = (
            np.concatenate([np.asarray(of[i]).reshape(-1, of[i].shape[-1]) for of in outputs])[counts]
            for i in (1, 2, 3)
        )
        visit(number, layer, ExpertInputs(*seen))
        number += 1


def _layers(model: Transformer) -> Iterator[Block]:
    """Takes the layers one by one."""
    for loop in model.config.model.stacks_of_loops:
        for trip in range(len(loop[0].layers)):
            for stack in loop:
                yield _layer(getattr(model, stack.name), trip)


@jax.jit(static_argnums=1)
def _layer(stack: Block, number: int) -> Block:
    return jax.tree.map(lambda leaf: leaf[number], stack)


@jax.jit
def _through(layer: Block, x_BLD: Array, documents: Documents | None) -> tuple[Array, ...]:
    """x_BLD behind the layer; of one with experts also what these are given, and the router's gates and choices."""
    y_BLD, _ = layer(x_BLD, None, True, documents)
    *before, (norm, mixer) = layer.mixers()
    if not isinstance(mixer, MoE):  # experts end a layer
        return (y_BLD,)
    for own_norm, mixes in before:
        assert isinstance(mixes, TokenMixer)
        x_BLD = x_BLD + mixes(own_norm(x_BLD), documents)
    h_BLD = norm(x_BLD)
    routing, _ = mixer.route(h_BLD, True)
    return y_BLD, h_BLD, routing.gates_BLK, routing.experts_BLK
