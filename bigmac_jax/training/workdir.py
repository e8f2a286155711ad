"""What a workdir says of its run beside checkpoints: its config, and what the config alone does not tell."""

import json
import os
import pathlib
from typing import Any

from bigmac_jax.config import Config, ConfigError, resume_notes

_CONFIG, _RUN = "config.json", "run.json"
# Fields that name where data lies; they may change as long as what lies there does not.
_PLACES = {"train": "source", "tokenizer": "tokenizer", "validation": "validation_source"}


def read_config(workdir: pathlib.Path) -> Config:
    """The config that a workdir was trained with.

    Raises:
      ConfigError: there is none.
    """
    file = workdir / _CONFIG
    if not file.is_file():
        raise ConfigError(f"--workdir={workdir} holds no config.json; give the workdir of a training run")
    return Config.from_json(file.read_text(), str(file))


def write_config(config: Config, workdir: pathlib.Path) -> None:
    """Makes the directory a workdir; the file appears whole or not at all."""
    _write(workdir / _CONFIG, config.to_json())


def write_run(workdir: pathlib.Path, config: Config, data: dict[str, str], mesh: dict[str, int]) -> None:
    """Writes the config, and in run.json what the run is of.

    Args:
      data: fingerprints by name: tokenizer, train, and validation if there is one.
      mesh: ranks by axis.
    """
    known = _read_run(workdir).get("data", {})  # of a validation split, which not every start reads
    _write(workdir / _RUN, json.dumps({"data": known | data, "mesh": mesh}, indent=2) + "\n")
    write_config(config, workdir)


def check_data(workdir: pathlib.Path, config: Config, data: dict[str, str]) -> None:
    """Whether a run goes on with the data that it was started with, wherever that lies now.

    Raises:
      ConfigError: it would not, or can't be told because an earlier edition started it.
    """
    saved, known = read_config(workdir).data, _read_run(workdir).get("data", {})
    for place in ("validation_source", "test_source"):
        if bool(getattr(saved, place)) != bool(getattr(config.data, place)):
            # What has no source of its own is held out of data.source, which is then another text.
            before, now = getattr(saved, place), getattr(config.data, place)
            raise ConfigError(
                f"data.{place}={now!r} differs from {before!r}, which this workdir was started with, and decides what "
                f"is held out of data.source; keep {before!r}, or use a new --workdir"
            )
    for name, place in _PLACES.items():
        before, now = getattr(saved, place), getattr(config.data, place)
        if name in known and name in data:
            if known[name] != data[name]:
                where = f"data.{place}={now}" if now else f"the {name} split of data.source={config.data.source}"
                raise ConfigError(
                    f"{where} holds other data than this workdir was started with; bring that back, or use a new "
                    f"--workdir"
                )
        elif before != now and not (name == "validation" and name not in data):
            raise ConfigError(
                f"data.{place}={now!r} differs from {before!r}, which this workdir was started with, and its run.json "
                f"has nothing to compare the data by; keep {before!r}, or use a new --workdir"
            )


def changes_of_loss(workdir: pathlib.Path, config: Config, mesh: dict[str, int]) -> list[str]:
    """A line for each way in which the rest of a run may differ by more than rounding from what it would have been."""
    saved, known = read_config(workdir), _read_run(workdir).get("mesh", {})
    if not known:  # of an earlier edition
        known = mesh | {axis: getattr(saved.mesh, axis) for axis in mesh if getattr(saved.mesh, axis)}
    return resume_notes(saved, config, known, mesh)


def _read_run(workdir: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads((workdir / _RUN).read_text())
    except (OSError, ValueError):  # of an earlier edition, or cut
        return {}


def _write(file: pathlib.Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, file)
