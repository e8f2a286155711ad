"""What a finite capacity factor drops: measured, not modelled (docs/distributions.md).

Of `configs/tiny.py` with 64 experts, K = 8, no shared experts, a factor of 1.25 and bigmac with the norm behind the
combine: 500 steps of one domain, then 500 of another, three seeds.
"""

from typing import Any, NamedTuple

from bigmac_jax.config import Config

FACTOR = 1.25


class Drops(NamedTuple):
    """Shares of all choices: `steady`, the mean of the last tenth of a run; `shifted`, the largest of the first tenth
    of a run's steps after its text changed."""

    steady: float
    shifted: float


# By model.balance; tests/planning/test_drops.py holds them against the study's file.
MEASURED = {
    "aux_loss": Drops(0.032, 0.541),
    "bias": Drops(0.021, 0.548),
    "quantile": Drops(0.012, 0.156),
    "none": Drops(0.260, 0.608),
}


def drops(config: Config) -> dict[str, Any] | None:
    """What was measured of the config's way to keep loads even, and of the one that drops least; None where nothing is
    dropped."""
    if not config.model.is_moe or config.dropless:
        return None
    least = min(MEASURED, key=lambda balance: MEASURED[balance].steady)
    names = dict.fromkeys((config.model.balance, least))
    return {"at_factor": FACTOR, "by_balance": {name: MEASURED[name]._asdict() for name in names}}
