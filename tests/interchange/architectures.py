"""NemotronH, Qwen3Moe and BigMac in numpy, from what the classes are defined to compute: the judge of an export.

They read config.json and the safetensors files and know nothing of our model: every token is taken through its own
loop over heads and experts, in float64.

L length, D hidden, H head size.
"""

import json
import pathlib
from typing import Any

import numpy as np
from safetensors.numpy import load_file


def load(directory: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json, and the tensors of the file or of all files that the index names, none of them twice."""
    index = directory / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        files = set(weight_map.values())
        for name in files:
            assert set(load_file(directory / name)) == {t for t, file in weight_map.items() if file == name}
    assert {path.name for path in directory.glob("*.safetensors")} == files
    tensors = [(name, value) for file in files for name, value in load_file(directory / file).items()]
    assert len(tensors) == len(dict(tensors))
    return json.loads((directory / "config.json").read_text()), {name: v.astype(np.float64) for name, v in tensors}


def logits(directory: pathlib.Path, tokens_BL: np.ndarray) -> np.ndarray:
    """[B, L, V]: of the class that config.json names."""
    config, w = load(directory)
    (architecture,) = config["architectures"]
    model = {"NemotronHForCausalLM": nemotron_h, "Qwen3MoeForCausalLM": qwen3_moe, "BigMacForCausalLM": bigmac}[
        architecture
    ]
    return np.stack([model(config, w, tokens_L) for tokens_L in tokens_BL])


def nemotron_h(config: dict[str, Any], w: dict[str, np.ndarray], tokens_L: np.ndarray) -> np.ndarray:
    return nemotron_features(config, w, tokens_L) @ w["lm_head.weight"].T


def nemotron_features(config: dict[str, Any], w: dict[str, np.ndarray], tokens_L: np.ndarray) -> np.ndarray:
    eps, letters = config["layer_norm_epsilon"], config["hybrid_override_pattern"]
    assert config["num_hidden_layers"] == len(letters)
    x_LD = nemotron_blocks(config, w, "backbone.layers", 0, letters, w["backbone.embeddings.weight"][tokens_L])
    return rms(x_LD, w["backbone.norm_f.weight"], eps)


def nemotron_next(directory: pathlib.Path, tokens_L: np.ndarray) -> list[np.ndarray]:
    """Logits of next-token module k = 1, 2, … at each position that has a token k behind it, as serving engines compute
    them: [L - k, V] each."""
    config, w = load(directory)
    eps, letters = config["layer_norm_epsilon"], config["mtp_hybrid_override_pattern"]
    x_LD, logits = nemotron_features(config, w, tokens_L), []
    for k in range(1, config["num_nextn_predict_layers"] + 1):
        first = (k - 1) * len(letters)
        module = [f"mtp.layers.{i}" for i in (first, first + len(letters) - 1)]
        read_LD = rms(w["backbone.embeddings.weight"][tokens_L[k:]], w[f"{module[0]}.enorm.weight"], eps)
        x_LD = rms(x_LD[:-1], w[f"{module[0]}.hnorm.weight"], eps)
        x_LD = np.concatenate([read_LD, x_LD], axis=1) @ w[f"{module[0]}.eh_proj.weight"].T
        x_LD = nemotron_blocks(config, w, "mtp.layers", first, letters, x_LD)
        x_LD = rms(x_LD, w[f"{module[1]}.final_layernorm.weight"], eps)
        logits.append(x_LD @ w["lm_head.weight"].T)
    return logits


def nemotron_blocks(
    config: dict[str, Any],
    w: dict[str, np.ndarray],
    name: str,
    first: int,
    letters: str,
    x_LD: np.ndarray,
) -> np.ndarray:
    """x ← x + mixer(norm(x)) in each of the blocks, which are numbered from `first` on."""
    eps = config["layer_norm_epsilon"]
    for i, letter in enumerate(letters, first):
        mixer = f"{name}.{i}.mixer"
        h_LD = rms(x_LD, w[f"{name}.{i}.norm.weight"], eps)
        if letter == "*":
            x_LD = x_LD + attention(config, w, mixer, h_LD, lambda q_LH: q_LH, lambda k_LH: k_LH)
        elif letter == "M":
            x_LD = x_LD + mamba(config, w, mixer, h_LD)
        else:
            feed_forward = {"E": nemotron_experts, "-": nemotron_mlp}[letter]
            x_LD = x_LD + np.stack([feed_forward(config, w, mixer, h_D) for h_D in h_LD])
    return x_LD


def mamba(config: dict[str, Any], w: dict[str, np.ndarray], mixer: str, x_LD: np.ndarray) -> np.ndarray:
    """Mamba-2, token by token and head by head."""
    heads, size, groups, state = (
        config[name] for name in ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size")
    )
    inner, taps, kernel = heads * size, config["conv_kernel"], w[f"{mixer}.conv1d.weight"]
    assert (f"{mixer}.conv1d.bias" in w, f"{mixer}.in_proj.bias" in w) == (config["use_conv_bias"], config["use_bias"])
    both = x_LD @ w[f"{mixer}.in_proj.weight"].T + w.get(f"{mixer}.in_proj.bias", 0)
    gate, line, time = both[:, :inner], both[:, inner:-heads], both[:, -heads:]
    padded = np.concatenate([np.zeros((taps - 1, line.shape[1])), line])
    convolved = np.stack([(padded[i : i + taps].T * kernel[:, 0]).sum(1) for i in range(len(x_LD))])
    convolved = silu(convolved + w.get(f"{mixer}.conv1d.bias", 0))
    step = np.maximum(np.log1p(np.exp(time + w[f"{mixer}.dt_bias"])), config["time_step_min"])
    y = np.zeros((len(x_LD), inner))
    for n in range(heads):
        g, memory = n // (heads // groups), np.zeros((size, state))
        for i, row in enumerate(convolved):
            x = row[n * size : (n + 1) * size]
            b, c = (row[inner + (g + k * groups) * state :][:state] for k in (0, 1))
            memory = memory * np.exp(-np.exp(w[f"{mixer}.A_log"][n]) * step[i, n]) + step[i, n] * np.outer(x, b)
            y[i, n * size : (n + 1) * size] = memory @ c + w[f"{mixer}.D"][n] * x
    y = (y * silu(gate)).reshape(len(x_LD), groups, -1)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + config["layer_norm_epsilon"])
    y = y.reshape(len(x_LD), inner) * w[f"{mixer}.norm.weight"]
    return y @ w[f"{mixer}.out_proj.weight"].T + w.get(f"{mixer}.out_proj.bias", 0)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def nemotron_mlp(config: dict[str, Any], w: dict[str, np.ndarray], name: str, x_D: np.ndarray) -> np.ndarray:
    assert config["mlp_hidden_act"] == "relu2" and not config["mlp_bias"]
    return w[f"{name}.down_proj.weight"] @ np.maximum(w[f"{name}.up_proj.weight"] @ x_D, 0) ** 2


def nemotron_experts(config: dict[str, Any], w: dict[str, np.ndarray], moe: str, x_D: np.ndarray) -> np.ndarray:
    scores = 1 / (1 + np.exp(-w[f"{moe}.gate.weight"] @ x_D))
    chosen = choose_experts(config, scores + w[f"{moe}.gate.e_score_correction_bias"], group_best=2)
    gates = scores[chosen]
    if config["norm_topk_prob"]:
        gates = gates / gates.sum()
    gates = gates * config["routed_scaling_factor"]

    def mlp(name: str, v: np.ndarray) -> np.ndarray:
        return nemotron_mlp(config, w, name, v)

    latent = config["moe_latent_size"] is not None
    x_R = w[f"{moe}.fc1_latent_proj.weight"] @ x_D if latent else x_D
    y_R = sum(gate * mlp(f"{moe}.experts.{expert}", x_R) for gate, expert in zip(gates, chosen, strict=True))
    y_D = w[f"{moe}.fc2_latent_proj.weight"] @ y_R if latent else y_R
    return y_D + mlp(f"{moe}.shared_experts", x_D)


def choose_experts(config: dict[str, Any], ranking_E: np.ndarray, group_best: int) -> np.ndarray:
    """The best experts of the best groups; a group is as good as its `group_best` best experts together."""
    groups = ranking_E.reshape(config["n_group"], -1)
    strength = np.sort(groups, axis=1)[:, -group_best:].sum(1)
    outside = np.argsort(-strength, kind="stable")[config["topk_group"] :]
    groups[outside] = -np.inf
    return np.argsort(-groups.reshape(-1), kind="stable")[: config["num_experts_per_tok"]]


def qwen3_moe(config: dict[str, Any], w: dict[str, np.ndarray], tokens_L: np.ndarray) -> np.ndarray:
    eps, theta = config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]

    def turned(x_LH: np.ndarray, scale_H: np.ndarray) -> np.ndarray:
        return rotate(rms(x_LH, scale_H, eps), theta)

    x_LD = w["model.embed_tokens.weight"][tokens_L]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        q_H, k_H = (w[f"{layer}.self_attn.{name}_norm.weight"] for name in "qk")
        h_LD = rms(x_LD, w[f"{layer}.input_layernorm.weight"], eps)
        x_LD = x_LD + attention(
            config, w, f"{layer}.self_attn", h_LD, lambda q, s=q_H: turned(q, s), lambda k, s=k_H: turned(k, s)
        )
        h_LD = rms(x_LD, w[f"{layer}.post_attention_layernorm.weight"], eps)
        x_LD = x_LD + np.stack([qwen_experts(config, w, f"{layer}.mlp", h_D) for h_D in h_LD])
    tied = config["tie_word_embeddings"]
    assert tied == ("lm_head.weight" not in w)
    return rms(x_LD, w["model.norm.weight"], eps) @ w["model.embed_tokens.weight" if tied else "lm_head.weight"].T


def qwen_experts(config: dict[str, Any], w: dict[str, np.ndarray], moe: str, x_D: np.ndarray) -> np.ndarray:
    shares = softmax(w[f"{moe}.gate.weight"] @ x_D)
    chosen = np.argsort(-shares, kind="stable")[: config["num_experts_per_tok"]]
    gates = shares[chosen] / (shares[chosen].sum() if config["norm_topk_prob"] else 1)
    assert config["hidden_act"] == "silu"
    y_D = np.zeros_like(x_D)
    for gate, expert in zip(gates, chosen, strict=True):
        first, second, last = (w[f"{moe}.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        v = first @ x_D
        y_D += gate * (last @ (v / (1 + np.exp(-v)) * (second @ x_D)))
    return y_D


def bigmac(config: dict[str, Any], w: dict[str, np.ndarray], tokens_L: np.ndarray) -> np.ndarray:
    x_LD = w["model.embed_tokens.weight"][tokens_L]
    if config["positions"] == "learned":
        x_LD = x_LD + w["model.embed_positions.weight"][: len(tokens_L)]
    if config["scale_embedding"]:
        x_LD = x_LD * np.sqrt(config["hidden_size"])
    for i, kind in enumerate(config["mlp_layer_types"]):
        layer = f"model.layers.{i}"

        def turned(x_LH: np.ndarray, name: str, prefix: str = f"{layer}.self_attn") -> np.ndarray:
            x_LH = rms(x_LH, w[f"{prefix}.{name}_norm.weight"], config["norm_eps"]) if config["qk_norm"] else x_LH
            return rotate(x_LH, config["rope_theta"]) if config["positions"] == "rope" else x_LH

        h_LD = normed(config, w, f"{layer}.input_layernorm", x_LD)
        x_LD = x_LD + attention(
            config, w, f"{layer}.self_attn", h_LD, lambda q, f=turned: f(q, "q"), lambda k, f=turned: f(k, "k")
        )
        h_LD = normed(config, w, f"{layer}.post_attention_layernorm", x_LD)
        feed_forward = {"dense": bigmac_mlp, "sparse": bigmac_experts}[kind]
        x_LD = x_LD + np.stack([feed_forward(config, w, f"{layer}.mlp", h_D) for h_D in h_LD])
    tied = config["tie_word_embeddings"]
    assert tied == ("lm_head.weight" not in w)
    h_LD = normed(config, w, "model.norm", x_LD)
    return h_LD @ w["model.embed_tokens.weight" if tied else "lm_head.weight"].T


def bigmac_experts(config: dict[str, Any], w: dict[str, np.ndarray], moe: str, x_D: np.ndarray) -> np.ndarray:
    """Experts between W↓ and W↑, around which stand what `latent_norms` names."""
    norms = config["latent_norms"]
    logits_E = w[f"{moe}.router.weight"] @ x_D
    logits_E = logits_E + w[f"{moe}.router.bias"] if config["router_logit_bias"] else logits_E
    scores = softmax(logits_E) if config["scoring_func"] == "softmax" else 1 / (1 + np.exp(-logits_E))
    bias_E = w[f"{moe}.router.e_score_correction_bias"] if config["router_bias"] else 0
    chosen = choose_experts(config, scores + bias_E, config["group_score_topk"])
    alone = len(chosen) == 1  # and keeps its gate
    gates = scores[chosen] / (scores[chosen].sum() if config["norm_topk_prob"] and not alone else 1)
    gates = gates * config["routed_scaling_factor"]

    latent = config["moe_latent_size"] is not None
    x_R = w[f"{moe}.latent_down.weight"] @ x_D if latent else x_D
    x_R = normed(config, w, f"{moe}.dispatch_norm", x_R) if "pre_dispatch" in norms else x_R
    y_R = np.zeros_like(x_R)
    for gate, e in zip(gates, chosen, strict=True):
        parts = {}
        for name in _parts(config):
            bias = f"{moe}.experts.{name}_bias"
            parts[name] = w[f"{moe}.experts.{name}_proj"][e].T, w[bias][e] if bias in w else 0
        y_R += gate * gated_mlp(config, x_R, parts)
    y_R = y_R + w[f"{moe}.skip_factor"] * x_R if "skip" in norms else y_R
    y_R = normed(config, w, f"{moe}.combine_norm", y_R) if "post_combine" in norms else y_R
    y_D = w[f"{moe}.latent_up.weight"] @ y_R if latent else y_R
    y_D = y_D * (1 + w[f"{moe}.output_gate.weight"] @ x_D) if "gate" in norms else y_D
    shared = config["shared_expert_intermediate_size"]
    return y_D + bigmac_mlp(config, w, f"{moe}.shared_experts", x_D) if shared else y_D


def bigmac_mlp(config: dict[str, Any], w: dict[str, np.ndarray], name: str, x_D: np.ndarray) -> np.ndarray:
    parts = {n: (w[f"{name}.{n}_proj.weight"], w.get(f"{name}.{n}_proj.bias", 0)) for n in _parts(config)}
    return gated_mlp(config, x_D, parts)


def _parts(config: dict[str, Any]) -> tuple[str, ...]:
    return ("up", "down", "gate") if config["gated"] else ("up", "down")


def gated_mlp(config: dict[str, Any], x: np.ndarray, parts: dict[str, Any]) -> np.ndarray:
    """`parts`: the matrix [outputs, inputs] and the bias of up, down and gate."""
    activation = {
        "relu2": lambda v: np.maximum(v, 0) ** 2,
        "silu": lambda v: v / (1 + np.exp(-v)),
        "gelu_pytorch_tanh": lambda v: v / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))),
    }[config["hidden_act"]]
    lines = {name: (lambda v, m=matrix, b=bias: m @ v + b) for name, (matrix, bias) in parts.items()}
    up = lines["up"](x)
    return lines["down"](activation(lines["gate"](x)) * up if config["gated"] else activation(up))


def attention(
    config: dict[str, Any], w: dict[str, np.ndarray], prefix: str, x_LD: np.ndarray, of_query: Any, of_key: Any
) -> np.ndarray:
    """Causal, query heads in groups that share a key-value head."""
    heads, H = config["num_attention_heads"], config["head_dim"]
    sharing = heads // config["num_key_value_heads"]
    q, k, v = (x_LD @ w[f"{prefix}.{name}_proj.weight"].T + w.get(f"{prefix}.{name}_proj.bias", 0) for name in "qkv")
    outputs = []
    for n in range(heads):
        g = n // sharing
        q_LH, k_LH = of_query(q[:, n * H : (n + 1) * H]), of_key(k[:, g * H : (g + 1) * H])
        scores_LL = np.where(np.tri(len(x_LD), dtype=bool), q_LH @ k_LH.T / np.sqrt(H), -np.inf)
        outputs.append(softmax(scores_LL) @ v[:, g * H : (g + 1) * H])
    return np.concatenate(outputs, -1) @ w[f"{prefix}.o_proj.weight"].T + w.get(f"{prefix}.o_proj.bias", 0)


def rotate(x_LH: np.ndarray, theta: float) -> np.ndarray:
    """Rotary positions from 0 on."""
    L, H = x_LH.shape
    angle_LH = np.outer(np.arange(L), theta ** (-np.arange(0, H, 2) / H))
    cos_LH, sin_LH = (np.tile(f(angle_LH), 2) for f in (np.cos, np.sin))
    return x_LH * cos_LH + np.concatenate([-x_LH[:, H // 2 :], x_LH[:, : H // 2]], -1) * sin_LH


def normed(config: dict[str, Any], w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    if config["norm"] == "rmsnorm":
        return rms(x, w[f"{name}.weight"], config["norm_eps"])
    return rms(x - x.mean(-1, keepdims=True), w[f"{name}.weight"], config["norm_eps"]) + w[f"{name}.bias"]


def rms(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
