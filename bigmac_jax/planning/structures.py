"""The structures that a config could have instead, each as large as the configured one."""

from dataclasses import replace
from typing import Any

from bigmac_jax.config import STRUCTURES, Config, ConfigError, ModelConfig
from bigmac_jax.config.model import LatentNorm, Structure
from bigmac_jax.model.counts import parameters
from bigmac_jax.planning.units import is_near

CONTROL = "fine_grained, norm"  # against it one sees what the narrow exchange alone does (docs/quality.md)


def name_of(model: ModelConfig) -> str:
    """The structure, or CONTROL."""
    is_control = model.structure == "fine_grained" and model.latent_norms == ("post_combine",)
    return CONTROL if is_control else model.structure


def alternatives(config: Config, studied: bool = False) -> dict[str, Config | ConfigError]:
    """The config with each structure, its own first and as it is; or why it cannot have that one.

    Args:
      studied: with what else the study of quality had of `bigmac`, r = 1/4, r = 1/2 and twice the experts.
    """
    m = config.model
    found: dict[str, Config | ConfigError] = {name_of(m): config}
    kinds: dict[str, dict[str, Any]] = {"bigmac": {"structure": "bigmac"}}
    if studied:
        ratios = (("1/4", 0.25), ("1/2", 0.5))
        kinds |= {f"bigmac, r = {said}": kinds["bigmac"] | {"down_ratio": r} for said, r in ratios if r != m.down_ratio}
        twice = {"down_ratio": 0.25, "num_experts": 2 * m.num_experts, "top_k": 2 * m.top_k}
        kinds |= {"bigmac, r = 1/4, twice the experts": kinds["bigmac"] | twice} if m.is_moe else {}
    kinds["fine_grained"] = {"structure": "fine_grained"}
    kinds[CONTROL] = {"structure": "fine_grained", "latent_norm": "post_combine"}
    kinds |= {name: {"structure": name} for name in reversed(STRUCTURES) if name not in kinds}
    for name, fields in kinds.items():
        if name not in found:
            found[name] = _tried(config, **fields)
    return found


def _tried(config: Config, **fields: Any) -> Config | ConfigError:
    try:
        return of_equal_size(config, **fields)
    except ConfigError as error:
        return error


def of_equal_size(config: Config, structure: Structure, latent_norm: LatentNorm = "auto", **more: Any) -> Config:
    """The config with another structure and as many parameters: its experts get the width that this takes, unless the
    paper's comes near. A hyper router counts as the matrix that it makes. A dense model has no idle experts: beside
    one, those that are active for a token are equal. Checkpoints have all experts, whose number may be another.

    Args:
      more: other fields of the model.
    """

    def with_width(width: int) -> Config:
        fields: dict[str, Any] = {"structure": structure, "latent_norm": latent_norm, **more}
        train = replace(config.train, experts_per_checkpoint=0)
        fields["expert_hidden_size"] = width
        if structure != config.model.structure:  # which may have too few experts for it; a plan is the same without
            fields["overflow"] = "drop"
        return replace(config, model=replace(config.model, **fields), train=train)

    def size(of: Config) -> int:
        count = parameters(of, {})
        return count.active if "dense" in (structure, config.model.structure) else count.computed

    wanted, own = size(config), with_width(0)
    if is_near(size(own), wanted):
        return own
    unit = 8 * config.mesh.tensor  # a width that matrix units take, and that the ranks of `tensor` divide
    narrowest = size(with_width(unit))
    each = size(with_width(2 * unit)) - narrowest
    return with_width(unit * max(1, 1 + round((wanted - narrowest) / each)))
