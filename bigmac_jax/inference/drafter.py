"""The draft model of speculative decoding, which exchanges nothing: the model itself with only the experts of a token's
own rank.

Attention, dense layers and shared experts are the model's; a chosen expert of another rank is left out. (After SpecMoE,
arXiv 2604.10152. To compute an expert that is near in its place was tried, and fewer tokens were accepted.)
"""

import copy
import dataclasses
import math
from dataclasses import dataclass

from bigmac_jax.config import Config
from bigmac_jax.config.errors import require
from bigmac_jax.inference.kv_cache import Decoder
from bigmac_jax.model.mesh import current_group
from bigmac_jax.model.moe import MoE
from bigmac_jax.model.transformer import Block


@dataclass(frozen=True)
class Speculation:
    """Settings of speculative decoding.

    Attributes:
      tokens: length of a draft; 0 turns drafting off.
      local_experts: how many experts of each rank a draft may use; 0 = all that it holds. Fewer are for study.
      least: drafting pauses while a smaller share of the drafted tokens is accepted.

    Raises:
      ConfigError: a value out of its range.
    """

    tokens: int = 0
    local_experts: int = 0
    least: float = 0.25

    def __post_init__(self) -> None:
        require(0 <= self.tokens <= 32, f"speculate={self.tokens} must lie in [0, 32]; 0 drafts nothing")
        require(self.local_experts >= 0, f"local_experts={self.local_experts} must be at least 0 (all of a rank)")
        require(0 <= self.least <= 1, f"least_acceptance={self.least} must lie in [0, 1]; 0 drafts always")

    def check(self, config: Config) -> None:
        """Raises ConfigError if drafting can save no exchange for a model on the current mesh."""
        if not self.tokens:
            return
        m, ranks = config.model, math.prod(current_group().sizes)
        require(
            m.is_moe,
            f"speculate={self.tokens} drafts with the experts that a rank holds, and model.structure={m.structure} "
            f"has no experts; use speculate=0",
        )
        held = m.expert_count // ranks
        require(
            self.local_experts <= held,
            f"local_experts={self.local_experts} must be at most the {held} that a rank holds",
        )
        require(
            ranks > 1 or 0 < self.local_experts < held,
            f"speculate={self.tokens} saves exchanges, and on one rank of experts there are none: a draft would be "
            f"the model itself; use speculate=0, mesh.expert > 1, or fewer local_experts to study acceptance",
        )


def make_drafter(decoder: Decoder, speculation: Speculation) -> Decoder:
    """Makes the draft model of a decoder: the same arrays, and MoE layers that compute experts of the token's rank."""
    held = decoder.config.model.expert_count // math.prod(current_group().sizes)

    def draft(layer: Block) -> Block:
        experts = getattr(layer, "mlp", None)
        if not isinstance(experts, MoE):
            return layer
        drafting, experts = copy.copy(layer), copy.copy(experts)
        experts.draft_experts = speculation.local_experts or held
        drafting.mlp = experts
        return drafting

    groups = tuple(tuple(map(draft, group)) for group in decoder.groups)
    return dataclasses.replace(decoder, groups=groups)
