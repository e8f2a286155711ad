"""Hugging Face data sets: prepared by the `datasets` library in its own cache, and read from there without it."""

import contextlib
import io
import pathlib
import sys
from typing import Any

from bigmac_jax.config import ConfigError
from bigmac_jax.data.local_files import FileDocuments
from bigmac_jax.data.text_field import TextField
from bigmac_jax.runtime import storage

HUB = "hf:"


def open_hub(
    source: str, setting: str, field: TextField, split: str, cache_dir: str, held_out: tuple[str, ...]
) -> FileDocuments:
    """Opens a split of `hf:NAME[/CONFIG]`, where NAME is on the hub, with or without an owner, or is a folder. A split
    that the data set lacks is held out of its training split. Raises ConfigError if the library, the data set, its
    config or its training split is missing."""
    name = f"{setting}={source}"
    splits = _load_files(source.removeprefix(HUB), name)
    if "train" not in splits:
        raise ConfigError(f"{name} has no train split, only {', '.join(splits)}; choose another data set")
    missing = tuple(name for name in held_out if name not in splits)
    own = split if split in splits and (split == "train" or split not in missing) else "train"
    return FileDocuments(source, setting, splits[own], field, split, cache_dir, missing if own == "train" else ())


def _load_files(rest: str, name: str) -> dict[str, dict[pathlib.Path, int]]:
    """Prepares the data set; returns split → its Arrow files → bytes."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import datasets
    except ImportError:
        raise ConfigError(f"{name} needs the package datasets; pip install 'bigmac-jax[datasets]'") from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    problems: list[Exception] = []
    for path, config in _readings(rest):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found: Any = datasets.load_dataset(path, config)
        except Exception as error:
            problems.append(error)
            continue
        return {
            split: {(file := pathlib.Path(entry["filename"])): file.stat().st_size for entry in part.cache_files}
            for split, part in found.items()
        }
    raise ConfigError(
        f"{name} cannot be loaded ({storage.reason(problems[0])}); check its name and config, and the network or the "
        f"cache of datasets (HF_HOME)"
    )


def _readings(rest: str) -> list[tuple[str, str | None]]:
    """The (path, config) that a name may mean, in the order in which they are tried."""
    parent, _, last = rest.rpartition("/")
    if pathlib.Path(rest).exists() or not parent:
        return [(rest, None)]
    if pathlib.Path(parent).exists() or parent.count("/") == 1:  # OWNER/NAME/CONFIG
        return [(parent, last)]
    return [(rest, None), (parent, last)]
