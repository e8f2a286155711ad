"""Settings that several config files share."""

from bigmac_jax.config.execution import ExecutionConfig, MeshConfig
from bigmac_jax.config.model import ModelConfig, Structure
from bigmac_jax.config.root import Config
from bigmac_jax.config.training import DataConfig, OptimizerConfig, TrainConfig


def paper(structure: Structure, num_layers: int, hidden_size: int, num_heads: int) -> Config:
    """A base model with the hyper-parameters of the paper's Table 5: GPT-2's backbone, 64 experts, K = 8, r = 1/4.

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
