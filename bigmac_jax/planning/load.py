"""How uneven routing is: the rows of the busiest rank over the mean, which the others wait for."""

import pathlib
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.runtime import storage
from bigmac_jax.training.metrics_file import read_records


@dataclass(frozen=True)
class Load:
    """A step's load.

    Attributes:
      busiest: of any group of ranks, if nothing is known of experts; of fewer ranks one takes all.
      layers_YE: each expert's load over the mean, by layer.
    """

    busiest: float = 1.0
    layers_YE: tuple[tuple[float, ...], ...] = ()

    def over(self, ranks: int) -> float:
        """The busiest of so many ranks' rows over the mean, on average over the layers."""
        if not self.layers_YE or ranks == 1:
            return min(self.busiest, ranks)
        layers = np.array(self.layers_YE)
        parts = np.array_split(layers, min(ranks, layers.shape[1]), axis=1)
        by_rank = np.stack([part.mean(1) for part in parts], axis=1)
        return float((by_rank.max(1) / by_rank.mean(1)).mean())


EVEN = Load()


def read_load(text: str, config: Config) -> Load:
    """Reads --imbalance: a number, or a run's workdir, whose last tenth of metrics says the load of each expert.

    Raises:
      ConfigError: neither, or a run of other experts.
    """
    if not text:
        return EVEN
    if not config.model.is_moe:
        raise ConfigError(f"--imbalance={text} is of experts, and model.structure=dense has none; drop it")
    if re.fullmatch(r"\d+(\.\d+)?", text):
        if not 1 <= float(text) <= config.model.expert_count:
            most = config.model.expert_count
            raise ConfigError(f"--imbalance={text} must be between 1 (even) and the {most} experts (one takes all)")
        return Load(float(text))
    folder = pathlib.Path(storage.locate(text, "--imbalance"))
    records: list[Any] = [record["moe/load"] for record in read_records(folder) if "moe/load" in record]
    if not records:
        raise ConfigError(f"--imbalance={text} must be a number, as 1.3, or the workdir of a run with experts")
    layers = np.mean(records[-max(1, len(records) // 10) :], axis=0)
    if layers.shape[1] != config.model.expert_count:
        raise ConfigError(
            f"--imbalance={text} is a run with {layers.shape[1]} experts a layer, but this config has "
            f"{config.model.expert_count}; give a number"
        )
    return Load(1.0, tuple(map(tuple, layers.tolist())))
