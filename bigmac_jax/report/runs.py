"""Reads what a run has logged, be it finished, resumed, or still being written."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from bigmac_jax.config import Config, ConfigError, missing_place_fix
from bigmac_jax.config.section import flat_values
from bigmac_jax.runtime import storage
from bigmac_jax.training.goodput import PARTS
from bigmac_jax.training.metrics_file import Record, read_records
from bigmac_jax.training.workdir import read_config, read_run_json

Records = list[Record]


@dataclasses.dataclass(frozen=True)
class Run:
    """The records of one workdir. Steps increase within `training` and `evaluations`; what was not finite is None."""

    name: str
    config: Config
    training: Records
    evaluations: Records
    events: Records  # bad steps that were skipped or rewound
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # by where the time went, in all starts
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)  # of tokenizer and texts, where known

    @property
    def of_pairs(self) -> bool:
        """Whether the training loss is DPO's, of a pair of answers: the validation loss is of a token all the same."""
        return self.config.tuning.objective == "dpo"

    @property
    def fields(self) -> dict[str, Any]:
        """The config by full name, such as "model.top_k"."""
        return {name: value for name, value in flat_values(self.config).items() if name != "cache_dir"}


def read_runs(workdirs: Sequence[str]) -> list[Run]:
    """Reads runs, which are named after their folders, or by the given paths where folders share a name.

    Raises:
      ConfigError: no workdir, one that is no run, or has logged nothing; the line names it.
    """
    if not workdirs:
        raise ConfigError("there must be at least one RUN, a --workdir of bigmac train; add it, as in runs/tiny")
    names = [os.path.basename(os.path.abspath(workdir)) for workdir in workdirs]
    unique = len(set(names)) == len(names)
    return [_read_run(w, n if unique else w) for w, n in zip(workdirs, names, strict=True)]


def _read_run(workdir: str, name: str) -> Run:
    path = storage.locate(workdir, "RUN")
    for file in ("config.json", "metrics.jsonl"):
        if not (path / file).is_file():
            fix = missing_place_fix(workdir, "give the --workdir of a training run that has begun")
            raise ConfigError(f"RUN={workdir} holds no {file}; {fix}")
    try:
        config = read_config(path)
        records = read_records(path)
    except storage.errors(ValueError) as error:
        raise ConfigError(f"RUN={workdir} cannot be read ({error}); repair it or leave it out") from None
    training = _latest([r for r in records if "loss" in r])
    if not training:
        raise ConfigError(
            f"RUN={workdir} has logged no training step in metrics.jsonl; wait for the first "
            "train.log_every steps, or leave it out"
        )
    evaluations = _latest([r for r in records if "eval/loss" in r])
    counted = next((r for r in reversed(records) if "goodput/wall_s" in r), {})
    seconds = {part: counted.get(f"goodput/{part}_s") for part in PARTS}
    whole = {part: value for part, value in seconds.items() if isinstance(value, (int, float))}
    events, fingerprints = [r for r in records if "event" in r], read_run_json(path)["data"]
    return Run(name, config, training, evaluations, events, whole, fingerprints)


def _latest(records: Records) -> Records:
    """Drops records whose steps were logged again later, as two trainers or joined files leave them."""
    kept: Records = []
    for record in records:
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return kept
