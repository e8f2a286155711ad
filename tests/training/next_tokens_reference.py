"""The loss with next-token modules, from the equations, in float64 with torch: loops over documents, heads and experts,
and gradients by torch's autograd. Nothing is masked: a document is cut out and computed alone.

T tokens of a document, D hidden, N heads, E experts, V vocabulary.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from bigmac_jax.config import Config, ModelConfig

Parameters = dict[str, torch.Tensor]


class Expected(NamedTuple):
    loss: float
    cross_entropy: float
    next_K: list[float]
    load_YE: np.ndarray
    gradients: dict[str, np.ndarray]


class Routed(NamedTuple):
    """What a layer's router says of some tokens."""

    shares_TE: torch.Tensor
    counts_TE: torch.Tensor
    squares_T: torch.Tensor  # logsumexp(logits)²


def expected(config: Config, values: dict[str, np.ndarray], documents: list[tuple[Any, Any]]) -> Expected:
    """`documents`: the tokens of each, and of each token its target, negative for none."""
    m = config.model
    p = {name: torch.tensor(np.asarray(value, np.float64), requires_grad=True) for name, value in values.items()}
    out_VD = p["embedding_VD"] if m.tie_embeddings else p["unembedding_VD"]
    losses: list[list[torch.Tensor]] = [[] for _ in range(1 + m.mtp_modules)]
    routed: list[list[Routed]] = [[] for _ in range(m.num_layers + m.mtp_modules)]
    for tokens, targets in documents:
        x_TD = embed(m, p, tokens, len(tokens))
        for layer in range(m.num_layers):
            x_TD, found = block(m, one(p, "layers", layer), x_TD)
            routed[layer].append(found)
        h_TD = norm(m, part(p, "final_norm"), x_TD)
        losses[0] += cross_entropies(h_TD, out_VD, targets)
        for k in range(1, 1 + m.mtp_modules):
            T = len(tokens) - k  # the others have no token k behind them
            if T <= 0:
                break
            own = one(p, "mtp", k - 1)
            e_TD = norm(m, part(own, "embedding_norm"), embed(m, p, tokens[k:], T))
            both = torch.cat([e_TD, norm(m, part(own, "hidden_norm"), h_TD[:T])], -1)
            x_TD, found = block(m, part(own, "layers"), both @ own["projection.w_DF"])
            routed[m.num_layers + k - 1].append(found)
            h_TD = norm(m, part(own, "final_norm"), x_TD)
            losses[k] += cross_entropies(h_TD, out_VD, targets[k:])
    means = [torch.stack(of).mean() for of in losses]
    loss = means[0] + config.train.mtp_weight * torch.stack(means[1:]).mean()
    load = np.zeros((0, 0))
    if m.is_moe:
        shares, counts, squares = ([torch.cat([r[i] for r in layer]) for layer in routed] for i in range(3))
        load_YE = torch.stack([of.mean(0) / m.top_k for of in counts])
        shares_YE = torch.stack([of.mean(0) for of in shares])
        if m.balance == "aux_loss":
            loss = loss + m.balance_coefficient * m.num_experts * (load_YE * shares_YE).sum()
        loss = loss + m.z_loss_coefficient * sum(of.mean() for of in squares)
        load = load_YE.numpy()
    loss.backward()
    gradients = {name: np.zeros(v.shape) if v.grad is None else v.grad.numpy() for name, v in p.items()}
    return Expected(loss.item(), means[0].item(), [mean.item() for mean in means[1:]], load, gradients)


def part(p: Parameters, name: str) -> Parameters:
    return {key.removeprefix(f"{name}."): value for key, value in p.items() if key.startswith(f"{name}.")}


def one(p: Parameters, name: str, number: int) -> Parameters:
    return {key: value[number] for key, value in part(p, name).items()}


def embed(m: ModelConfig, p: Parameters, tokens: Any, positions: int) -> torch.Tensor:
    x_TD = p["embedding_VD"][torch.tensor(np.asarray(tokens, np.int64))]
    if m.positions == "learned":
        x_TD = x_TD + p["positions_LD"][:positions]
    return x_TD * (math.sqrt(m.hidden_size) if m.scale_embedding else 1)


def cross_entropies(h_TD: torch.Tensor, out_VD: torch.Tensor, targets: Any) -> list[torch.Tensor]:
    log_p_TV = torch.log_softmax(h_TD @ out_VD.T, -1)
    return [-log_p_TV[t, target] for t, target in enumerate(targets) if target >= 0]


def norm(m: ModelConfig, p: Parameters, x: torch.Tensor) -> torch.Tensor:
    if "bias_D" in p:
        x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + m.norm_eps) * p["scale_D"] + p.get("bias_D", 0)


def block(m: ModelConfig, p: Parameters, x_TD: torch.Tensor) -> tuple[torch.Tensor, Any]:
    x_TD = x_TD + attention(m, part(p, "attention"), norm(m, part(p, "attention_norm"), x_TD))
    h_TD, own = norm(m, part(p, "mlp_norm"), x_TD), part(p, "mlp")
    if not m.is_moe:
        return x_TD + activate(h_TD @ own["up.w_DF"]) @ own["down.w_DF"], None
    y_TD, found = experts(m, own, h_TD)
    return x_TD + y_TD, found


def attention(m: ModelConfig, p: Parameters, x_TD: torch.Tensor) -> torch.Tensor:
    T, H, heads = len(x_TD), m.head_size, []
    q, k, v = ((x_TD @ p[f"{name}.w_DF"]).reshape(T, m.num_heads, H) for name in ("query", "key", "value"))
    for n in range(m.num_heads):
        q_TH, k_TH = q[:, n], k[:, n]
        if m.qk_norm:
            q_TH, k_TH = norm(m, part(p, "query_norm"), q_TH), norm(m, part(p, "key_norm"), k_TH)
        if m.positions == "rope":
            q_TH, k_TH = turn(m, q_TH), turn(m, k_TH)
        scores_TT = q_TH @ k_TH.T / math.sqrt(H) + torch.full((T, T), -math.inf, dtype=torch.float64).triu(1)
        heads.append(torch.softmax(scores_TT, -1) @ v[:, n])
    return torch.cat(heads, -1) @ p["out.w_DF"]


def turn(m: ModelConfig, x_TH: torch.Tensor) -> torch.Tensor:
    T, half = len(x_TH), m.head_size // 2
    angle = torch.outer(torch.arange(T).double(), m.rope_theta ** (-torch.arange(half).double() / half))
    a, b = x_TH[:, :half], x_TH[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def activate(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) ** 2


def experts(m: ModelConfig, p: Parameters, x_TD: torch.Tensor) -> tuple[torch.Tensor, Routed]:
    """bigmac with a norm and a skip on the latent; softmax scores, gates divided by their sum."""
    logits_TE = x_TD @ p["router_DE"]
    scores_TE = torch.softmax(logits_TE, -1)
    bias_E = p["router_bias_E"].detach() if "router_bias_E" in p else torch.zeros(m.num_experts)
    chosen_TE = torch.zeros_like(scores_TE)
    chosen_TE.scatter_(-1, torch.topk(scores_TE.detach() + bias_E, m.top_k).indices, 1.0)
    gates_TE = scores_TE * chosen_TE / (scores_TE * chosen_TE).sum(-1, keepdim=True)
    x_TR = x_TD @ p["down.w_DF"]
    y_TR = sum(
        gates_TE[:, e, None] * (activate(x_TR @ p["experts.w_in_eRF"][e]) @ p["experts.w_out_eFR"][e])
        for e in range(m.num_experts)
    )
    y_TD = norm(m, part(p, "combine_norm"), y_TR + p["skip_1"] * x_TR) @ p["up.w_DF"]
    return y_TD, Routed(scores_TE, chosen_TE, torch.logsumexp(logits_TE, -1) ** 2)
