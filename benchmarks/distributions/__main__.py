"""python -m benchmarks.distributions [--studies=shift,transfer --seeds=1,2,3 --jobs=2 --folder=runs/distributions]

Trains what the studies of `benchmarks.distributions.grid` compare. Each run is a process of its own and is written down
when it ends; started again, it goes on where it stopped. --jobs=0 runs nothing, and makes tables and pictures of what
there is. --quick takes 20 steps of two conditions of each study on little text, and writes beside the runs: it shows
that all of it works.
"""

import dataclasses
import json
import os
import pathlib
import time

from absl import app, flags

from benchmarks.distributions import pages
from benchmarks.distributions.domains import BYTES
from benchmarks.distributions.grid import SEEDS, STUDIES
from benchmarks.distributions.runs import prepare, train
from benchmarks.quality.runs import measure, write

_STUDIES = flags.DEFINE_list("studies", list(STUDIES), "Which, in their order.")
_SEEDS = flags.DEFINE_list("seeds", [str(seed) for seed in SEEDS], "Of train.seed.")
_JOBS = flags.DEFINE_integer("jobs", len(os.sched_getaffinity(0)), "Runs at a time.", lower_bound=0)
_FOLDER = flags.DEFINE_string("folder", "runs/distributions", "Of the domains and the runs.")
_OUTPUT = flags.DEFINE_string("output", "docs/results/distributions.json", "Where the figures go.")
_QUICK = flags.DEFINE_bool("quick", False, "Few steps, and nothing written to docs.")


def main(_: list[str]) -> None:
    folder, output = pathlib.Path(_FOLDER.value), pathlib.Path(_OUTPUT.value)
    seeds, studies, size = list(map(int, _SEEDS.value)), STUDIES, BYTES
    if _QUICK.value:
        folder, size, seeds = folder / "quick", 300_000, seeds[:1]
        output = folder / "quick.json"
        studies = {name: [dataclasses.replace(c, steps=20) for c in found[:2]] for name, found in STUDIES.items()}
    if unknown := [name for name in _STUDIES.value if name not in STUDIES]:
        raise app.UsageError(f"--studies={unknown[0]} must be of {', '.join(STUDIES)}")
    known = {run["key"]: run for run in json.loads(output.read_text())["runs"]} if output.exists() else {}
    # A whole study with one seed says little: all seeds of one before the next.
    runs = [(c, seed) for name in _STUDIES.value for seed in seeds for c in studies[name]]
    runs = [(condition, seed) for condition, seed in dict.fromkeys(runs) if condition.key(seed) not in known]
    if _JOBS.value and runs:
        prepare(folder, size)
        start = time.monotonic()
        for ended, record in enumerate(measure(runs, {}, folder, _JOBS.value, train), 1):
            known[record["key"]] = record
            write(output, "distributions", list(known.values()))
            left = (len(runs) - ended) * (time.monotonic() - start) / ended / 60
            losses = ", ".join(f"{name} {score['loss']:.3f}" for name, score in record["read"].items())
            print(f"{ended} of {len(runs)}: {record['key']}: {losses}; {left:.0f} min left", flush=True)
    if known:
        pages.write(folder if _QUICK.value else pathlib.Path("docs"), list(known.values()))


if __name__ == "__main__":
    app.run(main)
