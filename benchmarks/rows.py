"""What the programs that make rows for fine-tuning have in common."""

import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any


def write(task: str, definition: str, rows: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Writes SPLIT.jsonl for each split, and TASK.toml, into the folder that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("give the folder to write")
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for split, of_split in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_split))
    (folder / f"{task}.toml").write_text(definition)
