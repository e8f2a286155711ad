"""Rows for a classifier: a paragraph of a State of the Union address, and the time in which it was said.

    python -m benchmarks.eras FOLDER

writes train.jsonl and validation.jsonl, rows for tuning.objective=sft; and test.jsonl beside eras.toml, a task for
eval.py --tasks. A year stands in one of them alone, and each time has as many rows as the others.
"""

import json
import pathlib
import random
from collections.abc import Iterator
from typing import Any

from benchmarks.rows import write
from bigmac_jax.data.sotu import speech_files
from bigmac_jax.data.splits import SPLITS, choose_split

_CLASSES = {"early": range(1790, 1861), "middle": range(1861, 1933), "late": range(1933, 2100)}
_MOST = {"train": 4_000, "validation": 100, "test": 200}  # of a class
_SHORTEST, _LONGEST = 100, 300  # characters
_PROMPT = "{text}\nTime:"
_TASK = f"""# When a paragraph was said: early (before 1861), middle (before 1933) or late.
kind = "classification"
source = "test.jsonl"
prompt = {json.dumps(_PROMPT)}
choices = {json.dumps(list(_CLASSES))}
answer = "label"

[columns]
text = "text"
label = "label"
"""


def _paragraphs(path: pathlib.Path) -> Iterator[str]:
    for paragraph in path.read_text().split("\n"):
        text = " ".join(paragraph.split())
        if len(text) >= _SHORTEST:
            yield text[:_LONGEST].rsplit(" ", 1)[0] if len(text) > _LONGEST else text


def rows(seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """(paragraph, class), by split."""
    found: dict[str, dict[str, list[str]]] = {split: {name: [] for name in _CLASSES} for split in SPLITS}
    for year, path in speech_files():
        name = next(name for name, years in _CLASSES.items() if year in years)
        found[choose_split(year)][name] += _paragraphs(path)
    draw, made = random.Random(seed), {}
    for split, by_class in found.items():
        size = min(_MOST[split], *map(len, by_class.values()))
        made[split] = [(text, name) for name, texts in by_class.items() for text in draw.sample(texts, size)]
        draw.shuffle(made[split])
    return made


def _row(split: str, text: str, name: str) -> dict[str, Any]:
    if split == "test":
        return {"text": text, "label": list(_CLASSES).index(name)}
    return {"prompt": _PROMPT.format(text=text), "completion": f" {name}"}


if __name__ == "__main__":
    write("eras", _TASK, {split: [_row(split, *pair) for pair in pairs] for split, pairs in rows().items()})
