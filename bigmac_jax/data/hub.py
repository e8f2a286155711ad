"""Hugging Face data sets: prepared by the `datasets` library in its own cache, and read from there without it."""

import contextlib
import io
import pathlib
import sys
from typing import Any

from bigmac_jax.config import ConfigError
from bigmac_jax.data.documents import one_line
from bigmac_jax.data.local_files import FileDocuments
from bigmac_jax.data.readers import Wanted

HUB = "hf:"


def hub_documents(
    source: str, setting: str, wanted: Wanted, split: str, cache_dir: str, held_out: tuple[str, ...]
) -> FileDocuments:
    """The documents of a split of `hf:NAME[/CONFIG]`. NAME is that of the hub, with or without an owner, or a folder.
    A split that the data set has is its own; what it has not is held out of its training split.

    Raises:
      ConfigError: the library is missing, or the data set, its config or its training split is not there.
    """
    name = f"{setting}={source}"
    splits = _prepared(source.removeprefix(HUB), name)
    if "train" not in splits:
        raise ConfigError(f"{name} has no train split, only {', '.join(splits)}; choose another data set")
    missing = tuple(name for name in held_out if name not in splits)
    has_own = split in splits and (split == "train" or split not in missing)
    files = splits[split if has_own else "train"]
    cut = missing if not has_own or split == "train" else ()
    return FileDocuments(source, setting, files, wanted, split, cache_dir, cut)


def _prepared(rest: str, name: str) -> dict[str, dict[pathlib.Path, int]]:
    """Split → its Arrow files → bytes."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import datasets
    except ImportError:
        raise ConfigError(f"{name} needs the package datasets; pip install 'bigmac-jax[datasets]'") from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    problem: Exception | None = None
    for path, config in _readings(rest):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found: Any = datasets.load_dataset(path, config)
            break
        except Exception as error:
            problem = problem or error
    else:
        assert problem is not None
        raise ConfigError(
            f"{name} cannot be loaded ({one_line(problem)}); check its name and config, and the network or the cache "
            f"of datasets (HF_HOME)"
        )
    return {
        split: {(file := pathlib.Path(entry["filename"])): file.stat().st_size for entry in part.cache_files}
        for split, part in found.items()
    }


def _readings(rest: str) -> list[tuple[str, str | None]]:
    """(path, config) that a name may mean, in the order in which they are tried."""
    parent, _, last = rest.rpartition("/")
    whole = (rest, None)
    if pathlib.Path(rest).exists() or not parent:
        return [whole]
    if pathlib.Path(parent).exists() or parent.count("/") == 1:  # OWNER/NAME/CONFIG
        return [(parent, last)]
    return [whole, (parent, last)]
