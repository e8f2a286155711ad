"""The Mixture-of-Experts layer: router → exchange → experts → exchange → combine.

`bigmac` (DCCA) projects tokens down to R = r·D before the first exchange and up after the second; `fine_grained` and
`vanilla` exchange rows of full width (R = D here). B batch, L length, D hidden, R row width, E experts, K top-k.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from bigmac_jax.config import Config
from bigmac_jax.model.balance import balance_loss, evened, required_bias
from bigmac_jax.model.exchange import STRATEGIES, Local, Plan, Strategy, further_rounds
from bigmac_jax.model.experts import grouped_mlp
from bigmac_jax.model.layers import MLP, Linear, Norm, divisor, last_axes, normalised, product, residual_scale
from bigmac_jax.model.mesh import (
    AXES,
    EXPERT_GROUP,
    TENSOR,
    Crossing,
    ExpertGroup,
    Weight,
    current_group,
    on_each_rank,
    rank_spec,
    replicated_spec,
    tensor_ranks,
    token_spec,
)
from bigmac_jax.model.parameters import Declaration, parameter, weight
from bigmac_jax.model.router import Padding, Routing, chosen, scored


class Aux(NamedTuple):
    """What a layer reports beside its output; `model(tokens)` returns it with a leading dimension of layers."""

    balance_loss: Array  # E · Σ_e f_e P_e over the whole step; enters the loss with model.balance_coefficient
    z_loss: Array
    # Padding enters none of these.
    shares: Array  # [E] mean over the tokens of the router's normalised scores: P_e
    load: Array  # [E] share of the (token, choice) pairs that went to each expert, drops included: f_e
    drop_rate: Array  # share of the pairs that found their expert full
    router_entropy: Array  # nats
    moves_bias: Array  # what `balance.updated_bias` takes beside the load; of other balancing than by quantiles, empty


def empty_aux() -> Aux:
    """Of a layer without experts."""
    zero = jnp.zeros(())
    return Aux(zero, zero, jnp.zeros((0,)), jnp.zeros((0,)), zero, zero, jnp.zeros((0,)))


class RouterBias(nnx.Variable):
    """Moved by the load after each step, not by a gradient."""


class StandIns(nnx.Variable):
    """Of each rank, [ranks, E] int32: the local expert that a draft computes instead of each, e for none."""

    def weight(self) -> Weight:
        return Weight(self[...], Crossing("int32", "int32", "int32"), AXES)


class Experts(nnx.Module):
    """The routed experts' parameters, sharded over the expert group, and with mesh.split_experts over `tensor`."""

    def __init__(self, config: Config, key: Array):
        m = config.model
        E, R, F = m.expert_count, m.wire_size, m.expert_width
        # A residual branch ends in one matrix, which carries the scaling with depth: bigmac's is W↑, not the experts'.
        scale = 1.0 if m.structure == "bigmac" else residual_scale(config)
        along = {"e": EXPERT_GROUP, "F": TENSOR if config.mesh.split_experts else None, "R": None}

        def of_experts(key: Array | None, dims: str, *shape: int, std: float = 0.0) -> nnx.Param:
            matrix, axes = len(dims) == 3, tuple(along[dim] for dim in dims)
            declaration = Declaration(dims, "experts", std, not matrix, axes, decays=matrix, small=not matrix)
            return parameter(config, key, (E, *shape), declaration)

        keys = jax.random.split(key, 3)
        self.w_in_eRF = of_experts(keys[0], "eRF", R, F, std=1 / math.sqrt(R))
        self.w_out_eFR = of_experts(keys[1], "eFR", F, R, std=scale / math.sqrt(F))
        if m.gated:
            self.w_gate_eRF = of_experts(keys[2], "eRF", R, F, std=1 / math.sqrt(R))
        if m.use_bias:
            self.b_in_eF = of_experts(None, "eF", F)
            self.b_out_eR = of_experts(None, "eR", R)
        if m.use_bias and m.gated:
            self.b_gate_eF = of_experts(None, "eF", F)

    def weights(self) -> dict[str, nnx.Param]:
        return {name: value for name, value in vars(self).items() if isinstance(value, nnx.Param)}


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
        router = Declaration("DE", "router", 1 / math.sqrt(D), exact=True)
        self.router_DE = parameter(config, keys[0], (D, E), router)
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
        factor = Declaration("1", "norms", 1, constant=True, decays=False, small=True)
        self.factor_1 = parameter(config, None, (1,), factor) if "scale" in m.latent_norms else None
        self.skip_1 = parameter(config, None, (1,), factor) if "skip" in m.latent_norms else None
        # Zero at first, whatever the key.
        self.gate = Linear(config, keys[4], D, D, part, bias=False, scale=0.0) if "gate" in m.latent_norms else None
        self.stand_ins: StandIns | None = None  # of a draft, which sends nothing (`inference.drafter`)

    def __call__(
        self, x_BLD: Array, load_E: Array | None = None, evaluating: bool = False, padding: Padding | None = None
    ) -> tuple[Array, Aux]:
        """Applies the layer to a whole step's tokens.

        Args:
          load_E: the load for the balance loss, where the step is larger than x (gradient accumulation).
          evaluating: no choice is dropped, and none depends on another token.
          padding: tokens of no document, which no expert sees and no statistic counts.
        """
        m = self.config.model
        routing, moves_bias = self.routing(x_BLD, evaluating, padding)
        y_BLD, counts_SE, dropped_S = self._exchange_and_compute(
            math.inf if evaluating else m.capacity_factor, x_BLD, routing.gates_BLK, routing.experts_BLK
        )
        if self.gate is not None:
            y_BLD = y_BLD * (1 + self.gate(x_BLD))
        if self.shared is not None:
            y_BLD = y_BLD + self.shared(x_BLD)
        counts_E, shares_E = counts_SE.sum(0), routing.shares_E
        choices = routing.experts_BLK.size if padding is None else divisor(padding.tokens) * m.choices
        own_load_E = counts_E / choices
        if load_E is None:
            load_E = own_load_E
            if padding is not None:  # both over these tokens, whatever the step's other parts hold
                here = choices / divisor(counts_E.sum())
                load_E, shares_E = load_E * here, shares_E * here
        return y_BLD, Aux(
            balance_loss(shares_E, load_E),
            routing.z_loss,
            routing.shares_E,
            own_load_E,
            dropped_S.sum() / choices,
            routing.entropy,
            moves_bias,
        )

    def routing(self, x_BLD: Array, evaluating: bool, padding: Padding | None = None) -> tuple[Routing, Array]:
        """Which experts each token goes to, with what weight, and `Aux.moves_bias`."""
        m, moves_bias = self.config.model, jnp.zeros((0,))
        scores = scored(m, x_BLD, weight(self.config, self.router_DE))
        bias_E = None if self.router_bias_E is None else self.router_bias_E[...]
        if bias_E is not None and m.balance == "quantile" and not evaluating:
            if m.balance_step == "same":
                bias_E = moves_bias = evened(m, scores.scores_BLE, bias_E, padding)
            else:
                moves_bias = required_bias(self.config, scores.scores_BLE, bias_E, padding)
        return chosen(m, scores, bias_E, padding), moves_bias

    def _exchange_and_compute(
        self, capacity_factor: float, x_BLD: Array, gates_BLK: Array, experts_BLK: Array
    ) -> tuple[Array, Array, Array]:
        """All collectives of the layer: → y_BLD, counts_SE (choices per expert of each rank), dropped_S.

        Tokens go in `overlap_chunks` parts that don't depend on each other, from W↓ to W↑, so that one is computed
        while another is on the wire; a number of tokens that the chunks don't divide (of an evaluation) takes fewer.
        What their buffers left goes in further rounds of all tokens.
        """
        config, m = self.config, self.config.model
        of_experts = {name: weight(config, value) for name, value in self.experts.weights().items()}
        parts = {"down": self.down, "up": self.up, "pre": self.dispatch_norm, "post": self.combine_norm}
        weights: dict[str, list[Weight]] = {name: part.weights() for name, part in parts.items() if part is not None}
        of_one = {"factor": self.factor_1, "skip": self.skip_1}
        weights |= {name: [weight(config, value)] for name, value in of_one.items() if value is not None}
        if self.stand_ins is not None:
            weights["stand_ins"] = [self.stand_ins.weight()]

        def on_rank(x_BLD: Array, gates_BLK: Array, experts_BLK: Array, *given: Array) -> tuple[Array, Array, Array]:
            w_experts, others = given[: len(of_experts)], iter(given[len(of_experts) :])
            w = {name: [next(others) for _ in values] for name, values in weights.items()}

            def narrow(x_CD: Array) -> Array:
                x_CR = product(x_CD, *w["down"]) if "down" in w else x_CD
                return normalised(m, x_CR, *w["pre"]) if "pre" in w else x_CR

            def widen(x_CR: Array, y_CR: Array) -> Array:
                y_CR = y_CR + x_CR * last_axes(w["skip"][0], x_CR) if "skip" in w else y_CR
                y_CR = normalised(m, y_CR, *w["post"]) if "post" in w else y_CR
                y_CR = y_CR * last_axes(w["factor"][0], y_CR) if "factor" in w else y_CR
                return product(y_CR, *w["up"]) if "up" in w else y_CR

            def experts(plan: Plan, rows_NR: Array, gate_NK: Array | None, *weights: Array) -> Array:
                named = dict(zip(of_experts, weights, strict=True))
                return apply_experts(config, named, rows_NR, gate_NK, plan.expert_NK, share)

            def in_round(plan: Plan, x_TR: Array, gates_TK: Array, *weights: Array) -> Array:
                rows = exchange.dispatch(plan, x_TR, gates_TK)
                return exchange.combine(plan, experts(plan, *rows, *weights), gates_TK)

            x_TD, gates_TK, experts_TK = (v.reshape(-1, v.shape[-1]) for v in (x_BLD, gates_BLK, experts_BLK))
            chunks = math.gcd(config.execution.overlap_chunks, x_TD.shape[0])
            if "stand_ins" in w:
                exchange: Strategy = local(config, w["stand_ins"][0][0])
            else:
                exchange = strategy(config, capacity_factor, x_TD.shape[0] // chunks)
            plans = [exchange.plan(chosen_CK) for chosen_CK in jnp.split(experts_TK, chunks)]
            gates = jnp.split(gates_TK, chunks)
            narrowed = [narrow(x_CD) for x_CD in jnp.split(x_TD, chunks)]
            rows = [exchange.dispatch(*part) for part in zip(plans, narrowed, gates, strict=True)]
            share = gates[0].size // exchange.local_experts
            outputs = [experts(plan, *r, *w_experts) for plan, r in zip(plans, rows, strict=True)]
            combined = [exchange.combine(*part) for part in zip(plans, outputs, gates, strict=True)]
            if exchange.most_rounds(*gates[0].shape) > 1:
                left_TK = jnp.concatenate([plan.left_TK for plan in plans if plan.left_TK is not None])
                x_TR = jnp.concatenate(narrowed)
                more_TR = further_rounds(exchange, in_round, AXES, left_TK, x_TR, gates_TK, *w_experts)
                combined = [y + more for y, more in zip(combined, jnp.split(more_TR, chunks), strict=True)]
            y_TD = jnp.concatenate([widen(*part) for part in zip(narrowed, combined, strict=True)])
            counts_E = jnp.stack([plan.counts_E for plan in plans]).sum(0)
            dropped = jnp.stack([plan.dropped for plan in plans]).sum()
            return y_TD.reshape(x_BLD.shape), counts_E[None], dropped[None]

        return on_each_rank(
            on_rank,
            (x_BLD, gates_BLK, experts_BLK),
            [*of_experts.values(), *itertools.chain.from_iterable(weights.values())],
            out_specs=(token_spec(3), rank_spec(2), rank_spec(1)),
        )


def strategy(config: Config, capacity_factor: float, tokens: int, group: ExpertGroup | None = None) -> Strategy:
    """The exchange of `config` for `tokens` of a rank at a time, by default in the current mesh's group."""
    group = group or current_group()
    name: str = config.execution.exchange
    if name == "auto":
        seconds = predicted_seconds(config, capacity_factor, tokens, group)
        name = min(seconds, key=seconds.__getitem__)
    return make_strategy(name, config, capacity_factor, group)


def local(config: Config, stand_in_E: Array) -> Local:
    """What a draft has instead of an exchange."""
    return Local(config.model.expert_count, current_group().sizes, math.inf, EXPERT_GROUP, stand_in_E=stand_in_E)


def exchanges_of(device_kind: str) -> list[str]:
    """The strategies that devices of a kind have: v5e has no ragged exchange over a group of 32 ("limited ICI")."""
    return [name for name in STRATEGIES if name != "ragged" or device_kind != "TPU v5 lite"]


def predicted_seconds(
    config: Config, capacity_factor: float, tokens: int, group: ExpertGroup | None = None
) -> dict[str, float]:
    """What `auto` chooses by: seconds of each strategy's exchanges in a forward pass of one layer."""
    group, m = group or current_group(), config.model
    # The emulation of the ragged exchange on CPU is there to be tested.
    names = [name for name in exchanges_of(group.device_kind) if name != "ragged" or group.platform != "cpu"]
    if config.execution.asks_for_rounds:
        names = [name for name in names if STRATEGIES[name].takes_rounds]
    return {
        name: make_strategy(name, config, capacity_factor, group).seconds(tokens, m.choices, m.wire_size)
        for name in names
    }


def make_strategy(name: str, config: Config, capacity_factor: float, group: ExpertGroup) -> Strategy:
    execution = config.execution
    forward = execution.wire_dtype or execution.dtype
    return STRATEGIES[name](
        config.model.expert_count,
        group.sizes,
        capacity_factor,
        EXPERT_GROUP,
        forward,
        execution.wire_dtype_backward or forward,
        emulated=group.platform == "cpu",  # jax#34755: no ragged all-to-all
        buffer_factor=execution.room_factor,
    )


def apply_experts(
    config: Config, w: dict[str, Array], rows_NR: Array, gate_NK: Array | None, expert_NK: Array | None, share: int
) -> Array:
    """`grouped_mlp` of this rank's experts, or of its part of every one."""
    if not (config.mesh.split_experts and tensor_ranks() > 1):
        return grouped_mlp(config, w, rows_NR, gate_NK, expert_NK, share)
    # Each rank has a part of every expert: it takes the rows of all tensor ranks, R wide, and they sum the results.
    # Rows that stand by expert, as many for each, stand like that when they are gathered.
    e = 1 if expert_NK is not None else w["w_in_eRF"].shape[0]
    gate_NK, expert_NK = (None if v is None else _of_tensor_ranks(v, 1) for v in (gate_NK, expert_NK))
    if "b_out_eR" in w:  # one of them adds it
        w = w | {"b_out_eR": jnp.where(jax.lax.axis_index(TENSOR) == 0, w["b_out_eR"], 0)}
    y_NR = grouped_mlp(config, w, _of_tensor_ranks(rows_NR, e), gate_NK, expert_NK, share * tensor_ranks())
    y_ebR = jax.lax.psum_scatter(y_NR.reshape(e, -1, y_NR.shape[1]), TENSOR, scatter_dimension=1, tiled=True)
    return y_ebR.reshape(rows_NR.shape)


def _of_tensor_ranks(rows_NX: Array, groups: int) -> Array:
    """The rows of all tensor ranks, group by group."""
    rows = rows_NX.reshape(groups, -1, rows_NX.shape[1])
    return jax.lax.all_gather(rows, TENSOR, axis=1, tiled=True).reshape(-1, rows_NX.shape[1])
