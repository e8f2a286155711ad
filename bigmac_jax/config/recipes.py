"""Settings that several config files share."""

from collections.abc import Mapping
from typing import Any

from bigmac_jax.config.errors import require
from bigmac_jax.config.execution import ExecutionConfig, MeshConfig
from bigmac_jax.config.model import ModelConfig, Structure
from bigmac_jax.config.reading import with_overrides
from bigmac_jax.config.root import Config
from bigmac_jax.config.training import DataConfig, OptimizerConfig, TrainConfig


def paper(structure: Structure, num_layers: int, hidden_size: int, num_heads: int) -> Config:
    """A base model with the hyper-parameters of the paper's Table 5: GPT-2's backbone but for the embedding's factor
    √h, 64 experts, K = 8, r = 1/4.

    Its tensor parallelism of 4 is left out; a step has 0.5 M tokens.
    """
    return Config(
        model=ModelConfig(
            structure=structure,
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=num_heads,
            vocab_size=50304,  # GPT-2's 50,257, padded to a multiple of 128
            norm="layernorm",
            positions="learned",
            activation="gelu",
            use_bias=True,
            qk_norm=False,
            tie_embeddings=True,
            dropout=0.1,
            num_experts=64,
            top_k=8,
            down_ratio=0.25,
            latent_norm="none",
            projection_init="random",
            router_renormalize=False,
            capacity_factor=1.2,
            balance_coefficient=0.001,
            balance_scope="part",
        ),
        execution=ExecutionConfig(dtype="bfloat16"),
        mesh=MeshConfig(expert=4),
        data=DataConfig(source="tfds:wikipedia/20230601.en", tokenizer="gpt2", sequence_length=2048, batch_size=256),
        optimizer=OptimizerConfig(
            learning_rate=3e-4,
            final_learning_rate=3e-5,
            warmup_steps=1200,
            decay_steps=5200,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=6400, seed=1234, log_every=10, eval_every=400, checkpoint_every=400),
    )


def nemotron3(blocks: str, hidden_size: int, num_heads: int, mamba_heads: int, ranks: int, **model: Any) -> Config:
    """A model of Nemotron 3's family: Mamba-2, experts and a little attention, none of which has positions.

    Args:
      ranks: of the experts.
      model: what else differs in the family.
    """
    return Config(
        model=ModelConfig(
            **model,
            num_layers=1,
            blocks=blocks,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=2,
            head_dim=128,
            vocab_size=131072,
            norm_eps=1e-5,
            positions="none",
            qk_norm=False,
            tie_embeddings=False,
            scale_embedding=False,
            latent_norm="none",
            num_shared_experts=1,
            router_scores="sigmoid",
            balance="bias",
            mamba_heads=mamba_heads,
            mamba_groups=8,
            mamba_least_step=0.001,  # as transformers' class computes it
        ),
        execution=ExecutionConfig(dtype="bfloat16", remat="layer"),
        mesh=MeshConfig(expert=ranks, fsdp=True),
        data=DataConfig(source="tfds:wikipedia/20230601.en", sequence_length=4096, batch_size=512),
        optimizer=OptimizerConfig(learning_rate=4e-4, final_learning_rate=4e-6, warmup_steps=2000, b2=0.95),
        train=TrainConfig(steps=100_000, eval_every=1000, checkpoint_every=500),
    )


def on_machine(config: Config, machine: str, layouts: Mapping[str, str]) -> Config:
    """The config as it lies on a machine: with the fields of its layout, written as on a command line.

    Raises:
      ConfigError: there is no layout for the machine.
    """
    require(machine in layouts, f"there is no layout for {machine!r}; use {' or '.join(layouts)}, or fields of mesh")
    return with_overrides(config, layouts[machine].split())
