"""Nemotron 3 Super's shapes (120.6 B parameters, 12.7 B active): 40 Mamba-2 layers, 8 of attention, 40 of 512 experts
behind a latent of 1,024, K = 22. Source: its config.json, and docs/nemotron/super3/pretrain.md of NVIDIA-NeMo/Nemotron.

A checkpoint in the published layout (transformers' NemotronH) becomes a run of this model, or a model in a notebook:

    bigmac convert import --checkpoint=FOLDER --workdir=runs/super --config.mesh.expert=64 --config.mesh.fsdp=True
    bigmac plan --config=nemotron3_super --topology=h100:8x8 --compile
    bigmac plan --config=nemotron3_super:v5p --topology=v5p:4x4x8

The tokenizer is the checkpoint's: an import, or a run with `--config.train.init_from=FOLDER`, takes it from there.
"""

from bigmac_jax.config import Config
from bigmac_jax.config.recipes import nemotron3, on_machine

BLOCKS = "MEMEMEM*E" * 3 + "MEMEMEMEM*E" * 4 + "MEMEMEM*E" + "MEMEMEME"


# Machine → how 64 H100, or 128 v5p, train it. All programs of the first were compiled (docs/hybrid.md).
LAYOUTS = {
    "h100": "mesh.node=8 mesh.expert=8 execution.exchange=hierarchical execution.overlap_chunks=2 "
    "train.accumulate_steps=4",
    "v5p": "mesh.expert=128 execution.exchange=dedup execution.remat=exchange train.accumulate_steps=4",
}


def get_config(machine: str = "h100") -> Config:
    config = nemotron3(
        BLOCKS, 4096, 32, 128, ranks=64, structure="bigmac", num_experts=512, top_k=22,
        down_ratio=1 / 4, projection_init="random", expert_hidden_size=2688,
        shared_expert_hidden_size=5376, router_scale=5.0,
    )  # fmt: skip
    return on_machine(config, machine, LAYOUTS)
