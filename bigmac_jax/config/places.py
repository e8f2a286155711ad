"""Paths that a config or a command line gives: local ones, and those in an object store."""

import difflib
import functools
import itertools
import os
import pathlib
import re

from bigmac_jax.config.errors import ConfigError

_STORES = ("gs", "s3")  # schemes that runtime.storage reads and writes
_HUB = "a model's name on the Hub is not downloaded: hf download {place} --local-dir {name}, and give that folder"
_MOST = 10_000  # entries of a folder that are compared with a name
_LIKE = 0.7  # of difflib's ratio, from which on a path is suggested


@functools.cache  # every config asks for the same few
def check_place(place: str, name: str) -> str:
    """Checks a path, and returns its scheme: gs, s3, or "" on a local disk.

    Args:
      name: the flag, field or argument that gives the path, for the error.

    Raises:
      ConfigError: another scheme, a store without a bucket, or the home of a user that is not there.
    """
    scheme, mark, rest = place.partition("://")
    if mark and scheme not in _STORES:
        known = " or ".join(f"{store}://" for store in _STORES)
        raise ConfigError(f"{name}={place} must be a local path, or begin with {known}; mount other stores")
    if mark and not rest.strip("/"):
        raise ConfigError(f"{name}={place} names no bucket; use {scheme}://BUCKET/FOLDER")
    if not mark:
        try:
            pathlib.Path(place).expanduser()
        except RuntimeError:
            raise ConfigError(f"{name}={place} is in the home of a user that is not there; give another path") from None
    return scheme if mark else ""


def missing_place_fix(place: str, fix: str, hub: str = _HUB) -> str:
    """Makes the end of an error's line for a path that is not there: paths of nearly that name, or else `fix`.

    Args:
      hub: is said besides where the path looks like a name on Hugging Face's hub.
    """
    path = pathlib.Path(place)
    if "://" in place or os.path.exists(place):
        return fix
    if near := _near_paths(path):
        return f"did you mean {' or '.join(near)}?"
    if hub and re.fullmatch(r"[\w.-]+/[\w.-]+", place) and not os.path.exists(path.parent):
        return f"{fix}; {hub.format(place=place, name=path.name)}"
    return fix


def _near_paths(path: pathlib.Path) -> list[str]:
    """Paths that are there and nearly called so: beside it, or of its name in a folder nearly called as its own."""
    try:
        if path.parent.is_dir():
            return [str(path.with_name(name)) for name in _alike(path.name, path.parent)]
        if path.parent.parent.is_dir():
            folders = [path.parent.with_name(name) for name in _alike(path.parent.name, path.parent.parent)]
            return [str(folder / path.name) for folder in folders if (folder / path.name).exists()]
    except (OSError, ValueError):  # a name that no file can have
        pass
    return []


def _alike(name: str, folder: pathlib.Path) -> list[str]:
    names = [entry.name for entry in itertools.islice(folder.iterdir(), _MOST) if entry.name[:1] != "."]
    return difflib.get_close_matches(name, names, n=2, cutoff=_LIKE)
