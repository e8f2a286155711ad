"""Scores of a model by source, and what its routers do with each.

Y layers with experts, E experts, S sources.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bigmac_jax.config import Config, ConfigError, DataConfig
from bigmac_jax.config.mixture import short_name
from bigmac_jax.data.corpus import has_splits, parts_of
from bigmac_jax.data.pipeline import open_stream
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.evaluation.perplexity import Reading
from bigmac_jax.training.workdir import check_split, with_own_template


def open_sources(
    workdir: pathlib.Path, config: Config, names: Sequence[str], split: str, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Name → stream, read as the run reads its own. A source of its mixture (by its name, or `all` of them) and a data
    set that has splits are read at `split`, files and folders as a whole.

    Raises:
      ConfigError: a name that is neither, what `open_stream` raises, or the mixture is of other text than when the
        run was trained.
    """
    config = with_own_template(workdir, config)
    data = config.data
    mixed = _mixed(config)
    if "all" in names and not mixed:
        raise ConfigError("--sources=all is of a run with data.mixture, which this is not; name sources")
    if own_sources(config, names):
        if own := getattr(data, f"{split}_source", ""):
            raise ConfigError(f"data.{split}_source={own} is the {split} text of all sources; leave --sources out")
        check_split(workdir, config, split)
    streams = {}
    for name in dict.fromkeys(n for given in names for n in (mixed if given == "all" else [given])):
        part, its = mixed.get(name), split
        if part is None:
            own, its = ("", split) if has_splits(name) else ("-", "train")  # of a file nothing is held out
            one = dataclasses.replace(data, source=name, mixture="", curriculum="")
            part = dataclasses.replace(one, validation_source=own, test_source=own)
        label = name if name in mixed or short_name(name) in streams else short_name(name)
        setting = "data.mixture" if name in mixed else "--sources"
        streams[label] = open_stream(dataclasses.replace(config, data=part), its, tokenizer, setting=setting)
    return streams


def own_sources(config: Config, names: Sequence[str]) -> bool:
    """Whether some of the names are of the run's own mixture."""
    return "all" in names or not _mixed(config).keys().isdisjoint(names)


def _mixed(config: Config) -> dict[str, DataConfig]:
    return {name: part for name, part in parts_of(config.data, "train").items() if name}


class Load(NamedTuple):
    """How a layer's experts share tokens: standard deviation over mean (0 is balanced), and the busiest over the
    mean."""

    cv: float
    largest: float

    @classmethod
    def of(cls, load_YE: np.ndarray) -> "Load":
        relative_YE = load_YE * load_YE.shape[1]
        return cls(float(relative_YE.std(1).mean()), float(relative_YE.max(1).mean()))


def specialisation(load_SYE: np.ndarray) -> np.ndarray:
    """Mutual information of expert and source by layer, nats, each source counted alike: 0 where all sources use the
    experts alike, log S where each has its own."""
    mean_YE = load_SYE.mean(0)
    ratio_SYE = np.divide(load_SYE, mean_YE, out=np.ones_like(load_SYE), where=load_SYE > 0)
    return (load_SYE * np.log(ratio_SYE)).sum(-1).mean(0)


def report(readings: dict[str, Reading]) -> tuple[list[str], dict[str, Any]]:
    """Lines to print, and the same as JSON."""
    lines: list[str] = []
    sources: dict[str, Any] = {}
    width = max(map(len, readings))
    for name, reading in readings.items():
        score = reading.score
        line = f"{name:{width}}  perplexity {score.perplexity:9.3f}, {score.bits_per_byte:.4f} bits per byte"
        sources[name] = score._asdict()
        if reading.load_YE.size:
            load = Load.of(reading.load_YE)
            line += f", load: deviation {load.cv:.3f}, busiest {load.largest:.2f} × the mean"
            sources[name] |= {
                "load_cv": load.cv,
                "max_load": load.largest,
                "router_entropy": [round(float(entropy), 5) for entropy in reading.entropy_Y],
                "load": [[round(float(x), 5) for x in load_E * len(load_E)] for load_E in reading.load_YE],
            }
        lines.append(line)
    result: dict[str, Any] = {"sources": sources}
    if len(readings) > 1 and all(reading.load_YE.size for reading in readings.values()):
        told_Y = specialisation(np.stack([reading.load_YE for reading in readings.values()]))
        result["specialisation"] = [round(float(told), 6) for told in told_Y]
        shares = ", ".join(f"{told / math.log(len(readings)):.1%}" for told in told_Y)
        lines.append(f"an expert tells of the source, by layer: {shares} of what there is to know")
    return lines, result
