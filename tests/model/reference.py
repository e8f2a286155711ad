"""The whole model on one device, written from the mathematics: loops over layers, heads and experts, no sharding.

Every expert is applied to every token and weighted by a gate, which is zero where the expert was not chosen. Parameters
come as a flat dict of arrays by name (`tools.leaves`), layers stacked along the first dimension.

B batch, L length, D hidden, N heads, H head size, E experts, V vocabulary.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bigmac_jax.config import ModelConfig

Parameters = dict[str, Any]


class Layer(NamedTuple):
    balance_loss: Any = 0.0
    z_loss: Any = 0.0
    load: Any = ()
    experts: Any = ()  # first choice first


def reference(config: ModelConfig, p: Parameters, tokens_BL: Any) -> tuple[Array, list[Layer]]:
    """Logits, and what each layer's router reports."""
    with jax.numpy_rank_promotion("allow"):
        L = tokens_BL.shape[1]
        x_BLD = p["embedding_VD"][tokens_BL]
        if config.positions == "learned":
            x_BLD = x_BLD + p["positions_LD"][:L]
        if config.scale_embedding:
            x_BLD = x_BLD * config.hidden_size**0.5
        reports = []
        for i in range(config.num_layers):
            first = config.first_dense_layers
            stack, number = ("first", i) if i < first else ("layers", i - first)
            layer = {name: value[number] for name, value in part(p, stack).items()}
            x_BLD = x_BLD + attention(
                config, part(layer, "attention"), norm(config, config.norm, part(layer, "attention_norm"), x_BLD)
            )
            h_BLD, given = norm(config, config.norm, part(layer, "mlp_norm"), x_BLD), part(layer, "mlp")
            if stack == "first":
                x_BLD = x_BLD + mlp(config, given, h_BLD)
                continue
            y_BLD, report = feed_forward(config, given, h_BLD)
            x_BLD = x_BLD + y_BLD
            reports.append(report)
        x_BLD = norm(config, config.norm, part(p, "final_norm"), x_BLD)
        out_VD = p["embedding_VD"] if config.tie_embeddings else p["unembedding_VD"]
        return x_BLD @ out_VD.T, reports


def part(p: Parameters, name: str) -> Parameters:
    return {key.removeprefix(name + "."): value for key, value in p.items() if key.startswith(name + ".")}


def norm(config: ModelConfig, kind: str, p: Parameters, x: Array) -> Array:
    if kind == "layernorm":
        mean = x.mean(-1, keepdims=True)
        variance = ((x - mean) ** 2).mean(-1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + config.norm_eps) * p["scale_D"] + p["bias_D"]
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * p["scale_D"]


def linear(p: Parameters, x: Array) -> Array:
    return x @ p["w_DF"] + p.get("b_F", 0.0)


def sigma(config: ModelConfig, x: Array) -> Array:
    if config.activation == "relu2":
        return jnp.where(x > 0, x, 0.0) ** 2
    if config.activation == "silu":
        return x / (1 + jnp.exp(-x))
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))  # GPT-2's GELU


def turn(x_BLH: Array, theta: float) -> Array:
    """RoPE as a complex product: entries i and i + H/2 are the real and imaginary part of one number."""
    L, H = x_BLH.shape[1:]
    angle = jnp.array([[t * theta ** (-2 * i / H) for i in range(H // 2)] for t in range(L)])
    z = (x_BLH[..., : H // 2] + 1j * x_BLH[..., H // 2 :]) * jnp.exp(1j * angle)
    return jnp.concatenate([z.real, z.imag], -1)


def attention(config: ModelConfig, p: Parameters, x_BLD: Array) -> Array:
    B, L, _ = x_BLD.shape
    H, sharing = config.head_size, config.num_heads // config.kv_heads
    q, k, v = (linear(part(p, name), x_BLD).reshape(B, L, -1, H) for name in ("query", "key", "value"))
    future_LL = jnp.arange(L)[None, :] > jnp.arange(L)[:, None]
    heads = []
    for n in range(config.num_heads):
        q_BLH, k_BLH, v_BLH = q[:, :, n], k[:, :, n // sharing], v[:, :, n // sharing]
        if config.qk_norm:
            q_BLH, k_BLH = (
                norm(config, "rmsnorm", part(p, "query_norm"), q_BLH),
                norm(config, "rmsnorm", part(p, "key_norm"), k_BLH),
            )
        if config.positions == "rope":
            q_BLH, k_BLH = turn(q_BLH, config.rope_theta), turn(k_BLH, config.rope_theta)
        scores_BLL = jnp.where(future_LL, -jnp.inf, q_BLH @ k_BLH.swapaxes(1, 2) / math.sqrt(H))
        heads.append(jax.nn.softmax(scores_BLL, axis=-1) @ v_BLH)
    return linear(part(p, "out"), jnp.concatenate(heads, -1))


def mlp(config: ModelConfig, p: Parameters, x_BLD: Array) -> Array:
    up = linear(part(p, "up"), x_BLD)
    hidden = sigma(config, linear(part(p, "gate"), x_BLD)) * up if config.gated else sigma(config, up)
    return linear(part(p, "down"), hidden)


def expert(config: ModelConfig, p: Parameters, i: int, x: Array) -> Array:
    """Equation 4: σ(x W↑) W↓."""
    up = x @ p["w_in_eRF"][i] + (p["b_in_eF"][i] if config.use_bias else 0.0)
    hidden = sigma(config, up)
    if config.gated:
        hidden = sigma(config, x @ p["w_gate_eRF"][i] + (p["b_gate_eF"][i] if config.use_bias else 0.0)) * up
    return hidden @ p["w_out_eFR"][i] + (p["b_out_eR"][i] if config.use_bias else 0.0)


def feed_forward(config: ModelConfig, p: Parameters, x_BLD: Array) -> tuple[Array, Layer]:
    if config.structure == "dense":
        return mlp(config, p, x_BLD), Layer()
    gates_BLE, report = router(config, p, x_BLD)
    bigmac = config.structure == "bigmac"
    x_BLR = linear(part(p, "down"), x_BLD) if bigmac else x_BLD
    if config.latent_norm == "pre_dispatch":
        x_BLR = norm(config, config.norm, part(p, "dispatch_norm"), x_BLR)
    experts = part(p, "experts")
    y_BLR = sum(gates_BLE[..., i, None] * expert(config, experts, i, x_BLR) for i in range(config.expert_count))
    gate = config.latent_norm == "gate"
    skip = gate or config.latent_norm == "skip" or (config.latent_norm, bigmac) == ("auto", True)
    if skip:
        y_BLR = y_BLR + p["skip_1"] * x_BLR
    if skip or config.latent_norm == "post_combine":
        y_BLR = norm(config, config.norm, part(p, "combine_norm"), y_BLR)
    y_BLD = linear(part(p, "up"), y_BLR) if bigmac else y_BLR
    if gate:
        y_BLD = y_BLD * (1 + linear(part(p, "gate"), x_BLD))
    return y_BLD + (mlp(config, part(p, "shared"), x_BLD) if config.num_shared_experts else 0.0), report


def made_logits(p: Parameters, x_BLD: Array) -> Array:
    """W x + b, of what a network puts out: an expert's row and bias are a sum over its hidden units."""
    hidden_H = p["vector_D"] @ p["in_DH"]
    hidden_H = jnp.where(hidden_H > 0, hidden_H, 0.0)
    w_DE = sum(hidden_H[h] * p["out_DHE"][:, h] for h in range(len(hidden_H)))
    return x_BLD @ w_DE + sum(hidden_H[h] * p["out_HE"][h] for h in range(len(hidden_H)))


def router(config: ModelConfig, p: Parameters, x_BLD: Array) -> tuple[Array, Layer]:
    """A gate for every expert, zero unless chosen."""
    E, K = config.expert_count, config.choices
    logits_BLE = x_BLD @ p["router_DE"] if "router_DE" in p else made_logits(part(p, "hyper"), x_BLD)
    logits_BLE = logits_BLE + p.get("router_logit_bias_E", 0.0)
    if config.router_scores == "softmax":
        scores_BLE = normalised_BLE = jax.nn.softmax(logits_BLE, axis=-1)
    else:
        scores_BLE = 1 / (1 + jnp.exp(-logits_BLE))
        normalised_BLE = scores_BLE / scores_BLE.sum(-1, keepdims=True)
    experts_BLK = choose(config, jax.lax.stop_gradient(scores_BLE) + p.get("router_bias_E", 0.0))
    chosen_BLE = one_of(experts_BLK, E)
    gates_BLE = jnp.where(chosen_BLE, scores_BLE, 0.0)
    if config.router_renormalize and K > 1:
        gates_BLE = gates_BLE / gates_BLE.sum(-1, keepdims=True)
    load_E = chosen_BLE.mean((0, 1)) / K
    balance_loss = E * (load_E * normalised_BLE.mean((0, 1))).sum()
    z_loss = (jnp.log(jnp.exp(logits_BLE).sum(-1)) ** 2).mean()
    return gates_BLE * config.router_scale, Layer(balance_loss, z_loss, load_E, experts_BLK)


def choose(config: ModelConfig, ranking_BLE: Array) -> Array:
    """The K best experts, inside the best groups."""
    E, K, groups, top_groups = config.expert_count, config.choices, config.num_expert_groups, config.top_groups
    if top_groups < groups:
        size = E // groups
        members = [ranking_BLE[..., g * size : (g + 1) * size] for g in range(groups)]
        best = max(1, min(K // top_groups, size))
        strength_BLG = jnp.stack([jnp.sort(m)[..., size - best :].sum(-1) for m in members], -1)
        allowed_BLG = one_of(largest(strength_BLG, top_groups), groups)
        ranking_BLE = jnp.where(jnp.repeat(allowed_BLG, size, -1), ranking_BLE, -jnp.inf)
    return largest(ranking_BLE, K)


def largest(v: Array, count: int) -> Array:
    """Indices of the `count` largest entries of the last dimension, the first of equal ones first."""
    indices = []
    for _ in range(count):
        indices.append(v.argmax(-1))
        v = jnp.where(one_of(indices[-1][..., None], v.shape[-1]), -jnp.inf, v)
    return jnp.stack(indices, -1)


def one_of(indices: Array, size: int) -> Array:
    """Mask of the entries that `indices` name."""
    return (indices[..., None] == jnp.arange(size)).any(-2)
