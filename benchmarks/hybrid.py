"""Mamba layers or attention alone, at equal parameters? python -m benchmarks.hybrid [--steps=1000 --seeds=1,2,3]

Trains configs/hybrid.py (Mamba-2 in two of three layers) and the same model with attention in all three, 2,048 tokens a
step in sequences of 256 and of 2,048, and scores both on the validation split. Each run is a process of its own and is
written down when it ends; started again, it goes on where it stopped. --speed measures tokens a second of training, and
of decoding at 2,048, in one process, the models in turn; nothing else should run then.

    python -m benchmarks.hybrid --table                 the tables of what there is, and no run
    python -m benchmarks.hybrid --picture=FILE.png      losses over the tokens, of what there is, and no run
"""

import json
import os
import pathlib

from absl import app, flags

from benchmarks.hybrid_runs import LENGTHS, Run, arms, decoding_speed, draw, speed_table, table, train, training_speed
from benchmarks.quality.runs import read_file, train_missing, write

_STEPS = flags.DEFINE_integer("steps", 1000, "Of a run.", lower_bound=20)
_SEEDS = flags.DEFINE_list("seeds", ["1", "2", "3"], "Of train.seed.")
_JOBS = flags.DEFINE_integer("jobs", len(os.sched_getaffinity(0)), "Runs at a time.", lower_bound=1)
_FOLDER = flags.DEFINE_string("folder", "runs/hybrid", "Of the runs.")
_OUTPUT = flags.DEFINE_string("output", "docs/results/hybrid.json", "Where the losses go.")
_SPEEDS = flags.DEFINE_string("speeds", "docs/results/hybrid_speed.json", "Where the speeds go.")
_SPEED = flags.DEFINE_bool("speed", False, "Train nothing, measure speeds.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Of the speeds; a ratio is the median over rounds.", lower_bound=1)
_TABLE = flags.DEFINE_bool("table", False, "Run nothing, print the tables.")
_PICTURE = flags.DEFINE_string("picture", "", "Run nothing, draw this file.")


def main(_: list[str]) -> None:
    output, speeds = pathlib.Path(_OUTPUT.value), pathlib.Path(_SPEEDS.value)
    if _SPEED.value:
        _measure_speeds(speeds)
    elif not (_TABLE.value or _PICTURE.value):
        runs = [(arm, int(seed)) for seed in _SEEDS.value for arm in arms(_STEPS.value)]
        train_missing("hybrid", runs, output, pathlib.Path(_FOLDER.value), _JOBS.value, train, _say)
    found = [run for run in read_file(output).values() if run["steps"] == _STEPS.value]
    if _PICTURE.value:
        draw(found, pathlib.Path(_PICTURE.value))
    else:
        print(table(found), speed_table(list(read_file(speeds).values())), sep="\n\n")


def _measure_speeds(path: pathlib.Path) -> None:
    rates: list[Run] = []
    for length in LENGTHS:
        rates += training_speed(length, _ROUNDS.value)
    for requests in (1, 8):
        rates += decoding_speed(LENGTHS[-1], _ROUNDS.value, requests)
    write(path, "hybrid_speed", rates)
    print(*(json.dumps(rate, allow_nan=False) for rate in rates), sep="\n")


def _say(run: Run) -> str:
    return f"held-out loss {run['loss']:.4f}"


if __name__ == "__main__":
    app.run(main)
