"""Nemotron 3 Nano's shapes (31.6 B parameters, 3.6 B active): 23 Mamba-2 layers, 6 of attention, 23 of 128 experts at
full width, K = 6. Source: its config.json, and the recipe of Megatron-Bridge.

A checkpoint in the published layout (transformers' NemotronH) becomes a run of this model, or a model in a notebook:

    bigmac convert import --checkpoint=FOLDER --workdir=runs/nano --config.mesh.expert=8 --config.mesh.fsdp=True
    bigmac plan --config=configs/nemotron3_nano.py --topology=v6e:4x4 --compile

The tokenizer is the checkpoint's: an import, or a run with `--config.train.init_from=FOLDER`, takes it from there.
"""

from bigmac_jax.config import Config
from bigmac_jax.config.recipes import nemotron3

BLOCKS = "MEMEM*E" + "MEMEM*E" * 4 + "MEMEMEM*E" + "MEMEMEME"


def get_config() -> Config:
    return nemotron3(
        BLOCKS, 2688, 32, 64, ranks=8, structure="fine_grained", num_experts=128, top_k=6, expert_hidden_size=1856,
        shared_expert_hidden_size=3712, router_scale=2.5,
    )  # fmt: skip
