"""No loop of a compiled program has collectives beside it that its devices could mix up
(`bigmac_jax.runtime.collective_order`): those behind it need its result. jax 0.12 keeps their order itself."""

import itertools
import math
from typing import Any

import jax
import pytest

from bigmac_jax.planning.compiled_programs import compile_program
from bigmac_jax.runtime.collective_order import note

from .test_expert_parallel import name
from .tools import pairwise, tiny

# data, node, expert, tensor, fsdp, split_experts
MESHES = ((1, 1, 4), (1, 2, 2, 2), (8, 1, 1, 1, True), (2, 1, 4, 1, True), (2, 2, 2, 1, True),
          (1, 1, 4, 2, False, True), (1, 1, 2, 2, True, True))  # fmt: skip
ROUNDS = {"buffer_factor": 1.0, "length": 64}  # more than one of them
KINDS: dict[str, dict[str, Any]] = {
    "rounds of one layer": ROUNDS | {"num_layers": 1},
    "rounds": ROUNDS,
    "chunks in rounds": ROUNDS | {"overlap_chunks": 2, "exchange": "dedup"},
    "computed again": ROUNDS | {"remat": "layer", "num_layers": 3},
    "without rounds": {"overlap_chunks": 2},
    "dense layers first": {
        "structure": "fine_grained",
        "num_layers": 3,
        "first_dense_layers": 2,
        "capacity_factor": 1.5,
    },
    "counted quantiles": {"balance": "quantile", "balance_scope": "part", "overlap_chunks": 2},
    "dense": {"structure": "dense", "tie_embeddings": False},
}
QUICK = [("step", (1, 1, 2, 2, True, True), "rounds of one layer")]  # test_axes has loops over layers
STEPS = set(itertools.product(["step"], MESHES, KINDS))
REST = sorted((STEPS | set(pairwise(["evaluate", "prefill", "decode"], MESHES, KINDS))) - set(QUICK))


def check(program: str, mesh: tuple, kind: str) -> None:
    compiled = compile_program(tiny(mesh, **KINDS[kind]), jax.devices()[: math.prod(mesh[:4])], program)
    assert not note(program, compiled.text)


@pytest.mark.parametrize(("program", "mesh", "kind"), QUICK, ids=name)
def test_collectives_behind_a_loop_need_it(program: str, mesh: tuple, kind: str) -> None:
    check(program, mesh, kind)


@pytest.mark.full
@pytest.mark.parametrize(("program", "mesh", "kind"), REST, ids=name)
def test_collectives_behind_a_loop_need_it_everywhere(program: str, mesh: tuple, kind: str) -> None:
    check(program, mesh, kind)
