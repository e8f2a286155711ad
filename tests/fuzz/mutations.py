"""What may become of a small file on a disk, or under an editor: mutations of its bytes, and of the JSON in it.

The same seed gives the same damage.
"""

import json
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any

HUGE = (2**31 - 1, 2**31, 2**63, 10**18, 10**300, -(10**30), 1e300, -1e300, 1e-320, 5 * 10**9)
OTHERS = (None, True, False, 0, -1, 1.5, "", "x", "é", [], {}, [1], [[1]], {"a": 1}, ["a", None], [[0.5, "x"]])
NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "-" + "9" * 400, "0" * 10, "1e", "0x10")


def flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def empty(data: bytes, draw: random.Random) -> bytes:
    return draw.choice((b"", b"\n", b" ", b"\0" * len(data)))


def not_utf8(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return draw.choice(
        (data[:place] + b"\xff\xfe\x80" + data[place:], data.decode().encode("utf-16"), b"\xef\xbb\xbf" + data)
    )


def written_twice(data: bytes, draw: random.Random) -> bytes:
    return data + data[draw.randrange(len(data)) :]


def deep(data: bytes, draw: random.Random) -> bytes:
    depth = draw.choice((70, 500, 990, 100_000))
    opened, closed = draw.choice((("[", "]"), ('{"a":', "}")))
    nested = opened * depth + "1" + closed * draw.choice((depth, 0))
    return nested.encode() if draw.random() < 0.3 else _with_text(data, draw, nested)


def number(data: bytes, draw: random.Random) -> bytes:
    return _with_text(data, draw, draw.choice(NUMBERS))


def wrong_type(data: bytes, draw: random.Random) -> bytes:
    return _with_text(data, draw, json.dumps(draw.choice(OTHERS)))


def huge(data: bytes, draw: random.Random) -> bytes:
    return _with_text(data, draw, json.dumps(draw.choice((*HUGE, "x" * 100_000))))


def another_number(data: bytes, draw: random.Random) -> bytes:
    """Of the same type, so that only a digest can tell."""
    return _with_text(data, draw, str(draw.randint(0, 200)), lambda value: type(value) in (int, float))


def key(data: bytes, draw: random.Random) -> bytes:
    """One that is missing, stands there twice, is new, or is another."""
    text, pieces = data.decode(), data.decode().split('"')
    if len(pieces) < 3:
        return data + b'{"a": 1}'
    name = pieces[2 * draw.randrange(len(pieces) // 2) + 1]
    new = draw.choice((name + "x", "", "x" * 100_000, "__class__", "\\u0000", "\\ud800"))
    return text.replace(f'"{name}"', f'"{new}"', 1).encode()


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    flipped, truncated, empty, not_utf8, written_twice, deep, number, wrong_type, huge, another_number, key,
]  # fmt: skip


def damage(file: pathlib.Path, seed: int) -> str:
    """Changes the file, and says how; each seed takes the next kind, of which one is a folder in the file's place."""
    draw, kind = random.Random(seed), seed % (len(MUTATIONS) + 1)
    if kind == len(MUTATIONS):
        file.unlink()
        file.mkdir()
        if draw.random() < 0.5:
            (file / "x").write_text("")
        return f"{file.name}: a folder, seed {seed}"
    content = file.read_bytes()
    try:
        file.write_bytes(MUTATIONS[kind](content, draw))
    except json.JSONDecodeError:  # of JSON there is none
        file.write_bytes(flipped(content, draw))
    return f"{file.name}: {MUTATIONS[kind].__name__}, seed {seed}"


def restored(file: pathlib.Path, content: bytes) -> None:
    """Undoes `damage`."""
    if file.is_dir():
        shutil.rmtree(file)
    file.write_bytes(content)


def _with_text(data: bytes, draw: random.Random, text: str, fits: Callable[[Any], bool] = lambda value: True) -> bytes:
    """With `text` in the place of a value somewhere in the object, or in one of its lines."""
    lines = data.decode().splitlines() if data.count(b"\n") > 1 and data.lstrip()[:2] != b"{\n" else [data.decode()]
    number = draw.randrange(len(lines))
    values = json.loads(lines[number])
    mark = "a place that no file has"
    places = [(holder, name) for holder, name in _places(values) if fits(holder[name])]
    if not places:
        return data
    holder, name = draw.choice(places)
    holder[name] = mark
    lines[number] = json.dumps(values).replace(f'"{mark}"', text)
    return ("\n".join(lines) + "\n").encode(errors="surrogatepass")


def _places(values: Any) -> list[tuple[Any, Any]]:
    found = []
    for name in values if isinstance(values, dict) else range(len(values)):
        found.append((values, name))
        if isinstance(values[name], dict | list):
            found += _places(values[name])[:200]
    return found
