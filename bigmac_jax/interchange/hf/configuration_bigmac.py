"""The configuration of BigMac for transformers: what `modeling_bigmac.py` computes."""

from typing import Any

from transformers import PretrainedConfig

DEFAULTS: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "norm": "rmsnorm",  # rmsnorm | layernorm
    "norm_eps": 1e-6,
    "hidden_act": "relu2",  # σ, by transformers' names: relu2 | gelu_pytorch_tanh | silu
    "gated": False,  # experts and MLPs compute σ(gate) · up, not σ(up)
    "use_bias": False,  # in attention, experts and MLPs
    "tie_word_embeddings": True,
    "scale_embedding": True,  # what is read of the embedding is multiplied by √hidden_size
    # Attention.
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "positions": "rope",  # rope | learned (at most max_position_embeddings) | none
    "rope_theta": 10_000.0,
    "max_position_embeddings": 256,  # tokens that the model is declared to take
    "qk_norm": True,  # RMSNorm of every head's query and key
    # Feed-forward layers.
    "mlp_layer_types": None,  # of each layer: sparse (experts) | dense (one MLP); None = sparse
    "intermediate_size": 1024,  # of a dense layer
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "moe_latent_size": 64,  # width of the rows that experts take; None = hidden_size, without W↓ and W↑
    # Of pre_dispatch (a norm on x'), skip (a share of x' added to y'), post_combine (a norm on y'), gate (of the
    # output, by the token).
    "latent_norms": ["skip", "post_combine"],
    "shared_expert_intermediate_size": 0,  # of an MLP that every token passes beside the experts; 0 = none
    # The router.
    "scoring_func": "softmax",  # softmax | sigmoid
    "norm_topk_prob": True,  # the chosen gates are divided by their sum
    "routed_scaling_factor": 1.0,  # gates are multiplied by it
    "router_logit_bias": False,  # a bias of the logits
    "router_bias": False,  # a bias that shifts the choice of experts, not their gates
    "n_group": 1,  # experts are chosen from the best topk_group of n_group groups
    "topk_group": 1,
    "group_score_topk": 1,  # a group is as good as the sum of so many of its best experts
    "initializer_range": 0.02,
    "use_cache": True,
}


class BigMacConfig(PretrainedConfig):
    """The fields are those of `DEFAULTS`; others are transformers' own."""

    model_type = "bigmac"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  Trainer adds a list to it

    def __init__(self, **values: Any):
        for name, default in DEFAULTS.items():
            setattr(self, name, values.pop(name, default))
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["sparse"] * self.num_hidden_layers
        super().__init__(tie_word_embeddings=self.tie_word_embeddings, **values)

    @property
    def row_size(self) -> int:
        """Width of the rows that experts take."""
        return self.hidden_size if self.moe_latent_size is None else self.moe_latent_size
