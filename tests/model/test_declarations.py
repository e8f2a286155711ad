"""What every kind of parameter is declared as, against tables that were worked out by hand: shardings, the optimizer
and dtypes ask it, and a wrong answer of a small parameter shows in no loss."""

import fnmatch
from typing import Any

import jax
import pytest
from flax import nnx

from bigmac_jax.model.mesh import names
from bigmac_jax.model.parameters import Declaration, declared, leaf_name

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
