"""Nemotron 3 Ultra's shapes (550 B parameters, 55 B active): 48 Mamba-2 layers, 12 of attention, 48 of 512 experts
behind a latent of 2,048, K = 22. Source: paper/architecture.md of NVIDIA-NeMo/Nemotron, and its pretraining script.

    bigmac plan --config=nemotron3_ultra --topology=h100:64x8
    bigmac plan --config=nemotron3_ultra:v5p --topology=v5p:8x8x8
"""

from bigmac_jax.config import Config
from bigmac_jax.config.recipes import nemotron3, on_machine

BLOCKS = "MEMEMEM*EMEMEM*E" + "MEMEMEM*EMEMEMEM*EMEMEM*E" * 3 + "MEMEMEM*EMEMEMEME"

# Machine → how 512 H100, or 512 v5p, train it. All programs were compiled; those that decode on H100 need another mesh
# (docs/hybrid.md).
LAYOUTS = {
    "h100": "mesh.node=8 mesh.expert=8 execution.exchange=hierarchical execution.overlap_chunks=2",
    "v5p": "mesh.expert=64 execution.exchange=dedup",
}


def get_config(machine: str = "h100") -> Config:
    config = nemotron3(
        BLOCKS, 8192, 64, 256, ranks=64, structure="bigmac", num_experts=512, top_k=22,
        down_ratio=1 / 4, projection_init="random", expert_hidden_size=5120,
        shared_expert_hidden_size=10240, router_scale=5.0,
    )  # fmt: skip
    return on_machine(config, machine, LAYOUTS)
