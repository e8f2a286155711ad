"""The model of configs/modern.py on books of 131,072 tokens: documents don't see each other, and four ranks of `tensor`
share heads and sequence.

The base of the rotary positions is 1e7: a model that is to tell its own tokens apart at distance L needs a base of at
least 0.0424 · L^1.628 (Men et al. 2024, "Base of RoPE Bounds Context Length", figure 1), 9.1e6 for this L.

    bigmac plan --config=configs/long.py --topology=v5p:4x4x4 --compile
    bigmac plan --config=configs/long.py --topology=h100:4x8 --compile
    bigmac eval --workdir=runs/long --tasks=needle
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
            rope_theta=1e7,
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
        execution=ExecutionConfig(dtype="bfloat16", remat="exchange"),
        mesh=MeshConfig(expert=8, tensor=4, fsdp=True),
        data=DataConfig(
            source="tfds:pg19",
            text_field="book_text",
            tokenizer="gpt2",
            sequence_length=131072,
            documents="masked",
            packing="best_fit",
            batch_size=32,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-4, final_learning_rate=2e-5, warmup_steps=1000),
        train=TrainConfig(steps=20_000, accumulate_steps=2, eval_every=500, checkpoint_every=500),
    )
