"""How long one client waits beside nine that ask for too much: python -m benchmarks.hostile [--seconds=60].

serve.py with its defaults, on a run of two steps of configs/tiny.py and 1,024 tokens. Nine clients send long chats,
long texts, slow bodies and floods (`benchmarks.hostile.clients`), and one beside them asks for two tokens, again and
again. Prints its median and worst latency, how often it was refused, what the others were answered, and the memory of
the server before and behind.
"""

import contextlib
import json
import multiprocessing
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from absl import app, flags

from benchmarks.hostile import clients

_SECONDS = flags.DEFINE_float("seconds", 60, "Of the attack.")
_WORKDIR = flags.DEFINE_string("workdir", "", "A run to serve instead.")
_OUTPUT = flags.DEFINE_string("output", "docs/results/hostile.json", "Where the figures go.")
_LENGTH = 1024
_START = 600  # seconds that a server may take to start


def main(_: Any) -> None:
    with tempfile.TemporaryDirectory() as folder, _server(_WORKDIR.value or _trained(folder), folder) as (port, pid):
        alone = [seconds for seconds, _ in clients.latencies(port, 5)]
        before = _resident(pid)
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        attack = context.Process(target=clients.run, args=(port, _SECONDS.value, answers))
        attack.start()
        time.sleep(2)  # until they are all there
        seen = list(clients.latencies(port, _SECONDS.value - 2))
        others = answers.get(timeout=300)
        attack.join()
        after = _resident(pid)
    waited = [seconds for seconds, _ in seen]
    result = {
        "name": "hostile",
        "cores": len(os.sched_getaffinity(0)),
        "seconds": _SECONDS.value,
        "requests": len(seen),
        "median_s": round(statistics.median(waited), 3),
        "worst_s": round(max(waited), 3),
        "refused": sum(status != 200 for _, status in seen),
        "median_alone_s": round(statistics.median(alone), 3),
        "resident_mib": {"before": before, "after": after},
        "others": others,
    }
    text = json.dumps(result, indent=1)
    print(text, flush=True)
    if _OUTPUT.value:
        pathlib.Path(_OUTPUT.value).write_text(text + "\n")


def _trained(folder: str) -> str:
    workdir = f"{folder}/run"
    fields = {"train.steps": 2, "train.eval_every": 0, "train.checkpoint_every": 0}
    command = [sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={workdir}"]
    subprocess.run([*command, *(f"--config.{name}={value}" for name, value in fields.items())], check=True)
    return workdir


@contextlib.contextmanager
def _server(workdir: str, folder: str) -> Iterator[tuple[int, int]]:
    """serve.py → its port and process."""
    log = pathlib.Path(folder, "serve.log")
    command = [sys.executable, "serve.py", f"--workdir={workdir}", "--port=0", f"--max_length={_LENGTH}"]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        end = time.monotonic() + _START
        while not (line := re.search(r"serving .* at http://127\.0\.0\.1:(\d+)\n", log.read_text())):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(log.read_text())
            time.sleep(0.1)
        yield int(line[1]), process.pid
        print(log.read_text(), file=sys.stderr)
    finally:
        process.kill()
        process.wait()


def _resident(pid: int) -> int:
    """MiB."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) >> 10


if __name__ == "__main__":
    app.run(main)
