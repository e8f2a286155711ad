"""What a workdir says of its run beside checkpoints: its config, its tokenizer, and what these alone do not tell."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

from bigmac_jax.config import Config, ConfigError, resume_notes
from bigmac_jax.data.cache import CachedStream
from bigmac_jax.data.corpus import fingerprint
from bigmac_jax.data.datasets import DATASET
from bigmac_jax.data.pipeline import open_stream
from bigmac_jax.data.tokenizer import Tokenizer, load_tokenizer
from bigmac_jax.environment import edition

_CONFIG, _RUN = "config.json", "run.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
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
    return run_of(workdir)["data"].get("tokenizer", "")


def write_config(config: Config, workdir: pathlib.Path) -> None:
    """Makes the directory a workdir; the file appears whole or not at all."""
    _write(workdir / _CONFIG, config.to_json().encode())


def write_run(
    workdir: pathlib.Path, config: Config, data: dict[str, str], mesh: dict[str, int], tokenizer: Tokenizer
) -> None:
    """Writes the config, the tokenizer, and in run.json what the run is of: data, mesh, code and packages.

    Args:
      data: fingerprints by name: tokenizer, train, and validation if there is one.
      mesh: ranks by axis.
    """
    known = run_of(workdir)["data"]  # of a validation split, which not every start reads
    data = _of_own_files(config) | data
    if tokenizer.file:
        _write(workdir / tokenizer.file, tokenizer.content)
    _write(
        workdir / _RUN,
        (json.dumps({"data": known | data, "mesh": mesh, "edition": edition()}, indent=2) + "\n").encode(),
    )
    write_config(config, workdir)


def check_data(workdir: pathlib.Path, config: Config, data: dict[str, str]) -> None:
    """Whether a run goes on with the data that it was started with, wherever that lies now.

    Raises:
      ConfigError: it would not, or can't be told because an earlier edition started it.
    """
    saved, known = read_config(workdir).data, run_of(workdir)["data"]
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


def run_stream(workdir: pathlib.Path, config: Config, split: str, tokenizer: Tokenizer) -> CachedStream:
    """The tokens of a split of the run's data.

    Raises:
      ConfigError: it is not there any more, or holds other text than when the run was trained.
    """
    known, data, name = run_of(workdir)["data"], config.data, split
    if split not in known and not getattr(data, f"{split}_source", ""):
        name = "train"  # which it was held out of
    if name in known and known[name] != fingerprint(data, name, config.cache_dir):
        place = _PLACES.get(split, f"{split}_source")
        source = getattr(data, place)
        where = f"data.{place}={source}" if source else f"data.source={data.source}"
        raise ConfigError(
            f"{where} holds other data than {workdir} was trained with, so its {split} split is another; bring that "
            f"back, or score a text with --text_file"
        )
    return open_stream(config, split, tokenizer)


def changes_of_loss(workdir: pathlib.Path, config: Config, mesh: dict[str, int]) -> list[str]:
    """A line for each way in which the rest of a run may differ by more than rounding from what it would have been."""
    saved, known = read_config(workdir), run_of(workdir)["mesh"]
    if not known:  # of an earlier edition
        known = mesh | {axis: getattr(saved.mesh, axis) for axis in mesh if getattr(saved.mesh, axis)}
    return resume_notes(saved, config, known, mesh) + changes_of_edition(workdir)


def changes_of_edition(workdir: pathlib.Path) -> list[str]:
    """A line if this is other code, or these are other packages, than what last trained the run."""
    before, now = run_of(workdir)["edition"], edition()
    changed = [
        f"{name} {before[name]} → {now.get(name, 'none')}" for name in before if before[name] != now.get(name, "none")
    ]
    return [f"{workdir} was trained with other software ({', '.join(changed)}); numbers may differ"] if changed else []


def run_of(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    """run.json: fingerprints of `data`, the `mesh`, and the `edition` of code and packages; what is not known, or is
    not what it should be, is left out."""
    try:
        found = json.loads((workdir / _RUN).read_bytes())
    except (OSError, ValueError, RecursionError):  # of an earlier edition, or cut
        found = {}
    parts = {"data": str, "mesh": int, "edition": str}
    groups = {name: found.get(name) if isinstance(found, dict) else None for name in parts}
    return {
        name: {key: value for key, value in group.items() if isinstance(value, parts[name])}
        if isinstance(group, dict)
        else {}
        for name, group in groups.items()
    }


def _of_own_files(config: Config) -> dict[str, str]:
    """Fingerprints of the held-out splits that have files of their own, which training may not look at."""
    found = {}
    for split in ("validation", "test"):
        source = getattr(config.data, f"{split}_source")
        if source and source != "sotu" and not source.startswith(DATASET):
            with contextlib.suppress(ConfigError):  # evaluation will say what is wrong with it
                found[split] = fingerprint(config.data, split, config.cache_dir)
    return found


def _write(file: pathlib.Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, file)
