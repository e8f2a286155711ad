"""Measures cases on the cluster, each once: what has been measured is read again, so an interrupted run goes on.

Not measured again after a change of the program: empty the folder for that. A record says which commit it is of.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cluster import Cluster, Network
from benchmarks.reproduce.base import HOSTS
from benchmarks.reproduce.machine import commit

ROOT = pathlib.Path(__file__).parents[2]
BASE = "benchmarks/reproduce/base.py"
WARM = 2  # steps that are not counted: connections are made, memory is touched
Record = dict[str, Any]


class CaseError(RuntimeError):
    """A case that did not end; the message names its log."""


@dataclass(frozen=True)
class Case:
    """One job on the cluster.

    Attributes:
      size: of `base.SIZES`.
      overrides: of its config.
      program: train (train.py), or forward or generation (of this package).
      arguments: of the program, beside those of its config.
      local: without the exchange.
      rate, machine, fast_rate: as `Network`.
      repeat: which of several runs of the same.
    """

    size: str
    overrides: tuple[str, ...] = ()
    program: str = "train"
    local: bool = False
    rate: float = 0
    machine: int = 1
    fast_rate: float = 0
    steps: int = 20
    repeat: int = 0
    arguments: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return key_of(dataclasses.asdict(self) | {"overrides": sorted(self.overrides)})

    @property
    def command(self) -> list[str]:
        """Without the workdir."""
        if self.program == "train":
            module = ["-m", "benchmarks.train_local"] if self.local else ["train.py"]
        else:
            module = ["-m", f"benchmarks.reproduce.{self.program}", *(["--local"] if self.local else [])]
        fields = (*self.overrides, f"train.steps={self.steps + WARM}")
        return [*module, *self.arguments, f"--config={BASE}:{self.size}", *(f"--config.{field}" for field in fields)]

    def describe(self) -> str:
        links = "" if self.local else f", {self.rate / 1e6:.4g} Mbit/s" if self.rate else ", loopback"
        pairs = f", {self.machine} hosts a machine" if self.machine > 1 else ""
        what = " ".join((*(o.removeprefix("model.") for o in self.overrides), *self.arguments))
        return f"{self.program} {self.size} {what}{' without exchange' if self.local else ''}{links}{pairs}"


@dataclass
class Lab:
    """Attributes:
    folder: what was measured, and logs.
    steps, repeats: of every case.
    """

    folder: pathlib.Path
    steps: int = 20
    repeats: int = 3
    hosts: int = HOSTS
    toy: bool = False  # whether every size is `tiny`: it shows that all runs, and no more
    limit: float = 7200.0  # seconds of a case

    def case(self, size: str, *overrides: str, **more: Any) -> Case:
        return Case("tiny" if self.toy else size, overrides, **({"steps": self.steps} | more))

    def measure(self, cases: Sequence[Case]) -> list[Record]:
        """Each case's record, in order; see `_run`. Those that are there already are not run again."""
        unknown = [case for case in dict.fromkeys(cases) if not self._file(case).exists()]
        for number, case in enumerate(unknown):
            print(f"  {number + 1} of {len(unknown)}: {case.describe()}", end="", flush=True)
            start = time.monotonic()
            record = self._run(case)
            write_json(self._file(case), record)
            took = time.monotonic() - start
            print(f": {record['median_s']:.3f} s a {record['unit']}, {took:.0f} s in all", flush=True)
        return [json.loads(self._file(case).read_text()) for case in cases]

    def runs(self, *cases: Case) -> list[list[Record]]:
        """All runs of each case; they take turns, so that a machine that slows down slows all."""
        repeated = [dataclasses.replace(case, repeat=repeat) for repeat in range(self.repeats) for case in cases]
        records = self.measure(repeated)
        return [records[number :: len(cases)] for number in range(len(cases))]

    def _file(self, case: Case) -> pathlib.Path:
        return self.folder / "cases" / f"{case.key}.json"

    def _run(self, case: Case) -> Record:
        """Runs a case → seconds of each step, and what left each host, as the kernel counts it."""
        workdir = self.folder / "runs" / case.key
        logs = self.folder / "logs" / case.key
        shutil.rmtree(workdir, ignore_errors=True)
        logs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *case.command, f"--workdir={workdir}", f"--config.cache_dir={self.folder / 'cache'}"]
        metrics = workdir / "metrics.jsonl"
        counted: dict[int, list[int]] = {}
        between: list[int] = []  # that left the first machine
        network = Network(self.hosts, case.rate, case.machine, case.fast_rate)
        with Cluster(network) as cluster:

            def count() -> bool:
                """Reads the links' counters when the warm steps and when all steps are over."""
                done = len(step_records(metrics))
                for due in (WARM, WARM + case.steps):
                    if done >= due and due not in counted and network.shaped:
                        counted[due] = [cluster.sent_bytes(host) or 0 for host in range(network.hosts)]
                        between.append(cluster.sent_by_machine(0) or 0)
                return False

            code = cluster.run(command, logs, {"PYTHONPATH": str(ROOT)}, stop=count, limit=self.limit)
        if cluster.interrupted:
            raise KeyboardInterrupt
        records = step_records(metrics)[WARM:]
        if code or len(records) != case.steps:
            raise CaseError(f"{case.describe()}: ended with {code} after {len(records)} steps; see {logs}/host0.log")
        seconds = [record["step_time_s"] for record in records]
        result: Record = {
            "case": dataclasses.asdict(case),
            "command": " ".join(["python", *case.command]),
            "unit": {"train": "step", "forward": "pass"}.get(case.program, "batch"),
            "measured": measured(),
            "seconds": seconds,
            "median_s": statistics.median(seconds),
        }
        if len(counted) == 2:
            first, last = counted.values()
            sent = [(after - before) / case.steps for before, after in zip(first, last, strict=True)]
            result["link_bytes_a_step"] = [round(bytes_) for bytes_ in sent]
            if network.machine > 1:
                result["machine_bytes_a_step"] = round((between[-1] - between[0]) / case.steps)
        for name in ("loss", "moe/drop_rate", "moe/wire_bytes"):
            if name in records[-1]:
                result[name] = records[-1][name]
        shutil.rmtree(workdir)
        return result

    def traffic(self, size: str, *overrides: str) -> Record:
        """Bytes that all hosts together send in a training step, from the compiled program (plan.py)."""
        size = "tiny" if self.toy else size
        path = self.folder / "traffic" / f"{key_of([size, sorted(overrides), self.hosts])}.json"
        if not path.exists():
            command = [sys.executable, "plan.py", f"--config={BASE}:{size}", f"--devices={self.hosts}", "--compile"]
            command += ["--json", *(f"--config.{field}" for field in overrides)]
            program = answer(command)["program"]
            names = ("exchange_sent_bytes", "metadata_sent_bytes", "other_sent_bytes")
            write_json(path, {name: program[name] for name in names})
        record: Record = json.loads(path.read_text())
        return record


def answer(command: Sequence[str]) -> Record:
    """What one of the product's programs prints last with --json."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise CaseError(f"{' '.join(command)}: {(run.stderr.strip().splitlines() or ['?'])[-1]}")
    record: Record = json.loads(run.stdout.splitlines()[-1])
    return record


def median(records: Sequence[Record]) -> float:
    """Of the runs' medians."""
    return statistics.median(record["median_s"] for record in records)


def exchange_share(shaped: float, local: float) -> float:
    return 1 - local / shaped if shaped else math.nan


def step_records(path: pathlib.Path) -> list[Record]:
    """Whole lines of a metrics.jsonl that are of steps."""
    try:
        lines = path.read_text().split("\n")[:-1]
    except OSError:
        return []
    return [record for record in map(json.loads, lines) if "step_time_s" in record]


def key_of(value: Any) -> str:
    """Of a measurement, by what describes it and what the models are."""
    text = json.dumps(value, sort_keys=True) + (ROOT / BASE).read_text()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measured() -> dict[str, str]:
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit()}


def write_json(path: pathlib.Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)
