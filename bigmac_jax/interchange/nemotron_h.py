"""transformers' NemotronH: attention and MoE layers in turn, one norm before each.

Its MoE is ours: a sigmoid router of full width, whose bias shifts the choice alone, relu² experts without a gate
between `fc1_latent_proj` (W↓) and `fc2_latent_proj` (W↑), and a shared expert of full width. A model without a shared
expert is written with one of zeros, because the class always has one; without W↓ and W↑, moe_latent_size is null.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

from bigmac_jax.config import Config, ModelConfig
from bigmac_jax.interchange import layout
from bigmac_jax.interchange.layout import Leaves, Tensor, attention_tensors, expert_tensors, make_config
from bigmac_jax.interchange.tensor_files import Checkpoint, Index

_ZERO_WIDTH = 64  # of the shared expert that stands for none; small, and a multiple of what tensor parallelism splits
# The class's own defaults, of fields that a config.json may leave out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 131072, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 4096, "mlp_hidden_act": "relu2", "mlp_bias": False, "sliding_window": None,
    "n_routed_experts": 8, "moe_intermediate_size": 7688, "moe_shared_expert_intermediate_size": 7688,
    "moe_latent_size": None, "num_experts_per_tok": 2, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False, "layers_block_type": None,
    "hybrid_override_pattern": None, "dtype": "float32",
}  # fmt: skip
_OTHER_NAMES = {"num_local_experts": "n_routed_experts", "layer_types": "layers_block_type", "torch_dtype": "dtype"}
_LAYERS = ["full_attention", "moe"]
_LEGACY = {"*": "full_attention", "E": "moe", "attention": "full_attention"}


def find_obstacles(config: ModelConfig) -> list[str]:
    m, groups = config, config.num_expert_groups
    return layout.find_violations(
        vars(m),
        first_dense_layers=0,
        blocks=layout.find_other_blocks(config, "layers"),
        structure=(m.structure in ("bigmac", "fine_grained"), "bigmac or fine_grained"),
        norm="rmsnorm",
        positions=(m.positions == "none", "none (its attention has no rotary embedding)"),
        activation="relu2",
        gated=False,
        use_bias=False,
        qk_norm=False,
        latent_norm=(not m.latent_norms, "none"),
        router=(m.router in ("linear", "frozen"), "linear or frozen (its router's logits have no bias)"),
        router_scores="sigmoid",
        num_experts=(not m.is_moe or m.expert_count >= 2 * groups, "at least two a group"),
        group_scores=(m.top_groups == groups or m.group_best == 2, "top_2 (its router's)"),
    )


def tensors(config: ModelConfig, leaves: Leaves) -> Iterator[Tensor]:
    scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
    yield Tensor("backbone.embeddings.weight", "embedding_VD", scale=scale)
    for layer in range(config.depth):
        attention, moe = f"backbone.layers.{2 * layer}", f"backbone.layers.{2 * layer + 1}"
        yield Tensor(f"{attention}.norm.weight", "layers.attention_norm.scale_D", layer)
        yield from attention_tensors(f"{attention}.mixer", layer)
        yield Tensor(f"{moe}.norm.weight", "layers.mlp_norm.scale_D", layer)
        yield from _moe_tensors(config, leaves, f"{moe}.mixer", layer)
    yield Tensor("backbone.norm_f.weight", "final_norm.scale_D")
    yield Tensor("lm_head.weight", "embedding_VD" if config.tie_embeddings else "unembedding_VD")


def _moe_tensors(config: ModelConfig, leaves: Leaves, moe: str, layer: int) -> Iterator[Tensor]:
    yield Tensor(f"{moe}.gate.weight", "layers.mlp.router_DE", layer, transposed=True, exact=True)
    bias = "layers.mlp.router_bias_E"
    yield Tensor(
        f"{moe}.gate.e_score_correction_bias",
        bias if bias in leaves else "",
        layer,
        exact=True,
        shape=(config.expert_count,),
    )
    if config.structure == "bigmac":
        yield Tensor(f"{moe}.fc1_latent_proj.weight", "layers.mlp.down.w_DF", layer, transposed=True)
        yield Tensor(f"{moe}.fc2_latent_proj.weight", "layers.mlp.up.w_DF", layer, transposed=True)
    yield from expert_tensors(config, moe, layer, {"w_in_eRF": "up_proj", "w_out_eFR": "down_proj"})
    up, down = f"{moe}.shared_experts.up_proj.weight", f"{moe}.shared_experts.down_proj.weight"
    if config.shared_width:
        yield Tensor(up, "layers.mlp.shared.up.w_DF", layer, transposed=True)
        yield Tensor(down, "layers.mlp.shared.down.w_DF", layer, transposed=True)
    else:
        yield Tensor(up, "", layer, shape=(_ZERO_WIDTH, config.hidden_size))
        yield Tensor(down, "", layer, shape=(config.hidden_size, _ZERO_WIDTH))


def to_json(config: Config, leaves: Leaves) -> dict[str, Any]:
    m = config.model
    limited = m.top_groups < m.num_expert_groups
    return layout.common_json(config) | {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "num_hidden_layers": 2 * m.depth,
        "layers_block_type": _LAYERS * m.depth,
        "hybrid_override_pattern": "*E" * m.depth,  # the same, as serving engines read it
        "layer_norm_epsilon": m.norm_eps,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "attention_bias": False,
        "use_bias": False,
        "moe_latent_size": m.latent_size if m.structure == "bigmac" else None,
        "n_routed_experts": m.expert_count,
        "num_experts_per_tok": m.choices,
        "moe_intermediate_size": m.expert_width,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": m.shared_width or _ZERO_WIDTH,
        "norm_topk_prob": m.router_renormalize and m.choices > 1,
        "routed_scaling_factor": m.router_scale,
        "n_group": m.num_expert_groups if limited else 1,
        "topk_group": m.top_groups if limited else 1,
        # The class ties nothing, so lm_head is there whatever this says.
        "tie_word_embeddings": m.tie_embeddings and not m.scale_embedding,
    }


def from_json(values: dict[str, Any], checkpoint: Checkpoint) -> Config:
    v = layout.fill_json(values, _DEFAULTS, _OTHER_NAMES)
    layers = [_LEGACY.get(name, name) for name in v["layers_block_type"] or v["hybrid_override_pattern"] or ()]
    count = len(layers) // 2
    groups, best_groups, experts, latent = v["n_group"], v["topk_group"], v["n_routed_experts"], v["moe_latent_size"]
    limited = best_groups < groups
    layout.check_json(
        checkpoint,
        v | {"layers_block_type": layers},
        layers_block_type=(count > 0 and layers == _LAYERS * count, "full_attention, moe, and so on in turn"),
        mlp_hidden_act="relu2",
        mlp_bias=(not v["mlp_bias"], "false"),
        sliding_window=(v["sliding_window"] is None, "null"),
        moe_latent_size=(latent is None or latent <= v["hidden_size"], "at most hidden_size"),
        norm_topk_prob=(
            v["num_experts_per_tok"] > 1 or not v["norm_topk_prob"],
            "false where num_experts_per_tok is 1",
        ),
        n_group=(not limited or experts >= 2 * groups, "at most half of n_routed_experts"),
    )
    moe = [f"backbone.layers.{2 * layer + 1}.mixer" for layer in range(count)]

    def all_zero(*names: str) -> bool:
        found = [f"{prefix}.{name}" for prefix in moe for name in names if f"{prefix}.{name}" in checkpoint]
        return not any(checkpoint.read(name).any() for name in found)

    shared = not all_zero("shared_experts.up_proj.weight", "shared_experts.down_proj.weight")
    return make_config(
        v,
        checkpoint,
        structure="fine_grained" if latent is None else "bigmac",
        num_layers=count,
        positions="none",
        activation="relu2",
        qk_norm=False,
        norm_eps=float(v["layer_norm_epsilon"]),
        num_experts=experts,
        down_ratio=min(latent or v["moe_intermediate_size"], v["hidden_size"]) / v["hidden_size"],
        num_shared_experts=int(shared),
        shared_expert_hidden_size=v["moe_shared_expert_intermediate_size"] if shared else 0,
        router_scores="sigmoid",
        router_scale=float(v["routed_scaling_factor"]),
        balance="aux_loss" if all_zero("gate.e_score_correction_bias") else "bias",
        num_expert_groups=groups if limited else 1,
        top_groups=best_groups if limited else 1,
        group_scores="top_2" if limited else "top_k",
        tie_embeddings=v["tie_word_embeddings"] and _same(checkpoint, "backbone.embeddings.weight", "lm_head.weight"),
    )


def _same(checkpoint: Checkpoint, first: str, second: str) -> bool:
    both = first in checkpoint and second in checkpoint
    return both and (checkpoint.read(first) == checkpoint.read(second)).all().item()


def split_stored(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Index]]:
    if not name.startswith("mtp."):  # for predicting several tokens, which the class leaves out as well
        yield from layout.split_experts(re.sub(r"^model\.", "backbone.", name), shape)  # `model.` in transformers
