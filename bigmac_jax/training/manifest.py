"""manifest.json of a checkpoint: size and digest of its files. Of those that hold arrays it has the size alone where
they are large: their chunks carry checksums, which are compared when they are read (`arrays`).

`python -m bigmac_jax.training.manifest RUN/checkpoints/N` writes the one of a checkpoint that has none: that was saved
before there were manifests or such checksums, and that you trust.
"""

import hashlib
import heapq
import json
import pathlib
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from bigmac_jax.runtime.storage import file_size, is_store, list_files, list_folder, locate, reason, write_atomically

NAME = "manifest.json"
STEP = "step"  # which a checkpoint is of, whatever its directory is called; in its item `run`
_RUN = "run/metadata"
_COMMITTED = "commit_success.txt"  # what Orbax writes last on a store
_ARRAYS = "d"  # the directories of OCDBT's files, those of arrays
_SMALL = 1 << 16  # bytes


def write(directory: pathlib.Path, checked: bool = True) -> None:
    """Of all files below; it appears whole or not at all, and is on the disk then.

    Args:
      checked: whether arrays carry checksums of their own.
    """
    found = {path: size for path, size in list_files(directory).items() if path != directory / NAME}
    read = [path for path, size in found.items() if size <= _SMALL or path.parent.name != _ARRAYS or not checked]
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter lock
        digests = dict(zip(read, pool.map(_digest, read), strict=True))
    entries = {
        path.relative_to(directory).as_posix(): {"size": size} | ({"sha256": digests[path]} if path in digests else {})
        for path, size in sorted(found.items())
    }
    write_atomically(directory / NAME, _text(entries).encode())


def damage(
    directory: pathlib.Path, thorough: bool = True, without: str = "", share: tuple[int, int] = (0, 1)
) -> str | None:
    """What differs from the manifest, in a few words; None: nothing does.

    Args:
      thorough: False leaves files above 64 KiB unread: only their sizes are compared.
      without: a folder of the checkpoint that is not going to be loaded; of its large files, too, sizes are compared.
      share: (i, n) looks at the i-th of n parts of the files, of about as many bytes to read each.
    """
    try:
        text = (directory / NAME).read_bytes().decode()
    except FileNotFoundError:
        return f"{NAME} is missing" if directory.is_dir() and any(directory.iterdir()) else "it is empty"
    except (OSError, UnicodeDecodeError) as error:
        if is_store(directory):  # a moment without it damages nothing
            raise
        return f"{NAME} cannot be read ({type(error).__name__})"
    try:
        entries = json.loads(text)
        intact = text == _text(entries)  # so that no byte of it can change unseen
        wanted = {name: _size_and_digest(entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        intact = False
    if not intact:
        return f"{NAME} is truncated or changed"

    def to_read(name: str) -> bool:
        size, digest = wanted[name]
        return digest is not None and (
            size <= _SMALL or (thorough and not (without and name.startswith(f"{without}/")))
        )

    def differs(name: str) -> str | None:
        path, (size, digest) = directory / name, wanted[name]
        try:
            found = file_size(path)
            if found != size:
                return f"{name} has {found:,} bytes, not {size:,}"
            if to_read(name) and _digest(path) != digest:
                return f"{name} has changed (SHA-256)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            if is_store(path):
                raise
            return f"{name} cannot be read ({reason(error)})"
        return None

    own = _share({name: size if to_read(name) else 0 for name, (size, *_) in wanted.items()}, *share)
    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(differs, own)), None) or _of_another_step(directory)


def steps(workdir: pathlib.Path) -> list[int]:
    """Of a workdir's checkpoints, whatever their state, in order."""
    found = (path for path in list_folder(workdir / "checkpoints") if path.name.isdecimal() and is_whole(path))
    return sorted(int(path.name) for path in found)


def is_whole(directory: pathlib.Path) -> bool:
    """Whether a directory of a step's name is a checkpoint: a disk gives it that name last."""
    return not is_store(directory) or (directory / _COMMITTED).exists()


def _of_another_step(directory: pathlib.Path) -> str | None:
    """What is wrong with the name of the directory."""
    try:
        step = json.loads((directory / _RUN).read_bytes()).get(STEP)
    except (OSError, ValueError, AttributeError) as error:
        if is_store(directory) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        return None  # no checkpoint of ours
    if step is None or not directory.name.isdecimal() or int(directory.name) == step:  # None: of an earlier edition
        return None
    return f"it is of step {step}"


def _share(sizes: Mapping[str, int], index: int, count: int) -> list[str]:
    """The names, in their order, that are for one of `count` processes: the largest goes first, each to whoever has the
    least to read."""
    loads = [(0, process) for process in range(count)]
    own = set()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, process = loads[0]
        heapq.heapreplace(loads, (load + sizes[name] + _SMALL, process))  # opening a file takes its time, too
        if process == index:
            own.add(name)
    return [name for name in sizes if name in own]


def _size_and_digest(entry: Mapping[str, object]) -> tuple[int, str | None]:
    """ValueError for another entry than `write` makes."""
    if not {"size"} <= entry.keys() <= {"size", "sha256"}:
        raise ValueError(f"an entry with {sorted(entry)}")
    return int(str(entry["size"])), str(entry["sha256"]) if "sha256" in entry else None


def _text(entries: object) -> str:
    return json.dumps(entries, indent=0, allow_nan=False) + "\n"


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    write(locate(sys.argv[1], "checkpoint"), checked=False)
