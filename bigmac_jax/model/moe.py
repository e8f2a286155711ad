"""The Mixture-of-Experts layer: router → exchange → experts → exchange → combine.

`bigmac` (DCCA) projects tokens down to R = r·D before the first exchange and up after the second; `fine_grained` and
`vanilla` exchange rows of full width (R = D here). B batch, L length, D hidden, R row width, E experts, K top-k,
U replicas.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from bigmac_jax.config import Config, ModelConfig
from bigmac_jax.model.balance import balance_bias, balance_losses, required_bias
from bigmac_jax.model.choose_exchange import choose_exchange, make_local
from bigmac_jax.model.exchange import Plan, Strategy, in_rounds
from bigmac_jax.model.experts import apply_experts
from bigmac_jax.model.gathering import Weight, can_join, join, on_each_rank
from bigmac_jax.model.layers import MLP, Linear, Norm, divisor, last_axes, normalize, product, residual_scale
from bigmac_jax.model.mesh import (
    EXPERT_GROUP,
    INSIDE,
    TENSOR,
    per_replica,
    rank_spec,
    replicas,
    replicated_spec,
    token_spec,
)
from bigmac_jax.model.parameters import Declaration, parameter, weight
from bigmac_jax.model.router import Padding, Routing, choose_experts, score_experts
from bigmac_jax.model.router_weights import router_parameters, router_weights


class LayerStats(NamedTuple):
    """What a layer reports beside its output: means over the tokens of each of U replicas, padding left out, so that
    replicas need nothing of each other before the step's end."""

    z_loss: Array  # [U]
    shares: Array  # [U, E] of the router's normalised scores: P_e
    load: Array  # [U, E] share of the (token, choice) pairs that went to each expert, drops included: f_e
    drop_rate: Array  # [U] share of the pairs that were dropped, because their expert was full
    moved_rate: Array  # [U, 1] share that went to another, because theirs was full; empty unless overflow is next
    router_entropy: Array  # [U] nats
    quantile_stats: Array  # [U, …] what `balance.update_bias` takes beside the load; empty unless balance is quantile


def empty_stats() -> LayerStats:
    """What a layer without experts reports."""
    zero, none = jnp.zeros((1,)), jnp.zeros((1, 0))
    return LayerStats(zero, none, none, zero, none, zero, none)


class Aux(NamedTuple):
    """What `model(tokens)` returns beside logits, with a leading dimension of layers: of all tokens."""

    balance_loss: Array  # E · Σ_e f_e P_e over the whole step; enters the loss with model.balance_coefficient
    z_loss: Array
    shares: Array
    load: Array
    drop_rate: Array
    moved_rate: Array
    router_entropy: Array
    quantile_stats: Array

    @classmethod
    def of(cls, stats: LayerStats, balance_YU: Array | None = None) -> "Aux":
        """Joins the replicas' statistics [Y, U, …]; `balance_YU` is the balance loss where it is not that of these."""
        if balance_YU is None:
            balance_YU = balance_losses(stats.shares, stats.load)
        return cls(balance_YU.mean(1), *(v.mean(1) for v in stats))


class RouterBias(nnx.Variable):
    """Moved by the load after each step, not by a gradient."""


class Experts(nnx.Module):
    """The routed experts' parameters, sharded over the expert group, and with mesh.split_experts over `tensor`."""

    def __init__(self, config: Config, key: Array):
        m = config.model
        E, R, F = m.expert_count, m.wire_size, m.expert_width
        # A residual branch ends in one matrix, which carries the scaling with depth: bigmac's is W↑, not the experts'.
        scale = 1.0 if m.structure == "bigmac" else residual_scale(config)
        along = {"e": EXPERT_GROUP, "F": TENSOR if config.mesh.split_experts else None, "R": None}

        def declare(key: Array | None, dims: str, *shape: int, std: float = 0.0) -> nnx.Variable:
            matrix, axes = len(dims) == 3, tuple(along[dim] for dim in dims)
            declaration = Declaration(dims, "experts", std, not matrix, axes, decays=matrix, small=not matrix)
            return parameter(config, key, (E, *shape), declaration)

        keys = jax.random.split(key, 3)
        self.w_in_eRF = declare(keys[0], "eRF", R, F, std=1 / math.sqrt(R))
        self.w_out_eFR = declare(keys[1], "eFR", F, R, std=scale / math.sqrt(F))
        if m.gated:
            self.w_gate_eRF = declare(keys[2], "eRF", R, F, std=1 / math.sqrt(R))
        if m.use_bias:
            self.b_in_eF = declare(None, "eF", F)
            self.b_out_eR = declare(None, "eR", R)
        if m.use_bias and m.gated:
            self.b_gate_eF = declare(None, "eF", F)

    def weights(self, config: Config) -> dict[str, Weight]:
        """The parameters by name, for `on_each_rank`: in the dtype that their gradients are summed in, so that kernels
        write those in it (`grouped_matmul`), and cast where they are multiplied. A gate may be in w_in_eRF, b_in_eF."""
        execution = config.execution
        # The cast copy would be kept for the backward pass by the one policy that keeps casts.
        keeps_casts = config.mesh.fsdp and execution.remat == "none"
        wide = "float32" in (execution.dtype, execution.reduce_dtype) and not keeps_casts
        compute = "float32" if wide else execution.dtype
        weights = {name: weight(config, v, compute) for name, v in vars(self).items() if isinstance(v, nnx.Param)}
        # What is cast is copied anyway, and so the gate's matrices can stand beside W_in's: the rows are read once, and
        # their gradient comes from one product instead of a sum of two.
        if config.model.gated and can_join(weights["w_in_eRF"]):
            for name, gate in (("w_in_eRF", "w_gate_eRF"), ("b_in_eF", "b_gate_eF")):
                if gate in weights:
                    weights[name] = join(weights[name], weights.pop(gate))
        return weights


class MoE(nnx.Module):
    """y = (1 + x W_g) ⊙ (n(Σ_{i∈T} p_i(x) E_i(x') + α x') W↑) + shared(x), where x' = x W↓.

    W↓ and W↑ are the identity for fine_grained and vanilla; the norm n, the skip α x' and the gate 1 + x W_g are there
    where model.latent_norm says so, which for the paper's layer is nowhere.
    """

    def __init__(self, config: Config, key: Array):
        self.config = config
        m = config.model
        D, R, E = m.hidden_size, m.wire_size, m.expert_count
        keys = jax.random.split(key, 5)
        self.router_DE, self.router_logit_bias_E, self.hyper = router_parameters(config, keys[0])
        zeros_E = jnp.zeros(E, jnp.float32, out_sharding=replicated_spec(1))
        self.router_bias_E = RouterBias(zeros_E) if m.has_router_bias else None
        self.experts = Experts(config, keys[1])
        self.shared = MLP(config, keys[2], m.shared_width, shared=True) if m.shared_width else None
        bigmac, part, scale = m.structure == "bigmac", "projections", residual_scale(config)
        self.down = Linear(config, keys[3], D, R, part, bias=False, latent=True) if bigmac else None
        self.up = Linear(config, keys[4], R, D, part, bias=False, scale=scale, latent=True) if bigmac else None
        self.dispatch_norm = Norm(config, R) if "pre_dispatch" in m.latent_norms else None
        # Behind it, bigmac's W↑ carries the scaling with depth; where there is none, the norm does.
        gain = 1.0 if bigmac else scale
        self.combine_norm = Norm(config, R, gain=gain) if "post_combine" in m.latent_norms else None
        skip = Declaration("1", "norms", 1, constant=True, decays=False, small=True)
        self.skip_1 = parameter(config, None, (1,), skip) if "skip" in m.latent_norms else None
        # Zero at first, whatever the key.
        self.gate = Linear(config, keys[4], D, D, part, bias=False, scale=0.0) if "gate" in m.latent_norms else None
        self.draft_experts = 0  # experts of each rank that a draft computes, which sends nothing (`inference.drafter`)

    def __call__(
        self,
        x_BLD: Array,
        evaluating: bool = False,
        padding: Padding | None = None,
        choices: Array | None = None,
    ) -> tuple[Array, LayerStats]:
        """Applies the layer to a whole step's tokens.

        Args:
          evaluating: no choice is dropped, and none depends on another token.
          padding: tokens of no document, which no expert sees and no statistic counts.
          choices: how many experts a token takes, if fewer than model.top_k.
        """
        capacity_factor = math.inf if evaluating else self.config.model.capacity_factor
        routing, quantile_stats = self.route(x_BLD, evaluating, padding, choices)  # T and p(x)
        y_BLD, counts_SE, dropped_S = on_each_rank(  # y = widen(x', routed(x')), x' = narrow(x)
            functools.partial(layer_on_rank, self.config, capacity_factor, self.draft_experts),
            (x_BLD, routing.gates_BLK, routing.experts_BLK),
            self.weights(),
            out_specs=(token_spec(3), rank_spec(2), rank_spec(1)),
        )
        return self.finish(x_BLD, y_BLD), self.report(routing, counts_SE, dropped_S, padding, quantile_stats)

    def route(
        self, x_BLD: Array, evaluating: bool, padding: Padding | None = None, choices: Array | None = None
    ) -> tuple[Routing, Array]:
        """Chooses each token's experts and their weights → routing, and `LayerStats.quantile_stats`."""
        m, quantile_stats = self.config.model, jnp.zeros((1, 0))
        weights = router_weights(self.config, self.router_DE, self.router_logit_bias_E, self.hyper)
        scores = score_experts(m, x_BLD, weights)
        bias_E = None if self.router_bias_E is None else self.router_bias_E[...]
        if bias_E is not None and m.balance == "quantile" and not evaluating:
            if m.balance_step == "same":
                bias_E = balance_bias(m, scores.scores_BLE, bias_E, padding)
                quantile_stats = bias_E[None]
            else:
                quantile_stats = required_bias(self.config, scores.scores_BLE, bias_E, padding)
        moves = m.overflow == "next" and not evaluating
        place = functools.partial(place_on_rank, self.config) if moves else None
        return choose_experts(m, scores, bias_E, padding, place, choices), quantile_stats

    def finish(self, x_BLD: Array, y_BLD: Array) -> Array:
        """Adds what every token gets beside its routed experts' y."""
        if self.gate is not None:
            y_BLD = y_BLD * (1 + self.gate(x_BLD))  # (1 + x W_g) ⊙ y
        return y_BLD if self.shared is None else y_BLD + self.shared(x_BLD)

    def weights(self) -> "RowWeights":
        """What `layer_on_rank` computes with, for `on_each_rank`; no experts where they are elsewhere."""
        config = self.config
        return RowWeights(
            experts={} if self.experts is None else self.experts.weights(config),
            down_DR=None if self.down is None else weight(config, self.down.w_DF),
            up_RD=None if self.up is None else weight(config, self.up.w_DF),
            dispatch_norm=[] if self.dispatch_norm is None else self.dispatch_norm.weights(),
            combine_norm=[] if self.combine_norm is None else self.combine_norm.weights(),
            skip_1=None if self.skip_1 is None else weight(config, self.skip_1),
        )

    def report(
        self, routing: Routing, counts_SE: Array, dropped_S: Array, padding: Padding | None, quantile_stats: Array
    ) -> LayerStats:
        """The layer's statistics; S are all ranks."""
        tokens: Any = math.prod(routing.experts_BLK.shape[:2])
        if padding is not None:
            tokens = divisor(padding.tokens)
        choices = tokens * routing.choices
        load_UE, drop_rate_U = (per_replica(v).sum(1) / (choices / replicas()) for v in (counts_SE, dropped_S))
        router = routing.moved_U1, routing.entropy_U, quantile_stats
        return LayerStats(routing.z_loss_U, routing.shares_UE, load_UE, drop_rate_U, *router)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowWeights:
    """What turns a layer's tokens into its outputs on one rank; None, or empty, for what the layer does not have.

    experts: by name, as in `Experts`; their matrices in a decoder's loop each an `InStack`.
    down_DR, up_RD: W↓ and W↑.
    dispatch_norm, combine_norm: a norm's scale, and LayerNorm's bias.
    skip_1: α, which scales x' in y' + α x'.
    """

    experts: dict[str, Any]
    down_DR: Any
    up_RD: Any
    dispatch_norm: list[Any]
    combine_norm: list[Any]
    skip_1: Any


def place_on_rank(config: Config, ranked_BLN: Array) -> Array:
    """experts_BLK: this rank's choices, of the best N experts of each token, with those that find an expert full moved
    to the next with room, in each chunk as `layer_on_rank` sends it."""
    ranked_TN, K = ranked_BLN.reshape(-1, ranked_BLN.shape[-1]), config.model.choices
    chunks = count_chunks(config, len(ranked_TN))
    exchange = choose_exchange(config, config.model.capacity_factor, len(ranked_TN) // chunks)
    placed = [exchange.place(ranked_CN, K) for ranked_CN in jnp.split(ranked_TN, chunks)]
    return jnp.concatenate(placed).reshape(*ranked_BLN.shape[:-1], K)


def count_chunks(config: Config, tokens: int) -> int:
    """How many chunks a rank's tokens go in: `overlap_chunks`, or fewer where they don't divide its tokens."""
    return math.gcd(config.execution.overlap_chunks, tokens)


def layer_on_rank(
    config: Config,
    capacity_factor: float,
    draft_experts: int,
    x_BLD: Array,
    gates_BLK: Array,
    experts_BLK: Array,
    w: RowWeights,
) -> tuple[Array, Array, Array]:
    """The layer on one rank, between the router and the shared experts, with all collectives of the exchange.

        x' = narrow(x)        W↓
        y' = routed(x')       Σ_{i∈T} p_i(x) E_i(x'): dispatch, experts, combine
        y  = widen(x', y')    W↑

    Tokens go in `overlap_chunks` chunks that don't depend on each other, so that one is computed while another is on
    the wire; a number of tokens that the chunks don't divide (in evaluation) takes fewer.

    Returns:
      y_BLD; counts_1E, choices of each expert; dropped_1.
    """
    x_TD, gates_TK, experts_TK = (v.reshape(-1, v.shape[-1]) for v in (x_BLD, gates_BLK, experts_BLK))
    chunks = count_chunks(config, len(x_TD))
    exchange: Strategy
    if draft_experts:
        exchange = make_local(config, draft_experts)
    else:
        exchange = choose_exchange(config, capacity_factor, len(x_TD) // chunks)
    gates = jnp.split(gates_TK, chunks)

    plans = [exchange.plan(experts_CK) for experts_CK in jnp.split(experts_TK, chunks)]
    narrow_x = [narrow(config.model, w, x_CD) for x_CD in jnp.split(x_TD, chunks)]
    one_round = functools.partial(routed, config, exchange)
    narrow_y = in_rounds(exchange, one_round, INSIDE, plans, narrow_x, gates, w.experts)
    y = [widen(config.model, w, x_CR, y_CR) for x_CR, y_CR in zip(narrow_x, narrow_y, strict=True)]

    counts_E = jnp.stack([plan.counts_E for plan in plans]).sum(0)
    dropped = jnp.stack([plan.dropped for plan in plans]).sum()
    return jnp.concatenate(y).reshape(x_BLD.shape), counts_E[None], dropped[None]


def narrow(m: ModelConfig, w: RowWeights, x_TD: Array) -> Array:
    """x'_TR = n(x W↓)."""
    x_TR = x_TD if w.down_DR is None else product(x_TD, w.down_DR)
    return normalize(m, x_TR, *w.dispatch_norm) if w.dispatch_norm else x_TR


def routed(
    config: Config, exchange: Strategy, plan: Plan, x_TR: Array, gates_TK: Array, w_experts: dict[str, Array]
) -> Array:
    """y'_TR = Σ_{i∈T} p_i(x) E_i(x'): dispatch, experts, combine."""
    rows_NR, gate_NK = exchange.dispatch(plan, x_TR, gates_TK)
    share = gates_TK.size // exchange.local_experts
    y_NR = apply_experts(config, w_experts, rows_NR, gate_NK, plan.expert_NK, share, plan.most_local)
    return exchange.combine(plan, y_NR, gates_TK)


def widen(m: ModelConfig, w: RowWeights, x_TR: Array, y_TR: Array) -> Array:
    """y_TD = n(y' + α x') W↑."""
    y_TR = y_TR if w.skip_1 is None else y_TR + x_TR * last_axes(w.skip_1, x_TR)
    y_TR = normalize(m, y_TR, *w.combine_norm) if w.combine_norm else y_TR
    return y_TR if w.up_RD is None else product(y_TR, w.up_RD)
