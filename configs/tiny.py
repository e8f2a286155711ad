"""A language model in ten minutes on two CPU cores (draft; see docs/results.md)."""

from bigmac_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(num_layers=3, hidden_size=128, num_heads=4, num_experts=32, top_k=4),
        data=DataConfig(sequence_length=256, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=5e-3, final_learning_rate=5e-4, warmup_steps=60),
        train=TrainConfig(steps=1300, eval_every=250, checkpoint_every=250),
    )
