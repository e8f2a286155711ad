"""Repeats what a host measures, and logs it as train.py logs its steps."""

import json
import pathlib
import time
from collections.abc import Callable

from bigmac_jax.runtime import hosts


def log_steps(folder: pathlib.Path, steps: int, once: Callable[[], object]) -> None:
    """Calls `once`; process 0 writes a line a call to folder/metrics.jsonl: step, step_time_s."""
    if hosts.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text("")
    for step in range(1, steps + 1):
        start = time.perf_counter()
        once()
        line = {"step": step, "step_time_s": time.perf_counter() - start}
        if hosts.is_first():
            with (folder / "metrics.jsonl").open("a") as file:
                print(json.dumps(line), file=file)
