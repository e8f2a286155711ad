"""Configs that have an equivalent, and logits of ours."""

from typing import Any

import jax
import numpy as np
from model.tools import QUICK, random_tokens, split_tokens, tiny

from bigmac_jax.config import Config

NEMOTRON = {"latent_norm": "none", "positions": "none", "qk_norm": False, "router_scores": "sigmoid"}
QWEN = {"structure": "fine_grained", "gated": True, "activation": "silu"}
UNSCALED = {"scale_embedding": False}
MODELS: dict[str, dict[str, Any]] = {
    # As configs/nemotron.py, with grouped key-value heads of another size than h / N and node-limited routing.
    "bigmac": NEMOTRON | UNSCALED | {"balance": "bias", "num_shared_experts": 2, "num_kv_heads": 2, "head_dim": 6,
               "tie_embeddings": False, "top_k": 3, "num_expert_groups": 4, "top_groups": 2,
               "group_scores": "top_2", "router_scale": 2.5},
    # A shared expert of zeros, and an embedding times √D.
    "fine_grained": NEMOTRON | {"structure": "fine_grained", "norm_eps": 1e-3, "router_renormalize": False},
    # One table in both roles, a gate that is not renormalised because it is alone.
    "tied": NEMOTRON | UNSCALED | {"top_k": 1},
    "qwen": QWEN | {"num_kv_heads": 2, "rope_theta": 100.0, "norm_eps": 1e-3},
    "qwen tied": QWEN | UNSCALED | {"router_renormalize": False, "head_dim": 6, "rope_theta": 100.0},
}  # fmt: skip
CLASSES = {"qwen": "qwen3_moe", "qwen tied": "qwen3_moe"}


def config_of(name: str, mesh: tuple[Any, ...] = (1, 1, 1)) -> Config:
    return tiny(mesh, batch=4, **MODELS[name])


def tokens_of(config: Config) -> np.ndarray:
    return random_tokens(config)[:, :-1]


def our_logits(model: Any, tokens_BL: np.ndarray) -> np.ndarray:
    """On the current mesh."""
    call = jax.jit(lambda model, tokens_BL: model(tokens_BL, dropless=True)[0], compiler_options=QUICK)
    return np.asarray(call(model, split_tokens(tokens_BL)))
