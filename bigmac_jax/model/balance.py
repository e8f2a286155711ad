"""What keeps the experts' loads even: a loss, or a bias that shifts the choice and is moved after each step.

T tokens of the step, E experts, K top-k.
"""

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.config import Config, ModelConfig
from bigmac_jax.mesh import on_each_rank, rank_spec, replicated_spec, token_spec

_BINS = 1000  # of the histogram of required biases (Kimi K3's report)
_MOST_SORTED = 2**22  # entries of [T, E] up to which they are sorted on every rank


def balance_loss(shares_E: Array, load_E: Array) -> Array:
    """E · Σ_e f_e · P_e (Switch Transformer, equation 4): 1 at uniform routing, E when one expert takes all.

    `load_E` is f, the share of all (token, choice) pairs that went to each expert, drops included.
    """
    return shares_E.size * jnp.sum(jax.lax.stop_gradient(load_E) * shares_E)


def required_bias(config: Config, scores_BLE: Array, bias_E: Array, padding_BL: Array | None) -> Array:
    """What `solved` takes: of each expert and token the bias with which the token would choose the expert, counted.

    A token chooses an expert whose score and bias exceed its cut, the K+1st best of all experts, so that the bias that
    it requires is cut - score. Returns the cumulative counts at the edges of `_BINS` bins [E, bins + 1]; or, of a batch
    that is small enough, all required biases, sorted, [E, T].
    """
    m = config.model
    scores_BLE = jax.lax.stop_gradient(scores_BLE)
    edges = bias_E.min() - 1 + jnp.linspace(0.0, 1.0, _BINS + 1) * (bias_E.max() - bias_E.min() + 2)

    def required(scores_BLE: Array, bias_E: Array) -> Array:
        """[T, E]"""
        cut_BL1 = jax.lax.top_k(scores_BLE + bias_E.reshape(1, 1, -1), m.choices + 1)[0][..., -1:]
        return (cut_BL1 - scores_BLE).reshape(-1, m.expert_count)

    if sorts(config):
        return jnp.sort(required(jax.sharding.reshard(scores_BLE, replicated_spec(3)), bias_E).T)

    def counted(scores_BLE: Array, bias_E: Array, edges: Array, *padding: Array) -> Array:
        within_TEb = required(scores_BLE, bias_E)[..., None] <= edges.reshape(1, 1, -1)
        if padding:
            within_TEb &= ~padding[0].reshape(-1, 1, 1)
        return within_TEb.sum(0, dtype=jnp.float32)[None]

    given, specs = [scores_BLE, bias_E, edges], [token_spec(3), replicated_spec(1), replicated_spec(1)]
    if padding_BL is not None:
        given, specs = [*given, padding_BL], [*specs, token_spec(2)]
    return on_each_rank(counted, given, in_spec=specs, out_specs=rank_spec(3)).sum(0)


def sorts(config: Config) -> bool:
    """Whether required biases are sorted, not counted: a batch that is small, in one part, and has no padding."""
    entries = config.data.batch_size * config.data.sequence_length * config.model.expert_count
    whole = config.train.accumulate_steps == 1 and not config.has_segments
    return whole and entries <= _MOST_SORTED


def solved(config: Config, required: Array, bias_E: Array) -> Array:
    """Quantile balancing (Kimi K3): the bias that as many tokens require at most as each expert is to have, T·K/E.

    One step of the dual of the balanced assignment: cuts are of the biases before.
    """
    share = config.model.choices / config.model.expert_count
    if sorts(config):
        T = required.shape[-1]
        count = min(max(round(T * share), 1), T - 1)
        bias_E = (required[..., count - 1] + required[..., count]) / 2
    else:
        bias_E = _quantile(required, share, bias_E)
    return bias_E - bias_E.mean(-1, keepdims=True)


def _quantile(cumulative: Array, share: float, bias_E: Array) -> Array:
    """Where a count that grows evenly inside each bin reaches `share` of all."""
    wanted = share * cumulative[..., -1:]
    last = jnp.argmax(cumulative >= wanted, axis=-1, keepdims=True)  # the first edge that reaches it
    above, below = (jnp.take_along_axis(cumulative, jnp.maximum(last - n, 0), axis=-1) for n in (0, 1))
    inside = (wanted - below) / jnp.maximum(above - below, 1e-6)  # counts may be means over parts
    width = (bias_E.max(-1, keepdims=True) - bias_E.min(-1, keepdims=True) + 2) / _BINS
    return (bias_E.min(-1, keepdims=True) - 1 + width * (last - 1 + inside)[..., 0]).astype(jnp.float32)


def updated_bias(config: Config, bias_YE: Array, load_YE: Array, required: Array) -> Array:
    """After a step. balance=bias is DeepSeek-V3's: experts with more than the mean load become less attractive."""
    m: ModelConfig = config.model
    if m.balance == "quantile":
        return solved(config, required, bias_YE)
    return bias_YE + m.balance_bias_rate * jnp.sign(1 / m.expert_count - load_YE)
