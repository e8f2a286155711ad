"""Files that several processes may want at once: a lock, whole-or-nothing writes, digests."""

import contextlib
import errno
import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import TypeVar

from bigmac_jax import storage
from bigmac_jax.config import ConfigError

Found = TypeVar("Found")
_log = logging.getLogger(__name__)
_BLOCK = 1 << 20
# Above this size a digest reads the ends only: hashing a terabyte at every start would cost an hour.
_WHOLE = 1 << 30


def cache_directory(cache_dir: str | os.PathLike[str], *parts: str) -> pathlib.Path:
    """Creates and returns `cache_dir/parts`; raises ConfigError where that cannot be."""
    path = storage.locate(cache_dir, "cache_dir").joinpath(*parts)
    try:
        storage.make_folder(path)
    except OSError as error:
        raise ConfigError(f"cache_dir={str(cache_dir)!r} cannot be written ({error}); set another cache_dir") from None
    return path


def disk_full(error: BaseException | None, path: pathlib.Path) -> str:
    """What to do, if an error or what caused it is a full disk (or quota); "" if it is not."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            mount = next(parent for parent in (path, *path.parents) if parent.is_mount())
            size = shutil.disk_usage(mount).total / 1e9
            return f"the disk at {mount} ({size:,.3g} GB) is full; free some of it, or set another cache_dir"
        error = error.__cause__ or error.__context__
    return ""


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Holds the lock of `path` (`storage.locks`), and waits for whoever holds it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(storage.locked(path.with_name(f".{path.name}.lock"), say=_log.warning))
        except storage.errors() as error:
            raise ConfigError(
                f"cache_dir: {path} cannot be locked ({storage.reason(error)}); set a cache_dir you may write to"
            ) from None
        yield


@contextlib.contextmanager
def whole_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty directory that becomes `path` if the block ends well. Call it with the lock of `path` held.

    A full disk raises ConfigError.

    Directories that killed processes left half-way are removed here: whoever made them no longer holds the lock.
    """
    for left_over in path.parent.glob(f".{path.name}.part-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    part = pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.part-"))
    part.chmod(0o777 & ~_umask())
    try:
        yield part
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
    except Exception as error:
        if fix := disk_full(error, path):
            raise ConfigError(f"{path} cannot be written: {fix}") from None
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def made_once(
    path: pathlib.Path, opened: Callable[[pathlib.Path], Found | None], make: Callable[[pathlib.Path], None], last: str
) -> Found:
    """What `opened` finds in the folder `path`, which `make` fills first where it is not there, or damaged (None).

    Safe against other processes that do the same, and against being killed at any moment. On a store the folder is made
    on this machine, sent as a whole, and read from a local copy.

    Args:
      last: a file of the folder; it is sent last.
    """
    if not storage.is_store(path):
        with locked(path):
            found = opened(path)
            if found is None:
                with whole_directory(path) as part:
                    make(part)
                found = opened(path)
    else:
        copy = storage.local_copies(path.parent) / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)

        def fetched() -> Found | None:
            if not (path / last).exists():
                return None
            storage.fetch_tree(path, copy)
            return opened(copy)

        with locked(copy):
            found = opened(copy)
            if found is None:
                found = fetched()
            if found is None:
                with locked(path):
                    found = fetched()  # another host's, which had the lock
                    if found is None:
                        with whole_directory(copy) as part:
                            make(part)
                        storage.send_tree(copy, path, last)
                        found = opened(copy)
    assert found is not None, path
    return found


def file_digest(path: pathlib.Path) -> str:
    """Hex digest of a file's size and content; of a file above 1 GiB the two ends and the time of change count."""
    size = storage.size_of(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            while block := file.read(_BLOCK):
                digest.update(block)
        else:
            digest.update(file.read(_BLOCK))
            file.seek(-_BLOCK, os.SEEK_END)
            digest.update(file.read(_BLOCK))
            digest.update(storage.version_of(path).encode())
    return digest.hexdigest()
