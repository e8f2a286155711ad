"""The two ways in which LatentMoE (arXiv 2601.18089) spends a narrow exchange, at GPT3-XL's size.

Both keep the width of fine_grained's experts, r·h, where BigMac widens them to h. `:eff` keeps the number of experts
and top-k as well, and so has a quarter of the bytes, parameters and FLOPs in its experts. `:acc` multiplies both by
1/r: the bytes, parameters and FLOPs of fine_grained, spent on four times as many choices.

    bigmac plan --config=configs/latent_moe.py:acc --config.mesh.expert=32 --devices=32
"""

import dataclasses

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.config.recipes import paper

SCALES = {"eff": 1, "acc": 4}  # 1/r


def get_config(spend: str = "eff") -> Config:
    if spend not in SCALES:
        raise ConfigError(f"configs/latent_moe.py:{spend} must be one of {', '.join(SCALES)}, as in latent_moe.py:acc")
    base = paper("bigmac", num_layers=24, hidden_size=2048, num_heads=16)
    model, scale = base.model, SCALES[spend]
    experts = dataclasses.replace(
        model,
        num_experts=scale * model.num_experts,
        top_k=scale * model.top_k,
        expert_hidden_size=model.latent_size,
    )
    return dataclasses.replace(base, model=experts)
