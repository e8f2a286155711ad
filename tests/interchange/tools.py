"""Configs that have an equivalent, and logits of ours."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from model.tools import PAPER, random_tokens, split_tokens, tiny

from bigmac_jax.config import Config
from bigmac_jax.data.tokenizer import JsonTokenizer, SentencePieceTokenizer

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
# What no class of transformers has; each value of each field that the model is computed with stands in one of them.
OWN: dict[str, dict[str, Any]] = {
    # As configs/tiny.py.
    "tiny": {"num_shared_experts": 1, "shared_expert_hidden_size": 12, "router_scale": 2.0},
    "tiny without a norm": {"latent_norm": "none", "num_shared_experts": 1},
    "tiny untied": {"tie_embeddings": False, "balance": "none", "top_k": 1, "latent_norm": "gate",
                    "router_scores": "sigmoid"},
    "paper": PAPER | UNSCALED | {"latent_norm": "pre_dispatch", "router_renormalize": False, "num_layers": 3},
    "groups": {"num_expert_groups": 4, "top_groups": 1, "top_k": 2, "router_scores": "sigmoid", "balance": "bias",
               "num_kv_heads": 2, "head_dim": 6, "positions": "none", "latent_norm": "pre_dispatch", "norm_eps": 1e-3},
    "biased": {"latent_norm": "post_combine", "gated": True, "activation": "silu", "use_bias": True, "rope_theta": 1e2,
               "num_shared_experts": 2, "num_kv_heads": 1, "expert_hidden_size": 10, "balance": "quantile",
               "num_layers": 3, "first_dense_layers": 1, "dense_hidden_size": 20},
    "normed": {"structure": "fine_grained", "latent_norm": "post_combine", "norm": "layernorm",
               "num_expert_groups": 2, "top_groups": 1, "top_k": 4, "group_scores": "top_2", "router_scale": 0.5},
    # Logits with a bias, which is also what a hyper router is exported as; and a matrix that stays as it was drawn.
    "affine": {"router": "affine", "structure": "fine_grained", "gated": True, "activation": "silu"},
    "frozen": {"router": "frozen"},
    "vanilla": PAPER | {"structure": "vanilla", "num_experts": 128, "gated": True,
                        "tie_embeddings": False, "down_ratio": 0.25},
    "dense": {"structure": "dense", "positions": "learned", "gated": True, "tie_embeddings": False},
    "dense paper": PAPER | {"structure": "dense", "expert_hidden_size": 24},
}  # fmt: skip
MAMBA = {"mamba_heads": 4, "mamba_head_dim": 4, "mamba_groups": 2, "mamba_state": 6, "mamba_least_step": 0.7}
HYBRID = NEMOTRON | MAMBA | {"scale_embedding": False, "tie_embeddings": False, "num_layers": 1}
# Other orders of NemotronH's blocks. In in_proj of the first are rows of 16 gates, 16 inner, 12 of B, 12 of C, 4 steps.
HYBRIDS: dict[str, dict[str, Any]] = {
    "all kinds": {"blocks": "MM*E-M", "mamba_bias": True, "num_shared_experts": 1, "dense_hidden_size": 20,
                  "balance": "bias"},
    "no experts": {"blocks": "M-M*-", "structure": "dense", "mamba_conv_bias": False, "expert_hidden_size": 20},
    "runs": {"blocks": "ME*MEE", "num_layers": 2, "structure": "fine_grained", "mamba_conv": 3, "mamba_groups": 4},
}  # fmt: skip
# Next-token modules, some with blocks that the model itself has none of.
NEXT: dict[str, dict[str, Any]] = {
    "two with Mamba": {"blocks": "*EE", "mtp_modules": 2, "mtp_blocks": "M*E", "balance": "bias", "mamba_bias": True},
    "published": {"blocks": "MEM*E", "mtp_modules": 1, "mtp_blocks": "*E", "num_shared_experts": 1, "balance": "bias"},
    "no pattern": {"num_layers": 2, "mtp_modules": 3, "structure": "fine_grained", "scale_embedding": True},
    "no experts in them": {"blocks": "ME*E", "mtp_modules": 2, "mtp_blocks": "**-", "dense_hidden_size": 20},
    "no experts": {"blocks": "M*", "mtp_modules": 1, "mtp_blocks": "*-", "structure": "dense",
                   "expert_hidden_size": 20},
}  # fmt: skip
CLASSES = {"qwen": "qwen3_moe", "qwen tied": "qwen3_moe"}


def config_of(name: str, mesh: tuple[Any, ...] = (1, 1, 1)) -> Config:
    return tiny(mesh, batch=4, **(MODELS | OWN)[name])


def of_model(config: Config) -> tuple[Any, ...]:
    """What an export says of a config, and an import takes."""
    data = config.data
    return config.resolved.model, data.sequence_length, data.documents, data.tokenizer, config.execution.dtype


def tokens_of(config: Config) -> np.ndarray:
    return random_tokens(config)[:, :-1]


def our_logits(model: Any, tokens_BL: np.ndarray) -> np.ndarray:
    """On the current mesh."""
    return np.asarray(_logits(model, split_tokens(tokens_BL)))


@functools.partial(jax.jit)  # a model of the same config is compiled once
def _logits(model: Any, tokens_BL: jax.Array) -> jax.Array:
    logits_BLV: jax.Array = model(tokens_BL, evaluating=True)[0]
    return logits_BLV


def with_special_tokens(tokenizer: JsonTokenizer, *names: str) -> JsonTokenizer:
    """The tokenizer with more tokens, behind its own."""
    whole = tokenizers.Tokenizer.from_str(tokenizer.json_text)
    whole.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names])
    return JsonTokenizer(whole.to_str())


def sentencepiece_model(folder: pathlib.Path, texts: list[str]) -> SentencePieceTokenizer:
    """A Unigram model of these, as SentencePiece makes it by default: with a space before every text."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    file = folder / "sp.model"
    with file.open("wb") as writer:
        trainer.train(
            sentence_iterator=iter([line for text in texts for line in text.splitlines()]), model_writer=writer,
            vocab_size=200, hard_vocab_limit=False, eos_piece="<eos>", minloglevel=5,
        )  # fmt: skip
    return SentencePieceTokenizer(file)
