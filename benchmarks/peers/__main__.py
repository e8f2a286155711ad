"""A training step of this project beside those of other trainers: python -m benchmarks.peers.

Every case is a process in an environment of its own; rounds alternate, so that only one computes at a time and a
machine that drifts favours none. JSON lines: of each case tokens a second, parameters and rounds; of each of our cases
its tokens a second over each peer's, the median over rounds.

    python -m benchmarks.peers --setup      first: makes the peers' environments
    python -m benchmarks.peers
    python -m benchmarks.peers --cases=qwen3_moe,qwen3_moe:eager,qwen3_moe:grouped_mm:eager    settings of a peer

A peer that is not installed is left out, with one line that says so.
"""

from bigmac_jax.runtime import environment

environment.prepare()  # for the workers too, which inherit it: the peers gain from it as well

import contextlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import pathlib  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402

from absl import app, flags  # noqa: E402

from benchmarks.peers import SHAPE  # noqa: E402
from benchmarks.peers.worker import Worker  # noqa: E402
from benchmarks.timing import alternate, median_ratio, summary  # noqa: E402

_CASES = flags.DEFINE_list("cases", "fine_grained,bigmac,qwen3_moe,nemotron_h,maxtext", "Cases, see above.")
_STEPS = flags.DEFINE_integer("steps", 3, "Timed steps of a round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds; a ratio is the median over rounds.", lower_bound=1)
_CORES = flags.DEFINE_integer("cores", 2, "CPU cores that every case computes on.", lower_bound=1)
_HF_PYTHON = flags.DEFINE_string("hf_python", ".venv-peers-hf/bin/python", "Python with torch and transformers.")
_MAXTEXT_PYTHON = flags.DEFINE_string("maxtext_python", ".venv-peers-maxtext/bin/python", "Python with MaxText.")
_SETUP = flags.DEFINE_bool("setup", False, "Make the environments of the peers, and stop.")

STRUCTURES = ("fine_grained", "bigmac")
HF = ("torch>=2.10", "transformers>=5.8,<6")
# MaxText asks for nothing itself; these let its training step run without Google Cloud. It needs Python 3.12 or later.
MAXTEXT = (
    "maxtext>=0.2.5,<0.3", "absl-py", "aqtp", "array-record", "chex", "datasets", "drjax", "flax", "grain[parquet]",
    "jax[tpu]", "jaxtyping", "jinja2", "jsonlines", "ml-collections", "omegaconf", "optax", "orbax-checkpoint",
    "pathwaysutils", "pillow", "protobuf", "psutil", "pydantic", "qwix", "sentencepiece", "sympy", "tensorboardx",
    "tensorflow-cpu", "tiktoken", "tokamax", "transformers",
)  # fmt: skip


def main(_: list[str]) -> None:
    if _SETUP.value:
        return _set_up()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _CORES.value])  # of the workers, which inherit it
    with contextlib.ExitStack() as stack:
        workers = {}
        for case in _CASES.value:
            module, python = _environment(case)
            if not pathlib.Path(python).is_file():
                print(f"{case} is left out: {python} is not there; make it with --setup", file=sys.stderr)
                continue
            workers[case] = Worker(python, f"benchmarks.peers.{module}", case, str(_STEPS.value))
            stack.callback(workers[case].close)
        seconds = alternate(workers, _ROUNDS.value)
    for case, rounds in seconds.items():
        rate = SHAPE.batch_size * SHAPE.sequence_length / statistics.median(rounds)
        line = {"name": case, "tokens_per_s": round(rate), "parameters": workers[case].first["parameters"]}
        print(json.dumps(line | summary(rounds)), flush=True)
    peers = [case for case in seconds if case not in STRUCTURES]
    for ours in (case for case in seconds if case in STRUCTURES):
        ratios = {f"over_{peer}": round(median_ratio(seconds[peer], seconds[ours]), 3) for peer in peers}
        print(json.dumps({"name": ours} | ratios), flush=True)


def _environment(case: str) -> tuple[str, str]:
    """The worker's module and the interpreter that runs it."""
    if case in STRUCTURES:
        return "ours", sys.executable
    if case.startswith("maxtext"):
        return "maxtext", _MAXTEXT_PYTHON.value
    return "huggingface", _HF_PYTHON.value


def _set_up() -> None:
    """Makes the environments that are not there yet."""
    for python, packages in ((_HF_PYTHON.value, HF), (_MAXTEXT_PYTHON.value, MAXTEXT)):
        if packages is MAXTEXT and sys.version_info < (3, 12):
            print("MaxText is left out: it needs Python 3.12 or later; run this with one", file=sys.stderr)
            continue
        folder = pathlib.Path(python).parents[1]
        if not folder.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)


if __name__ == "__main__":
    app.run(main)
