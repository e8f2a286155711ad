"""A present-day BigMac model at GPT3-XL's size: RMSNorm, rotary positions, grouped-query attention, relu² experts, a
sigmoid router balanced by its bias, one shared expert.

    bigmac plan --config=configs/modern.py --config.mesh.expert=32 --devices=32
"""

from bigmac_jax.config import Config, DataConfig, ExecutionConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            structure="bigmac",
            num_layers=24,
            hidden_size=2048,
            num_heads=16,
            num_kv_heads=4,
            vocab_size=50304,
            tie_embeddings=False,
            num_experts=128,
            top_k=8,
            down_ratio=0.25,
            num_shared_experts=1,
            shared_expert_hidden_size=2048,
            router_scores="sigmoid",
            router_scale=2.5,
            balance="bias",
            capacity_factor=1.25,
        ),
        execution=ExecutionConfig(dtype="bfloat16", remat="layer"),
        mesh=MeshConfig(expert=4),
        data=DataConfig(source="tfds:wikipedia/20230601.en", tokenizer="gpt2", sequence_length=4096, batch_size=256),
        optimizer=OptimizerConfig(learning_rate=4e-4, final_learning_rate=4e-5, warmup_steps=2000),
        train=TrainConfig(steps=50_000, eval_every=1000, checkpoint_every=1000),
    )
