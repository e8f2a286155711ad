"""manifest.json of a checkpoint: size and SHA-256 of its files. Of large files that hold arrays it has the size alone:
their chunks carry checksums, which are compared when they are read (`checkpoint_arrays`)."""

import hashlib
import json
import pathlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

from bigmac_jax.runtime.storage import (
    file_size,
    is_store,
    list_files,
    list_folder,
    may_pass,
    reason,
    remove_tree,
    write_atomically,
)

NAME = "manifest.json"
STEP = "step"  # the key, in the item `run`, of the step that a checkpoint is of, whatever its directory is called
_RUN = "run/metadata"
_COMMITTED = "commit_success.txt"  # what Orbax writes last on a store
_ARRAYS = "d"  # the directories of OCDBT's files, those of arrays
_SMALL = 1 << 16  # bytes


def write(directory: pathlib.Path) -> None:
    """Writes the manifest of all files below; it appears whole or not at all, and is on the disk then."""
    found = {path: size for path, size in list_files(directory).items() if path != directory / NAME}
    read = [path for path, size in found.items() if size <= _SMALL or path.parent.name != _ARRAYS]
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter lock
        digests = dict(zip(read, pool.map(_digest, read), strict=True))
    entries = {
        path.relative_to(directory).as_posix(): {"size": size} | ({"sha256": digests[path]} if path in digests else {})
        for path, size in sorted(found.items())
    }
    write_atomically(directory / NAME, _text(entries).encode())


def find_damage(
    directory: pathlib.Path, thorough: bool = True, without: str = "", share: tuple[int, int] = (0, 1)
) -> str | None:
    """Compares a checkpoint with its manifest → the first difference, in a few words; None if there is none.

    Args:
      thorough: False leaves files above 64 KiB unread: only their sizes are compared.
      without: a folder of the checkpoint that is not going to be loaded; of its large files, too, sizes are compared.
      share: (i, n) looks at the i-th of n parts of the files.
    """
    try:
        text = (directory / NAME).read_bytes().decode()
    except FileNotFoundError:
        return f"{NAME} is missing" if directory.is_dir() and any(directory.iterdir()) else "it is empty"
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and may_pass(error, directory):
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

    def is_read(name: str) -> bool:
        size, digest = wanted[name]
        passed_over = bool(without) and name.startswith(f"{without}/")
        return digest is not None and (size <= _SMALL or (thorough and not passed_over))

    def compare(name: str) -> str | None:
        path, (size, digest) = directory / name, wanted[name]
        try:
            found = file_size(path)
            if found != size:
                return f"{name} has {found:,} bytes, not {size:,}"
            if is_read(name) and _digest(path) != digest:
                return f"{name} has changed (SHA-256)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            if may_pass(error, path):
                raise
            return f"{name} cannot be read ({reason(error)})"
        return None

    index, count = share
    by_size = sorted(wanted, key=lambda name: (-wanted[name][0] if is_read(name) else 0, name))
    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(compare, sorted(by_size[index::count]))), None) or _find_other_step(directory)


def list_items(directory: pathlib.Path) -> set[str]:
    """The items that a checkpoint holds by its manifest; none if that is missing or damaged."""
    try:
        return {name.partition("/")[0] for name in json.loads((directory / NAME).read_bytes())}
    except (OSError, ValueError):
        return set()


def is_stripped(directory: pathlib.Path) -> bool:
    """Whether the experts alone are left of a save (`partial_checkpoint`), from which no run goes on; of one whose
    manifest is damaged that is not known."""
    items = list_items(directory)
    return bool(items) and "model" not in items


def remove_items(directory: pathlib.Path, items: Collection[str]) -> None:
    """Removes items of a checkpoint, from the manifest first; one whose removal was interrupted can be asked again."""
    entries = json.loads((directory / NAME).read_bytes())
    kept = {name: entry for name, entry in entries.items() if name.partition("/")[0] not in items}
    if len(kept) < len(entries):
        write_atomically(directory / NAME, _text(kept).encode())
    for item in items:
        remove_tree(directory / item)


def list_steps(workdir: pathlib.Path) -> list[int]:
    """The steps of a workdir's checkpoints, whatever their state, in order."""
    found = (path for path in list_folder(workdir / "checkpoints") if path.name.isdecimal() and is_complete(path))
    return sorted(int(path.name) for path in found)


def is_complete(directory: pathlib.Path) -> bool:
    """Whether a directory of a step's name is a checkpoint: a disk gives it that name last."""
    return not is_store(directory) or (directory / _COMMITTED).exists()


def _find_other_step(directory: pathlib.Path) -> str | None:
    """Says whether a checkpoint is of another step than its directory's name."""
    try:
        step = json.loads((directory / _RUN).read_bytes()).get(STEP)
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and may_pass(error, directory):
            raise
        return None  # no checkpoint of ours
    return f"it is of step {step}" if directory.name.isdecimal() and step not in (None, int(directory.name)) else None


def _size_and_digest(entry: Mapping[str, object]) -> tuple[int, str | None]:
    """Reads an entry that `write` makes; ValueError for another."""
    if not {"size"} <= entry.keys() <= {"size", "sha256"}:
        raise ValueError(f"an entry with {sorted(entry)}")
    return int(str(entry["size"])), str(entry["sha256"]) if "sha256" in entry else None


def _text(entries: object) -> str:
    return json.dumps(entries, indent=0, allow_nan=False) + "\n"


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
