"""A BigMac language model of the State of the Union addresses that Hugging Face's NemotronH loads: `configs/tiny.py`
without positions, query-key norm and the norm of the latent, with a sigmoid router that its bias balances and an
embedding of its own.

    bigmac train --config=configs/nemotron.py --workdir=runs/nemotron
    bigmac convert export --workdir=runs/nemotron --step=best --output=exported

As many parameters in a layer and as many tokens as `configs/tiny.py`.
"""

from bigmac_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            structure="bigmac",
            num_layers=3,
            hidden_size=128,
            num_heads=2,
            vocab_size=8192,
            positions="none",
            qk_norm=False,
            tie_embeddings=False,
            scale_embedding=False,
            num_experts=32,
            top_k=4,
            down_ratio=0.25,
            latent_norm="none",  # NemotronH has none; configs/tiny.py learns better with it (docs/quality.md)
            projection_init="random",  # how W↓ and W↑ start without a norm was not tried
            num_shared_experts=1,
            shared_expert_hidden_size=256,
            router_scores="sigmoid",
            router_scale=2.0,
            balance="bias",
            capacity_factor=float("inf"),
        ),
        data=DataConfig(source="sotu", tokenizer="bpe", sequence_length=256, batch_size=8),
        optimizer=OptimizerConfig(
            learning_rate=6e-3, final_learning_rate=1e-4, warmup_steps=100, b2=0.98, weight_decay=0.1
        ),
        train=TrainConfig(steps=2400, log_every=20, eval_every=600, checkpoint_every=600),
    )
