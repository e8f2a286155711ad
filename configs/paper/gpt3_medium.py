"""GPT3-Medium with experts, as in the paper (Table 5). An argument changes the structure: gpt3_medium.py:vanilla.

bigmac plan --config=configs/paper/gpt3_medium.py --config.mesh.expert=32 --devices=32 --paper
"""

from bigmac_jax.config import Config
from bigmac_jax.config.recipes import paper


def get_config(structure: str = "bigmac") -> Config:
    return paper(structure, num_layers=24, hidden_size=1024, num_heads=16)
