"""Nemotron 3 Ultra's shapes (550 B parameters, 55 B active): 48 Mamba-2 layers, 12 of attention, 48 of 512 experts
behind a latent of 2,048, K = 22. Source: paper/architecture.md of NVIDIA-NeMo/Nemotron, and its pretraining script.

    bigmac plan --config=configs/nemotron3_ultra.py --topology=h100:16x8 --compile
"""

from bigmac_jax.config import Config
from bigmac_jax.config.recipes import nemotron3

BLOCKS = "MEMEMEM*EMEMEM*E" + "MEMEMEM*EMEMEMEM*EMEMEM*E" * 3 + "MEMEMEM*EMEMEMEME"


def get_config() -> Config:
    return nemotron3(
        BLOCKS, 8192, 64, 256, ranks=64, structure="bigmac", num_experts=512, top_k=22, down_ratio=1 / 4,
        expert_hidden_size=5120, shared_expert_hidden_size=10240, router_scale=5.0,
    )  # fmt: skip
