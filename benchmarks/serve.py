"""Requests that join a running batch, beside batches that end with their longest: python -m benchmarks.serve.

The model of benchmarks.decode (configs/nemotron.py, random parameters), prompts and completions of 16 to 512 tokens,
greedy. First all at once: new tokens a second of the engine, and of the same engine that is given a batch and waits for
its end; rounds alternate. Then Poisson arrivals, by requests a second: milliseconds to the first token and between
tokens. JSON lines.

With --peers it is a Qwen3Moe of the same size, and transformers takes the same requests beside it on the exported
model: its continuous batching, and `generate` on one batch after the other.

    python -m benchmarks.peers --setup      first: makes the environment of transformers
    python -m benchmarks.serve --peers
"""

from bigmac_jax.runtime import environment

environment.prepare()

import contextlib  # noqa: E402
import json  # noqa: E402
import pathlib  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402

from benchmarks.peers.worker import Worker  # noqa: E402
from benchmarks.timing import alternate, median_ratio, summary  # noqa: E402
from bigmac_jax.commands import cli  # noqa: E402
from bigmac_jax.config import load_config  # noqa: E402
from bigmac_jax.data.tokenizer import ByteTokenizer  # noqa: E402
from bigmac_jax.inference import Generator, Sampling  # noqa: E402
from bigmac_jax.inference.engine import Engine  # noqa: E402
from bigmac_jax.inference.jobs import Job  # noqa: E402
from bigmac_jax.interchange import export_model  # noqa: E402
from bigmac_jax.model.transformer import init_model  # noqa: E402

_REQUESTS = flags.DEFINE_integer("requests", 96, "Requests.")
_BATCH = flags.DEFINE_integer("batch", 16, "Requests at a time.")
_SHORTEST = flags.DEFINE_integer("shortest", 16, "Tokens of a prompt or completion, at least.")
_LONGEST = flags.DEFINE_integer("longest", 512, "And at most.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds; a ratio is the median over rounds.")
_RATES = flags.DEFINE_list("rates", "1,2,4", "Requests a second.")
_PEERS = flags.DEFINE_bool("peers", False, "Whether transformers computes beside it.")
_HF_PYTHON = flags.DEFINE_string("hf_python", ".venv-peers-hf/bin/python", "Python with torch and transformers.")
_WEIGHTS = flags.DEFINE_string("weights", "", "As of serve.py.")


# What makes a Qwen3Moe of configs/nemotron.py.
QWEN = ("model.structure=fine_grained", "model.positions=rope", "model.qk_norm=True", "model.gated=True",
        "model.activation=silu", "model.num_shared_experts=0", "model.router_scores=softmax", "model.router_scale=1",
        "model.balance=aux_loss")  # fmt: skip


def main() -> None:
    longest = 2 * _LONGEST.value
    own = ("mesh.data=1", f"data.sequence_length={longest}", *(QWEN if _PEERS.value else ()))
    config = load_config("configs/nemotron.py", own)
    cli.enter_mesh(config, fit_batch=False)
    model = init_model(config, jax.random.key(0))
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if _PEERS.value:  # before the generator takes its arrays
            export_model(config, model, folder / "model", format="qwen3_moe")
        generator = Generator(
            config, model, batch_size=_BATCH.value, tokenizer=ByteTokenizer(), consume=True, weights=_WEIGHTS.value
        )
        # The cache of so many sequences of the mean length, not of the longest; nothing is found in it.
        room = (_BATCH.value + 2) * longest // 2 + longest
        engine = generator.engine(_BATCH.value, positions=room, reuse=False)
        engine.compile()
        cases = {"continuous": _offline(generator, engine, _BATCH.value), "static": _offline(generator, engine, 0)}
        for case in cases.values():
            case()
        if _PEERS.value:
            cases |= _peers(folder, _jobs(generator), stack)
        seconds = alternate(cases, _ROUNDS.value)
    new = sum(job.sampling.max_tokens for job in _jobs(generator))
    for case, rounds in seconds.items():
        line = {"name": case, "tokens_per_s": round(new / statistics.median(rounds)), **summary(rounds)}
        print(json.dumps(line | {"time_over_static": round(median_ratio(rounds, seconds["static"]), 3)}), flush=True)
    for rate in map(float, _RATES.value):
        print(json.dumps(_arriving(engine, _jobs(generator), rate)), flush=True)


def _peers(folder: pathlib.Path, jobs: Sequence[Job], stack: contextlib.ExitStack) -> dict[str, Callable[[], float]]:
    """transformers on the model in `folder`, until `stack` is closed."""
    requests = folder / "requests.json"
    requests.write_text(json.dumps([(list(job.prompt), job.sampling.max_tokens) for job in jobs]))
    given = "benchmarks.peers.requests", str(folder / "model"), str(requests), str(_BATCH.value)
    workers = {way: Worker(_HF_PYTHON.value, *given, way) for way in ("continuous", "static")}
    for worker in workers.values():
        stack.callback(worker.close)
    return {f"transformers, {way}": worker for way, worker in workers.items()}


def _jobs(generator: Generator) -> list[Job]:
    draw = np.random.default_rng(0)
    low, high, vocab = _SHORTEST.value, _LONGEST.value, generator.vocab_size
    jobs = []
    for _ in range(_REQUESTS.value):
        prompt = draw.integers(vocab, size=int(draw.integers(low, high + 1))).tolist()
        jobs.append(generator.job(prompt, Sampling(max_tokens=int(draw.integers(low, high + 1)), ignore_eos=True)))
    return jobs


def _offline(generator: Generator, engine: Engine, at_once: int) -> Callable[[], float]:
    """All requests in the order of their arrival. `at_once` 0: a batch of them, and the next when it has ended."""

    def run() -> float:
        jobs = _jobs(generator)
        size = len(jobs) if at_once else _BATCH.value
        start = time.perf_counter()
        for first in range(0, len(jobs), size):
            for job in jobs[first : first + size]:
                engine.submit(job)
            while engine.busy:
                engine.step()
        assert all(len(job.text.tokens) == job.sampling.max_tokens for job in jobs)
        return time.perf_counter() - start

    return run


def _arriving(engine: Engine, jobs: Sequence[Job], rate: float) -> dict[str, float | str]:
    arrives = np.cumsum(np.random.default_rng(1).exponential(1 / rate, size=len(jobs)))
    at, first, between = dict(zip(jobs, arrives, strict=True)), [], []
    last: dict[Job, float] = {}
    left, start = list(jobs), time.perf_counter()
    while left or engine.busy:
        now = time.perf_counter() - start
        while left and at[left[0]] <= now:
            engine.submit(left.pop(0))
        if not engine.busy:
            time.sleep(max(0.0, at[left[0]] - now))
            continue
        steps = engine.step()
        now = time.perf_counter() - start
        for step in steps:
            if step.job in last:
                between.append(now - last[step.job])
            else:
                first.append(now - at[step.job])
            last[step.job] = now
    of = {"first_token_ms": first, "between_tokens_ms": between}
    quantiles = {
        f"{name}_p{q}": round(1e3 * float(np.percentile(values, q)), 1)
        for name, values in of.items()
        for q in (50, 95, 99)
    }
    new = sum(job.sampling.max_tokens for job in jobs)
    return {"name": "poisson", "requests_per_s": rate, "tokens_per_s": round(new / now), **quantiles}


if __name__ == "__main__":
    cli.run(main)
