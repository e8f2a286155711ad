"""The router: which experts a token goes to, and with what weight. Float32, full width.

`score_experts`, then `choose_experts`: between the two, a bias may be made from the scores (`balance.balance_bias`).

D hidden, E experts, K top-k, G expert groups, U replicas; leading dimensions (B, L) are the tokens of the whole step.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.config import ModelConfig
from bigmac_jax.model.gathering import Weight, on_each_rank
from bigmac_jax.model.layers import divisor, exact_product, last_axes
from bigmac_jax.model.mesh import per_replica, replicas, token_spec


class Routing(NamedTuple):
    """The choice of each token, first choice first, and what the losses need."""

    gates_BLK: Array  # float32; the weight of each chosen expert's output
    experts_BLK: Array  # int32; E: none, of padding and of what is above `choices`
    choices: Array | int  # of each token
    # Means over the tokens of each replica of the mesh; those over the step are their means.
    shares_UE: Array  # of the normalised scores: P_e of the balance loss
    z_loss_U: Array  # of logsumexp(logits)² (ST-MoE, equation 5)
    entropy_U: Array  # of the normalised scores, nats
    moved_U1: Array  # share of the choices that `place` moved; [1, 0] without it


class Padding(NamedTuple):
    """Tokens of no document: they go to no expert and enter no statistic."""

    mask_BL: Array  # bool, on each rank its own tokens
    tokens: Array  # how many other tokens means are of: of a batch in parts, those of the whole step over its parts

    @classmethod
    def of(cls, mask_BL: Array, tokens: Array | None = None) -> "Padding":
        """Makes Padding from a mask of any sharding; `tokens` defaults to the number of unmasked tokens."""
        mask_BL = jax.sharding.reshard(mask_BL, token_spec(2))
        return cls(mask_BL, jnp.sum(~mask_BL) if tokens is None else tokens)


class Scores(NamedTuple):
    """Every expert's logit and score for every token, float32."""

    logits_BLE: Array
    scores_BLE: Array


@jax.named_scope("router")
def score_experts(config: ModelConfig, x_BLD: Array, weights: Sequence[Weight]) -> Scores:
    """Scores every expert for every token. `weights` are w_DE, and perhaps a bias_E (`router_weights`)."""

    # Fewer bits would change which experts 1 to 2 % of the tokens are sent to.
    def score(x_BLD: Array, w_DE: Array, bias_E: Array | None = None) -> Array:
        logits_BLE = exact_product(x_BLD, w_DE)
        return logits_BLE if bias_E is None else logits_BLE + last_axes(bias_E, logits_BLE)

    logits_BLE = on_each_rank(score, (x_BLD,), weights)
    softmax = config.router_scores == "softmax"
    return Scores(logits_BLE, jax.nn.softmax(logits_BLE) if softmax else jax.nn.sigmoid(logits_BLE))


@jax.named_scope("router")
def choose_experts(
    config: ModelConfig,
    scores: Scores,
    bias_E: Array | None,
    padding: Padding | None = None,
    place: Callable[[Array], Array] | None = None,
    choices: Array | None = None,
) -> Routing:
    """Chooses the K best experts of each token; for padding none, with gates of zero.

    Args:
      bias_E: shifts the choice but not the gates (DeepSeek-V3's balancing without a loss).
      place: makes a rank's experts_BLK of its ranked_BLN, each token's K + overflow_tries best, E for padding; by
        default the choice is the K best. Gates are of the experts that it gives.
      choices: how many of the K are taken (`training.choices`); the others are as a token of padding has them.
    """
    logits_BLE, scores_BLE = scores
    softmax = config.router_scores == "softmax"
    shares_BLE = scores_BLE if softmax else scores_BLE / scores_BLE.sum(-1, keepdims=True)
    ranking_BLE = jax.lax.stop_gradient(scores_BLE)
    if bias_E is not None:
        ranking_BLE = ranking_BLE + bias_E.reshape(1, 1, -1)

    # Told rank by rank: XLA would gather the scores of all ranks for a top-k, and choose for all of them.
    def choose(ranking_BLE: Array, scores_BLE: Array, *padding: Array) -> tuple[Array, Array, Array]:
        best = config.choices + (config.overflow_tries if place else 0)
        ranked_BLN = jax.lax.top_k(_in_best_groups(config, ranking_BLE), best)[1]
        if place:  # of a slice of a top-k XLA makes a sort, which takes six times as long on CPU
            ranked_BLN = jax.lax.optimization_barrier(ranked_BLN)
        if padding:
            ranked_BLN = jnp.where(padding[0][..., None], config.expert_count, ranked_BLN)
        experts_BLK = place(ranked_BLN) if place else ranked_BLN
        gates_BLK = jnp.take_along_axis(scores_BLE, experts_BLK, axis=-1, mode="clip")
        if padding:
            gates_BLK = jnp.where(padding[0][..., None], 0, gates_BLK)
        moved_BLK = experts_BLK != ranked_BLN[..., : config.choices]
        return experts_BLK, gates_BLK, moved_BLK.astype(jnp.float32).mean(-1, keepdims=True)

    def mean(of_tokens: Array) -> Array:
        if padding is None:
            return per_replica(of_tokens).mean((1, 2))
        mask = padding.mask_BL.reshape(padding.mask_BL.shape + (1,) * (of_tokens.ndim - 2))
        return per_replica(jnp.where(mask, 0, of_tokens)).sum((1, 2)) / divisor(padding.tokens / replicas())

    specs = token_spec(3), token_spec(3), token_spec(3)
    given = (ranking_BLE, scores_BLE) if padding is None else (ranking_BLE, scores_BLE, padding.mask_BL)
    experts_BLK, gates_BLK, moved_BL1 = on_each_rank(choose, given, out_specs=specs)
    if choices is not None:
        taken_11K = (jnp.arange(config.choices) < choices)[None, None]
        experts_BLK, gates_BLK = (
            jnp.where(taken_11K, experts_BLK, config.expert_count),
            jnp.where(taken_11K, gates_BLK, 0),
        )
    # A single gate over itself would be 1, and no gradient of the loss would reach the router.
    if config.router_renormalize and config.choices > 1:
        gates_BLK = gates_BLK / jnp.maximum(gates_BLK.sum(-1, keepdims=True), 1e-20)
    return Routing(
        gates_BLK * config.router_scale,
        experts_BLK,
        config.choices if choices is None else choices,
        mean(shares_BLE),
        mean(jnp.square(jax.nn.logsumexp(logits_BLE, axis=-1))),
        mean(-(shares_BLE * jnp.log(jnp.maximum(shares_BLE, 1e-20))).sum(-1)),
        mean(moved_BL1) if place else jnp.zeros((1, 0)),
    )


def _in_best_groups(config: ModelConfig, ranking_BLE: Array) -> Array:
    """Node-limited choice: -inf outside the top_groups groups whose `group_best` best scores have the largest sums."""
    groups = config.num_expert_groups
    if groups == config.top_groups:
        return ranking_BLE
    B, L, E = ranking_BLE.shape
    grouped_BLGe = ranking_BLE.reshape(B, L, groups, E // groups)
    strength_BLG = jax.lax.top_k(grouped_BLGe, config.group_best)[0].sum(-1)
    chosen_BLg = jax.lax.top_k(strength_BLG, config.top_groups)[1]
    allowed_BLG = jax.nn.one_hot(chosen_BLg, groups, dtype=jnp.bool_).any(-2)
    return jnp.where(allowed_BLG[..., None], grouped_BLGe, -jnp.inf).reshape(B, L, E)
