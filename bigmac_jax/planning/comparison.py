"""Structures at an equal loss: the tokens that each needs for it, by the quality study, and the time that those take.

Loss falls by `slope` nats for e times the tokens, so a structure that is behind by a gap at equal tokens needs
e^(gap / slope) times as many for the loss that the configured one reaches.
"""

import functools
import math
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any, NamedTuple

from bigmac_jax.config import Config, ConfigError, ModelConfig
from bigmac_jax.planning.structures import name_of

ERRORS = 2  # standard errors that a difference must exceed to be one
_RATIOS = {0.25: "bigmac 1/4", 0.5: "bigmac 1/2"}
TWICE = ", twice"  # behind the name of one with twice as many experts and choices, each half as large


class Measured(NamedTuple):
    """A figure and its standard error."""

    value: float
    error: float

    def differs(self, other: float) -> bool:
        """Whether it is further from `other` than its error explains."""
        return abs(self.value - other) > ERRORS * self.error


class Gap(NamedTuple):
    """How far one structure's loss is behind another's at equal tokens.

    Attributes:
      width: h of the models, the nearest that was measured.
      tokens: the fewest and the most that those models were trained on.
      extrapolated: the width or the tokens asked for lie outside what was measured of this pair.
    """

    behind: Measured
    width: int
    tokens: tuple[int, int]
    extrapolated: bool


@functools.cache
def study() -> dict[str, Any]:
    """What quality.toml says."""
    return tomllib.loads((pathlib.Path(__file__).parent / "quality.toml").read_text())


def studied_name(model: ModelConfig, own: ModelConfig | None = None) -> str:
    """What the study calls this model's structure; "" if it has none like it.

    Args:
      own: the model that it is compared with, which may have half as many experts.
    """
    if model.structure == "bigmac":
        ships = model.latent_norms == ("skip", "post_combine") and model.projection_init == "selection"
        more = TWICE if own and model.expert_count == 2 * own.expert_count else ""
        return f"{_RATIOS[model.down_ratio]}{more}" if ships and model.down_ratio in _RATIOS else ""
    is_studied = model.structure == "fine_grained" and model.latent_norms in ((), ("post_combine",))
    return name_of(model) if is_studied else ""


def gap(name: str, base: str, width: int, tokens: float) -> Gap | None:
    """Nats that one structure's loss is above the other's, by models of the measured h that is nearest to `width`:
    between two lengths on a line through ln tokens, beyond them what the nearest length has. None of a pair that was
    not measured."""
    found = [row for row in study()["gap"] if {name, base} == set(row["structures"])]
    if not found:
        return None
    widths = {row["width"] for row in found}
    nearest = min(widths, key=lambda measured: abs(math.log(measured / width)))
    rows = sorted((row for row in found if row["width"] == nearest), key=lambda row: row["tokens"])
    short = next((row for row in reversed(rows) if row["tokens"] <= tokens), rows[0])
    long = next((row for row in rows if row["tokens"] >= tokens), rows[-1])
    apart = math.log(long["tokens"] / short["tokens"])
    share = math.log(tokens / short["tokens"]) / apart if apart else 0.0
    parts = [(weight * (1 if row["structures"][0] == name else -1), row) for weight, row in
             ((1 - share, short), (share, long))]  # fmt: skip
    nats = sum(weight * row["nats"] for weight, row in parts)
    error = math.hypot(*(weight * row["error"] for weight, row in parts))
    lengths = rows[0]["tokens"], rows[-1]["tokens"]
    inside = min(widths) <= width <= max(widths) and lengths[0] <= tokens <= lengths[1]
    return Gap(Measured(nats, error), nearest, lengths, not inside)


def tokens_factor(behind: Measured, slope: Measured) -> Measured:
    """How many times as many tokens make up for a gap of `behind` nats; `slope` is what e times the tokens take off the
    loss."""
    folds = behind.value / slope.value
    value = math.exp(folds)
    return Measured(value, value * math.hypot(behind.error, folds * slope.error) / slope.value)


def compare(config: Config, steps: Mapping[str, tuple[ModelConfig, float] | str], tokens: int) -> dict[str, Any]:
    """Makes what plan.py's JSON says of structures at an equal loss.

    Args:
      steps: by structure, the configured one first: (its model, seconds of its step), or why there is none.
      tokens: that the configured one is trained on.
    """
    m, tokens_per_step = config.model, config.data.batch_size * config.data.sequence_length
    own, slope = studied_name(m), study()["slope"]
    configured, rows = steps[name_of(m)], []
    first = math.nan if isinstance(configured, str) else configured[1]
    for name, step in steps.items():
        row: dict[str, Any] = {"structure": name}
        rows.append(row)
        if isinstance(step, str):
            row["error"] = step
            continue
        row["step"] = step[1]
        if isinstance(configured, str):
            row["error"] = "it has nothing to be compared with"
            continue
        if name == name_of(m):
            row["seconds"] = tokens / tokens_per_step * first
            continue
        if (found := gap(studied_name(step[0], m), own, m.hidden_size, tokens)) is None:
            row["error"] = "its loss was not measured"
            continue
        factor = tokens_factor(found.behind, Measured(slope["nats"], slope["error"]))
        time = Measured(*(value * step[1] / first for value in factor))
        row |= {
            "width": found.width,
            "measured_tokens": list(found.tokens),
            "extrapolated": found.extrapolated,
            "behind": found.behind._asdict(),
            "tokens_factor": factor._asdict(),
            "time_factor": time._asdict(),
            "differs": time.differs(1.0),
            "seconds": tokens / tokens_per_step * first * time.value,
        }
    return {
        "of": name_of(m),
        "tokens": tokens,
        "width": m.hidden_size,
        "measured": {"models": study()["models"], "page": "docs/quality.md"},
        "extrapolated": any(row.get("extrapolated") for row in rows),
        "structures": rows,
    }


def check(model: ModelConfig) -> None:
    """Raises ConfigError for a structure whose loss was not measured."""
    if not studied_name(model):
        given = f"model.structure={model.structure}"
        if model.structure == "bigmac":
            given += f", down_ratio={model.down_ratio:g}, latent_norm={model.latent_norm_kind}"
            given += f", projection_init={model.projection_init}"
        elif model.latent_norms:
            given += f", latent_norm={model.latent_norm_kind}"
        raise ConfigError(
            f"--compare knows no loss of {given}; use bigmac with down_ratio=0.25 or 0.5, latent_norm=skip and "
            "projection_init=selection, or fine_grained with latent_norm=none or post_combine"
        )
