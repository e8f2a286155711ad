"""NemotronH and Qwen3Moe in numpy, from what the classes are defined to compute: the judge of what an export holds.

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
    model = {"NemotronHForCausalLM": nemotron_h, "Qwen3MoeForCausalLM": qwen3_moe}[architecture]
    return np.stack([model(config, w, tokens_L) for tokens_L in tokens_BL])


def nemotron_h(config: dict[str, Any], w: dict[str, np.ndarray], tokens_L: np.ndarray) -> np.ndarray:
    """x ← x + mixer(norm(x)) in each of its layers, which are attention or experts."""
    eps = config["layer_norm_epsilon"]
    x_LD = w["backbone.embeddings.weight"][tokens_L]
    assert config["num_hidden_layers"] == len(config["layers_block_type"]) == len(config["hybrid_override_pattern"])
    for i, kind in enumerate(config["layers_block_type"]):
        assert config["hybrid_override_pattern"][i] == {"full_attention": "*", "moe": "E"}[kind]
        mixer = f"backbone.layers.{i}.mixer"
        h_LD = rms(x_LD, w[f"backbone.layers.{i}.norm.weight"], eps)
        if kind == "full_attention":
            x_LD = x_LD + attention(config, w, mixer, h_LD, lambda q_LH: q_LH, lambda k_LH: k_LH)
        else:
            x_LD = x_LD + np.stack([nemotron_experts(config, w, mixer, h_D) for h_D in h_LD])
    return rms(x_LD, w["backbone.norm_f.weight"], eps) @ w["lm_head.weight"].T


def nemotron_experts(config: dict[str, Any], w: dict[str, np.ndarray], moe: str, x_D: np.ndarray) -> np.ndarray:
    scores = 1 / (1 + np.exp(-w[f"{moe}.gate.weight"] @ x_D))
    ranking = scores + w[f"{moe}.gate.e_score_correction_bias"]
    groups = ranking.reshape(config["n_group"], -1)
    strength = np.sort(groups, axis=1)[:, -2:].sum(1)  # a group is as good as its two best experts
    outside = np.argsort(-strength, kind="stable")[config["topk_group"] :]
    groups[outside] = -np.inf
    chosen = np.argsort(-groups.reshape(-1), kind="stable")[: config["num_experts_per_tok"]]
    gates = scores[chosen]
    if config["norm_topk_prob"]:
        gates = gates / gates.sum()
    gates = gates * config["routed_scaling_factor"]

    def mlp(name: str, v: np.ndarray) -> np.ndarray:
        return w[f"{name}.down_proj.weight"] @ np.maximum(w[f"{name}.up_proj.weight"] @ v, 0) ** 2

    latent = config["moe_latent_size"] is not None
    x_R = w[f"{moe}.fc1_latent_proj.weight"] @ x_D if latent else x_D
    y_R = sum(gate * mlp(f"{moe}.experts.{expert}", x_R) for gate, expert in zip(gates, chosen, strict=True))
    y_D = w[f"{moe}.fc2_latent_proj.weight"] @ y_R if latent else y_R
    return y_D + mlp(f"{moe}.shared_experts", x_D)


def qwen3_moe(config: dict[str, Any], w: dict[str, np.ndarray], tokens_L: np.ndarray) -> np.ndarray:
    eps, H = config["rms_norm_eps"], config["head_dim"]
    angle_LH = np.outer(np.arange(len(tokens_L)), config["rope_parameters"]["rope_theta"] ** (-np.arange(0, H, 2) / H))
    cos_LH, sin_LH = (np.tile(f(angle_LH), 2) for f in (np.cos, np.sin))

    def turned(x_LH: np.ndarray, scale_H: np.ndarray) -> np.ndarray:
        y_LH = rms(x_LH, scale_H, eps)
        return y_LH * cos_LH + np.concatenate([-y_LH[:, H // 2 :], y_LH[:, : H // 2]], -1) * sin_LH

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


def attention(
    config: dict[str, Any], w: dict[str, np.ndarray], prefix: str, x_LD: np.ndarray, of_query: Any, of_key: Any
) -> np.ndarray:
    """Causal, query heads in groups that share a key-value head."""
    heads, H = config["num_attention_heads"], config["head_dim"]
    sharing = heads // config["num_key_value_heads"]
    q, k, v = (x_LD @ w[f"{prefix}.{name}_proj.weight"].T for name in "qkv")
    outputs = []
    for n in range(heads):
        g = n // sharing
        q_LH, k_LH = of_query(q[:, n * H : (n + 1) * H]), of_key(k[:, g * H : (g + 1) * H])
        scores_LL = np.where(np.tri(len(x_LD), dtype=bool), q_LH @ k_LH.T / np.sqrt(H), -np.inf)
        outputs.append(softmax(scores_LL) @ v[:, g * H : (g + 1) * H])
    return np.concatenate(outputs, -1) @ w[f"{prefix}.o_proj.weight"].T


def rms(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
