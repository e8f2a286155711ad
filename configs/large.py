"""BigMac models of the size that frontier models have: 118 B parameters of which 9.8 B are active, or with `:258b` 88
layers and 258 B of which 20 B; latent 1024 of 4096, 512 experts, K = 22, one shared expert; a step of 4 M tokens on
512 TPU v5p.

    bigmac plan --config=configs/large.py --topology=v5p:8x8x8 --compile
    bigmac plan --config=configs/large.py:258b --topology=h100:64x8 --search
"""

from bigmac_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)

LAYERS = {"118b": 40, "258b": 88}


def get_config(size: str = "118b") -> Config:
    if size not in LAYERS:
        raise ConfigError(f"configs/large.py:{size} must be one of {', '.join(LAYERS)}, as in large.py:258b")
    return Config(
        model=ModelConfig(
            structure="bigmac",
            num_layers=LAYERS[size],
            hidden_size=4096,
            num_heads=32,
            num_kv_heads=8,
            vocab_size=131072,
            tie_embeddings=False,
            num_experts=512,
            top_k=22,
            down_ratio=0.25,
            expert_hidden_size=2688,
            num_shared_experts=1,
            shared_expert_hidden_size=5376,
            router_scores="sigmoid",
            router_scale=5.0,
            balance="bias",
            capacity_factor=1.25,
        ),
        execution=ExecutionConfig(dtype="bfloat16", remat="layer"),
        mesh=MeshConfig(expert=64, fsdp=True),
        data=DataConfig(source="tfds:wikipedia/20230601.en", tokenizer="gpt2", sequence_length=4096, batch_size=1024),
        optimizer=OptimizerConfig(learning_rate=2e-4, final_learning_rate=2e-5, warmup_steps=2000),
        train=TrainConfig(steps=100_000, accumulate_steps=2, eval_every=1000, checkpoint_every=500),
    )
