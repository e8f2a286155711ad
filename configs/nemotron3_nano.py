"""Nemotron 3 Nano's shapes (31.6 B parameters, 3.6 B active): 23 Mamba-2 layers, 6 of attention, 23 of 128 experts at
full width, K = 6. Source: its config.json, and the recipe of Megatron-Bridge.

A checkpoint in the published layout (transformers' NemotronH) becomes a run of this model, or a model in a notebook:

    bigmac convert import --checkpoint=FOLDER --workdir=runs/nano --config.mesh.expert=8 --config.mesh.fsdp=True
    bigmac plan --config=nemotron3_nano --topology=h100:1x8 --compile
    bigmac plan --config=nemotron3_nano:v6e --topology=v6e:4x4

The tokenizer is the checkpoint's: an import, or a run with `--config.train.init_from=FOLDER`, takes it from there.
"""

from bigmac_jax.config import Config
from bigmac_jax.config.recipes import nemotron3, on_machine

BLOCKS = "MEMEM*E" + "MEMEM*E" * 4 + "MEMEMEM*E" + "MEMEMEME"


# Machine → how eight H100, or 16 v6e, train it (docs/hybrid.md says what was compiled). Both keep moments
# in host memory: parameters and the sums of two gradients take 44 of an H100's 75 GiB, and 22 of a v6e's 31.
LAYOUTS = {
    "h100": "mesh.expert=4 execution.exchange=dedup execution.remat=exchange execution.offload_optimizer=True "
    "train.accumulate_steps=32",
    "v6e": "mesh.expert=4 mesh.tensor=4 mesh.split_experts=True execution.exchange=gather execution.remat=layer "
    "execution.offload_optimizer=True optimizer.moment_dtype=bfloat16 train.accumulate_steps=128",
}


def get_config(machine: str = "h100") -> Config:
    config = nemotron3(
        BLOCKS, 2688, 32, 64, ranks=8, structure="fine_grained", num_experts=128, top_k=6, expert_hidden_size=1856,
        shared_expert_hidden_size=3712, router_scale=2.5,
    )  # fmt: skip
    return on_machine(config, machine, LAYOUTS)
