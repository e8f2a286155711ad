"""Where a run reads and writes: local disks, Google Cloud Storage (`gs://`) and S3 (`s3://`).

A path is a `pathlib.Path` on a disk and an `etils.epath.Path` on a store, which has the same methods except for those
that stand here. Nothing else knows of schemes.
"""

import contextlib
import errno
import glob
import hashlib
import importlib.util
import io
import logging
import os
import pathlib
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from bigmac_jax.config import ConfigError, check_place

# scheme → the package that fsspec reads it with, and the extra that brings that package
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# What these packages raise beside OSError: module → classes.
_ERRORS = {
    "gcsfs.retry": ("HttpError", "ChecksumError", "NonRetryableError"),
    "gcsfs.utils": ("HttpError",),
    "aiohttp": ("ClientError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "google.api_core.exceptions": ("GoogleAPIError",),
    "requests": ("RequestException",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
}
# Errors of a disk that say nothing of what a path holds: it may be read another time, or by another process.
UNREADABLE_NOW = {
    errno.EACCES: "give this user the right to it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "end what holds so many files open",
    errno.ENOMEM: "free memory",
    errno.ENOTCONN: "mount its file system again",
    errno.ESTALE: "run it again",
    errno.ETIMEDOUT: "run it again later",
}
AWAY = 300.0  # seconds after which a store that does not answer ends the job
_ABANDONED = 3600.0  # seconds after which nobody writes a temporary file any more
_AT_ONCE = {"batch_size": 16}  # objects that are sent, fetched or copied at a time


def locate(place: str | os.PathLike[str], name: str) -> pathlib.Path:
    """The path that the user gave for the flag, field or argument `name`.

    Raises:
      ConfigError: a scheme that is not known, a store whose package is missing, or the home of an unknown user.
    """
    text = os.fspath(place)
    scheme = check_place(text, name)
    if not scheme:
        return pathlib.Path(text).expanduser()
    package, extra = _PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{name}={text} needs the package {package}; pip install 'bigmac-jax[{extra}]'")
    return _store_path(text)


def _store_path(text: str) -> pathlib.Path:
    import fsspec
    from etils import epath

    for chatty in ("gcsfs", "google.auth"):  # they log with tracebacks what they raise as well
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    for known in _PACKAGES:
        # Other processes, and TensorStore in this one, write too: a listing that was kept would be of the past.
        fsspec.config.conf.setdefault(known, {}).setdefault("use_listings_cache", False)
    # Or a server that is away for some seconds is an error: botocore's own way gives up early at times.
    fsspec.config.conf["s3"].setdefault("config_kwargs", {"retries": {"max_attempts": 10, "mode": "standard"}})
    return cast(pathlib.Path, epath.Path(text))


def is_store(path: pathlib.Path) -> bool:
    """Whether a path is on a store."""
    return "://" in str(path)


def filesystem(path: pathlib.Path) -> Any:
    """The fsspec file system of a path on a store."""
    import fsspec

    return fsspec.core.url_to_fs(str(path))[0]


def absolute(path: pathlib.Path) -> pathlib.Path:
    """`path.absolute()`, also for stores."""
    return path if is_store(path) else path.absolute()


def errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """The exceptions that reading or writing a path may raise, and `others`, for an `except` clause."""
    found: list[type[Exception]] = [OSError, *others]
    for module, names in _ERRORS.items():
        found += [getattr(sys.modules[module], n) for n in names if hasattr(sys.modules.get(module), n)]
    return tuple(found)


def is_store_error(error: BaseException) -> bool:
    """Whether an error comes from a store or its network, and not from a disk, whose errors have an `errno`."""
    of_disk = isinstance(error, OSError) and type(error).__module__ == "builtins" and error.errno is not None
    return isinstance(error, errors()) and not of_disk


def may_pass(error: OSError, path: pathlib.Path) -> bool:
    """Whether an error of reading a path says nothing of what it holds; on a store a moment without it is one."""
    return is_store(path) or error.errno in UNREADABLE_NOW


def reason(error: BaseException) -> str:
    """One line that says why a path could not be read or written."""
    # A store's errors have no `strerror`.
    known = error.strerror if isinstance(error, OSError) and type(error).__module__ == "builtins" else ""
    text = known or f"{type(error).__name__}: {error}"
    return " ".join(str(text).split())[:200]


def check_inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The path of a file in a folder that somebody else may have filled.

    Raises:
      ConfigError: it is a link out of the folder; links inside the cache of Hugging Face's hub are fine.
    """
    path = folder / name
    if is_store(path):
        return path
    root, target = folder.resolve(), path.resolve()
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
    if not (target.is_relative_to(root) or target.is_relative_to(blobs)):
        raise ConfigError(f"{path} is a link to {target}, outside of its folder; copy that file there if you trust it")
    return path


def make_folder(path: pathlib.Path) -> None:
    """Makes a folder on a disk. A store has none, and its mkdir would make a bucket of a misspelled name."""
    if not is_store(path):
        path.mkdir(parents=True, exist_ok=True)


def file_size(path: pathlib.Path) -> int:
    """Bytes of a file."""
    return int(filesystem(path).info(str(path))["size"]) if is_store(path) else path.stat().st_size


def list_folder(folder: pathlib.Path) -> list[pathlib.Path]:
    """What is in a folder; [] if it does not exist. Raises where a store gives no answer, unlike `is_dir`."""
    if not is_store(folder):
        return sorted(folder.iterdir()) if folder.is_dir() else []
    try:
        names = filesystem(folder).ls(str(folder), detail=False)
    except FileNotFoundError:
        return []
    return sorted(folder / name.rstrip("/").rpartition("/")[2] for name in names)


def file_version(path: pathlib.Path) -> str:
    """A text that changes whenever the file is written again."""
    if not is_store(path):
        return str(path.stat().st_mtime_ns)
    info = filesystem(path).info(str(path))
    return str(info.get("generation") or info.get("ETag"))


def find_files(pattern: pathlib.Path) -> dict[pathlib.Path, int]:
    """Files that match a pattern, in order → bytes; `**` matches folders at any level. A file that is reached by
    several links is there once; a link that leads nowhere has 0 bytes."""
    if is_store(pattern):
        return _file_sizes(pattern, filesystem(pattern).glob(str(pattern), detail=True))
    places: dict[str, list[pathlib.Path]] = {}
    for path in sorted(map(pathlib.Path, glob.glob(str(pattern), recursive=True))):
        if path.is_file() or not path.exists():
            places.setdefault(os.path.realpath(path), []).append(path)
    found = (min(paths, key=lambda path: str(path.absolute()) != real) for real, paths in places.items())
    return {path: path.stat().st_size if path.exists() else 0 for path in sorted(found)}


def list_files(folder: pathlib.Path) -> dict[pathlib.Path, int]:
    """All files in a folder and below it, in order → bytes. On a store that is one request per thousand files.

    Linked files and folders are among them, a folder once: where it stands, or by the first of its links. A folder that
    cannot be read and a link that leads nowhere stand there themselves, with 0 bytes, so that whoever reads them says
    what is wrong.
    """
    if is_store(folder):
        return _file_sizes(folder, filesystem(folder).find(str(folder), detail=True))
    found, seen, waiting = dict[pathlib.Path, int](), set[str](), [folder] if folder.is_dir() else []
    while waiting:
        linked: list[pathlib.Path] = []
        for one in waiting:
            _walk(one, found, seen, linked)
        waiting = sorted(linked)
    return dict(sorted(found.items()))


def _walk(folder: pathlib.Path, found: dict[pathlib.Path, int], seen: set[str], linked: list[pathlib.Path]) -> None:
    """Adds a folder's files to those that were found, unless its real place was seen; links to folders wait."""
    if (real := os.path.realpath(folder)) in seen:
        return
    seen.add(real)
    try:
        names = os.listdir(folder)
    except OSError:
        found[folder] = 0
        return
    for path in (folder / name for name in names):
        if os.path.isdir(path):
            linked.append(path) if os.path.islink(path) else _walk(path, found, seen, linked)
        elif os.path.isfile(path):
            found[path] = path.stat().st_size
        elif not os.path.exists(path):
            found[path] = 0


def _file_sizes(place: pathlib.Path, entries: dict[str, Any]) -> dict[pathlib.Path, int]:
    """Sizes from a store's listing, ordered as paths are, so that a corpus has one order wherever it lies."""
    scheme = str(place).partition("://")[0]
    return {
        _store_path(f"{scheme}://{name}"): int(entry["size"])
        for name, entry in sorted(entries.items(), key=lambda entry: entry[0].split("/"))
        if entry["type"] == "file" and not name.endswith("/")
    }


def open_lines(path: pathlib.Path) -> BinaryIO:
    """Opens a file to loop over its lines, faster on a store than fsspec's own file."""
    file: Any = path.open("rb")
    return io.BufferedReader(file, 1 << 20) if is_store(path) else file


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all, and is on the disk when this returns."""
    make_folder(path.parent)
    if is_store(path):  # an object is atomic by itself
        filesystem(path).pipe_file(str(path), content)
        return
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # others may write the same file now
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):  # what a full disk took of it
            temporary.unlink()
        raise
    with contextlib.suppress(OSError):
        now = path.stat().st_mtime  # by the clock of the disk's server
        for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
            if now - left.stat().st_mtime > _ABANDONED:  # by a process that was killed
                left.unlink()


def save_figure(figure: Any, path: pathlib.Path) -> None:
    """Saves a matplotlib figure in the format of the path's suffix."""
    if not is_store(path):
        figure.savefig(path, dpi=110)
        return
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format=path.suffix.removeprefix("."))
    write_atomically(path, content.getvalue())


def remove_tree(path: pathlib.Path) -> None:
    """Removes a folder and all in it, if it exists; what cannot be removed stays."""
    if not is_store(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(*errors()):
        filesystem(path).rm(str(path), recursive=True)


def move(source: pathlib.Path, target: pathlib.Path) -> None:
    """Moves a folder; on a store object by object, copied by the server."""
    if is_store(source):
        names = [str(path) for path in list_files(source)]
        filesystem(source).copy(names, [f"{target}{name[len(str(source)) :]}" for name in names], **_AT_ONCE)
        remove_tree(source)
    else:
        os.rename(source, target)


def make_local_copy_folder(path: pathlib.Path) -> pathlib.Path:
    """Makes and returns the local folder for the copy of a folder in an object store; it may be removed at will.

    Raises:
      ConfigError: it cannot be written.
    """
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        folder = base.expanduser() / "bigmac_jax" / "stores" / hashlib.sha256(str(path).encode()).hexdigest()[:20]
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        raise ConfigError(
            f"{path} is read from a copy on this machine, and {base} cannot be written ({reason(error)}); set the "
            f"environment variable XDG_CACHE_HOME to a folder that can"
        ) from None
    return folder


def fetch_tree(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a store's folder into a local one, which appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = pathlib.Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.part-"))
    try:
        names = [str(path) for path in list_files(source)]
        local = [str(part / name[len(str(source)) + 1 :]) for name in names]
        filesystem(source).get(names, local, **_AT_ONCE)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def send_tree(source: pathlib.Path, target: pathlib.Path, last: str) -> None:
    """Copies a local folder to a store's; the file `last` comes last, as the sign that the others are there."""
    paths = [path for path in list_files(source) if path.name != last]
    names = [f"{target}/{path.relative_to(source).as_posix()}" for path in paths]
    filesystem(target).put([str(path) for path in paths], names, **_AT_ONCE)
    if last:
        send_file(source / last, target / last)


def fetch_file(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies an object into a local file, which appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.part-") as folder:
        part = pathlib.Path(folder) / target.name
        filesystem(source).get_file(str(source), str(part))
        part.replace(target)


def send_file(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a local file to an object."""
    filesystem(target).put_file(str(source), str(target))


@contextlib.contextmanager
def local_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a folder itself, or a local copy of a store's; ConfigError where the store's folder holds nothing."""
    if not is_store(path):
        yield path
        return
    if not list_folder(path):
        raise ConfigError(f"{path} holds nothing; give a folder that is there")
    with tempfile.TemporaryDirectory() as folder:
        fetch_tree(path, pathlib.Path(folder) / path.name)
        yield pathlib.Path(folder) / path.name


@contextlib.contextmanager
def local_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a file itself, or a local copy of an object, for libraries that know only disks."""
    if not is_store(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / path.name
        filesystem(path).get_file(str(path), str(copy))
        yield copy
