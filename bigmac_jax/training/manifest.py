"""manifest.json of a checkpoint: size and SHA-256 of its files, because the arrays' own files carry no checksums.

`python -m bigmac_jax.training.manifest RUN/checkpoints/N` writes the one of a checkpoint that has none: that was saved
before there were manifests, and that you trust.
"""

import hashlib
import json
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

from bigmac_jax.storage import files_below, is_store, locate, reason, size_of, write_whole

NAME = "manifest.json"
_SMALL = 1 << 16  # bytes; larger files hold arrays


def write(directory: pathlib.Path) -> None:
    """Reads every file of the directory once; the manifest appears whole or not at all, and is on the disk then."""
    sizes = files_below(directory)
    files = [path for path in sizes if path != directory / NAME]
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter lock
        digests = list(pool.map(_digest, files))
    entries = {
        path.relative_to(directory).as_posix(): {"size": sizes[path], "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    write_whole(directory / NAME, _text(entries).encode())


def damage(directory: pathlib.Path, thorough: bool = True) -> str | None:
    """What differs from the manifest, in a few words; None: nothing does.

    Without `thorough`, files above 64 KiB are not read: only their sizes are compared.
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
        wanted = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        return f"{NAME} is truncated or changed"

    def differs(name: str) -> str | None:
        path, (size, digest) = directory / name, wanted[name]
        try:
            found = size_of(path)
            if found != size:
                return f"{name} has {found:,} bytes, not {size:,}"
            if (thorough or size <= _SMALL) and _digest(path) != digest:
                return f"{name} has changed (SHA-256)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            if is_store(path):
                raise
            return f"{name} cannot be read ({reason(error)})"
        return None

    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(differs, wanted)), None)


def _text(entries: object) -> str:
    return json.dumps(entries, indent=0) + "\n"


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    write(locate(sys.argv[1], "checkpoint"))
