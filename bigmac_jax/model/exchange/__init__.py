"""The exchange: moves rows to the ranks that hold their experts, and back. It knows nothing of parameters."""

from bigmac_jax.model.exchange.all_to_all import AllToAll
from bigmac_jax.model.exchange.dedup import Dedup, Hierarchical
from bigmac_jax.model.exchange.gather import Gather
from bigmac_jax.model.exchange.local import Local
from bigmac_jax.model.exchange.ragged import Ragged
from bigmac_jax.model.exchange.rounds import in_rounds
from bigmac_jax.model.exchange.strategy import Plan, Strategy

STRATEGIES: dict[str, type[Strategy]] = {
    "all_to_all": AllToAll,
    "dedup": Dedup,
    "hierarchical": Hierarchical,
    "gather": Gather,
    "ragged": Ragged,
}

__all__ = [
    "STRATEGIES", "AllToAll", "Dedup", "Gather", "Hierarchical", "Local", "Plan", "Ragged", "Strategy",
    "in_rounds",
]  # fmt: skip
