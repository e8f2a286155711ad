"""Measured shares of choices that a finite capacity factor drops (docs/distributions.md); no model predicts them.

Measured with `configs/tiny.py`: 64 experts, K = 8, no shared experts, a factor of 1.25, bigmac with the norm behind the
combine; 1,000 steps, three seeds.
"""

import math
from typing import Any, NamedTuple

from bigmac_jax.config import Config
from bigmac_jax.config.reads import unread_for
from bigmac_jax.config.section import flat_values

FACTOR = 1.25


class Drops(NamedTuple):
    """Shares of all choices that were dropped; None = not measured."""

    one: float  # mean of a run's last tenth, on one domain
    mixed: float | None  # the same on four domains at once
    shifted: float  # the largest of the first tenth of a run's steps after one domain followed another


# By model.balance; tests/planning/test_drops.py holds them against the study's file.
MEASURED = {
    "aux_loss": Drops(0.032, 0.031, 0.541),
    "bias": Drops(0.021, 0.053, 0.548),
    "quantile": Drops(0.012, 0.048, 0.156),
    "none": Drops(0.260, None, 0.608),
}


# What decides which choices stand in one line for an expert's room.
_SPLITS = (
    *(f"mesh.{axis}" for axis in ("replica", "data", "node", "expert", "tensor")),
    *("execution.exchange", "execution.overlap_chunks", "train.accumulate_steps"),
)


def drops(config: Config) -> bool:
    """Whether a training step drops choices that find their expert full."""
    return math.isfinite(config.model.capacity_factor) and not unread_for(config, "model.capacity_factor")


def drop_notes(before: Config, after: Config) -> list[str]:
    """Writes a line if the same model drops no choices any more, does so now, or drops others."""
    factor = f"model.capacity_factor={after.model.capacity_factor:g}"
    if not drops(after):
        why = unread_for(after, "model.capacity_factor")
        return [f"{why}: {factor} is not read, and nothing is dropped any more"] if drops(before) else []
    if not drops(before):
        return [f"{factor} is read now: choices that find their expert full are dropped"]
    old, new = flat_values(before), flat_values(after)
    changed = ", ".join(f"{name} {old[name]} → {new[name]}" for name in _SPLITS if old[name] != new[name])
    return [f"{changed}: which choices find their expert full ({factor}) depends on it"] if changed else []


def measured_drops(config: Config) -> dict[str, Any] | None:
    """For plan.py's JSON: all measurements, and which of them is the config's; None where nothing is dropped."""
    m = config.model
    if not drops(config):
        return None
    measured = {name: found._asdict() for name, found in MEASURED.items()}
    balance = m.balance if m.balance_step == "next" else f"{m.balance}, balance_step={m.balance_step}"
    balance += ", overflow=next" if m.overflow == "next" else ""
    return {"balance": balance, "at_factor": FACTOR, "measured": measured}
