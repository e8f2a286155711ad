"""Nemotron 3 Super's shapes (120.6 B parameters, 12.7 B active): 40 Mamba-2 layers, 8 of attention, 40 of 512 experts
behind a latent of 1,024, K = 22. Source: its config.json, and docs/nemotron/super3/pretrain.md of NVIDIA-NeMo/Nemotron.

A checkpoint in the published layout (transformers' NemotronH) becomes a run of this model, or a model in a notebook:

    bigmac convert import --checkpoint=FOLDER --workdir=runs/super --config.mesh.expert=64 --config.mesh.fsdp=True
    bigmac plan --config=configs/nemotron3_super.py --topology=h100:8x8 --compile

The tokenizer is the checkpoint's: an import, or a run with `--config.train.init_from=FOLDER`, takes it from there.
"""

from bigmac_jax.config import Config
from bigmac_jax.config.recipes import nemotron3

BLOCKS = "MEMEMEM*E" * 3 + "MEMEMEMEM*E" * 4 + "MEMEMEM*E" + "MEMEMEME"


def get_config() -> Config:
    return nemotron3(
        BLOCKS, 4096, 32, 128, ranks=64, structure="bigmac", num_experts=512, top_k=22, down_ratio=1 / 4,
        expert_hidden_size=2688, shared_expert_hidden_size=5376, router_scale=5.0,
    )  # fmt: skip
