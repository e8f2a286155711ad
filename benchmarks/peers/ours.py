"""A worker of benchmarks.peers: this project, in the likeness of each structure's peer.

Started as python -m benchmarks.peers.ours STRUCTURE STEPS.
"""

import sys
from typing import Any

import jax

from benchmarks.peers import B1, B2, LEARNING_RATE, SHAPE, WEIGHT_DECAY, serve
from benchmarks.stepper import Stepper
from bigmac_jax.commands import cli
from bigmac_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from bigmac_jax.training.step import make_trainer

# What differs from the defaults, to be what the peer is.
LIKE_PEER: dict[str, dict[str, Any]] = {
    "fine_grained": {"gated": True, "activation": "silu"},  # Qwen3-MoE
    "bigmac": {  # NemotronH: neither rotary positions nor query-key norm, and always a shared expert
        "positions": "none",
        "qk_norm": False,
        "router_scores": "sigmoid",
        "num_shared_experts": 1,
        "shared_expert_hidden_size": SHAPE.latent_size,
    },
}


def config_like_peer(structure: str) -> Config:
    model = ModelConfig(
        structure=structure,
        num_layers=SHAPE.num_layers,
        hidden_size=SHAPE.hidden_size,
        num_heads=SHAPE.num_heads,
        vocab_size=SHAPE.vocab_size,
        tie_embeddings=False,
        num_experts=SHAPE.num_experts,
        top_k=SHAPE.top_k,
        down_ratio=SHAPE.latent_size / SHAPE.hidden_size,
        capacity_factor=float("inf"),
        balance="none",
        latent_norm="none",
        projection_init="random",
        **LIKE_PEER[structure],
    )
    optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATE, b1=B1, b2=B2, weight_decay=WEIGHT_DECAY, warmup_steps=0, clip_norm=0.0
    )
    data = DataConfig(batch_size=SHAPE.batch_size, sequence_length=SHAPE.sequence_length)
    return Config(model=model, optimizer=optimizer, data=data)


def main() -> None:
    config = config_like_peer(sys.argv[1])
    mesh = cli.enter_mesh(config)
    params = make_trainer(config, mesh).abstract_state.params
    serve(sum(leaf.size for leaf in jax.tree.leaves(params)), Stepper(config, mesh, steps=int(sys.argv[2])))


if __name__ == "__main__":
    main()
