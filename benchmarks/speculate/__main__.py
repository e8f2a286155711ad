"""Drafts by the experts that a rank holds: what is accepted, and what they save on slow links.

    make train
    python -m benchmarks.speculate

Of a trained model with experts (--run). First the share of drafted tokens that is accepted, by draft length, ranks
(and so experts of a rank), on simulated devices; every completion is compared with plain decoding's. Four
ranks have all --prompts, the others an eighth of them.
Then tokens a second on four hosts with shaped links (benchmarks.cluster; root and iproute2), plain and with drafts by
turns, by prompts at a time. JSON lines; and --output with its picture. What has been measured is read again from
--folder, so that an interrupted run goes on; empty it after a change of the program. --quick: minutes, to see that it
runs.
"""

import argparse
import hashlib
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.cluster import Cluster, ClusterError, Network, bits_per_second
from benchmarks.reproduce.lab import ROOT
from benchmarks.reproduce.machine import commit, describe_machine
from bigmac_jax.runtime.storage import write_atomically

HOSTS = 4
OUTPUT, PICTURE = "docs/results/speculation.json", "docs/images/speculation.png"
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
    parser.add_argument("--prompts", type=int, default=1000, help="for the acceptance on four ranks")
    parser.add_argument("--rounds", type=int, default=5, help="for tokens a second")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / OUTPUT, help="of the figures, but for --quick")
    parser.add_argument("--quick", action="store_true", help="few prompts, one round: shows that it runs")
    given = parser.parse_args()
    if not (given.run / "config.json").is_file():
        print(f"error: --run={given.run} is no run of train.py; `make train` makes runs/tiny", file=sys.stderr)
        return 2
    folder = (given.folder / ("quick" if given.quick else "full")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lines = [*_acceptance(given, folder), *_speed(given, folder)]
    except (ClusterError, FailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if not given.quick:
        rows = ",\n".join(" " + json.dumps(line) for line in lines)
        described = json.dumps({"machine": describe_machine(), "commit": commit()})
        write_atomically(
            given.output, f'{{"name": "speculation", "of": {described}, "lines": [\n{rows}\n]}}\n'.encode()
        )
        draw(lines, ROOT / PICTURE)
    return 0


def _acceptance(given: argparse.Namespace, folder: pathlib.Path) -> Iterator[Line]:
    new, lengths = (16, "2,4") if given.quick else (128, "1,2,4,8")
    for ranks in (4,) if given.quick else (4, 2, 8):
        prompts = 16 if given.quick else given.prompts if ranks == 4 else given.prompts // 8
        arguments = [f"--drafts={lengths}", "--batches=64", f"--prompts={prompts}", f"--new={new}", "--nowarm",
                     f"--cpu_devices={ranks}", "--config.mesh.data=1", f"--config.mesh.expert={ranks}"]  # fmt: skip
        for line in _measured(given, folder, arguments, None):
            if line["draft"]:
                share = round(line["accepted"] / line["drafted"], 4)
                yield _said(line, name="acceptance", ranks=ranks, accepted_share=share)


def _speed(given: argparse.Namespace, folder: pathlib.Path) -> Iterator[Line]:
    batches, new, lengths = ("4", 16, "2") if given.quick else ("1,2,4,8,16", 128, "2,4")
    for rate in map(bits_per_second, given.rates.split(",")):
        arguments = [f"--drafts={lengths}", f"--batches={batches}", f"--new={new}", f"--exchange={given.exchange}",
                     f"--rounds={1 if given.quick else given.rounds}", "--config.mesh.data=1",
                     f"--config.mesh.expert={HOSTS}"]  # fmt: skip
        plain: dict[int, list[float]] = {}
        for line in _measured(given, folder, arguments, Network(HOSTS, rate)):
            plain.setdefault(line["batch"], line["seconds"])
            ratios = [a / b for a, b in zip(plain[line["batch"]], line["seconds"], strict=True)]
            yield _said(line, name="speed", mbit_per_s=rate / 1e6, tokens_per_s=round(
                line["new_tokens"] / statistics.median(line["seconds"]), 1),
                over_plain=round(statistics.median(ratios), 3))  # fmt: skip


def _said(line: Line, **more: Any) -> Line:
    print(json.dumps(more | line), flush=True)
    return more | line


def draw(lines: list[Line], picture: pathlib.Path) -> None:
    """The accepted share by draft length, and tokens a second over plain decoding's by prompts at a time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for ranks in dict.fromkeys(d["ranks"] for d in lines if d["name"] == "acceptance"):
        found = [d for d in lines if d["name"] == "acceptance" and d["ranks"] == ranks]
        left.plot([d["draft"] for d in found], [d["accepted_share"] for d in found], "-o", ms=4, label=f"{ranks} ranks")
    speed = [d for d in lines if d["name"] == "speed" and d["draft"]]
    for rate, draft in dict.fromkeys((d["mbit_per_s"], d["draft"]) for d in speed):
        found = [d for d in speed if (d["mbit_per_s"], d["draft"]) == (rate, draft)]
        x, y = [d["batch"] for d in found], [d["over_plain"] for d in found]
        right.plot(x, y, "-o", ms=4, label=f"drafts of {draft}, {rate:g} Mbit/s")
    right.axhline(1, color="gray", lw=0.8)
    left.set(xlabel="tokens of a draft", ylabel="accepted share of drafted tokens", ylim=(0, 1))
    right.set(xlabel="prompts at a time", ylabel="tokens a second over plain decoding's")
    right.set_xscale("log", base=2)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


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
