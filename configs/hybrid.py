"""A hybrid language model of the State of the Union addresses: `configs/tiny.py` with Mamba-2 in two of three layers,
as Nemotron 3 has it, and no positions.

    bigmac train --config=configs/hybrid.py --workdir=runs/hybrid
"""

import dataclasses

from bigmac_jax.config import Config, load_config


def get_config() -> Config:
    base = load_config("tiny")
    hybrid = dataclasses.replace(
        base.model, blocks="MEME*E", num_layers=1, positions="none", mamba_head_dim=32, mamba_groups=2, mamba_state=32
    )
    return dataclasses.replace(base, model=hybrid)
