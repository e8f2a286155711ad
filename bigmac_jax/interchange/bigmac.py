"""Our own class in transformers, for any config: its code, `hf/`, is written beside the weights.

Names are transformers' where it has some. A layer's experts are one tensor, [E, inputs, outputs]; other matrices are
torch's, [outputs, inputs]. config.json has what the class computes, and under `bigmac_jax` the model of our config.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from bigmac_jax.config import Config, ConfigError, ModelConfig
from bigmac_jax.interchange import layout
from bigmac_jax.interchange.layout import (
    ACTIVATIONS,
    Leaves,
    Tensor,
    describe_config,
    find_other_blocks,
    read_description,
    split_leaf,
)
from bigmac_jax.interchange.tensor_files import Checkpoint, Index

CODE = sorted(pathlib.Path(__file__).with_name("hf").glob("*.py"))
_ENDS = {
    "embedding_VD": "model.embed_tokens.weight",
    "positions_LD": "model.embed_positions.weight",
    "final_norm.scale_D": "model.norm.weight",
    "final_norm.bias_D": "model.norm.bias",
    "unembedding_VD": "lm_head.weight",
}
_LAYER = {
    "attention_norm.scale_D": "input_layernorm.weight",
    "attention_norm.bias_D": "input_layernorm.bias",
    "attention.query.w_DF": "self_attn.q_proj.weight",
    "attention.query.b_F": "self_attn.q_proj.bias",
    "attention.key.w_DF": "self_attn.k_proj.weight",
    "attention.key.b_F": "self_attn.k_proj.bias",
    "attention.value.w_DF": "self_attn.v_proj.weight",
    "attention.value.b_F": "self_attn.v_proj.bias",
    "attention.out.w_DF": "self_attn.o_proj.weight",
    "attention.out.b_F": "self_attn.o_proj.bias",
    "attention.query_norm.scale_D": "self_attn.q_norm.weight",
    "attention.key_norm.scale_D": "self_attn.k_norm.weight",
    "mlp_norm.scale_D": "post_attention_layernorm.weight",
    "mlp_norm.bias_D": "post_attention_layernorm.bias",
}
_MLP = {
    "up.w_DF": "up_proj.weight",
    "up.b_F": "up_proj.bias",
    "gate.w_DF": "gate_proj.weight",
    "gate.b_F": "gate_proj.bias",
    "down.w_DF": "down_proj.weight",
    "down.b_F": "down_proj.bias",
}
_MOE = {
    "router_DE": "router.weight",
    "router_logit_bias_E": "router.bias",
    "router_bias_E": "router.e_score_correction_bias",
    "down.w_DF": "latent_down.weight",
    "up.w_DF": "latent_up.weight",
    "experts.w_in_eRF": "experts.up_proj",
    "experts.b_in_eF": "experts.up_bias",
    "experts.w_gate_eRF": "experts.gate_proj",
    "experts.b_gate_eF": "experts.gate_bias",
    "experts.w_out_eFR": "experts.down_proj",
    "experts.b_out_eR": "experts.down_bias",
    "dispatch_norm.scale_D": "dispatch_norm.weight",
    "dispatch_norm.bias_D": "dispatch_norm.bias",
    "combine_norm.scale_D": "combine_norm.weight",
    "combine_norm.bias_D": "combine_norm.bias",
    "skip_1": "skip_factor",
    "gate.w_DF": "output_gate.weight",
} | {f"shared.{ours}": f"shared_experts.{theirs}" for ours, theirs in _MLP.items()}


def find_obstacles(config: ModelConfig) -> list[str]:
    return layout.find_violations(vars(config), blocks=find_other_blocks(config, "first", "layers"))


def tensors(config: ModelConfig, leaves: Leaves) -> Iterator[Tensor]:
    for leaf in leaves:
        if leaf in _ENDS:
            yield Tensor(_ENDS[leaf], leaf)
            continue
        stack, ours = split_leaf(config, leaf)
        assert stack is not None
        feed_forward = _MOE if stack.experts else _MLP
        of_layer = _LAYER | {f"mlp.{name}": f"mlp.{theirs}" for name, theirs in feed_forward.items()}
        transposed, exact = ours.endswith(("w_DF", "router_DE")), "router" in ours
        for place, layer in enumerate(stack.layers):
            name = f"model.layers.{layer}.{of_layer[ours]}"
            yield Tensor(name, leaf, place, transposed=transposed, exact=exact)


def to_json(config: Config, leaves: Leaves) -> dict[str, Any]:
    return {
        "architectures": ["BigMacForCausalLM"],
        "model_type": "bigmac",
        "auto_map": {
            "AutoConfig": "configuration_bigmac.BigMacConfig",
            "AutoModel": "modeling_bigmac.BigMacModel",
            "AutoModelForCausalLM": "modeling_bigmac.BigMacForCausalLM",
        },
        **_computed(config),
        "bigmac_jax": describe_config(config),
    }


def _computed(config: Config) -> dict[str, Any]:
    """The fields of `hf/configuration_bigmac.py`, which says what they mean."""
    m = config.model
    fields = layout.common_json(config) | {
        "num_hidden_layers": m.depth,
        "norm": m.norm,
        "norm_eps": m.norm_eps,
        "hidden_act": ACTIVATIONS[m.activation],
        "gated": m.gated,
        "use_bias": m.use_bias,
        "tie_word_embeddings": m.tie_embeddings,
        "scale_embedding": m.scale_embedding,
        "positions": m.positions,
        "rope_theta": m.rope_theta,
        "qk_norm": m.qk_norm,
        "mlp_layer_types": ["dense"] * m.mlp_layers + ["sparse"] * m.moe_layers,
    }
    if m.mlp_layers:
        fields |= {"intermediate_size": m.mlp_width}
    if not m.is_moe:
        return fields
    return fields | {
        "num_experts": m.expert_count,
        "num_experts_per_tok": m.choices,
        "moe_intermediate_size": m.expert_width,
        "moe_latent_size": m.latent_size if m.structure == "bigmac" else None,
        "latent_norms": list(m.latent_norms),
        "shared_expert_intermediate_size": m.shared_width,
        "scoring_func": m.router_scores,
        "norm_topk_prob": m.router_renormalize,
        "routed_scaling_factor": m.router_scale,
        "router_logit_bias": m.router == "affine",
        "router_bias": m.has_router_bias,
        "n_group": m.num_expert_groups,
        "topk_group": m.top_groups,
        "group_score_topk": m.group_best,
    }


def from_json(values: dict[str, Any], checkpoint: Checkpoint) -> Config:
    config = read_description(values["bigmac_jax"], checkpoint)
    # transformers writes all of the class's fields, also those of experts where there are none.
    layout.check_known(checkpoint, values, ["bigmac_jax", "intermediate_size"], _computed(config), _computed(Config()))
    if config.model.is_moe and config.model.router == "hyper":
        raise ConfigError(
            f"{checkpoint.directory / 'config.json'}: model.router=hyper must be affine: an export has the "
            f"matrix that the network makes, not the network"
        )
    for name, value in _computed(config).items():
        if values.get(name, value) != value:
            raise ConfigError(
                f"{checkpoint.directory / 'config.json'}: {name}={values[name]} must be {value}, as its bigmac_jax "
                f"section has it; change both, or neither"
            )
    if config.model.tie_embeddings:
        layout.leave_out_tied(checkpoint, "model.embed_tokens.weight", "lm_head.weight")
    return config


def split_stored(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Index]]:
    yield name, ()
