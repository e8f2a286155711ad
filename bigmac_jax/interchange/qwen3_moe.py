"""transformers' Qwen3Moe: fine-grained gated experts, a softmax router, rotary positions, query-key norm."""

import math
from collections.abc import Iterator
from typing import Any

from bigmac_jax.config import Config, ModelConfig
from bigmac_jax.interchange import layout
from bigmac_jax.interchange.layout import ACTIVATIONS, Leaves, Tensor, attention_tensors, expert_tensors, make_config
from bigmac_jax.interchange.tensor_files import Checkpoint

# The class's own defaults, of fields that a config.json may leave out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 0, "hidden_act": "silu", "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False, "use_sliding_window": False,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768, "num_experts_per_tok": 8,
    "num_experts": 128, "norm_topk_prob": False, "rope_theta": 10_000.0, "dtype": "float32",
}  # fmt: skip
_OTHER_NAMES = {"num_local_experts": "num_experts"}
# Read in another way, or of dense layers and windows of attention, which an import refuses.
_UNREAD = ("rope_scaling", "rope_parameters", "intermediate_size", "max_window_layers", "sliding_window")


def find_obstacles(config: ModelConfig) -> list[str]:
    m = config
    return layout.find_violations(
        vars(m),
        first_dense_layers=0,
        blocks=layout.find_other_blocks(config, "layers"),
        structure="fine_grained",
        norm="rmsnorm",
        positions="rope",
        gated=True,
        use_bias=False,
        qk_norm=True,
        latent_norm=(not m.latent_norms, "none"),
        router=(m.router in ("linear", "frozen"), "linear or frozen (its router's logits have no bias)"),
        router_scores="softmax",
        router_scale=1,
        balance=(not m.has_router_bias, "aux_loss or none (its router has no bias)"),
        top_groups=(m.top_groups == m.num_expert_groups, f"{m.num_expert_groups} (all groups)"),
        num_shared_experts=(not m.shared_width, "0"),
    )


def tensors(config: ModelConfig, leaves: Leaves) -> Iterator[Tensor]:
    scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
    yield Tensor("model.embed_tokens.weight", "embedding_VD", scale=scale)
    for layer in range(config.depth):
        prefix = f"model.layers.{layer}"
        yield Tensor(f"{prefix}.input_layernorm.weight", "layers.attention_norm.scale_D", layer)
        yield from attention_tensors(f"{prefix}.self_attn", layer)
        yield Tensor(f"{prefix}.self_attn.q_norm.weight", "layers.attention.query_norm.scale_D", layer)
        yield Tensor(f"{prefix}.self_attn.k_norm.weight", "layers.attention.key_norm.scale_D", layer)
        yield Tensor(f"{prefix}.post_attention_layernorm.weight", "layers.mlp_norm.scale_D", layer)
        yield Tensor(f"{prefix}.mlp.gate.weight", "layers.mlp.router_DE", layer, transposed=True)
        names = {"w_gate_eRF": "gate_proj", "w_in_eRF": "up_proj", "w_out_eFR": "down_proj"}
        yield from expert_tensors(config, f"{prefix}.mlp", layer, names)
    yield Tensor("model.norm.weight", "final_norm.scale_D")
    if not _tied(config):
        yield Tensor("lm_head.weight", "embedding_VD" if config.tie_embeddings else "unembedding_VD")


def _tied(config: ModelConfig) -> bool:
    """Whether one table serves both in the checkpoint: multiplied by √D, the embedding is another one."""
    return config.tie_embeddings and not config.scale_embedding


def to_json(config: Config, leaves: Leaves) -> dict[str, Any]:
    m = config.model
    return layout.common_json(config) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": m.depth,
        "rope_theta": m.rope_theta,  # where it stood before transformers 5, and where it stands now
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta},
        "rms_norm_eps": m.norm_eps,
        "hidden_act": ACTIVATIONS[m.activation],
        "attention_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "intermediate_size": m.expert_width,  # of dense layers, which there are not
        "moe_intermediate_size": m.expert_width,
        "num_experts": m.expert_count,
        "num_experts_per_tok": m.choices,
        "norm_topk_prob": m.router_renormalize and m.choices > 1,
        # Theirs is K where loads are even, in means over all layers; ours is 1 for each layer.
        "router_aux_loss_coef": m.balance_coefficient * m.depth / m.choices if m.balance == "aux_loss" else 0.0,
        "tie_word_embeddings": _tied(m),
    }


def from_json(values: dict[str, Any], checkpoint: Checkpoint) -> Config:
    layout.check_known(checkpoint, values, _DEFAULTS, _OTHER_NAMES, _UNREAD)
    v = layout.fill_json(values, _DEFAULTS, _OTHER_NAMES)
    rope = v.get("rope_scaling") or v.get("rope_parameters") or {}  # the class reads one of them, this one first
    v |= {"rope_theta": rope.get("rope_theta", v["rope_theta"])}
    v |= {"rope_type": rope.get("rope_type", rope.get("type", "default"))}
    activations = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
    layout.check_json(
        checkpoint,
        v,
        rope_type="default",
        hidden_act=(v["hidden_act"] in activations, f"one of {', '.join(activations)}"),
        attention_bias=(not v["attention_bias"], "false"),
        use_sliding_window=(not v["use_sliding_window"], "false"),
        decoder_sparse_step=1,
        mlp_only_layers=(not v["mlp_only_layers"], "empty"),
        norm_topk_prob=(
            v["num_experts_per_tok"] > 1 or not v["norm_topk_prob"],
            "false where num_experts_per_tok is 1",
        ),
    )
    if v["tie_word_embeddings"]:
        layout.leave_out_tied(checkpoint, "model.embed_tokens.weight", "lm_head.weight")
    return make_config(
        v,
        checkpoint,
        structure="fine_grained",
        num_layers=v["num_hidden_layers"],
        positions="rope",
        rope_theta=float(v["rope_theta"]),
        activation=activations[v["hidden_act"]],
        gated=True,
        qk_norm=True,
        norm_eps=float(v["rms_norm_eps"]),
        num_experts=v["num_experts"],
        down_ratio=min(v["moe_intermediate_size"], v["hidden_size"]) / v["hidden_size"],
        router_scores="softmax",
        tie_embeddings=v["tie_word_embeddings"],
    )


split_stored = layout.split_experts
