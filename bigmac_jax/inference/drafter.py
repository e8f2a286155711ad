"""The draft model of speculative decoding, which exchanges nothing: the model itself with only the experts of a token's
own rank.

Attention, dense layers and shared experts are the model's. A chosen expert of another rank is left out, or replaced by
its stand-in: the expert here whose outputs are nearest, by a table made once from the weights. (After SpecMoE, arXiv
2604.10152.) D hidden, R row width, N probes, E experts, e of them on a rank, S ranks, Y layers.
"""

import copy
import dataclasses
import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from bigmac_jax.config import Config
from bigmac_jax.config.errors import require
from bigmac_jax.inference.int8_weights import dequantize
from bigmac_jax.inference.kv_cache import Decoder
from bigmac_jax.model.experts import apply_experts
from bigmac_jax.model.mesh import (
    EXPERT_GROUP,
    batch_ranks,
    current_group,
    on_each_rank,
    rank_spec,
    tensor_ranks,
    token_spec,
)
from bigmac_jax.model.moe import MoE, RowWeights, StandIns, narrow
from bigmac_jax.model.transformer import Block

NEAREST, NONE = "nearest", "none"
STAND_INS = (NONE, NEAREST)
_PROBES = 64  # random rows on which experts are compared


@dataclass(frozen=True)
class Speculation:
    """Settings of speculative decoding.

    Attributes:
      tokens: length of a draft; 0 turns drafting off.
      local_experts: how many experts of each rank a draft may use; 0 = all that it holds. Fewer are for study.
      stand_ins: what replaces an expert that is not among them: `none`, or `nearest`, the one of them whose outputs are
        nearest; docs/serving.md measures both.
      least: drafting pauses while a smaller share of the drafted tokens is accepted.

    Raises:
      ConfigError: a value out of its range.
    """

    tokens: int = 0
    local_experts: int = 0
    stand_ins: str = NONE
    least: float = 0.25

    def __post_init__(self) -> None:
        require(0 <= self.tokens <= 32, f"speculate={self.tokens} must lie in [0, 32]; 0 drafts nothing")
        require(self.local_experts >= 0, f"local_experts={self.local_experts} must be at least 0 (all of a rank)")
        require(self.stand_ins in STAND_INS, f"stand_ins={self.stand_ins!r} must be {NONE} or {NEAREST}")
        require(0 <= self.least <= 1, f"least_acceptance={self.least} must lie in [0, 1]; 0 drafts always")

    def check(self, config: Config) -> None:
        """Raises ConfigError if drafting can save no exchange for a model on the current mesh."""
        if not self.tokens:
            return
        m, ranks = config.model, math.prod(current_group().sizes)
        require(
            m.is_moe,
            f"speculate={self.tokens} drafts with the experts that a rank holds, and model.structure={m.structure} "
            f"has no experts; use speculate=0",
        )
        held = m.expert_count // ranks
        require(
            self.local_experts <= held,
            f"local_experts={self.local_experts} must be at most the {held} that a rank holds",
        )
        require(
            ranks > 1 or 0 < self.local_experts < held,
            f"speculate={self.tokens} saves exchanges, and on one rank of experts there are none: a draft would be "
            f"the model itself; use speculate=0, mesh.expert > 1, or fewer local_experts to study acceptance",
        )


def make_drafter(decoder: Decoder, speculation: Speculation) -> Decoder:
    """Makes the draft model of a decoder: the same arrays, and in each MoE layer a table of which local expert replaces
    which expert of another rank."""
    tables = jax.jit(functools.partial(_tables, decoder.config, speculation))

    def add_stand_ins(group: Block) -> Block:
        if not isinstance(group.mlp, MoE):
            return group
        drafting = copy.copy(group)
        drafting.mlp = copy.copy(group.mlp)
        drafting.mlp.stand_ins = nnx.data(StandIns(tables(group)))
        return drafting

    return dataclasses.replace(decoder, groups=tuple(map(add_stand_ins, decoder.groups)))


def _tables(config: Config, speculation: Speculation, group: Block) -> Array:
    """The tables of a group of layers, [Y, S, E]."""

    def make_table(_: None, layer: Block) -> tuple[None, Array]:
        layer = dequantize(layer, config.execution.dtype)
        assert isinstance(layer.mlp, MoE)
        return None, _table(config, speculation, layer.mlp, _probes(config, layer))

    return jax.lax.scan(make_table, None, group)[1]


def _probes(config: Config, layer: Block) -> Array:
    """Random inputs of the layer's MoE, the same on each rank."""
    x_1ND = jax.random.normal(jax.random.key(0), (1, _PROBES, config.model.hidden_size))
    x_BND = jnp.tile(x_1ND.astype(config.execution.dtype), (batch_ranks(), tensor_ranks(), 1))
    return layer.mlp_norm(jax.sharding.reshard(x_BND, token_spec(3)))


def _table(config: Config, speculation: Speculation, mlp: MoE, x_BND: Array) -> Array:
    """A layer's table [S, E]: the local index of the expert that each rank computes for each of all; e for none."""

    def on_rank(x_1ND: Array, w: RowWeights) -> Array:
        e, E = w.experts["w_in_eRF"].shape[0], config.model.expert_count
        first, n = e * jax.lax.axis_index(EXPERT_GROUP), speculation.local_experts or e
        own_E = jnp.arange(E, dtype=jnp.int32) - first
        is_own_E = (own_E >= 0) & (own_E < n)
        if speculation.stand_ins == NONE:
            return jnp.where(is_own_E, own_E, e)[None]
        x_NR = narrow(config.model, w, x_1ND[0])
        y_NR = apply_experts(config, w.experts, jnp.tile(x_NR, (e, 1)), None, None, len(x_NR))
        y_eX = y_NR.reshape(e, -1).astype(jnp.float32)
        y_EX = jax.lax.all_gather(y_eX, EXPERT_GROUP, tiled=True)
        # |a - b|² but for |a|², which is the same for all b.
        square_n = jnp.square(y_eX[:n]).sum(-1)
        distance_En = square_n[None] - 2 * jnp.matmul(y_EX, y_eX[:n].T, precision=jax.lax.Precision.HIGHEST)
        return jnp.where(is_own_E, own_E, distance_En.argmin(-1).astype(jnp.int32))[None]

    return on_each_rank(on_rank, (x_BND,), mlp.weights(), out_specs=rank_spec(2))
