"""What a program sends: its collectives, counted in the jaxpr and in the compiled HLO."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import Mesh

from bigmac_jax.config import Config
from bigmac_jax.model.mesh import batch_spec, token_spec

from .tools import abstract_layer, abstract_model, on_mesh

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


def layer(config: Config, gradients: bool = False, mesh: Mesh | None = None) -> Any:
    """The traced MoE layer of `config`, without or with its gradients, on abstract arrays.

    `mesh`: of devices that are only compiled for; by default that of `config` on the ones that are here.
    """
    shape = config.data.batch_size, config.data.sequence_length, config.model.hidden_size
    with on_mesh(config) if mesh is None else jax.set_mesh(mesh):
        moe = abstract_layer(config)
        x_BLD = jax.eval_shape(lambda: jnp.zeros(shape, config.execution.dtype, out_sharding=token_spec(3)))
        if gradients:
            return jax.jit(jax.grad(lambda m, x: jnp.square(m(x)[0].astype(jnp.float32)).sum(), (0, 1))).trace(
                moe, x_BLD
            )
        return jax.jit(lambda m, x: m(x)[0]).trace(moe, x_BLD)


class Collective(NamedTuple):
    """One instruction of the compiled program."""

    kind: str  # all-to-all, all-gather, reduce-scatter, all-reduce
    operands: list[Operand]  # an all-to-all lists what it receives from each rank

    @property
    def ranks(self) -> int:
        """Of an all-to-all's group."""
        return len(self.operands)

    @property
    def bytes(self) -> int:
        """Of all operands on one rank."""
        return sum(jnp.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in self.operands)


def collectives(traced: Any) -> list[Collective]:
    """Those in the HLO text; a loop's body counts once. Reads no replica groups, which print differently by version."""
    text = traced.lower().compile().as_text()
    found = re.findall(r"= (.*?) (all-to-all|all-gather|reduce-scatter|all-reduce)(?:-start)?\(", text)
    return [
        Collective(kind, [_operand(*part) for part in re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]", line)])
        for line, kind in found
    ]


def compiled_all_to_alls(traced: Any) -> list[list[Operand]]:
    """The operands of each all-to-all."""
    return [found.operands for found in collectives(traced) if found.kind == "all-to-all"]


def _operand(kind: str, dims: str) -> Operand:
    names = {"f": "float", "s": "int", "u": "uint", "bf": "bfloat"}
    letters, bits = re.match(r"([a-z]+)(\d+)", kind).groups()  # type: ignore[union-attr]
    return names[letters] + bits, tuple(int(n) for n in dims.split(",") if n)


def payloads(operands: list[Operand]) -> list[Operand]:
    """Without the integers of the plan."""
    return [operand for operand in operands if not operand[0].startswith("int")]
