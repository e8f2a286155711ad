"""Texts → paths, and what a path of a store cannot do by itself. Nothing else knows of schemes."""

import contextlib
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, cast

from bigmac_jax.config import ConfigError, check_place

# scheme → the package that fsspec reads it with, and the extra that brings that package
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# What these packages raise beside OSError, by module.
_ERRORS = {
    "gcsfs.retry": ("HttpError",),
    "gcsfs.utils": ("HttpError",),
    "aiohttp": ("ClientError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "google.api_core.exceptions": ("GoogleAPIError",),
    "requests": ("RequestException",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
}
AWAY = 300.0  # seconds after which a store that does not answer ends the job
_AT_ONCE = 16  # objects that are sent or fetched at a time


def locate(place: str | os.PathLike[str], name: str) -> pathlib.Path:
    """The path that a flag, a field or an argument `name` gives.

    Raises:
      ConfigError: a scheme that is not known, a store whose package is missing, or the home of nobody.
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

    for chatty in ("gcsfs", "google.auth"):  # they tell with tracebacks what they raise as well
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    for known in _PACKAGES:
        # Other processes, and TensorStore in this one, write too: a listing that was kept would be of the past.
        fsspec.config.conf.setdefault(known, {}).setdefault("use_listings_cache", False)
    # Or a server that is away for some seconds is an error: botocore's own way gives up early at times.
    fsspec.config.conf["s3"].setdefault("config_kwargs", {"retries": {"max_attempts": 10, "mode": "standard"}})
    return cast(pathlib.Path, epath.Path(text))


def is_store(path: pathlib.Path) -> bool:
    return "://" in str(path)


def filesystem(path: pathlib.Path) -> Any:
    """fsspec's, of a path on a store."""
    import fsspec

    return fsspec.core.url_to_fs(str(path))[0]


def absolute(path: pathlib.Path) -> pathlib.Path:
    return path if is_store(path) else path.absolute()


def errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What reading or writing a path may raise, for an `except` that is of `others`, too."""
    found: list[type[Exception]] = [OSError, *others]
    for module, names in _ERRORS.items():
        found += [getattr(sys.modules[module], n) for n in names if hasattr(sys.modules.get(module), n)]
    return tuple(found)


def is_store_error(error: BaseException) -> bool:
    """Whether it comes from a store and its network, and not from a disk, whose errors have an `errno`."""
    of_disk = isinstance(error, OSError) and type(error).__module__ == "builtins" and error.errno is not None
    return isinstance(error, errors()) and not of_disk


def reason(error: BaseException) -> str:
    """Why a path could not be read or written, on one line; a store's errors have no `strerror`."""
    known = error.strerror if isinstance(error, OSError) and type(error).__module__ == "builtins" else ""
    text = known or f"{type(error).__name__}: {error}"
    return " ".join(str(text).split())[:200]


def check_inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The path of a file of a folder that somebody else may have filled. Of a folder in the cache of Hugging Face's
    hub, which is made of links, the files are elsewhere in that cache.

    Raises:
      ConfigError: it is a link to something outside of the folder.
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
    """A store has no folders, and its mkdir would make a bucket of a name that is misspelled."""
    if not is_store(path):
        path.mkdir(parents=True, exist_ok=True)


def file_size(path: pathlib.Path) -> int:
    """Bytes."""
    return int(filesystem(path).info(str(path))["size"]) if is_store(path) else path.stat().st_size


def list_folder(folder: pathlib.Path) -> list[pathlib.Path]:
    """What is in a folder, none if it is not there. `is_dir` says no of a store that gives no answer; this raises."""
    if not is_store(folder):
        return sorted(folder.iterdir()) if folder.is_dir() else []
    try:
        names = filesystem(folder).ls(str(folder), detail=False)
    except FileNotFoundError:
        return []
    return sorted(folder / name.rstrip("/").rpartition("/")[2] for name in names)


def file_version(path: pathlib.Path) -> str:
    """What changes when the file is written again."""
    if not is_store(path):
        return str(path.stat().st_mtime_ns)
    info = filesystem(path).info(str(path))
    return str(info.get("generation") or info.get("ETag"))


def find_files(pattern: pathlib.Path) -> dict[pathlib.Path, int]:
    """The files that a pattern means, in order → bytes; `**` is folders at any level."""
    if not is_store(pattern):
        found = sorted(map(pathlib.Path, glob.glob(str(pattern), recursive=True)))
        return {path: path.stat().st_size for path in found if path.is_file()}
    scheme = str(pattern).partition("://")[0]
    entries = filesystem(pattern).glob(str(pattern), detail=True)
    return {
        _store_path(f"{scheme}://{name}"): int(entry["size"])
        for name, entry in sorted(entries.items(), key=_parts)
        if entry["type"] == "file" and not name.endswith("/")
    }


def list_files(folder: pathlib.Path) -> dict[pathlib.Path, int]:
    """All files of a folder, at every level, in order → bytes. Of a store that is one request a thousand of them."""
    if not is_store(folder):
        return {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    scheme = str(folder).partition("://")[0]
    found = filesystem(folder).find(str(folder), detail=True)
    return {
        _store_path(f"{scheme}://{name}"): int(entry["size"])
        for name, entry in sorted(found.items(), key=_parts)
        if not name.endswith("/")
    }


def _parts(entry: tuple[str, Any]) -> list[str]:
    """Orders names as paths are ordered, so that a corpus has one order wherever it lies."""
    return entry[0].split("/")


def open_lines(path: pathlib.Path) -> BinaryIO:
    """For a loop over its lines, each of which fsspec's own file would take from its block anew."""
    file: Any = path.open("rb")
    return io.BufferedReader(file, 1 << 20) if is_store(path) else file


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """The file appears whole or not at all, and is on the disk then; an object does so by itself."""
    make_folder(path.parent)
    if is_store(path):
        filesystem(path).pipe_file(str(path), content)
        return
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_figure(figure: Any, path: pathlib.Path) -> None:
    """A figure of matplotlib, as the format that the path's suffix names."""
    if not is_store(path):
        figure.savefig(path, dpi=110)
        return
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format=path.suffix.removeprefix("."))
    write_atomically(path, content.getvalue())


def remove_tree(path: pathlib.Path) -> None:
    """A folder and all in it, if it is there; what cannot be removed stays."""
    if not is_store(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(*errors()):
        filesystem(path).rm(str(path), recursive=True)


def move(source: pathlib.Path, target: pathlib.Path) -> None:
    """A folder; on a store object by object, copied by the server."""
    if is_store(source):
        files, start = filesystem(source), len(str(source))
        for path in list_files(source):
            files.cp_file(str(path), f"{target}{str(path)[start:]}")
        remove_tree(source)
    else:
        os.rename(source, target)


def local_copy_path(path: pathlib.Path) -> pathlib.Path:
    """Where the local copies of a store's folder lie: on this machine alone, and to be removed at will."""
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "bigmac_jax" / "stores" / hashlib.sha256(str(path).encode()).hexdigest()[:20]


def fetch_tree(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a store's folder into a local one, which appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = pathlib.Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.part-"))
    try:
        start = len(str(source)) + 1

        def fetch(path: pathlib.Path) -> None:
            to = part / str(path)[start:]
            to.parent.mkdir(parents=True, exist_ok=True)
            filesystem(source).get_file(str(path), str(to))

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(fetch, list_files(source)))
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def send_tree(source: pathlib.Path, target: pathlib.Path, last: str = "") -> None:
    """Copies a local folder to a store's; `last` is the file whose being there says that the others are."""
    files = [path for path in list_files(source) if path.name != last]

    def send(path: pathlib.Path) -> None:
        filesystem(target).put_file(str(path), f"{target}/{path.relative_to(source).as_posix()}")

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(send, files))
    if last:
        send(source / last)


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
    """As `local_file`; ConfigError where the store has none."""
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
    """The file itself, or a local copy of an object, for libraries that know of disks alone."""
    if not is_store(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / path.name
        filesystem(path).get_file(str(path), str(copy))
        yield copy
