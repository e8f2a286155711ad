"""What a run learns, and when: train.py with checkpoints, each of which eval.py then scores, off the clock."""

import dataclasses
import json
import pathlib
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cluster import Cluster, Network
from benchmarks.reproduce.lab import (
    BASE,
    ROOT,
    CaseError,
    Lab,
    Record,
    answer,
    key_of,
    measured,
    step_records,
    write_json,
)

TAIL = 20  # steps whose mean loss is the run's


@dataclass(frozen=True)
class Course:
    """A run that learns, in one process of four simulated devices: what it learns does not depend on time.

    Attributes:
      evaluations: checkpoints that are scored, the last one included.
    """

    size: str
    overrides: tuple[str, ...]
    steps: int
    evaluations: int = 10
    seed: int = 1234

    @property
    def key(self) -> str:
        return "course-" + key_of(dataclasses.asdict(self) | {"overrides": sorted(self.overrides)})


def learn(lab: Lab, course: Course) -> Record:
    """Runs or resumes a course → losses by step, and of each checkpoint its perplexity on the validation split."""
    if lab.toy:
        course = dataclasses.replace(course, size="tiny", evaluations=min(2, course.evaluations))
    path = lab.folder / "cases" / f"{course.key}.json"
    if not path.exists():
        what = " ".join((course.size, *course.overrides))
        print(f"  {what}: {course.steps} steps, seed {course.seed}", flush=True)
        write_json(path, _learn(lab, course))
    record: Record = json.loads(path.read_text())
    return record


def _learn(lab: Lab, course: Course) -> Record:
    workdir, logs = lab.folder / "runs" / course.key, lab.folder / "logs" / course.key
    logs.mkdir(parents=True, exist_ok=True)
    every = max(1, course.steps // max(1, course.evaluations))
    fields = (
        *course.overrides, f"train.steps={course.steps}", f"train.seed={course.seed}",
        f"train.checkpoint_every={every if course.evaluations else 0}", "train.keep_checkpoints=1000",
        f"cache_dir={lab.folder / 'cache'}",
    )  # fmt: skip
    command = [sys.executable, "train.py", f"--config={BASE}:{course.size}", f"--workdir={workdir}"]
    command += [f"--config.{field}" for field in fields]
    command.append(f"--cpu_devices={lab.hosts}")
    with Cluster(Network(1), pin=False) as cluster:
        code = cluster.run(command, logs, {"PYTHONPATH": str(ROOT)}, join=False, limit=24 * 3600)
    if cluster.interrupted:  # train.py has saved
        raise KeyboardInterrupt
    records = step_records(workdir / "metrics.jsonl")
    if code or len(records) != course.steps:  # what there is stays, and the next call goes on from it
        what = " ".join(course.overrides)
        raise CaseError(f"{what}: ended with {code} after {len(records)} steps; see {logs}/host0.log")
    losses = [record["loss"] for record in records]
    scored = [n for n in range(1, course.steps + 1) if course.evaluations and (n % every == 0 or n == course.steps)]
    result: Record = {
        "course": dataclasses.asdict(course),
        "measured": measured(),
        "losses": [round(loss, 5) for loss in losses],
        "final_loss": statistics.fmean(losses[-TAIL:]),
        "drop_rate": statistics.fmean(record.get("moe/drop_rate", 0.0) for record in records[-TAIL:]),
        "evaluations": [
            {"step": n, "tokens": records[n - 1]["tokens"], "perplexity": _score(workdir, n)} for n in scored
        ],
    }
    shutil.rmtree(workdir)
    return result


def _score(workdir: pathlib.Path, step: int) -> float:
    """Perplexity on the whole validation split, dropless, on one device."""
    command = [sys.executable, "eval.py", f"--workdir={workdir}", f"--step={step}", "--split=validation", "--json"]
    command += ["--config.mesh.expert=1", "--config.mesh.node=1", "--config.mesh.tensor=1", "--cpu_devices=1"]
    return float(answer(command)["perplexity"])


def steps_to(evaluations: Sequence[Record], perplexity: float) -> float | None:
    """Steps until the validation perplexity was reached, between two checkpoints by interpolation."""
    before: Record | None = None
    for point in evaluations:
        if point["perplexity"] <= perplexity:
            if before is None:
                return float(point["step"])
            share = (before["perplexity"] - perplexity) / (before["perplexity"] - point["perplexity"])
            return float(before["step"] + share * (point["step"] - before["step"]))
        before = point
    return None
