"""python -m benchmarks.quality [--studies=norms,ratios --seeds=1,2,3 --jobs=2 --folder=runs/quality]

Trains what the studies of `benchmarks.quality.grid` compare. Each run is a process of its own and is written down when
it ends; started again, it goes on where it stopped. --jobs=0 runs nothing, and makes tables and pictures of what there
is.
"""

import json
import os
import pathlib
import time

from absl import app, flags

from benchmarks.quality import fit, pages
from benchmarks.quality.grid import SEEDS, STUDIES
from benchmarks.quality.runs import measure, write

_STUDIES = flags.DEFINE_list("studies", list(STUDIES), "Which, in their order.")
_SEEDS = flags.DEFINE_list("seeds", [str(seed) for seed in SEEDS], "Of train.seed.")
_JOBS = flags.DEFINE_integer("jobs", len(os.sched_getaffinity(0)), "Runs at a time.", lower_bound=0)
_FOLDER = flags.DEFINE_string("folder", "runs/quality", "Of the runs.")
_DEFAULT = "docs/results/quality.json"  # of which the page is made
_OUTPUT = flags.DEFINE_string("output", _DEFAULT, "Where the figures go.")


def main(_: list[str]) -> None:
    output = pathlib.Path(_OUTPUT.value)
    known = {run["key"]: run for run in json.loads(output.read_text())["runs"]} if output.exists() else {}
    if unknown := [name for name in _STUDIES.value if name not in STUDIES]:
        raise app.UsageError(f"--studies={unknown[0]} must be of {', '.join(STUDIES)}")
    # A whole study with one seed says little: all seeds of one before the next.
    runs = [
        (condition, seed)
        for name in _STUDIES.value
        for seed in map(int, _SEEDS.value)
        for condition in STUDIES[name]
        if seed in condition.seeds
    ]
    missing = {condition.key(seed) for condition, seed in runs} - known.keys()
    if _JOBS.value:
        start = time.monotonic()
        for ended, record in enumerate(measure(runs, known, pathlib.Path(_FOLDER.value), _JOBS.value), 1):
            known[record["key"]] = record
            write(output, "quality", list(known.values()))
            left = (len(missing) - ended) * (time.monotonic() - start) / ended / 60
            reached = f"{record['key']}: loss {record['loss']:.4f}"
            print(f"{ended} of {len(missing)}: {reached}, {left:.0f} min left", flush=True)
    if known and output == pathlib.Path(_DEFAULT):
        pages.write(pathlib.Path("docs"), list(known.values()))
        pathlib.Path(fit.PATH).write_text(fit.text(list(known.values())))


if __name__ == "__main__":
    app.run(main)
