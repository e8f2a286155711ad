"""Tensor parallelism and full sharding change nothing either, and send what the table says and no more."""

import itertools
import math
from collections import Counter
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config
from bigmac_jax.model.mesh import batch_spec, fully_sharded, token_spec
from bigmac_jax.model.moe import MoE
from bigmac_jax.planning import hlo
from bigmac_jax.planning.compiled_programs import compile_program
from bigmac_jax.planning.hlo_collectives import collectives
from bigmac_jax.runtime.collective_order import note

from .test_expert_parallel import BACKBONES, LAYOUTS, ROUTERS, STRUCTURES, check, name
from .tools import PAPER, some, tiny

Mesh = tuple[int, int, int, int, bool, bool]  # data, node, expert, tensor, fsdp, split_experts

MESHES: tuple[Mesh, ...] = (
    (1, 1, 1, 2, False, False),
    (1, 1, 2, 4, False, True),
    (2, 1, 2, 2, False, False),
    (1, 2, 2, 2, False, True),
    (8, 1, 1, 1, True, False),
    (2, 1, 4, 1, True, False),
    (2, 2, 2, 1, True, False),
    (2, 1, 2, 2, True, False),
    (2, 1, 1, 4, True, True),
    (1, 2, 2, 2, True, True),
)


def full(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.full)


def build(mesh: Mesh, structure: str, router: str, backbone: str, layout: str, **model: Any) -> Config:
    return tiny(mesh, **(STRUCTURES[structure] | ROUTERS[router] | BACKBONES[backbone] | LAYOUTS[layout] | model))


# In `make test` layers stand on both axes in test_rounds and test_replicas.
EVERYWHERE = itertools.product(MESHES, STRUCTURES, ["softmax", "sigmoid"], BACKBONES, LAYOUTS)


@pytest.mark.full
@pytest.mark.parametrize(("mesh", "structure", "router", "backbone", "layout"), EVERYWHERE, ids=name)
def test_equals_the_reference(mesh: Mesh, structure: str, router: str, backbone: str, layout: str) -> None:
    check(build(mesh, structure, router, backbone, layout))


@pytest.mark.full
@pytest.mark.parametrize(
    ("mesh", "backbone"), [((2, 1, 1, 4, False, False), "gated"), ((2, 1, 2, 2, True, False), "paper")], ids=name
)
def test_dense_equals_the_reference(mesh: Mesh, backbone: str) -> None:
    check(tiny(mesh, structure="dense", **BACKBONES[backbone]))


@pytest.mark.parametrize("exchange", [full(name) for name in ("hierarchical", "dedup", "gather", "ragged")])
def test_strategies_with_split_experts(exchange: str) -> None:
    check(
        tiny(
            (1, 2, 2, 2, True, True), exchange=exchange, overlap_chunks=2, grouped_matmul="blocks", **BACKBONES["gated"]
        )
    )


@pytest.mark.full
@pytest.mark.parametrize(("heads", "fsdp"), [(1, True), (1, False), (2, False), (2, True)])
def test_fewer_key_value_heads_than_tensor_ranks(heads: int, fsdp: bool) -> None:
    """Each rank takes the head that its query heads ask; the ranks that share one add up its gradient."""
    check(tiny((1, 1, 2, 4, fsdp, False), num_kv_heads=heads, **(PAPER | {"tie_embeddings": not fsdp})))


@pytest.mark.full
def test_a_batch_of_one_with_a_group_for_every_expert() -> None:
    check(tiny((1, 1, 1, 2), batch=1, num_expert_groups=8, top_groups=4))


@pytest.mark.full
def test_remat_and_full_sharding() -> None:
    check(tiny((2, 1, 2, 2, True, True), remat="layer", unroll_layers=2))


SIZES = {"data": 3, "node": 1, "expert": 2, "tensor": 1}
GROUP = ("node", "expert")


@pytest.mark.parametrize(
    ("shape", "own", "sizes", "expected"),
    [
        ((12, 24), P(None, None), SIZES, P(("data", *GROUP, "tensor"), None)),  # the first that all divide
        ((16, 12), P(None, None), SIZES, P(None, ("data", *GROUP, "tensor"))),
        ((16, 8), P(None, None), SIZES, P((*GROUP, "tensor"), None)),  # data keeps copies
        ((9, 16), P(None, None), SIZES, P(("data", "node", "tensor"), ("expert",))),  # the larger set first
        ((12, 16, 9), P(GROUP, None, None), SIZES, P((*GROUP, "data", "tensor"), None, None)),  # behind what it has
        ((8, 16, 9), P(GROUP, None, None), SIZES, P(GROUP, None, ("data", "tensor"))),
        ((8, 16, 5), P(GROUP, None, None), SIZES, P(GROUP, None, None)),
        ((12, 64), P("tensor", None), SIZES | {"tensor": 2}, P(("tensor", "data", *GROUP), None)),
        ((10, 64), P("tensor", None), SIZES | {"tensor": 2}, P("tensor", GROUP)),
    ],
    ids=str,
)
def test_parameters_are_split_as_far_as_they_divide(
    shape: tuple[int, ...], own: P, sizes: dict[str, int], expected: P
) -> None:
    assert fully_sharded(shape, own, sizes) == expected


@pytest.mark.full
@pytest.mark.parametrize("mesh", [(2, 1, 3, 1, True, False), (3, 1, 2, 1, True, False)], ids=name)
def test_axes_that_do_not_divide_together(mesh: Mesh) -> None:
    """Two axes on two dimensions, and copies on a third: 6 ranks divide neither 16 nor 9."""
    check(tiny(mesh, batch=6, num_heads=3, head_dim=3, num_experts=6, **PAPER))


# What a training step sends, one layer of it: (kind, axes, width) → how often, forward + backward. Width is the last
# dimension of what moves; h = 16, r·h = 4, experts' hidden width 16 (bigmac) or 4. Tokens are float32, an exchange of
# static capacity. Of parameters what is gathered (twice with fsdp: forward, and again backward) and how their gradients
# are summed; vectors (norms, statistics of the router, the loss) are summed, and stand below the table.
TOKENS = {
    # Attention gathers the sequence and scatters sums, h wide; each is the other's gradient.
    "attention": {("all-gather", "tensor", 16): 2, ("reduce-scatter", "tensor", 16): 2},
    # Two exchanges, and two of gradients: the only traffic of tokens in a MoE layer whose experts are whole.
    "bigmac": {("all-to-all", "expert", 4): 4},
    "fine_grained": {("all-to-all", "expert", 16): 4},
    # Experts that `tensor` splits, too: rows of their own width, r·h for bigmac.
    "bigmac, split": {("all-gather", "tensor", 4): 2, ("reduce-scatter", "tensor", 4): 2},
    "fine_grained, split": {("all-gather", "tensor", 16): 2, ("reduce-scatter", "tensor", 16): 2},
    "dense": {("all-gather", "tensor", 16): 2, ("reduce-scatter", "tensor", 16): 2},
}
TABLE: dict[tuple[str, Mesh], tuple[str, ...]] = {
    ("bigmac", (2, 1, 2, 1, False, False)): ("bigmac",),
    ("bigmac", (2, 1, 2, 2, False, False)): ("attention", "bigmac"),
    ("bigmac", (2, 1, 2, 2, True, False)): ("attention", "bigmac"),
    ("bigmac", (1, 1, 2, 4, False, True)): ("attention", "bigmac", "bigmac, split"),
    ("bigmac", (2, 1, 2, 2, True, True)): ("attention", "bigmac", "bigmac, split"),
    ("fine_grained", (2, 1, 2, 2, False, False)): ("attention", "fine_grained"),
    ("fine_grained", (2, 1, 2, 2, True, True)): ("attention", "fine_grained", "fine_grained, split"),
    ("dense", (2, 1, 1, 4, False, False)): ("attention", "dense"),
    ("dense", (2, 1, 1, 4, True, False)): ("attention", "dense"),
    ("bigmac", (8, 1, 1, 1, True, False)): (),
}
# A layer's matrices by shape, as one rank computes with them, where `tensor` has one rank: (how many, whether `tensor`
# splits them, and by which dimension; whether they are the experts').
MATRICES = {
    "attention": [(16, 16, 1)] * 3 + [(16, 16, 0)],
    "bigmac": [(16, 8, None), (16, 4, None), (4, 16, None)],  # router, W↓, W↑
    "fine_grained": [(16, 8, None)],
    "dense": [(16, 64, 1), (64, 16, 0)],
}
EXPERTS = {"bigmac": (4, 16), "fine_grained": (16, 4)}


def parameters(structure: str, mesh: Mesh) -> Counter[tuple[str, str, tuple[int, ...]]]:
    """Collectives of one layer's parameters: (kind, axes, shape of the whole) → how often."""
    data, node, expert, tensor, fsdp, split = mesh
    sizes = {"data": data, "node": node, "expert": expert, "tensor": tensor}
    found: Counter[tuple[str, str, tuple[int, ...]]] = Counter()

    def add(shape: tuple[int, ...], axes: str) -> None:
        named = " ".join(axis for axis in axes.split() if sizes[axis] > 1)
        if fsdp and named:
            found["all-gather", named, shape] += 2
            found["reduce-scatter", named, shape] += 1
        elif named:
            found["all-reduce", named, shape] += 1

    for rows, columns, dim in MATRICES["attention"] + MATRICES[structure]:
        whole = [rows, columns]
        if dim is not None:
            whole[dim] //= tensor
        add(tuple(whole), "data node expert" if dim is not None and tensor > 1 else "data node expert tensor")
    if structure in EXPERTS:
        R, F = EXPERTS[structure]
        F = F // tensor if split else F
        for shape in ((8 // (node * expert), R, F), (8 // (node * expert), F, R)):
            add(shape, "data" if split else "data tensor")
    return found


def sent(structure: str, mesh: Mesh) -> Counter[tuple[str, str, tuple[int, ...]]]:
    """Collectives of the compiled step's loops over layers: (kind, axes, shape) of every array that moves."""
    fields = {"structure": structure, "capacity_factor": 1.0, "qk_norm": False, "positions": "none", "balance": "none"}
    compiled = compile_program(tiny(mesh, num_layers=3, **fields), jax.devices()[: math.prod(mesh[:4])])
    assert not note("step", compiled.text)
    module = hlo.parse(compiled.text)
    found: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for c in collectives(module, compiled.mesh):
        if not c.axes or 3 not in c.loops:
            continue
        assert c.times == 3, c  # once a layer
        computation = module.computations[c.computation]
        instruction = computation.by_name[c.name]
        arrays = instruction.shapes if c.kind == "all-gather" else computation.operands(instruction)  # the larger side
        found.update((c.kind, " ".join(c.axes), shape.dims) for shape in arrays)
    return found


@pytest.mark.parametrize(("structure", "mesh"), some(TABLE, every=len(TABLE)), ids=name)
def test_collectives_of_a_layer(structure: str, mesh: Mesh) -> None:
    found = sent(structure, mesh)
    vectors = {key: found.pop(key) for key in list(found) if sum(size > 1 for size in key[2]) < 2}
    assert {kind for kind, _, _ in vectors} <= {"all-reduce"}
    expected = parameters(structure, mesh)
    tokens = Counter[tuple[str, str, int]]()
    for (kind, axes, shape), count in (found - expected).items():
        # An all-to-all lists what goes to each rank of its group.
        tokens[kind, axes, shape[-1]] += count // (mesh[2] if kind == "all-to-all" else 1)
    assert not expected - found, expected - found
    assert tokens == sum((Counter(TOKENS[row]) for row in TABLE[structure, mesh]), Counter())


def test_a_gather_of_full_width_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    call = MoE.__call__

    def gathering(self: MoE, x_BLD: jax.Array, *arguments: Any) -> Any:
        return call(self, jax.sharding.reshard(jax.sharding.reshard(x_BLD, batch_spec(3)), token_spec(3)), *arguments)

    monkeypatch.setattr(MoE, "__call__", gathering)
    structure, mesh = "bigmac", (2, 1, 2, 2, False, False)
    with pytest.raises(AssertionError, match="'all-gather', 'tensor', 16"):
        test_collectives_of_a_layer(structure, mesh)
