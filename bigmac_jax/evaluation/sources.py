"""Scores of a model by source, and what its routers do with each.

Y layers with experts, E experts, S sources.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigmac_jax.config import Config, ConfigError, DataConfig
from bigmac_jax.config.mixture import short_name
from bigmac_jax.data.corpus import configs_by_source, has_splits
from bigmac_jax.data.pipeline import open_stream
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.evaluation.perplexity import Evaluation
from bigmac_jax.training.run_data import check_split
from bigmac_jax.training.workdir import use_saved_template


def open_sources(
    workdir: pathlib.Path, config: Config, names: Sequence[str], split: str, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Opens the token stream of each source, by its short name, or the whole one where another source has that.

    Args:
      names: sources of the run's mixture, `all` of them, or data sets, which are read at `split`; or files and
        folders, which are read whole.

    Raises:
      ConfigError: an unknown name, what `open_stream` raises, or the mixture's text has changed since training.
    """
    config = use_saved_template(workdir, config)
    data, mixed = config.data, _mixture_sources(config)
    if "all" in names and not mixed:
        raise ConfigError("--sources=all is of a run with data.mixture, which this is not; name sources")
    if has_own_sources(config, names):
        if own := getattr(data, f"{split}_source", ""):
            raise ConfigError(f"data.{split}_source={own} is the {split} text of all sources; leave --sources out")
        check_split(workdir, config, split)
    wanted = dict.fromkeys(n for entry in names for n in (mixed if entry == "all" else [entry]))
    streams: dict[str, Any] = {}
    for name in wanted:
        if name in mixed:
            label, setting, part, part_split = name, "data.mixture", mixed[name], split
        else:
            short, setting = short_name(name), "--sources"
            label = name if short in {*wanted, *streams} else short
            own, part_split = ("", split) if has_splits(name) else ("-", "train")  # nothing is held out of a file
            part = dataclasses.replace(
                data, source=name, mixture="", curriculum="", validation_source=own, test_source=own
            )
        streams[label] = open_stream(dataclasses.replace(config, data=part), part_split, tokenizer, setting=setting)
    return streams


def has_own_sources(config: Config, names: Sequence[str]) -> bool:
    """Whether some of the names are sources of the run's own mixture."""
    return "all" in names or not _mixture_sources(config).keys().isdisjoint(names)


def _mixture_sources(config: Config) -> dict[str, DataConfig]:
    return {name: part for name, part in configs_by_source(config.data, "train").items() if name}


def measure_spread(load_YE: np.ndarray) -> tuple[float, float]:
    """How unevenly experts share tokens, mean over layers: (standard deviation, busiest expert), both over the mean
    load."""
    relative_YE = load_YE * load_YE.shape[1]
    return float(relative_YE.std(1).mean()), float(relative_YE.max(1).mean())


def measure_specialisation(load_SYE: np.ndarray) -> np.ndarray:
    """Mutual information of expert and source in each layer, nats, with each source counted alike: 0 where all sources
    use the experts alike, log S where each source has its own."""
    mean_YE = load_SYE.mean(0)
    ratio_SYE = np.divide(load_SYE, mean_YE, out=np.ones_like(load_SYE), where=load_SYE > 0)
    return (load_SYE * np.log(ratio_SYE)).sum(-1).mean(0)


def report_sources(evaluations: dict[str, Evaluation]) -> tuple[list[str], dict[str, Any]]:
    """Lines to print, and the same as JSON."""
    lines: list[str] = []
    sources: dict[str, Any] = {}
    width = max(map(len, evaluations))
    for name, (score, load_YE, entropy_Y) in evaluations.items():
        line = f"{name:{width}}  perplexity {score.perplexity:9.3f}, {score.bits_per_byte:.4f} bits per byte"
        sources[name] = score._asdict()
        if load_YE.size:
            deviation, busiest = measure_spread(load_YE)
            line += f", load: deviation {deviation:.3f}, busiest {busiest:.2f} × the mean"
            sources[name] |= {
                "load_cv": deviation,
                "max_load": busiest,
                "router_entropy": entropy_Y.round(5).tolist(),
                "load": (load_YE * load_YE.shape[1]).round(5).tolist(),
            }
        lines.append(line)
    result: dict[str, Any] = {"sources": sources}
    if len(evaluations) > 1 and all(evaluation.load_YE.size for evaluation in evaluations.values()):
        told_Y = measure_specialisation(np.stack([evaluation.load_YE for evaluation in evaluations.values()]))
        result["specialisation"] = told_Y.round(6).tolist()
        shares = ", ".join(f"{told / math.log(len(evaluations)):.1%}" for told in told_Y)
        lines.append(f"an expert tells of the source, by layer: {shares} of what there is to know")
    return lines, result
