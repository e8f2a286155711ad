"""What keeps the experts' loads even: a loss, or a bias that shifts the choice and is moved after each step.

T tokens of the step, E experts, K top-k, Y layers, U replicas.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from bigmac_jax.config import Config, ModelConfig
from bigmac_jax.model.gathering import on_each_rank
from bigmac_jax.model.layers import divisor, last_axes
from bigmac_jax.model.mesh import per_replica, rank_spec, replicated_spec, token_spec
from bigmac_jax.model.router import Padding

_BINS = 1000  # of the histogram of required biases (Kimi K3's report)
_NEAREST = 1e-6  # the first edges beside an expert's bias, of the range
BALANCE_BIAS = "evened"  # what `balance_bias` gives: execution.remat keeps it, whatever else it computes again
# `balance_bias`: steps of the dual, and how each finds its quantiles: by 16 parts of a range five times, to 1e-6 of it.
_DUAL_STEPS, _PARTS, _SEARCHES = 4, 16, 5
QUANTILE_SUMS = _DUAL_STEPS * _SEARCHES  # of counts, over all ranks


def balance_loss(shares_E: Array, load_E: Array) -> Array:
    """E · Σ_e f_e · P_e (Switch Transformer, equation 4): 1 at uniform routing, E when one expert takes all.

    `load_E` is f, the share of all (token, choice) pairs that went to each expert, drops included.
    """
    return shares_E.size * jnp.sum(jax.lax.stop_gradient(load_E) * shares_E)


def balance_losses(shares_YUE: Array, load_YUE: Array, load_YE: Array | None = None) -> Array:
    """The balance loss of each layer, in means over each replica's tokens [Y, U].

    Args:
      load_YE: the load of a step that these tokens are a part of; by default it is these tokens'.
    """
    if load_YE is None:
        load_YE = load_YUE.mean(1)
        here_Y1 = 1 / divisor(load_YE.sum(-1, keepdims=True))  # not 1 where means are of more tokens than these
        load_YE, shares_YUE = load_YE * here_Y1, shares_YUE * here_Y1[:, None]
    return jax.vmap(jax.vmap(balance_loss, (0, None)))(shares_YUE, load_YE)


def required_bias(config: Config, scores_BLE: Array, bias_E: Array, padding: Padding | None) -> Array:
    """Counts, for each expert, the biases with which tokens would choose it: the input of `solve_bias`.

    A token chooses an expert whose score and bias exceed its cut, the K+1st best of all experts, so that the bias that
    it requires is cut - score. Returns the cumulative counts at the `_edges` [U, E, bins + 1]; or, of a batch that is
    small enough, all required biases, sorted, [1, E, T].
    """
    m = config.model
    scores_BLE = jax.lax.stop_gradient(scores_BLE)

    required = functools.partial(_required, m)
    if config.sorts_biases:
        required_BLE = required(jax.sharding.reshard(scores_BLE, replicated_spec(3)), bias_E)
        return jnp.sort(required_BLE.reshape(-1, m.expert_count).T)[None]

    def counted(scores_BLE: Array, bias_E: Array, edges_Eb: Array, *mask: Array) -> Array:
        required_TE = required(scores_BLE, bias_E).reshape(-1, m.expert_count)
        within_TEb = required_TE[..., None] <= edges_Eb[None]
        if mask:
            within_TEb &= ~mask[0].reshape(-1, 1, 1)
        return within_TEb.sum(0, dtype=jnp.float32)[None]

    given, specs = [scores_BLE, bias_E, _edges(bias_E)], [token_spec(3), replicated_spec(1), replicated_spec(2)]
    if padding is not None:
        given, specs = [*given, padding.mask_BL], [*specs, token_spec(2)]
    return per_replica(on_each_rank(counted, given, in_spec=specs, out_specs=rank_spec(3))).sum(1)


def _edges(bias_E: Array) -> Array:
    """Edges of the bins, the closer to each other the nearer they are to an expert's bias, which moves little from step
    to step: scores of a softmax over hundreds of experts differ by less than a thousandth → [..., E, bins + 1].

    A cut lies between two experts' scores and biases, so scores of up to 1 require nothing outside.
    """
    side = _NEAREST ** jnp.linspace(1.0, 0.0, _BINS // 2)
    around = jnp.concatenate([-side[::-1], jnp.zeros(1), side])
    reach = (bias_E.max(-1, keepdims=True) - bias_E.min(-1, keepdims=True) + 1)[..., None]
    return bias_E[..., None] + reach * last_axes(around, reach)


def _required(m: ModelConfig, scores_BLE: Array, bias_E: Array) -> Array:
    """[B, L, E], on one rank."""
    best_BLK1 = jax.lax.top_k(scores_BLE + bias_E.reshape(1, 1, -1), m.choices + 1)[0]
    # Not its last column: of a slice of a top-k XLA makes a sort, which takes six times as long on CPU.
    return best_BLK1.min(-1, keepdims=True) - scores_BLE


def balance_bias(m: ModelConfig, scores_BLE: Array, bias_E: Array, padding: Padding | None) -> Array:
    """Solves for the bias with which these very tokens share the experts nearly evenly, by `_DUAL_STEPS` from `bias_E`.

    Each finds the quantiles of `solve_bias` by a search, for which ranks exchange counts alone, and takes the bias just
    below what the next token requires.
    """
    scores_BLE, required = jax.lax.stop_gradient(scores_BLE), functools.partial(_required, m)
    specs = [token_spec(3), replicated_spec(1)]
    tokens = jnp.float32(scores_BLE.size // m.expert_count) if padding is None else jnp.sum(~padding.mask_BL)
    wanted = tokens * (m.choices / m.expert_count) + 0.5  # the nearest whole number

    def dual_step(_: int, bias_E: Array) -> Array:
        required_BLE = on_each_rank(required, (scores_BLE, bias_E), in_spec=specs, out_specs=token_spec(3))
        if padding is not None:
            required_BLE = jnp.where(padding.mask_BL[..., None], jnp.inf, required_BLE)
        required_E1BL = jnp.moveaxis(required_BLE, -1, 0)[:, None]

        def searched(_: int, at: tuple[Array, Array]) -> tuple[Array, Array]:
            low_E, part = at[0], at[1] / _PARTS
            edges_Ep = low_E[:, None] + part * jnp.arange(1.0, _PARTS)[None]
            within_EpBL = required_E1BL <= edges_Ep[..., None, None]
            return low_E + part * (within_EpBL.sum((2, 3), dtype=jnp.float32) < wanted).sum(-1), part

        whole = jnp.full_like(bias_E, bias_E.min() - 1), bias_E.max() - bias_E.min() + 2
        low_E, _ = jax.lax.fori_loop(0, _SEARCHES, searched, whole)
        return low_E - low_E.mean()

    return checkpoint_name(jax.lax.fori_loop(0, _DUAL_STEPS, dual_step, bias_E), BALANCE_BIAS)


def solve_bias(config: Config, required: Array, bias_E: Array) -> Array:
    """Quantile balancing (Kimi K3): the bias that as many tokens require at most as each expert is to have, T·K/E.

    One step of the dual of the balanced assignment: cuts are of the biases before.
    """
    share = config.model.choices / config.model.expert_count
    if config.sorts_biases:
        T = required.shape[-1]
        count = min(max(round(T * share), 1), T - 1)
        bias_E = (required[..., count - 1] + required[..., count]) / 2
    else:
        bias_E = _quantile(required, share, bias_E)
    return bias_E - bias_E.mean(-1, keepdims=True)


def _quantile(cumulative: Array, share: float, bias_E: Array) -> Array:
    """The value at which a count that grows evenly inside each bin reaches `share` of all."""
    wanted = share * cumulative[..., -1:]
    last = jnp.argmax(cumulative >= wanted, axis=-1, keepdims=True)  # the first edge that reaches it
    edges, two = _edges(bias_E), (jnp.maximum(last - 1, 0), last)
    (below, above), (low, high) = ([jnp.take_along_axis(v, n, axis=-1) for n in two] for v in (cumulative, edges))
    inside = (wanted - below) / jnp.maximum(above - below, 1e-6)  # counts may be means over parts
    return (low + inside * (high - low))[..., 0]


def update_bias(config: Config, bias_YE: Array, load_YE: Array, quantile_stats: Array) -> Array:
    """The router's bias after a step. balance=bias is DeepSeek-V3's: an expert above the mean load becomes less likely.

    Args:
      quantile_stats: what `required_bias` gave, or with balance_step=same `balance_bias`, in means over the parts.
    """
    m: ModelConfig = config.model
    if m.balance == "quantile":
        return quantile_stats if m.balance_step == "same" else solve_bias(config, quantile_stats, bias_YE)
    return bias_YE + m.balance_bias_rate * jnp.sign(1 / m.expert_count - load_YE)
