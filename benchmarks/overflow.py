"""Where experts are full, is it better to drop choices or to move them? python -m benchmarks.overflow [--steps=1000]

Trains configs/tiny.py on the embedded text with capacity factors of 1.0 and 1.25, dropping what finds its expert full
or moving it to the token's next expert (model.overflow), and dropless beside them. Each run is a process of its own and
is written down when it ends; started again, it goes on where it stopped.

    python -m benchmarks.overflow --table              the table of what there is, and no run
    python -m benchmarks.overflow --picture=FILE.png   drops and moves over the steps, of what there is, and no run
"""

import os
import pathlib

from absl import app, flags

from benchmarks.overflow_runs import Run, arms, picture, table, train
from benchmarks.quality.runs import read_file, train_missing

_STEPS = flags.DEFINE_integer("steps", 1000, "Of a run.", lower_bound=20)
_SEEDS = flags.DEFINE_list("seeds", ["1", "2", "3"], "Of train.seed.")
_JOBS = flags.DEFINE_integer("jobs", len(os.sched_getaffinity(0)), "Runs at a time.", lower_bound=1)
_FOLDER = flags.DEFINE_string("folder", "runs/overflow", "Of the runs.")
_OUTPUT = flags.DEFINE_string("output", "docs/results/overflow.json", "Where the figures go.")
_TABLE = flags.DEFINE_bool("table", False, "Run nothing, print the table.")
_PICTURE = flags.DEFINE_string("picture", "", "Run nothing, draw this file.")


def main(_: list[str]) -> None:
    output, steps = pathlib.Path(_OUTPUT.value), _STEPS.value
    if not (_TABLE.value or _PICTURE.value):
        runs = [(arm, int(seed)) for seed in _SEEDS.value for arm in arms(steps)]
        train_missing("overflow", runs, output, pathlib.Path(_FOLDER.value), _JOBS.value, train, _say)
    found = [run for run in read_file(output).values() if run["steps"] == steps]
    if _PICTURE.value:
        picture(found, pathlib.Path(_PICTURE.value))
    else:
        print(table(found))


def _say(run: Run) -> str:
    return f"held-out loss {run['loss']:.4f}, {run['dropped']:.2%} dropped, {run['moved']:.2%} moved"


if __name__ == "__main__":
    app.run(main)
