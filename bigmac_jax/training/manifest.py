"""manifest.json of a checkpoint: size and SHA-256 of its files, because the arrays' own files carry no checksums.

`python -m bigmac_jax.training.manifest RUN/checkpoints/N` writes the one of a checkpoint that has none: that was saved
before there were manifests, and that you trust.
"""

import hashlib
import json
import os
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

NAME = "manifest.json"
STEP = "step"  # in the data position: which step a checkpoint is of, whatever its directory is called
_POSITION = "data/metadata"
_SMALL = 1 << 16  # bytes; larger files hold arrays


def write(directory: pathlib.Path) -> None:
    """Reads every file of the directory once; the manifest appears whole or not at all, and is on the disk then."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / NAME)
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter lock
        digests = list(pool.map(_digest, files))
    entries = {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    temporary = directory / f"{NAME}.tmp"
    with temporary.open("w") as file:
        file.write(_text(entries))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / NAME)


def damage(directory: pathlib.Path, thorough: bool = True) -> str | None:
    """What differs from the manifest, in a few words; None: nothing does.

    Without `thorough`, files above 64 KiB are not read: only their sizes are compared.
    """
    try:
        text = (directory / NAME).read_text()
    except FileNotFoundError:
        return f"{NAME} is missing" if directory.is_dir() and any(directory.iterdir()) else "it is empty"
    except (OSError, UnicodeDecodeError) as error:
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
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes, not {size:,}"
            if (thorough or size <= _SMALL) and _digest(path) != digest:
                return f"{name} has changed (SHA-256)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None

    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(differs, wanted)), None) or _of_another_step(directory)


def steps(workdir: pathlib.Path) -> list[int]:
    """Of a workdir's checkpoints, whatever their state, in order."""
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def _of_another_step(directory: pathlib.Path) -> str | None:
    """What is wrong with the name of the directory."""
    try:
        step = json.loads((directory / _POSITION).read_bytes()).get(STEP)
    except (OSError, ValueError, AttributeError):  # no checkpoint of ours
        return None
    if step is None or not directory.name.isdecimal() or int(directory.name) == step:  # None: of an earlier edition
        return None
    return f"it is of step {step}"


def _text(entries: object) -> str:
    return json.dumps(entries, indent=0) + "\n"


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]))
