"""python -m benchmarks.quality [--studies=length,control --seeds=1,2,3 --jobs=2 --folder=runs/quality]

Trains what is compared on text that no run reads twice (benchmarks.quality.unrepeated), or with --text=embedded on the
embedded corpus, as docs/quality.md had it first (benchmarks.quality.grid). Each run is a process of its own and is
written down when it ends; started again, it goes on where it stopped. --jobs=0 runs nothing, and makes tables and
pictures of what there is.

    python -m benchmarks.quality --device=gpu --minutes=40      wider models on a GPU, one after the other, for so long
"""

import functools
import math
import os
import pathlib
import sys
import time
from typing import Any

from absl import app, flags

from benchmarks.markers import put
from benchmarks.quality import corpus, equal, fit, grid, pages, unrepeated
from benchmarks.quality.runs import Machine, StoppedError, read_file, train_missing, train_on_sotu

_TEXT = flags.DEFINE_enum("text", "unrepeated", ["unrepeated", "embedded"], "What is read.")
_STUDIES = flags.DEFINE_list("studies", [], "Which, in their order; all of them by default.")
_SEEDS = flags.DEFINE_list("seeds", [str(seed) for seed in grid.SEEDS], "Of train.seed.")
_JOBS = flags.DEFINE_integer("jobs", -1, "Runs at a time; by default one a core, or a GPU.", lower_bound=-1)
_FOLDER = flags.DEFINE_string("folder", "", "Of the runs, by default runs/quality, or runs/quality-gpu.")
_OUTPUT = flags.DEFINE_string("output", "", "Where the figures go, by default to docs/results; those of a GPU apart.")
_DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "What trains.")
_MINUTES = flags.DEFINE_float("minutes", 0, "After which no run goes on; 0: when all have ended.", lower_bound=0)
_EMBEDDED, _UNREPEATED = "docs/results/quality.json", "docs/results/unrepeated.json"  # of which the pages are made
_OF_GPUS = "docs/results/unrepeated-gpu.json"
_ARMS_AT = 2500  # steps: the length of which all arms have three seeds
# Tokens of fine_grained: those of the studies, and what all of the text costs where a token costs a quarter.
BUDGETS = (2_048_000, 13_701_120 / 4, 5_120_000, 10_240_000, 13_701_120)


def main(_: list[str]) -> None:
    start, embedded, gpu = time.monotonic(), _TEXT.value == "embedded", _DEVICE.value == "gpu"
    if embedded and gpu:
        raise app.UsageError("--device=gpu trains on --text=unrepeated alone")
    studies = grid.STUDIES if embedded else unrepeated.GPU_STUDIES if gpu else unrepeated.STUDIES
    if unknown := [name for name in _STUDIES.value if name not in studies]:
        raise app.UsageError(f"--studies={unknown[0]} must be of {', '.join(studies)}")
    # A whole study with one seed says little: all seeds of one before the next.
    runs = [
        (condition, seed)
        for name in _STUDIES.value or studies
        for seed in map(int, _SEEDS.value)
        for condition in studies[name]
        if seed in condition.seeds
    ]
    # Seeds of two devices are no pairs: a GPU's runs have files of their own.
    output = pathlib.Path(_OUTPUT.value or (_EMBEDDED if embedded else _OF_GPUS if gpu else _UNREPEATED))
    folder = pathlib.Path(_FOLDER.value or ("runs/quality-gpu" if gpu else "runs/quality"))
    jobs = _JOBS.value if _JOBS.value >= 0 else 1 if gpu else len(os.sched_getaffinity(0))
    if jobs:
        machine = Machine(_DEVICE.value, start + 60 * _MINUTES.value if _MINUTES.value else math.inf)
        train = functools.partial(train_on_sotu if embedded else unrepeated.train, machine=machine)
        try:
            if not embedded:
                corpus.prepare(unrepeated.CORPUS)
            train_missing(output.stem, runs, output, folder, jobs, train, _say)
        except StoppedError:
            print(f"stopped after {_MINUTES.value:g} minutes; the same command goes on")
        except ValueError as error:
            sys.exit(f"error: {error}")
    if not (known := list(read_file(output).values())):
        return
    if not embedded:
        print(unrepeated.table(known), equal.table(known, BUDGETS), sep="\n\n")
    if output in (pathlib.Path(_EMBEDDED), pathlib.Path(_UNREPEATED)):  # what docs are made of
        _write_docs(pathlib.Path("docs"), known, embedded)


def _write_docs(docs: pathlib.Path, runs: list[dict[str, Any]], embedded: bool) -> None:
    """Tables and pictures of one of the texts, and what the planner knows of that which no run reads twice."""
    if embedded:
        pages.write(docs, runs)
    else:
        unrepeated.draw(runs, docs / "images/quality/unrepeated.png")
        equal.draw(runs, docs / "images/quality/equal.png")
        slope, _ = fit.slope(runs, fit.longest(runs))
        put(docs / "quality.md", [unrepeated.by_arm(runs, _ARMS_AT, slope)], name="arms")
        put(docs / "quality.md", [unrepeated.by_length(runs)], name="lengths")
        put(docs / "notes/unrepeated.md", [unrepeated.by_balance(runs)], name="balance")
        pathlib.Path(fit.PATH).write_text(fit.text(runs))


def _say(run: dict[str, float]) -> str:
    return f"loss {run['loss']:.4f}"


if __name__ == "__main__":
    app.run(main)
