"""The paper's tables and figures, measured again: python -m benchmarks.reproduce [--quick] [--only=table1,figure3].

Four hosts on this machine, each a network namespace and a process of train.py; the links are so slow that fine_grained
at K = 8 spends the paper's 91.8 % of a training step in its exchange (calibrated first). Needs root and iproute2. What
has been measured is kept in --folder, so the same command goes on where it was interrupted; without other work beside
it, since computation is measured, too. Writes docs/results/NAME.json, docs/reproduction.md, docs/notes/reproduction.md
and their pictures; --quick and --toy write theirs into --folder.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time

from benchmarks.cluster import ClusterError
from benchmarks.cluster.network import require_tools
from benchmarks.reproduce import pages
from benchmarks.reproduce.calibrate import CalibrationError, calibrate
from benchmarks.reproduce.experiments import EXPERIMENTS, QUICK
from benchmarks.reproduce.lab import ROOT, CaseError, Lab
from benchmarks.reproduce.machine import describe_machine


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of an hour: the main rows, one run")
    parser.add_argument("--only", default="", help=f"some of {','.join(EXPERIMENTS)}")
    parser.add_argument("--steps", type=int, default=0, help="of a case; 20, or 4 with --quick")
    parser.add_argument("--runs", type=int, default=0, help="of each case; 3, or 1 with --quick")
    parser.add_argument("--rate", type=float, default=0.0, help="bits a second, instead of calibrating")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs/reproduce", help="of what was measured")
    parser.add_argument("--docs", type=pathlib.Path, help="where the page goes, if not docs (quick and toy: --folder)")
    parser.add_argument("--page", action="store_true", help="write the page from docs/results alone, measure nothing")
    parser.add_argument("--toy", action="store_true", help="a tiny model: shows that it runs, measures nothing")
    given = parser.parse_args()
    names = given.only.split(",") if given.only else list(QUICK if given.quick else EXPERIMENTS)
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        print(f"error: --only={unknown[0]} must be some of {', '.join(EXPERIMENTS)}", file=sys.stderr)
        return 2
    folder = given.folder / ("toy" if given.toy else "quick" if given.quick else "full")
    docs: pathlib.Path = given.docs or (folder / "docs" if given.quick or given.toy else ROOT / "docs")
    if given.page:
        pages.write(docs)
        return 0
    steps, runs = (4, 1) if given.quick else (20, 3)
    lab = Lab(folder.resolve(), given.steps or steps, given.runs or runs, toy=given.toy)
    command = "python -m benchmarks.reproduce " + " ".join(sys.argv[1:])
    try:
        require_tools()
        print("calibration", flush=True)
        # With the usual steps whatever --steps: one calibration serves every command of a folder.
        calibration = {"rate": given.rate} if given.rate else calibrate(dataclasses.replace(lab, steps=steps), "small")
        for number, name in enumerate(names):
            print(f"{name} ({number + 1} of {len(names)})", flush=True)
            result = dataclasses.asdict(EXPERIMENTS[name](lab, calibration["rate"], given.quick))
            origin = {
                "command": command.strip(),
                "date": time.strftime("%Y-%m-%d"),
                "machine": describe_machine(),
                "steps": lab.steps,
                "runs": lab.repeats,
                "calibration": calibration,
            }
            path = docs / "results" / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"name": name} | origin | result, indent=1, ensure_ascii=False) + "\n")
            pages.write(docs)
            print(f"  {docs / pages.PAGE}", flush=True)
    except (ClusterError, CaseError, CalibrationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
