"""Measured shares of choices that a finite capacity factor drops (docs/distributions.md); no model predicts them.

Measured with `configs/tiny.py`: 64 experts, K = 8, no shared experts, a factor of 1.25, bigmac with the norm behind the
combine; 1,000 steps, three seeds.
"""

from typing import Any, NamedTuple

from bigmac_jax.config import Config

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


def measured_drops(config: Config) -> dict[str, Any] | None:
    """For plan.py's JSON: all measurements, and which of them is the config's; None where nothing is dropped."""
    m = config.model
    if config.dropless:
        return None
    measured = {name: found._asdict() for name, found in MEASURED.items()}
    balance = m.balance if m.balance_step == "next" else f"{m.balance}, balance_step={m.balance_step}"
    balance += ", overflow=next" if m.overflow == "next" else ""
    return {"balance": balance, "at_factor": FACTOR, "measured": measured}
