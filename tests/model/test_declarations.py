"""What every kind of parameter is declared as, against tables that were worked out by hand: shardings, the optimizer
and dtypes ask it, and a wrong answer of a small parameter shows in no loss."""

import dataclasses
import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import ExecutionConfig
from bigmac_jax.model.attention import Attention
from bigmac_jax.model.gathering import Crossing, InStack
from bigmac_jax.model.mesh import AXES, names
from bigmac_jax.model.parameters import Adapted, Declaration, declared, leaf_name, shard_spec, state_spec, weight

from .tools import abstract_model, on_mesh, tiny

# One layer of width 16, four heads, eight experts, wire width 4: N(0, 1 / rows), and in a matrix that ends a residual
# branch 1/√2 of it, for the two branches. dims, part, axes, start (± a deviation, = a constant), and what is not as by
# default. The first row that a name matches holds.
ATTENTION = """
    embedding_VD                         VD embedding tensor/- ±0.02 table
    *.attention.out.w_DF                 DF attention tensor/- ±0.1768
    *.attention.*.w_DF                   DF attention -/tensor ±0.25
    *norm.scale_D                        D norms - =1 small exact not-decays
"""
EXPERTS = """
    *.experts.w_in_eRF, *.experts.w_gate_eRF    eRF experts node+expert/-/- ±0.5
    *.experts.w_out_eFR                         eFR experts node+expert/-/- ±0.25
    *.mlp.router_DE                             DE router - ±0.25 exact
    *.mlp.skip_1                                1 norms - =1 small not-decays
"""
TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "bigmac": (
        {},
        f"""{ATTENTION} {EXPERTS}
    *.mlp.down.w_DF    DF projections - ±0.25 selects slow
    *.mlp.up.w_DF      DF projections - ±0.3536 selects slow
""",
    ),
    "biases, and all that has a field": (
        {"use_bias": True, "gated": True, "norm": "layernorm", "positions": "learned", "router": "affine",
         "tie_embeddings": False, "scale_embedding": False, "num_shared_experts": 1, "projection_init": "random",
         "latent_norm": "gate"},
        f"""
    embedding_VD                                VD embedding tensor/- ±0.08 table
    unembedding_VD                              VD embedding tensor/- ±0.02 table
    positions_LD                                LD embedding - ±0.02 not-decays
    *norm.bias_D                                D norms - =0 small exact not-decays
    *.attention.out.b_F                         F attention - =0 small not-decays
    *.attention.*.b_F                           F attention tensor =0 small not-decays
    *.experts.b_in_eF, *.experts.b_gate_eF      eF experts node+expert/- =0 small not-decays
    *.experts.b_out_eR                          eR experts node+expert/- =0 small not-decays
    *.mlp.router_logit_bias_E                   E router - =0 small exact not-decays
    *.shared.down.w_DF                          DF shared - ±0.3536
    *.shared.up.w_DF, *.shared.gate.w_DF        DF shared - ±0.25
    *.shared.*.b_F                              F shared - =0 small not-decays
    *.mlp.down.w_DF                             DF projections - ±0.25 slow
    *.mlp.up.w_DF                               DF projections - ±0.3536 slow
    *.mlp.gate.w_DF                             DF projections - ±0
    {ATTENTION} {EXPERTS}
""",
    ),
    "a network makes the router": (
        {"router": "hyper", "structure": "fine_grained"},
        f"""{ATTENTION}
    *.experts.w_in_eRF       eRF experts node+expert/-/- ±0.25
    *.experts.w_out_eFR      eFR experts node+expert/-/- ±0.3536
    *.hyper.vector_D         D router - ±1 small exact not-decays
    *.hyper.in_DH            DH router - ±0.02 small exact not-trained
    *.hyper.out_DHE          DHE router - ±0.02 exact not-trained not-pads
    *.hyper.out_HE           HE router - ±0.02 small exact not-trained
""",
    ),
    "a frozen router, experts split": (
        {"router": "frozen", "mesh": (1, 1, 1, 1, True, True)},
        f"""{ATTENTION}
    *.experts.w_in_eRF       eRF experts node+expert/-/tensor ±0.5
    *.experts.w_out_eFR      eFR experts node+expert/tensor/- ±0.25
    *.mlp.router_DE          DE router - ±0.25 exact not-trained
    *.mlp.skip_1             1 norms - =1 small not-decays
    *.mlp.down.w_DF          DF projections - ±0.25 selects slow
    *.mlp.up.w_DF            DF projections - ±0.3536 selects slow
""",
    ),
    "dense": (
        {"structure": "dense"},
        f"""{ATTENTION}
    *.mlp.up.w_DF            DF mlp -/tensor ±0.25
    *.mlp.down.w_DF          DF mlp tensor/- ±0.08839
""",
    ),
    "mamba, and a module of next tokens": (
        {"blocks": "M", "structure": "dense", "mamba_bias": True, "mtp_modules": 1, "mamba_head_dim": 4},
        """
    embedding_VD                              VD embedding tensor/- ±0.02 table
    *.mamba.norm.scale_D                      D mamba tensor =1 small exact not-decays
    *norm.scale_D                             D norms - =1 small exact not-decays
    *.mamba.out.w_DF                          DF mamba tensor/- ±0.1768
    *.mamba.out.b_F                           F mamba - =0 small not-decays
    *.mamba.*.w_DF                            DF mamba -/tensor ±0.25
    *.mamba.*.b_F, *.mamba.conv_*_bias_F      F mamba tensor =0 small not-decays
    *.mamba.conv_*_KF                         KF mamba -/tensor ±0.5 small not-decays _uniform
    *.mamba.a_log_N                           N mamba tensor ±1 small exact not-decays _rates
    *.mamba.time_bias_N                       N mamba tensor ±1 small exact not-decays _first_steps
    *.mamba.skip_N                            N mamba tensor =1 small exact not-decays
    mtp.projection.w_DF                       DF attention - ±0.1768
""",
    ),
}  # fmt: skip


def say(of: Declaration) -> str:
    axes = "/".join("+".join(names(axis)) or "-" for axis in of.axes) if any(of.axes) else "-"
    flags = [name for name in ("small", "selects", "slow", "exact", "table") if getattr(of, name)]
    flags += [f"not-{name}" for name in ("decays", "trained", "pads") if not getattr(of, name)]
    draw = [of.draw.__name__] if of.draw else []
    return " ".join([of.dims, of.part, axes, f"{'=' if of.constant else '±'}{of.value:.4g}", *flags, *draw])


@pytest.mark.parametrize("name", TABLES)
def test_every_parameter_is_declared_as_the_table_has_it(name: str) -> None:
    fields, table = TABLES[name]
    rows = [line.split("  ", 1) for line in map(str.strip, table.splitlines()) if line]
    rules: dict[str, str] = {}
    for patterns, text in rows:
        for pattern in patterns.split(", "):
            rules.setdefault(pattern, text.strip())
    config = tiny(**{"num_layers": 1} | fields)
    with on_mesh(config):
        state = nnx.state(abstract_model(config))
    found, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    left = set(rules)
    for path, variable in found:
        if "declaration" in variable.get_metadata():  # a bias that loads move has none
            leaf = leaf_name(path)
            rule = next((pattern for pattern in rules if fnmatch.fnmatch(leaf, pattern)), "")
            assert f"{leaf} {say(declared(variable))}" == f"{leaf} {rules.get(rule)}"
            left.discard(rule)
    assert left <= {"*.experts.w_gate_eRF"}  # of EXPERTS, which a model without gates shares


MATRIX = Declaration("eRF", "experts", 1.0, axes=("expert", None, "tensor"), shape=(8, 5, 12))
VECTOR = Declaration("D", "norms", 1.0, small=True, exact=True, decays=False, shape=(16,))
HALF = ExecutionConfig(dtype="bfloat16", reduce_dtype="bfloat16")


def test_ranks_gather_in_the_narrower_dtype_and_what_is_exact_in_float32() -> None:
    """Gradients are summed as execution.reduce_dtype says, but for those of small exact parameters."""
    exact, whole, gather = dataclasses.replace(MATRIX, exact=True), ExecutionConfig(), ExecutionConfig
    for of, execution, expected in (
        (MATRIX, whole, ("float32", "float32", "float32")),
        (MATRIX, HALF, ("bfloat16", "bfloat16", "bfloat16")),
        (MATRIX, gather(dtype="bfloat16", gather_dtype="float32"), ("bfloat16", "bfloat16", "float32")),
        (MATRIX, gather(gather_dtype="bfloat16"), ("float32", "bfloat16", "float32")),
        (exact, HALF, ("float32", "float32", "bfloat16")),
        (VECTOR, HALF, ("float32", "float32", "float32")),
        (dataclasses.replace(VECTOR, exact=False), HALF, ("bfloat16", "bfloat16", "bfloat16")),
    ):
        assert of.crossing(execution) == Crossing(*expected), (of, execution)


def test_shapes_and_what_is_updated_in_host_memory() -> None:
    """A stack's shape has layers before the declared one, and some experts are fewer; TPUs update matrices of whole
    lanes."""
    assert MATRIX.unpadded((2, 8, 6, 12)) == (2, 8, 5, 12) and MATRIX.unpadded((3, 3, 5, 16)) == (3, 3, 5, 12)
    assert dataclasses.replace(MATRIX, shape=()).unpadded((3, 6, 16)) == (3, 6, 16)
    sliced = [(of.dims, n) for of in (MATRIX, VECTOR) for n in (64, 128, 192, 256) if of.sliced_in_host_memory(n)]
    assert sliced == [("eRF", 128), ("eRF", 256)]


def test_where_gradients_and_moments_of_replicas_stand() -> None:
    """Gradients are split as far as ranks of a replica can, once parameters are not; moments over replicas, if they are
    to be. What is small stays whole, and an array with fewer entries than dimensions has whole ones behind."""
    sizes = dict.fromkeys(AXES, 2)
    given, small = P(None, "expert", None, "tensor"), dataclasses.replace(MATRIX, small=True)
    assert shard_spec(MATRIX, (4, 8, 8, 12), given, False, sizes) == P(("data", "node"), "expert", None, "tensor")
    for of, fsdp in ((MATRIX, True), (small, False)):
        assert shard_spec(of, (4, 8, 8, 12), given, fsdp, sizes) == given
    for of, sharded, expected in (
        (MATRIX, True, P("replica", "expert", None, "tensor")),
        (MATRIX, False, given),
        (small, True, given),
    ):
        assert state_spec(of, (4, 8, 8, 12), given, sharded, sizes, by_layers=False) == expected
    few = Declaration("VD", "embedding", 1.0, axes=("tensor",))
    assert few.spec((8, 6), False, sizes) == P("tensor", None)
    assert few.spec((8, 6), True, sizes) == P(("tensor", "data", "node"), "expert")
    assert dataclasses.replace(few, small=True).spec((8, 6), True, sizes) == P("tensor", None)


def test_weights_are_what_their_declarations_say() -> None:
    """A layer's matrix in a stack of the dtype that is gathered is left there, and else taken out of it. Each replica's
    own stand along a dimension before the others."""
    config, stack = dataclasses.replace(tiny(), execution=HALF), jnp.arange(720.0).reshape(3, 2, 5, 24)
    of = dataclasses.replace(MATRIX, axes=("expert",), shape=(2, 5, 12))
    for dtype in (jnp.bfloat16, jnp.float32):
        found = weight(config, nnx.Param(InStack(stack.astype(dtype), jnp.int32(1)), declaration=of))
        left = dtype == jnp.bfloat16
        assert (found.layer is not None, found.split, found.shape) == (left, ("expert",), (2, 5, 12))
        assert found.crossing == Crossing(*["bfloat16"] * 3)
        np.testing.assert_array_equal(found.value, stack.astype(dtype)[slice(None) if left else 1])
    for value, compute, split in ((stack[0], "", ("expert",)), (stack, "float32", ("expert", "replica"))):
        found = weight(config, nnx.Param(value, declaration=of), compute)
        assert found.split == split and found.value is value and found.layer is None
        assert found.crossing == Crossing(compute or "bfloat16", "bfloat16", "bfloat16")


def test_adapters_of_each_replica_are_added_to_the_one_matrix() -> None:
    rng = np.random.default_rng(0)
    w, a, b = (rng.standard_normal(shape) for shape in ((4, 3), (2, 4, 5), (2, 5, 3)))
    pair = Adapted(*map(jnp.asarray, (w, a, b)))
    np.testing.assert_allclose(pair.sum(exact=True), w + a @ b, atol=1e-5)


@pytest.mark.parametrize(("tensor", "split"), [(1, True), (2, True), (4, False)])
def test_key_value_heads_that_are_fewer_than_ranks_are_whole(tensor: int, split: bool) -> None:
    """As many heads as ranks are one each; of two that four ranks ask, each rank takes one out of the whole matrix."""
    config = tiny((1, 1, 1, tensor), num_kv_heads=2, use_bias=True, norm="layernorm")
    with on_mesh(config):
        layer = jax.eval_shape(lambda: Attention(config, jax.random.key(0)))
    for linear in (layer.key, layer.value):
        assert (linear.heads == 0) == split
        assert (declared(linear.w_DF).axes[1] == "tensor") == (declared(linear.b_F).axes[0] == "tensor") == split
    assert declared(layer.query.w_DF).axes[1] == "tensor" and not layer.query.heads
    assert layer.query_norm.bias_D is layer.key_norm.bias_D is None  # RMSNorm, whatever the model's norm is
