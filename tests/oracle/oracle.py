"""The loss and gradients of one training step, written from the mathematics: float64, one device, nothing split.

Every expert is computed for every token and weighted, logits are whole, documents are a mask, and the batch is one
part: which rows make which part matters only to what the documentation says is of a part. Nothing of the program is
called. It gives the parameters' values, by name, and the fields of its config. The equations are those of
docs/model.md, docs/training.md, docs/finetune.md, docs/conversion.md and docs/data.md.

B rows, L length, D hidden, n heads, H head size, R row width, E experts, K top-k, V vocabulary, Y layers with experts,
M parts of the batch.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigmac_jax.config import Config, ModelConfig

Values = dict[str, Any]  # arrays by name


class Sample(NamedTuple):
    """What a step is given; NumPy arrays of the host."""

    inputs_BL: Any
    targets_BL: Any  # negative: none
    segments_BL: Any  # negative: of no document
    reference_BL: Any  # -log p of each target under the reference of preferences, if it is given


class Given(NamedTuple):
    """Values of a step that no gradient is taken of."""

    rest: Values  # the routers' biases
    solved: Values  # with balance_step=same: those that the program chose by
    base: Values  # of adapters: the model's own parameters
    teacher: Values
    teacher_rest: Values


class Layers(NamedTuple):
    """What the layers with experts, stacked, report of the step."""

    balance_Y: Any
    z_Y: Any
    load_YE: Any
    entropy_Y: Any
    bias_YE: Any  # with balance_step=same: what the bias should be
    margin: Any  # the least distance between a score that was chosen by and the next one, of real tokens


class Report(NamedTuple):
    text: Any  # cross-entropy, or the loss of preferences
    layers: Layers
    divergence: Any
    hidden_Y: Any
    accuracy: Any
    reward_margin: Any
    reward_size: Any  # mean over pairs of |margin|


class Expected(NamedTuple):
    loss: Any
    gradients: Values
    report: Report


class Routed(NamedTuple):
    """Of each token, by a router."""

    gates_BLE: Any  # zero where an expert was not chosen
    chosen_BLE: Any
    shares_BLE: Any  # scores that sum to one
    logits_BLE: Any
    bias_E: Any  # with balance_step=same: what the bias should be
    margin_BL: Any


class Oracle:
    """The step of a config, compiled once, in float64."""

    def __init__(self, config: Config, teacher: Config | None = None):
        def of_step(trained: Values, given: Given, sample: Sample) -> tuple[Any, Report]:
            return loss(config, teacher, trained, given, sample)

        gradient = jax.value_and_grad(of_step, has_aux=True)
        self._step = jax.jit(gradient, compiler_options={"xla_backend_optimization_level": 0})

    def __call__(self, trained: Values, given: Given, sample: Sample) -> Expected:
        def wide(value: Any) -> Any:
            value = np.asarray(value)
            return value.astype(np.float64) if value.dtype.kind == "f" else value

        with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
            of_step = jax.tree.map(wide, (trained, given, sample))
            (value, report), gradients = jax.tree.map(np.asarray, self._step(*of_step))
        assert value.dtype == np.float64 and all(g.dtype == np.float64 for g in gradients.values())
        return Expected(value, gradients, report)


def loss(config: Config, teacher: Config | None, trained: Values, given: Given, sample: Sample) -> tuple[Any, Report]:
    """What the gradient is taken of, of the whole step."""
    m, tuning = config.model, config.tuning
    biases = {**given.rest, **{f"{name}.solved": value for name, value in given.solved.items()}}
    p = with_adapters(config, given.base, trained) if tuning.lora_rank else trained
    if not tuning.train_router:
        p = {name: jax.lax.stop_gradient(v) if is_router(name) else v for name, v in p.items()}
    x_BLD, streams, layers = through(config, p, biases, sample, config.train.choices_from)  # of the first step
    log_p_BLV = log_softmax(x_BLD @ table(m, p).T)
    nll_BL = picked(log_p_BLV, sample.targets_BL)
    counts_BL = sample.targets_BL >= 0
    divergence = hidden_Y = jnp.zeros(())
    rewards = [jnp.zeros(())] * 3
    if tuning.objective == "dpo":
        reference_BL = sample.reference_BL
        if tuning.lora_rank:  # the model without its adapters
            base_BLD, _, of_base = through(config, given.base, biases, sample)
            reference_BL = picked(log_softmax(base_BLD @ table(m, given.base).T), sample.targets_BL)
            reference_BL = jax.lax.stop_gradient(reference_BL)
            layers = layers._replace(margin=jnp.minimum(layers.margin, of_base.margin))
        gain_BL = jnp.where(counts_BL, reference_BL - nll_BL, 0.0)  # log p - log p of the reference
        text, *rewards = preferences(tuning.dpo_beta, gain_BL, sample.segments_BL)
    else:
        text = jnp.where(counts_BL, nll_BL, 0.0).sum() / counts_BL.sum()
    total = text
    if teacher is not None:
        t_BLD, of_teacher, taught = through(teacher, given.teacher, given.teacher_rest, sample)
        log_q_BLV = log_softmax(t_BLD @ table(teacher.model, given.teacher).T)
        kl_BL = (jnp.exp(log_q_BLV) * (log_q_BLV - log_p_BLV)).sum(-1)
        divergence = jnp.where(counts_BL, kl_BL, 0.0).sum() / counts_BL.sum()
        hidden_Y = jnp.stack(
            [gap(config, x, t, counts_BL) for x, t in zip(streams, of_teacher, strict=True)][m.first_dense_layers :]
        )
        total = (1 - tuning.teacher_weight) * text + tuning.teacher_weight * divergence
        total = total + tuning.hidden_weight * hidden_Y.mean()
        layers = layers._replace(margin=jnp.minimum(layers.margin, taught.margin))
    total = total + m.z_loss_coefficient * jnp.sum(layers.z_Y)
    if m.balance == "aux_loss":
        total = total + m.balance_coefficient * jnp.sum(layers.balance_Y)
    return total, Report(text, layers, divergence, hidden_Y, *rewards)


def gap(config: Config, x_BLD: Any, t_BLD: Any, counts_BL: Any) -> Any:
    """|x - x'|² / |x'|² over the targets of a part, mean over the parts (`training.distillation`)."""
    M, parts = config.train.accumulate_steps, []
    for m in range(M):
        x, t, counts = x_BLD[m::M], jax.lax.stop_gradient(t_BLD[m::M]), counts_BL[m::M, :, None]
        size = jnp.where(counts, t**2, 0.0).sum()
        distance = jnp.where(counts, (x - t) ** 2, 0.0).sum()
        parts.append(jnp.where(size > 0, distance / jnp.where(size > 0, size, 1.0), 0.0))
    return sum(parts) / M


def preferences(beta: float, gain_BL: Any, segments_BL: Any) -> tuple[Any, Any, Any, Any]:
    """Means over all pairs: DPO's loss, whether they are in order, the difference of the rewards, and its size."""
    losses, right, margins, sizes, count = 0.0, 0.0, 0.0, 0.0, 0.0
    for pair in range((gain_BL.shape[1] + 1) // 2):
        chosen_B, other_B = (
            jnp.where(segments_BL == segment, gain_BL, 0.0).sum(1) for segment in (2 * pair, 2 * pair + 1)
        )
        there_B = (segments_BL == 2 * pair).any(1)
        margin_B = beta * (chosen_B - other_B)
        losses += jnp.where(there_B, jnp.log1p(jnp.exp(-margin_B)), 0.0).sum()  # -log sigmoid
        right += (there_B & (margin_B > 0)).sum()
        margins += jnp.where(there_B, margin_B, 0.0).sum()
        sizes += jnp.where(there_B, abs(margin_B), 0.0).sum()
        count += there_B.sum()
    return losses / count, right / count, margins / count, sizes / count


# The model.


def is_router(name: str) -> bool:
    return name.removesuffix(".a").removesuffix(".b").endswith(("router_DE", "router_logit_bias_E", "hyper.vector_D"))


def with_adapters(config: Config, base: Values, adapters: Values) -> Values:
    """W + (alpha / rank) A B wherever there is a pair."""
    scale = config.tuning.lora_alpha / config.tuning.lora_rank
    base = {name: jax.lax.stop_gradient(value) for name, value in base.items()}
    for name in {name[: -len(".a")] for name in adapters}:
        base[name] = base[name] + scale * jnp.matmul(adapters[name + ".a"], adapters[name + ".b"])
    return base


def under(p: Values, name: str) -> Values:
    return {key[len(name) + 1 :]: value for key, value in p.items() if key.startswith(name + ".")}


def table(m: ModelConfig, p: Values) -> Any:
    return p["embedding_VD"] if m.tie_embeddings else p["unembedding_VD"]


def through(config: Config, p: Values, rest: Values, sample: Sample, taken: int = 0) -> tuple[Any, list[Any], Layers]:
    """The normalised features, the residual stream behind each layer, and what the routers report.

    Args:
      taken: how many experts a token is sent to; 0: the config's.
    """
    m = config.model
    same_BLL = sample.segments_BL[:, :, None] == sample.segments_BL[:, None, :]
    L = sample.inputs_BL.shape[1]
    before_LL = jnp.tril(jnp.ones((L, L), bool))
    sees_BLL = same_BLL & before_LL
    position_BL = sees_BLL.sum(-1) - 1  # documents are contiguous
    real_BL = sample.segments_BL >= 0
    x_BLD = p["embedding_VD"][sample.inputs_BL]
    if m.positions == "learned":
        x_BLD = x_BLD + p["positions_LD"][position_BL]
    if m.scale_embedding:
        x_BLD = x_BLD * math.sqrt(m.hidden_size)
    streams, found = [], []
    for i in range(m.num_layers):
        stack, number = ("first", i) if i < m.first_dense_layers else ("layers", i - m.first_dense_layers)
        layer, state = ({k: v[number] for k, v in under(values, stack).items()} for values in (p, rest))
        h_BLD = norm(m, m.norm, under(layer, "attention_norm"), x_BLD)
        x_BLD = x_BLD + attention(m, under(layer, "attention"), h_BLD, sees_BLL, position_BL)
        h_BLD = norm(m, m.norm, under(layer, "mlp_norm"), x_BLD)
        given = under(layer, "mlp")
        if stack == "first" or m.structure == "dense":
            x_BLD = x_BLD + mlp(m, given, h_BLD)
        else:
            routed = router(m, taken, given, under(state, "mlp"), h_BLD, real_BL)
            x_BLD = x_BLD + experts(m, given, routed.gates_BLE, h_BLD)
            found.append(statistics(config, routed, real_BL))
        streams.append(x_BLD)
    features_BLD = norm(m, m.norm, under(p, "final_norm"), x_BLD)
    if not found:
        return features_BLD, streams, Layers(*[jnp.zeros((0,))] * 5, jnp.inf)
    stacked = [jnp.stack(values) for values in zip(*found, strict=True)]
    return features_BLD, streams, Layers(*stacked[:-1], stacked[-1].min())


def norm(m: ModelConfig, kind: str, p: Values, x: Any) -> Any:
    if kind == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + m.norm_eps) * p["scale_D"]
    return x + p["bias_D"] if kind == "layernorm" else x


def linear(p: Values, x: Any) -> Any:
    y = x @ p["w_DF"]
    return y + p["b_F"] if "b_F" in p else y


def sigma(m: ModelConfig, x: Any) -> Any:
    if m.activation == "relu2":
        return jnp.where(x > 0, x * x, 0.0)
    if m.activation == "silu":
        return x / (1 + jnp.exp(-x))
    return x / 2 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))  # GPT-2's


def mlp(m: ModelConfig, p: Values, x: Any) -> Any:
    up = linear(under(p, "up"), x)
    return linear(under(p, "down"), sigma(m, linear(under(p, "gate"), x)) * up if m.gated else sigma(m, up))


def turned(x_BLnH: Any, theta: float, position_BL: Any) -> Any:
    """Pairs (i, i + H/2) turn by position · theta^(-2i/H)."""
    half = x_BLnH.shape[-1] // 2
    angle_BL1h = position_BL[:, :, None, None] * theta ** (-2.0 * jnp.arange(half) / (2 * half))
    a, b = x_BLnH[..., :half], x_BLnH[..., half:]
    cos, sin = jnp.cos(angle_BL1h), jnp.sin(angle_BL1h)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def attention(m: ModelConfig, p: Values, x_BLD: Any, sees_BLL: Any, position_BL: Any) -> Any:
    B, L, _ = x_BLD.shape
    q, k, v = (linear(under(p, name), x_BLD).reshape(B, L, -1, m.head_size) for name in ("query", "key", "value"))
    if m.qk_norm:
        q, k = (norm(m, "rmsnorm", under(p, f"{name}_norm"), v) for name, v in (("query", q), ("key", k)))
    if m.positions == "rope":
        q, k = (turned(v, m.rope_theta, position_BL) for v in (q, k))
    heads = []
    for n in range(m.num_heads):
        g = n // (m.num_heads // m.kv_heads)
        scores_BLL = jnp.einsum("BiH,BjH->Bij", q[:, :, n], k[:, :, g]) / math.sqrt(m.head_size)
        e_BLL = jnp.where(sees_BLL, jnp.exp(jnp.where(sees_BLL, scores_BLL, 0.0)), 0.0)
        heads.append((e_BLL / e_BLL.sum(-1, keepdims=True)) @ v[:, :, g])
    return linear(under(p, "out"), jnp.concatenate(heads, -1))


def experts(m: ModelConfig, p: Values, gates_BLE: Any, x_BLD: Any) -> Any:
    """y = (1 + x W_g) ⊙ (n(Σ p_i(x) E_i(x') + α x') W↑) + shared(x), with what of it latent_norm and structure have."""
    bigmac = m.structure == "bigmac"
    kind = m.latent_norm
    if kind == "auto":
        kind = "skip" if bigmac else "none"
    x_BLR = linear(under(p, "down"), x_BLD) if bigmac else x_BLD
    if kind == "pre_dispatch":
        x_BLR = norm(m, m.norm, under(p, "dispatch_norm"), x_BLR)
    y_BLR = jnp.zeros_like(x_BLR)
    for e in range(gates_BLE.shape[-1]):
        own = {name: value[e] for name, value in under(p, "experts").items()}
        hidden = x_BLR @ own["w_in_eRF"] + own.get("b_in_eF", 0.0)
        if m.gated:
            hidden = sigma(m, x_BLR @ own["w_gate_eRF"] + own.get("b_gate_eF", 0.0)) * hidden
        else:
            hidden = sigma(m, hidden)
        y_BLR = y_BLR + gates_BLE[..., e, None] * (hidden @ own["w_out_eFR"] + own.get("b_out_eR", 0.0))
    if kind in ("skip", "gate"):
        y_BLR = y_BLR + p["skip_1"] * x_BLR
    if kind in ("skip", "gate", "post_combine"):
        y_BLR = norm(m, m.norm, under(p, "combine_norm"), y_BLR)
    y_BLD = linear(under(p, "up"), y_BLR) if bigmac else y_BLR
    if kind == "gate":
        y_BLD = (1 + linear(under(p, "gate"), x_BLD)) * y_BLD
    return y_BLD + mlp(m, under(p, "shared"), x_BLD) if m.num_shared_experts else y_BLD


def logits(p: Values, x_BLD: Any) -> Any:
    """x W + b: a matrix and perhaps a bias, or what a network of one hidden layer, relu, puts out at a vector."""
    if "hyper.vector_D" not in p:
        return x_BLD @ p["router_DE"] + p.get("router_logit_bias_E", 0.0)
    h_H = jnp.maximum(p["hyper.vector_D"] @ p["hyper.in_DH"], 0.0)
    return x_BLD @ jnp.einsum("H,DHE->DE", h_H, p["hyper.out_DHE"]) + h_H @ p["hyper.out_HE"]


def router(m: ModelConfig, taken: int, p: Values, biases: Values, x_BLD: Any, real_BL: Any) -> Routed:
    """`biases`: what no gradient is taken of, parts of a router among it."""
    logits_BLE = logits(p | biases, x_BLD)
    E, K = logits_BLE.shape[-1], 1 if m.structure == "vanilla" else m.top_k
    if m.router_scores == "softmax":
        scores_BLE = shares_BLE = jnp.exp(log_softmax(logits_BLE))
    else:
        scores_BLE = 1 / (1 + jnp.exp(-logits_BLE))
        shares_BLE = scores_BLE / scores_BLE.sum(-1, keepdims=True)
    fixed_BLE, bias_E, wanted_E = (
        jax.lax.stop_gradient(scores_BLE),
        biases.get("router_bias_E", jnp.zeros(E)),
        jnp.zeros(E),
    )
    if "router_bias_E.solved" in biases:
        # What is solved puts a token of each expert on the very edge, on which side is a matter of rounding.
        wanted_E, bias_E = evened(K, fixed_BLE, bias_E, real_BL), biases["router_bias_E.solved"]
    chosen_BLE, margin_BL = best(m, K, taken or K, fixed_BLE + bias_E)
    gates_BLE = jnp.where(chosen_BLE & real_BL[..., None], scores_BLE, 0.0)
    if m.router_renormalize and K > 1:
        sums_BL1 = gates_BLE.sum(-1, keepdims=True)
        gates_BLE = gates_BLE / jnp.where(sums_BL1 > 0, sums_BL1, 1.0)
    return Routed(m.router_scale * gates_BLE, chosen_BLE, shares_BLE, logits_BLE, wanted_E, margin_BL)


def best(m: ModelConfig, K: int, taken: int, ranking_BLE: Any) -> tuple[Any, Any]:
    """Which experts are among the `taken` best of the best groups, and by how much the choice was clear."""
    E, groups = ranking_BLE.shape[-1], m.num_expert_groups
    margin_BL = jnp.full(ranking_BLE.shape[:2], jnp.inf)
    if m.top_groups < groups:
        size = E // groups
        summed = min(size, 2 if m.group_scores == "top_2" else max(1, K // m.top_groups))
        of_groups = [jnp.sort(ranking_BLE[..., g * size : (g + 1) * size], -1) for g in range(groups)]
        strength_BLG = jnp.stack([sorted_BLe[..., -summed:].sum(-1) for sorted_BLe in of_groups], -1)
        sorted_BLG = jnp.sort(strength_BLG, -1)
        margin_BL = sorted_BLG[..., -m.top_groups] - sorted_BLG[..., -m.top_groups - 1]
        allowed_BLG = strength_BLG >= sorted_BLG[..., -m.top_groups, None]
        ranking_BLE = jnp.where(jnp.repeat(allowed_BLG, size, -1), ranking_BLE, -jnp.inf)
    sorted_BLE = jnp.sort(ranking_BLE, -1)
    if taken < E:
        margin_BL = jnp.minimum(margin_BL, sorted_BLE[..., -taken] - sorted_BLE[..., -taken - 1])
    return ranking_BLE >= sorted_BLE[..., -taken, None], margin_BL


def evened(K: int, scores_BLE: Any, bias_E: Any, real_BL: Any) -> Any:
    """The bias of balance_step=same: four steps from the last one, each expert's just below what one token more than
    its share of the tokens requires. That is the token's K+1st best less its score (docs/model.md)."""
    E = bias_E.shape[0]
    scores_TE = scores_BLE.reshape(-1, E)
    real_T1 = real_BL.reshape(-1, 1)
    first = jnp.ceil(real_BL.sum() * K / E + 0.5).astype(int)  # the first token too many, counted from 1
    for _ in range(4):
        cut_T1 = jnp.sort(scores_TE + bias_E, -1)[:, -K - 1, None]
        required_TE = jnp.sort(jnp.where(real_T1, cut_T1 - scores_TE, jnp.inf), 0)
        bias_E = required_TE[first - 1]
        bias_E = bias_E - bias_E.mean()
    return bias_E


def statistics(config: Config, routed: Routed, real_BL: Any) -> tuple[Any, ...]:
    """Of a layer, over the real tokens of the whole step, as `Layers`."""
    m, M = config.model, config.train.accumulate_steps

    def mean(of_tokens: Any, real_BL: Any) -> Any:
        real = real_BL.reshape(real_BL.shape + (1,) * (of_tokens.ndim - 2))
        return jnp.where(real, of_tokens, 0.0).sum((0, 1)) / jnp.maximum(real_BL.sum(), 1)

    def balance(rows: slice) -> Any:
        """E · Σ f_e P_e."""
        chosen_BLE, real = routed.chosen_BLE[rows], real_BL[rows]
        f_E = mean(chosen_BLE / chosen_BLE.sum(-1, keepdims=True), real)
        return f_E.size * (f_E * mean(routed.shares_BLE[rows], real)).sum()

    of_parts = [slice(i, None, M) for i in range(M)] if m.balance_scope == "part" else [slice(None)]
    shares_BLE, chosen_BLE = routed.shares_BLE, routed.chosen_BLE
    z_BL = jnp.log(jnp.exp(routed.logits_BLE).sum(-1)) ** 2
    return (
        sum(map(balance, of_parts)) / len(of_parts),
        mean(z_BL, real_BL),
        mean(chosen_BLE / chosen_BLE.sum(-1, keepdims=True), real_BL),
        mean(-(shares_BLE * jnp.log(shares_BLE)).sum(-1), real_BL),
        routed.bias_E,
        jnp.where(real_BL, routed.margin_BL, jnp.inf).min(),
    )


def log_softmax(logits: Any) -> Any:
    return logits - jnp.log(jnp.exp(logits).sum(-1, keepdims=True))


def picked(log_p_BLV: Any, targets_BL: Any) -> Any:
    """-log p of the targets; of none any number."""
    return -jnp.take_along_axis(log_p_BLV, jnp.maximum(targets_BL, 0)[..., None], -1)[..., 0]
