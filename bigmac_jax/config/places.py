"""Paths that a config or a command line gives: local ones, and those in an object store."""

import pathlib

from bigmac_jax.config.errors import ConfigError

_STORES = ("gs", "s3")  # schemes that runtime.storage reads and writes


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
