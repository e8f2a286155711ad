"""Rows for a first fine-tuning: dates as people write them, and as numbers.

    python -m benchmarks.dates FOLDER

writes train.jsonl and validation.jsonl, conversations for tuning.objective=sft; preferences.jsonl for dpo, in which
7.3.1863 is preferred to 1863-03-07; and test.jsonl beside dates.toml, a task for eval.py --tasks. No date stands in two
of them.
"""

import datetime
import random
from typing import Any

from benchmarks.rows import write

_FORMS = ("{d} {month} {y}", "{month} {d}, {y}", "the {d}. of {month} {y}")
_SIZES = {"train": 40_000, "validation": 500, "test": 500, "preferences": 2_000}
_TASK = """# Dates as numbers: what a tuned model writes must be the date, digit by digit.
kind = "generate"
source = "test.jsonl"
prompt = "User: {date}\\nAssistant:"
answer = "{numbers}"
max_tokens = 16
metrics = ["exact_match"]

[columns]
date = "date"
numbers = "numbers"
"""


def rows(seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """(as it is written, as numbers), by split."""
    draw = random.Random(seed)
    first = datetime.date(1000, 1, 1)
    days = draw.sample(range(365 * 1900), sum(_SIZES.values()))
    made = iter([_written(first + datetime.timedelta(day), draw.choice(_FORMS)) for day in days])
    return {split: [next(made) for _ in range(size)] for split, size in _SIZES.items()}


def _written(date: datetime.date, form: str) -> tuple[str, str]:
    return form.format(d=date.day, month=f"{date:%B}", y=date.year), date.isoformat()


def _row(split: str, date: str, numbers: str) -> dict[str, Any]:
    if split == "test":
        return {"date": date, "numbers": numbers}
    asked = {"role": "user", "content": date}
    if split == "preferences":
        year, month, day = map(int, numbers.split("-"))
        return {"prompt": [asked], "chosen": f"{day}.{month}.{year}", "rejected": numbers}
    return {"messages": [asked, {"role": "assistant", "content": numbers}]}


if __name__ == "__main__":
    write("dates", _TASK, {split: [_row(split, *pair) for pair in pairs] for split, pairs in rows().items()})
