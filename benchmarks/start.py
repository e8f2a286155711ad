"""From the start of train.py to its first step: python -m benchmarks.start [--config=… --config.a.b=…].

JSON lines: seconds until the first step's line stands in metrics.jsonl, with an empty cache of compiled programs and
with the one that this left behind. The corpus is tokenised before.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from bigmac_jax.config import load_config

_CONFIG = flags.DEFINE_string("config", "configs/tiny.py", "Config file; --config.a.b=value overrides a field.")
_STARTS = flags.DEFINE_integer("starts", 3, "Starts with a warm cache.", lower_bound=1)
ROOT = pathlib.Path(__file__).parents[1]


def main(arguments: list[str]) -> None:
    overrides = [argument.removeprefix("--config.") for argument in arguments[1:]]
    with tempfile.TemporaryDirectory() as folder:
        fields = [*overrides, "train.steps=1", "train.log_every=1", "train.eval_every=0", f"cache_dir={folder}/cache"]
        load_config(_CONFIG.value, fields)  # a mistake is told before anything is run
        command = [sys.executable, "train.py", f"--config={_CONFIG.value}", *(f"--config.{field}" for field in fields)]
        _seconds_to_first_step(command, pathlib.Path(folder) / "tokenised")
        shutil.rmtree(f"{folder}/cache/programs")
        for start in range(1 + _STARTS.value):
            seconds = _seconds_to_first_step(command, pathlib.Path(folder) / str(start))
            print(json.dumps({"name": "warm" if start else "cold", "seconds": round(seconds, 2)}), flush=True)


def _seconds_to_first_step(command: list[str], workdir: pathlib.Path) -> float:
    start = time.perf_counter()
    run = subprocess.Popen([*command, f"--workdir={workdir}"], cwd=ROOT, stdout=subprocess.DEVNULL)
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        if run.poll() is not None:
            raise RuntimeError(
                f"train.py ended with exit code {run.returncode} before its first step; its error stands above"
            )
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    run.wait()
    return seconds


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: flags.FLAGS(argv, known_only=True))
