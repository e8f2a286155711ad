"""Drafts by the experts that a rank holds: what is accepted, and what they save on slow links.

    make train
    python -m benchmarks.speculate

Of a trained model with experts (--run). First the share of drafted tokens that is accepted, by draft length, ranks
(and so experts of a rank) and stand-ins, on simulated devices; every completion is compared with plain decoding's. The
first case, four ranks and the nearest stand-ins, has all --prompts, the others an eighth of them.
Then tokens a second on four hosts with shaped links (benchmarks.cluster; root and iproute2), plain and with drafts by
turns, by prompts at a time. JSON lines, and a table. What has been measured is read again from --folder, so that an
interrupted run goes on; empty it after a change of the program. --quick: minutes, to see that it runs.
"""

import argparse
import hashlib
import json
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.cluster import Cluster, ClusterError, Network, bits_per_second
from benchmarks.reproduce.lab import ROOT
from benchmarks.reproduce.machine import commit, describe_machine

HOSTS = 4
Line = dict[str, Any]


class FailedError(RuntimeError):
    """A measurement that did not end; the message names its log."""


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.speculate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=pathlib.Path, default=ROOT / "runs/tiny", help="of train.py")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs/speculate", help="of what was measured")
    parser.add_argument(
        "--rates", default="26.56mbit", help="of the links, some; the default is docs/reproduction.md's"
    )
    parser.add_argument("--exchange", default="auto", help="as of generate.py")
    parser.add_argument("--prompts", type=int, default=1000, help="for the first acceptance")
    parser.add_argument("--rounds", type=int, default=5, help="for tokens a second")
    parser.add_argument("--quick", action="store_true", help="few prompts, one round: shows that it runs")
    given = parser.parse_args()
    if not (given.run / "config.json").is_file():
        print(f"error: --run={given.run} is no run of train.py; `make train` makes runs/tiny", file=sys.stderr)
        return 2
    folder = (given.folder / ("quick" if given.quick else "full")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _acceptance(given, folder)
        _speed(given, folder)
    except (ClusterError, FailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _acceptance(given: argparse.Namespace, folder: pathlib.Path) -> None:
    new, lengths = (16, "2,4") if given.quick else (128, "1,2,4,8")
    for ranks in (4,) if given.quick else (4, 2, 8):
        for stand_ins in ("nearest", "none"):
            prompts = given.prompts if (ranks, stand_ins) == (4, "nearest") else given.prompts // 8
            prompts = 16 if given.quick else prompts
            arguments = [f"--drafts={lengths}", f"--stand_ins={stand_ins}", "--batches=64", f"--prompts={prompts}",
                         f"--new={new}", "--nowarm", f"--cpu_devices={ranks}", "--config.mesh.data=1",
                         f"--config.mesh.expert={ranks}"]  # fmt: skip
            for line in _measured(given, folder, arguments, None):
                if line["draft"]:
                    share = line["accepted"] / line["drafted"]
                    _say(line, name="acceptance", ranks=ranks, stand_ins=stand_ins, accepted_share=round(share, 4))


def _speed(given: argparse.Namespace, folder: pathlib.Path) -> None:
    batches, new, lengths = ("4", 16, "2") if given.quick else ("1,2,4,8,16", 128, "2,4")
    for rate in map(bits_per_second, given.rates.split(",")):
        arguments = [f"--drafts={lengths}", f"--batches={batches}", f"--new={new}", f"--exchange={given.exchange}",
                     f"--rounds={1 if given.quick else given.rounds}", "--config.mesh.data=1",
                     f"--config.mesh.expert={HOSTS}"]  # fmt: skip
        plain: dict[int, list[float]] = {}
        for line in _measured(given, folder, arguments, Network(HOSTS, rate)):
            plain.setdefault(line["batch"], line["seconds"])
            ratios = [a / b for a, b in zip(plain[line["batch"]], line["seconds"], strict=True)]
            _say(line, name="speed", mbit_per_s=rate / 1e6, tokens_per_s=round(
                line["new_tokens"] / statistics.median(line["seconds"]), 1),
                over_plain=round(statistics.median(ratios), 3))  # fmt: skip


def _say(line: Line, **more: Any) -> None:
    print(json.dumps(more | line), flush=True)


def _measured(
    given: argparse.Namespace, folder: pathlib.Path, arguments: list[str], network: Network | None
) -> list[Line]:
    """The worker's lines, of what was measured before or now."""
    command = ["-m", "benchmarks.speculate.worker", f"--run={given.run.resolve()}", *arguments]
    links = "" if network is None else f"{network.rate:.0f}"
    key = hashlib.sha256(json.dumps([command, links, _state(given.run)]).encode()).hexdigest()[:16]
    output, log = folder / f"{key}.jsonl", folder / f"{key}.log"
    if not output.exists():
        command = [sys.executable, *command, f"--output={output}"]
        if network is None:
            with log.open("w") as file:
                code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
        else:
            logs = folder / key
            logs.mkdir(exist_ok=True)
            log = logs / "host0.log"
            with Cluster(network) as cluster:
                code = cluster.run(command, logs, {"PYTHONPATH": str(ROOT)})
                if cluster.interrupted:
                    raise KeyboardInterrupt
        if code or not output.exists():
            raise FailedError(f"{' '.join(arguments)} ended with {code}; see {log}")
        described = {"command": command[1:], "rate": links, "machine": describe_machine(), "commit": commit()}
        output.with_suffix(".json").write_text(json.dumps(described, indent=1) + "\n")
    return [json.loads(line) for line in output.read_text().splitlines()]


def _state(run: pathlib.Path) -> list[str]:
    """Which training the run has: its checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


if __name__ == "__main__":
    sys.exit(main())
