"""Qwen3-30B-A3B's shapes: 48 layers, 128 gated experts of width 768, K = 8, grouped-query attention with heads of 128.

A checkpoint in the published layout (transformers' Qwen3Moe) becomes a run of this model, or a model in a notebook:

    bigmac convert import --checkpoint=FOLDER --workdir=runs/qwen3 --config.mesh.expert=32 --config.mesh.fsdp=True
    bigmac plan --config=configs/qwen3_30b.py --topology=v6e:4x8 --compile

The tokenizer is the checkpoint's: an import, or a run with `--config.train.init_from=FOLDER`, takes it from there.
`--config=configs/qwen3_30b.py:bigmac` is the same model with a narrow exchange: r = 1/4, experts of the same FLOPs.
"""

from bigmac_jax.config import Config, DataConfig, ExecutionConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config(structure: str = "fine_grained") -> Config:
    return Config(
        model=ModelConfig(
            structure=structure,
            num_layers=48,
            hidden_size=2048,
            num_heads=32,
            num_kv_heads=4,
            head_dim=128,
            vocab_size=151936,
            rope_theta=1e6,
            activation="silu",
            gated=True,
            tie_embeddings=False,
            scale_embedding=False,
            num_experts=128,
            top_k=8,
            # W_in and W_out of a bigmac expert are r·h = 512 wide on the wire; 4 × 768 inside keeps rows × FLOPs equal.
            expert_hidden_size=768 if structure == "fine_grained" else 3072,
            capacity_factor=1.25,
            balance_coefficient=0.001,
        ),
        execution=ExecutionConfig(dtype="bfloat16", remat="layer"),
        mesh=MeshConfig(expert=32, fsdp=True),
        data=DataConfig(source="tfds:wikipedia/20230601.en", sequence_length=4096, batch_size=256),
        optimizer=OptimizerConfig(learning_rate=3e-4, final_learning_rate=3e-5, warmup_steps=2000),
        train=TrainConfig(steps=50_000, accumulate_steps=8, eval_every=1000, checkpoint_every=1000),
    )
