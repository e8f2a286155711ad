"""What drafts in speculative decoding: a next-token module, or a draft model that exchanges nothing, which is the model
itself with only the experts of a token's own rank.

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

DRAFTERS = ("auto", "mtp", "local")


@dataclass(frozen=True)
class Speculation:
    """Settings of speculative decoding.

    Attributes:
      tokens: length of a draft; 0 turns drafting off.
      local_experts: how many experts of each rank a draft may use; 0 = all that it holds. Fewer are for study.
      least: drafting pauses while a smaller share of the drafted tokens is accepted.
      by: `mtp`, the model's first next-token module drafts (`next_token_drafts`); `local`, the experts of each rank;
        `auto`, the module where the model has one.

    Raises:
      ConfigError: a value out of its range.
    """

    tokens: int = 0
    local_experts: int = 0
    least: float = 0.25
    by: str = "auto"

    def __post_init__(self) -> None:
        require(0 <= self.tokens <= 32, f"speculate={self.tokens} must lie in [0, 32]; 0 drafts nothing")
        require(self.local_experts >= 0, f"local_experts={self.local_experts} must be at least 0 (all of a rank)")
        require(0 <= self.least <= 1, f"least_acceptance={self.least} must lie in [0, 1]; 0 drafts always")
        require(self.by in DRAFTERS, f"draft_with={self.by!r} must be one of {', '.join(DRAFTERS)}; use auto")

    def by_module(self, config: Config) -> bool:
        """Whether a next-token module drafts for a model."""
        return self.tokens > 0 and (self.by == "mtp" or (self.by == "auto" and config.model.mtp_modules > 0))

    def check(self, config: Config) -> None:
        """Raises ConfigError if a model has no module that could draft, or if drafts without exchange save none on the
        current mesh."""
        require(
            self.tokens > 0 or self.by == "auto",
            f"draft_with={self.by} says how tokens are drafted, and speculate=0 drafts none; use speculate=1 or more",
        )
        if not self.tokens:
            return
        m, ranks = config.model, math.prod(current_group().sizes)
        if self.by_module(config):
            require(
                m.mtp_modules > 0,
                f"draft_with=mtp needs a next-token module, and model.mtp_modules={m.mtp_modules}; use "
                f"draft_with=local, or speculate=0",
            )
            require(
                not self.local_experts,
                f"local_experts={self.local_experts} is for drafts by the experts of each rank, and a next-token "
                f"module drafts; use local_experts=0, or draft_with=local",
            )
            return
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
