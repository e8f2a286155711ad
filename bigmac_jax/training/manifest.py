"""manifest.json of a checkpoint: size and digest of its files, because the arrays' own files carry no checksums.

Every process digests the arrays that it has written right after it wrote them, when its host still has them in memory
(`write_part`). The first process joins that (`write`), and reads only what is in no part: small files. Parts are XXH3,
a fifth of SHA-256's work, which added 40 % to a write that nothing but memory held up (benchmarks/saves.py).

`python -m bigmac_jax.training.manifest RUN/checkpoints/N` writes the one of a checkpoint that has none: that was saved
before there were manifests, and that you trust.
"""

import hashlib
import heapq
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash

from bigmac_jax.storage import children, files_below, is_store, locate, reason, size_of, write_whole

NAME = "manifest.json"
_PART = "digests.process_{}.json"  # beside the files that it is of
STEP = "step"  # which a checkpoint is of, whatever its directory is called; in its item `run`
_RUN = "run/metadata"
_COMMITTED = "commit_success.txt"  # what Orbax writes last on a store
_SMALL = 1 << 16  # bytes; larger files hold arrays
# By the name that an entry has it under. Earlier editions wrote SHA-256 alone.
_HASHES: dict[str, Callable[[], Any]] = {"sha256": hashlib.sha256, "xxh3_128": xxhash.xxh3_128}
_SPELLED = {"sha256": "SHA-256", "xxh3_128": "XXH3"}


def write_part(folder: pathlib.Path, process: int) -> None:
    """Digests what a process has written below `folder`, its `ocdbt.process_N`, for `write`."""
    own = folder / f"ocdbt.process_{process}"
    (folder / _PART.format(process)).write_text(json.dumps(_entries(folder, files_below(own), "xxh3_128")))


def write(directory: pathlib.Path) -> None:
    """Reads each file of which no part tells; the manifest appears whole or not at all, and is on the disk then."""
    entries: dict[str, Any] = {}
    for part in [file for item in children(directory) for file in children(item) if _is_part(file)]:
        below = part.parent.relative_to(directory)
        entries |= {(below / name).as_posix(): entry for name, entry in json.loads(part.read_bytes()).items()}
        part.unlink()
    found = {path: size for path, size in files_below(directory).items() if path != directory / NAME}
    sizes = {path.relative_to(directory).as_posix(): size for path, size in found.items()}
    known = {name: entries[name] for name, size in sizes.items() if entries.get(name, {}).get("size") == size}
    left = {directory / name: sizes[name] for name in sizes.keys() - known.keys()}
    read = _entries(directory, left, "sha256")
    write_whole(directory / NAME, _text(dict(sorted((known | read).items()))).encode())


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
        wanted = {name: (int(entry["size"]), *_kind_and_digest(entry)) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        intact = False
    if not intact:
        return f"{NAME} is truncated or changed"

    def to_read(name: str) -> bool:
        return wanted[name][0] <= _SMALL or (thorough and not (without and name.startswith(f"{without}/")))

    def differs(name: str) -> str | None:
        path, (size, kind, digest) = directory / name, wanted[name]
        try:
            found = size_of(path)
            if found != size:
                return f"{name} has {found:,} bytes, not {size:,}"
            if to_read(name) and _digest(path, kind) != digest:
                return f"{name} has changed ({_SPELLED[kind]})"
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
    found = (path for path in children(workdir / "checkpoints") if path.name.isdecimal() and is_whole(path))
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


def _entries(directory: pathlib.Path, sizes: Mapping[pathlib.Path, int], kind: str) -> dict[str, dict[str, Any]]:
    """By name below `directory`: size and digest of files, each of which is read once."""
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter lock
        digests = list(pool.map(lambda path: _digest(path, kind), sizes))
    return {
        path.relative_to(directory).as_posix(): {"size": size, kind: digest}
        for (path, size), digest in zip(sizes.items(), digests, strict=True)
    }


def _is_part(file: pathlib.Path) -> bool:
    return file.match(_PART.format("*"))


def _kind_and_digest(entry: Mapping[str, Any]) -> tuple[str, str]:
    """KeyError where there is none that is known."""
    kind = next((kind for kind in _HASHES if kind in entry), "sha256")
    return kind, str(entry[kind])


def _text(entries: object) -> str:
    return json.dumps(entries, indent=0) + "\n"


def _digest(path: pathlib.Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _HASHES[kind]).hexdigest()


if __name__ == "__main__":
    write(locate(sys.argv[1], "checkpoint"))
