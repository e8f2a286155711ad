"""GPT3-2.7B with experts, as in the paper (Table 5). An argument changes the structure: gpt3_2_7b.py:vanilla.

bigmac plan --config=configs/paper/gpt3_2_7b.py --config.mesh.expert=32 --devices=32 --paper
"""

from bigmac_jax.config import Config
from bigmac_jax.config.recipes import paper


def get_config(structure: str = "bigmac") -> Config:
    return paper(structure, num_layers=32, hidden_size=2560, num_heads=32)
