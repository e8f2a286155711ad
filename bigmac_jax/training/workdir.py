"""What a workdir says of its run beside checkpoints: its config, its tokenizer, and what these alone do not tell."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from bigmac_jax.config import Config, ConfigError, resume_notes
from bigmac_jax.data.tokenizer import Tokenizer, load_tokenizer
from bigmac_jax.storage import locate, write_whole

_CONFIG, _RUN = "config.json", "run.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# Fields that name where data lies; they may change as long as what lies there does not.
_PLACES = {"train": "source", "tokenizer": "tokenizer", "validation": "validation_source"}


def run_folder(place: str) -> pathlib.Path:
    """The path of --workdir.

    Raises:
      ConfigError: no path, or on a store that takes no checkpoints.
    """
    if place.startswith("s3://"):
        raise ConfigError(
            f"--workdir={place} can't be on S3, where Orbax writes no checkpoints; use a local disk or gs:// for it "
            f"(data, cache_dir and exports may be on s3://)"
        )
    return locate(place, "--workdir")


def read_config(workdir: pathlib.Path) -> Config:
    """The config that a workdir was trained with.

    Raises:
      ConfigError: there is none.
    """
    file = workdir / _CONFIG
    if not file.is_file():
        raise ConfigError(f"--workdir={workdir} holds no config.json; give the workdir of a training run")
    return Config.from_json(file.read_bytes(), str(file))


def with_own_tokenizer(workdir: pathlib.Path, config: Config) -> Config:
    """The config with the workdir's copy of the tokenizer, which stays what it was whatever becomes of the corpus that
    it was trained on, or of the file or package that it came from. As it is where it names another one than the run's,
    or there is no copy: of bytes, and of earlier editions.

    Raises:
      ConfigError: the copy has changed.
    """
    kept = next((workdir / name for name in _TOKENIZERS if (workdir / name).is_file()), None)
    if kept is None or read_config(workdir).data.tokenizer != config.data.tokenizer:
        return config
    if _fingerprint(workdir) not in ("", hashlib.sha256(kept.read_bytes()).hexdigest()):
        raise ConfigError(f"{kept} is not the tokenizer that the run was trained with; bring back a good copy")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(kept)))


def run_tokenizer(workdir: pathlib.Path, config: Config) -> Tokenizer:
    """The tokenizer that the run was trained with, or that the config names instead.

    Raises:
      ConfigError: it is not there any more, or is another one.
    """
    own = with_own_tokenizer(workdir, config)
    tokenizer = load_tokenizer(own)
    same = own.data.tokenizer == read_config(workdir).data.tokenizer
    if same and _fingerprint(workdir) not in ("", tokenizer.fingerprint):
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer} is not the one that {workdir} was trained with, of which an "
            f"earlier edition kept no copy: what it is made from has changed; bring that back"
        )
    return tokenizer


def _fingerprint(workdir: pathlib.Path) -> str:
    """Of the run's tokenizer; "" if it is not known."""
    return _read_run(workdir).get("data", {}).get("tokenizer", "")


def write_config(config: Config, workdir: pathlib.Path) -> None:
    """Makes the directory a workdir; the file appears whole or not at all."""
    write_whole(workdir / _CONFIG, config.to_json().encode())


def write_run(
    workdir: pathlib.Path, config: Config, data: dict[str, str], mesh: dict[str, int], tokenizer: Tokenizer
) -> None:
    """Writes the config, the tokenizer, and in run.json what the run is of.

    Args:
      data: fingerprints by name: tokenizer, train, and validation if there is one.
      mesh: ranks by axis.
    """
    known = _read_run(workdir).get("data", {})  # of a validation split, which not every start reads
    if tokenizer.file:
        write_whole(workdir / tokenizer.file, tokenizer.content)
    write_whole(workdir / _RUN, (json.dumps({"data": known | data, "mesh": mesh}, indent=2) + "\n").encode())
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
        found = json.loads((workdir / _RUN).read_bytes())
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):  # of an earlier edition, or cut
        return {}
    return found if isinstance(found, dict) else {}
