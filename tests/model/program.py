"""What a program sends: its all-to-alls, counted in the jaxpr and in the compiled HLO."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from bigmac_jax.config import Config
from bigmac_jax.mesh import batch_spec

from .tools import QUICK, abstract_model, on_mesh

Operand = tuple[str, tuple[int, ...]]  # dtype, shape on one rank


def forward(config: Config) -> Any:
    """The traced forward pass of `config`, on abstract arrays."""
    shape = config.data.batch_size, config.data.sequence_length
    with on_mesh(config):
        tokens = jax.eval_shape(lambda: jnp.zeros(shape, jnp.int32, out_sharding=batch_spec(2)))
        return jax.jit(lambda model, tokens: model(tokens)).trace(abstract_model(config), tokens)


def all_to_alls(jaxpr: core.Jaxpr) -> list[Operand]:
    """The operands of every all-to-all that one run of `jaxpr` makes; a scan's body counts `length` times."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "all_to_all":
            found += [(v.aval.dtype.name, v.aval.shape) for v in eqn.invars]
        inside = [operand for inner in _jaxprs(tuple(eqn.params.values())) for operand in all_to_alls(inner)]
        assert not (inside and eqn.primitive.name in ("while", "cond")), "how often it runs is not in the program"
        found += inside * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return found


def _jaxprs(value: Any) -> Iterator[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _jaxprs(entry)


def compiled_all_to_alls(traced: Any) -> list[list[Operand]]:
    """The all-to-alls in the HLO text, each a list of what it receives from each rank; a loop's body counts once.

    Reads no replica groups, which print differently from version to version.
    """
    text = traced.lower().compile(compiler_options=QUICK).as_text()
    instructions = re.findall(r"= (.*) all-to-all\(", text)
    return [[_operand(*part) for part in re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]", line)] for line in instructions]


def _operand(kind: str, dims: str) -> Operand:
    return {"f32": "float32", "s32": "int32"}[kind], tuple(int(n) for n in dims.split(","))


def payloads(operands: list[Operand]) -> list[Operand]:
    """Without the integers of the plan."""
    return [operand for operand in operands if operand[0] != "int32"]
