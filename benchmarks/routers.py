"""Which router learns best? python -m benchmarks.routers [--steps=1000 --seeds=1,2,3 --jobs=2]

Trains configs/tiny.py with 64 experts, eight of them a token, behind a linear router, one whose matrix a frozen network
makes (hyper), and one that is never trained (frozen); each with eight choices from the first step on, and with four
that grow to eight over the run. That is the curriculum of HyperRouter's own runs, which begin with half of the choices,
too (8 of 16), and with fewer one sees less of it: from two to four are three steps. Nothing is dropped; what a capacity
would have dropped is told from the loads. Every run is scored on the validation split with all its choices, and with
half of them, of which the paper says that they do for a hyper router.

Each run is a process of its own and is written down when it ends; started again, it goes on where it stopped. --table
and --picture=FILE make the table and the picture of docs/routers.md of what there is, and run nothing.
"""

import json
import os
import pathlib
from typing import Any

from absl import app, flags, logging

from benchmarks.quality.runs import read_file, train_missing
from benchmarks.router_runs import conditions, draw, score, table, train

_STEPS = flags.DEFINE_integer("steps", 1000, "Of a run.", lower_bound=1)
_SEEDS = flags.DEFINE_list("seeds", ["1", "2", "3"], "Of train.seed.")
_JOBS = flags.DEFINE_integer("jobs", len(os.sched_getaffinity(0)), "Runs at a time.", lower_bound=1)
_FOLDER = flags.DEFINE_string("folder", "runs/routers", "Of the runs.")
_OUTPUT = flags.DEFINE_string("output", "docs/results/routers.json", "Where the figures go.")
_TABLE = flags.DEFINE_bool("table", False, "Print the table of what there is; run nothing.")
_PICTURE = flags.DEFINE_string("picture", "", "Draw what there is to this file; run nothing.")
_SCORE = flags.DEFINE_string("score", "", "The workdir of a run that this program has started, to be scored.")


def main(_: Any) -> None:
    if _SCORE.value:
        logging.set_verbosity(logging.WARNING)
        print(json.dumps(score(pathlib.Path(_SCORE.value)), allow_nan=False))
        return
    output = pathlib.Path(_OUTPUT.value)
    if not (_TABLE.value or _PICTURE.value):
        # All arms of a seed before the next: a study with one seed is a study.
        runs = [(condition, seed) for seed in map(int, _SEEDS.value) for condition in conditions(_STEPS.value)]
        train_missing("routers", runs, output, pathlib.Path(_FOLDER.value), _JOBS.value, train, _say)
    of_steps = [run for run in read_file(output).values() if run["steps"] == _STEPS.value]
    if _TABLE.value:
        print(table(of_steps))
    if _PICTURE.value:
        draw(of_steps, pathlib.Path(_PICTURE.value))


def _say(run: dict[str, Any]) -> str:
    return f"loss {run['loss']:.4f}, entropy {run['entropy']:.2f}"


if __name__ == "__main__":
    app.run(main)
