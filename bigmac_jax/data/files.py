"""Files that several processes may want at once: locks, digests, and what to do about a full disk."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bigmac_jax.config import ConfigError, parse_object, seal, unseal
from bigmac_jax.runtime import leases, storage

_log = logging.getLogger(__name__)
_BLOCK = 1 << 20
# Above this size a digest reads the ends only: hashing a terabyte at every start would cost an hour.
_WHOLE = 1 << 30
# Nanoseconds. A file that was changed this shortly before it was read may be changed again without new times: clocks of
# file systems tick slowly, up to 2 s.
_RACY = 2 * 10**9


def make_cache_directory(cache_dir: str | os.PathLike[str], *parts: str) -> pathlib.Path:
    """Creates and returns the folder `cache_dir/parts`; raises ConfigError if that is impossible."""
    path = storage.locate(cache_dir, "cache_dir").joinpath(*parts)
    try:
        storage.make_folder(path)
    except OSError as error:
        raise ConfigError(f"cache_dir={str(cache_dir)!r} cannot be written ({error}); set another cache_dir") from None
    return path


def disk_full_fix(error: BaseException | None, path: pathlib.Path) -> str:
    """What to do about a full disk (or quota) that caused an error; "" if none did."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            mount = next(parent for parent in (path, *path.parents) if parent.is_mount())
            size = shutil.disk_usage(mount).total / 1e9
            return f"the disk at {mount} ({size:,.3g} GB) is full; free some of it, or set another cache_dir"
        error = error.__cause__ or error.__context__
    return ""


@contextlib.contextmanager
def explain_full_disk(path: pathlib.Path) -> Iterator[None]:
    """Turns the error of a full disk into a ConfigError that says what could not be written."""
    try:
        yield
    except OSError as error:
        if fix := disk_full_fix(error, path):
            raise ConfigError(f"{path} cannot be written: {fix}") from None
        raise


@contextlib.contextmanager
def lock_path(path: pathlib.Path) -> Iterator[None]:
    """Holds the lock of `path` (`leases.lock`); waits for whoever holds it."""
    with contextlib.ExitStack() as stack:
        try:
            with explain_full_disk(path):
                # Of several processes the first one alone shows what is no warning; most of them wait.
                stack.enter_context(leases.lock(path.with_name(f".{path.name}.lock"), say=_log.info))
        except storage.errors() as error:
            raise ConfigError(
                f"cache_dir: {path} cannot be locked ({storage.reason(error)}); set a cache_dir you may write to"
            ) from None
        yield


def remove(path: pathlib.Path) -> None:
    """Removes a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def file_digest(path: pathlib.Path, version: Callable[[pathlib.Path], str] = storage.file_version) -> str:
    """Hex digest of a file's size and content; above 1 GiB, of its two ends and its `version`, the time of its last
    change."""
    size = storage.file_size(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            while block := file.read(_BLOCK):
                digest.update(block)
        else:
            digest.update(file.read(_BLOCK))
            file.seek(-_BLOCK, os.SEEK_END)
            digest.update(file.read(_BLOCK))
            digest.update(version(path).encode())
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """Hex digest of a value as JSON."""
    return hashlib.sha256(json.dumps(value, allow_nan=False).encode()).hexdigest()


class Digests:
    """Computes `file_digest` of the files of a corpus; keeps them in cache_dir/digests, so that only new and changed
    files are read. A file has not changed while its size, inode, mtime and ctime (which no program can set back) are
    the same. Each `corpus` has a table of its own."""

    def __init__(self, cache_dir: str | os.PathLike[str], corpus: str):
        name = hashlib.sha256(os.path.abspath(os.path.expanduser(corpus)).encode()).hexdigest()[:20]
        folder = make_cache_directory(cache_dir, "digests")
        if storage.is_store(folder):  # each machine keeps a table of its own
            folder = storage.make_local_copy_folder(folder)
        self._path = folder / f"{name}.json"

    def __call__(self, paths: Sequence[pathlib.Path]) -> list[str]:
        """Hex digests of files; raises OSError for one that cannot be read. Processes that ask at the same time wait
        for the first."""
        with lock_path(self._path):
            known, now = self._read(), time.time_ns()
            named = {str(path): path for path in paths}
            with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock, and a store takes its time
                states = dict(zip(named, pool.map(_state, named.values()), strict=True))
                fresh = [path for path in states if known.get(path, [None])[:-1] != states[path]]
                read = dict(zip(fresh, pool.map(file_digest, (named[path] for path in fresh)), strict=True))
            digests = {path: read[path] if path in read else known[path][-1] for path in states}
            if read or len(known) > len(states):
                settled = {path: state for path, state in states.items() if _is_settled(state, now)}
                self._write({path: [*state, digests[path]] for path, state in settled.items()})
        return [digests[str(path)] for path in paths]

    def _read(self) -> dict[str, Any]:
        try:
            return dict(unseal(parse_object(self._path.read_bytes()))["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # there is none, or it is damaged: all is read again

    def _write(self, files: dict[str, Any]) -> None:
        part = self._path.with_suffix(".part")
        with contextlib.suppress(OSError):  # a full disk: all is read again next time
            part.write_text(json.dumps(seal({"files": files}), allow_nan=False))
            part.replace(self._path)


def _state(path: pathlib.Path) -> list[Any]:
    """What changes when a file does; an object of a store that is written again has another version."""
    if storage.is_store(path):
        return [storage.file_size(path), storage.file_version(path)]
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _is_settled(state: list[Any], now: int) -> bool:
    """Whether a further change would show: the last one was not at this moment."""
    return isinstance(state[1], str) or max(state[1:3]) < now - _RACY
