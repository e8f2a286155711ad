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
from bigmac_jax.data.corpus import MIXTURE, configs_by_source, has_splits
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
        folders, which are read whole. A data set that the run reads is cut as it was for the run.

    Raises:
      ConfigError: an unknown name, what `open_stream` raises, or the run's own text has changed since training.
    """
    config = use_saved_template(workdir, config)
    data, own = config.data, _own_sources(config.data)
    if "all" in names and not data.mixture:
        raise ConfigError("--sources=all is of a run with data.mixture, which this is not; name sources")
    if has_own_sources(config, names):
        if text := getattr(data, f"{split}_source", ""):
            raise ConfigError(f"data.{split}_source={text} is the {split} text of all sources; leave --sources out")
        check_split(workdir, config, split)
    wanted = dict.fromkeys(_own_name(n, own) for entry in names for n in (own if entry == "all" else [entry]))
    streams: dict[str, Any] = {}
    for name in wanted:
        short = short_name(name)
        label = name if (data.mixture and name in own) or short in {*wanted, *streams} else short
        if name in own:
            setting, part, part_split = MIXTURE if data.mixture else "data.source", own[name], split
        else:
            held, part_split = ("", split) if has_splits(name) else ("-", "train")  # nothing is held out of a file
            alone: dict[str, Any] = {"mixture": "", "curriculum": "", "validation_source": held, "test_source": held}
            setting, part = "--sources", dataclasses.replace(data, source=name, **alone)
        streams[label] = open_stream(dataclasses.replace(config, data=part), part_split, tokenizer, setting=setting)
    return streams


def has_own_sources(config: Config, names: Sequence[str]) -> bool:
    """Whether some of the names are sources of the run's own mixture, or the data set that it reads."""
    own = _own_sources(config.data)
    return "all" in names or any(_own_name(name, own) in own for name in names)


def _own_sources(data: DataConfig) -> dict[str, DataConfig]:
    """The sources of a run's mixture by short name, or the one data set that it reads, by its whole name."""
    parts = configs_by_source(data, "train")
    return {name or part.source: part for name, part in parts.items() if name or has_splits(part.source)}


def _own_name(name: str, own: dict[str, DataConfig]) -> str:
    """The name in `own` of a source, if it is there; a data set goes by its whole name, too. A file's path means all of
    its text, the run's or not."""
    whole = {part.source: known for known, part in own.items() if has_splits(part.source)}
    return name if name in own else whole.get(name, name)


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
