"""What a run has logged, read back: of one that is finished, was resumed, or is still being written."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from bigmac_jax import storage
from bigmac_jax.config import ConfigError, second_edition
from bigmac_jax.config.reading import field_values

Records = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One workdir. Steps increase within `training` and within `evaluations`; what was not finite is None."""

    name: str
    config: dict[str, Any]  # as config.json has it: of an older version, perhaps
    training: Records
    evaluations: Records
    events: Records  # bad steps that were skipped or rewound

    @property
    def fields(self) -> dict[str, Any]:
        """The config by full name, such as "model.top_k"."""
        return dict(field_values(self.config))


def read_runs(workdirs: Sequence[str]) -> list[Run]:
    """Runs are named after their folders, or by the given paths where folders share a name.

    Raises:
      ConfigError: no workdir, one that is no run, or has logged nothing; the line names it.
    """
    if not workdirs:
        raise ConfigError("there must be at least one RUN, a --workdir of train.py; add it, as in runs/tiny")
    names = [os.path.basename(os.path.abspath(workdir)) for workdir in workdirs]
    unique = len(set(names)) == len(names)
    return [_read_run(w, n if unique else w) for w, n in zip(workdirs, names, strict=True)]


def read_metrics(workdir: pathlib.Path) -> Records:
    """The records of metrics.jsonl, in order.

    Lines that are no record are left out: the last one of a run that is writing it, or one that a full disk has cut.
    """
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []
    return [record for line in lines if (record := _record(line)) is not None]


def _read_run(workdir: str, name: str) -> Run:
    path = storage.locate(workdir, "RUN")
    for file in ("config.json", "metrics.jsonl"):
        if not (path / file).is_file():
            raise ConfigError(f"RUN={workdir} holds no {file}; give the --workdir of a training run that has begun")
    try:
        config = second_edition(json.loads((path / "config.json").read_bytes()))
        if not isinstance(config, dict):
            raise ValueError("config.json is no object")
        records = read_metrics(path)
    except storage.errors(ValueError, RecursionError) as error:
        raise ConfigError(f"RUN={workdir} cannot be read ({error}); repair it or leave it out") from None
    training = _latest([r for r in records if "loss" in r])
    if not training:
        raise ConfigError(
            f"RUN={workdir} has logged no training step in metrics.jsonl; wait for the first "
            "train.log_every steps, or leave it out"
        )
    evaluations = _latest([r for r in records if "eval/loss" in r])
    return Run(name, config, training, evaluations, [r for r in records if "event" in r])


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _latest(records: Records) -> Records:
    """Where steps were logged twice, as two trainers or joined files leave them, those that came later."""
    kept: Records = []
    for record in records:
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return kept
