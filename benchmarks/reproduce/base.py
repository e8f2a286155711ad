"""The models of docs/reproduction.md: --config=benchmarks/reproduce/base.py:SIZE, one rank a host.

A small model with many tokens a step: the dense parameters' gradients, summed over the hosts, are about 4 % of the bytes
that fine_grained exchanges at K = 8, as in the paper. Long sequences, so that what does not grow with K outweighs
the experts, as it did in the paper's Table 1, whose steps without exchange take as long at K = 1 as at K = 8.
"""

from bigmac_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig

HOSTS = 4
SIZES = {"tiny": 32, "small": 128, "medium": 192, "large": 256}  # h


def get_config(size: str = "small") -> Config:
    hidden = SIZES[size]
    toy = size == "tiny"
    return Config(
        model=ModelConfig(
            structure="fine_grained",
            num_layers=2,
            hidden_size=hidden,
            num_heads=2,
            vocab_size=512,
            num_experts=64,
            top_k=8,
            down_ratio=0.25,
            capacity_factor=1.2,
            exchange="all_to_all",
            wire_dtype="bfloat16",
        ),
        mesh=MeshConfig(expert=HOSTS),
        data=DataConfig(sequence_length=128 if toy else 1024, batch_size=HOSTS * 2),
        optimizer=OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-3, warmup_steps=10),
        train=TrainConfig(steps=20, log_every=1),
    )
