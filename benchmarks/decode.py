"""Decoding with the cache beside recomputing the prefix and transformers' generate: python -m benchmarks.decode.

The model of configs/nemotron.py (the size of configs/tiny.py) with random parameters, batch 16; transformers gets the
exported model, in an environment of its own. Rounds alternate, one computes at a time. JSON lines: new tokens a second
of each; the median over rounds of each one's time over ours. And the picture docs/images/decode.png: milliseconds of
each step and memory, by the number of tokens that have been generated.

    python -m benchmarks.peers --setup      first: makes the environment of transformers
    python -m benchmarks.decode
"""

from bigmac_jax.runtime import environment

environment.prepare()

import contextlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import pathlib  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402

import jax  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402
from jax import Array  # noqa: E402

from benchmarks.peers.worker import Worker  # noqa: E402
from benchmarks.timing import alternate, median_ratio, summary  # noqa: E402
from bigmac_jax.commands import cli  # noqa: E402
from bigmac_jax.config import load_config  # noqa: E402
from bigmac_jax.data.tokenizer import ByteTokenizer  # noqa: E402
from bigmac_jax.inference import Generator, Sampling  # noqa: E402
from bigmac_jax.interchange import export_model  # noqa: E402
from bigmac_jax.model.mesh import token_spec  # noqa: E402
from bigmac_jax.model.transformer import Transformer, init_model  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

_BATCH = flags.DEFINE_integer("batch", 16, "Prompts.")
_PROMPT = flags.DEFINE_integer("prompt", 64, "Tokens of each.")
_NEW = flags.DEFINE_integer("new", 128, "Tokens to generate.")
_LONG = flags.DEFINE_integer("long", 960, "Tokens to generate for the picture; 0 draws none.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds; a ratio is the median over rounds.")
_HF_PYTHON = flags.DEFINE_string("hf_python", ".venv-peers-hf/bin/python", "Python with torch and transformers.")
_PICTURE = pathlib.Path("docs/images/decode.png")
_PADDING = 32  # recomputed prefixes are padded to multiples of it, or every length would be compiled


def main() -> None:
    config = load_config("configs/nemotron.py", ("mesh.data=1", f"data.sequence_length={_PROMPT.value + _NEW.value}"))
    cli.enter_mesh(config, fit_batch=False)
    model = init_model(config, jax.random.key(0))
    draw = np.random.default_rng(0)
    tokens_BP = draw.integers(config.model.vocab_size, size=(_BATCH.value, _PROMPT.value)).astype(np.int32)
    longest = _PROMPT.value + max(_NEW.value, _LONG.value)
    generator = Generator(config, model, max_length=longest, batch_size=_BATCH.value, tokenizer=ByteTokenizer())
    cases = {"cached": _cached(generator, tokens_BP), "recomputed": _recomputed(model, tokens_BP)}
    with contextlib.ExitStack() as stack:
        if pathlib.Path(_HF_PYTHON.value).is_file():
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
            export_model(config, model, folder, format="nemotron_h")
            sizes = map(str, (_BATCH.value, _PROMPT.value, _NEW.value))
            worker = Worker(_HF_PYTHON.value, "benchmarks.peers.generate", str(folder), *sizes)
            stack.callback(worker.close)
            cases["transformers"] = worker
        else:
            print(f"transformers is left out: {_HF_PYTHON.value} is not there", file=sys.stderr)
        for case in ("cached", "recomputed"):
            cases[case]()
        seconds = alternate(cases, _ROUNDS.value)
    for case, rounds in seconds.items():
        rate = _BATCH.value * _NEW.value / statistics.median(rounds)
        line = {"name": case, "tokens_per_s": round(rate), **summary(rounds)}
        print(json.dumps(line | {"time_over_cached": round(median_ratio(rounds, seconds["cached"]), 2)}), flush=True)
    if _LONG.value:
        _draw(generator, tokens_BP)


def _cached(generator: Generator, tokens_BP: np.ndarray) -> Callable[[], float]:
    prompts = [tuple(row) for row in tokens_BP.tolist()]

    def run() -> float:
        start = time.perf_counter()
        completions = generator.generate(prompts, max_tokens=_NEW.value, ignore_eos=True)
        assert all(len(completion.tokens) == _NEW.value for completion in completions)
        return time.perf_counter() - start

    return run


def _recomputed(model: Transformer, tokens_BP: np.ndarray) -> Callable[[], float]:
    """Greedy decoding that reads the whole prefix for each token; one program a padded length."""

    @jax.jit
    def next_token(model: Transformer, tokens_BL: Array, length: Array) -> Array:
        x_BLD, _ = model.features(tokens_BL, evaluating=True)
        x_B1D = jax.lax.dynamic_slice_in_dim(x_BLD, length - 1, 1, axis=1)
        return model.logits(x_B1D).argmax(-1)[:, 0]

    def run() -> float:
        start = time.perf_counter()
        P, longest = tokens_BP.shape[1], tokens_BP.shape[1] + _NEW.value
        prefix_BL = np.zeros((len(tokens_BP), longest + _PADDING), np.int32)
        prefix_BL[:, :P] = tokens_BP
        for length in range(P, longest):
            padded = -(-length // _PADDING) * _PADDING
            given_BL = jax.device_put(prefix_BL[:, :padded], token_spec(2))
            prefix_BL[:, length] = np.asarray(next_token(model, given_BL, length))
        return time.perf_counter() - start

    return run


def _draw(generator: Generator, tokens_BP: np.ndarray) -> None:
    """Milliseconds a step, and the process's memory, by the number of tokens generated; medians of 16 steps."""
    prompts, sampling = tokens_BP.tolist(), Sampling(max_tokens=_LONG.value, ignore_eos=True)
    steps_ms, memory_mb = [], []
    for _ in range(2):  # the first time compiles
        steps_ms, memory_mb, last = [], [], time.perf_counter()
        jobs = [generator.job(prompt, sampling) for prompt in prompts]
        engine = generator.engine(len(jobs), jobs)
        for job in jobs:
            engine.submit(job)
        while engine.busy:
            if len(engine.step()) < len(jobs):
                continue
            now = time.perf_counter()
            steps_ms.append(1e3 * (now - last))
            memory_mb.append(_resident_mb())
            last = now
    groups = [slice(i, i + 16) for i in range(1, _LONG.value, 16)]
    at = [group.start + 8 for group in groups]
    figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps_of, memory_of = ([statistics.median(v[group]) for group in groups] for v in (steps_ms, memory_mb))
    time_axis.plot(at, steps_of, "o-", ms=3, color="black")
    time_axis.set(xlabel="tokens generated", ylabel="milliseconds a step", ylim=(0, 1.5 * max(steps_of)))
    memory_axis.plot(at, memory_of, "o-", ms=3, color="black")
    memory_axis.set(xlabel="tokens generated", ylabel="resident memory, MiB", ylim=(0, 1.5 * max(memory_of)))
    figure.suptitle(f"configs/nemotron.py, {len(prompts)} prompts of {tokens_BP.shape[1]} tokens")
    figure.savefig(_PICTURE, dpi=110)
    first, final = (statistics.median(steps_ms[part]) for part in (slice(1, 65), slice(-64, None)))
    line = {"name": "flat", "first_64_ms": round(first, 2), "last_64_ms": round(final, 2),
            "first_mb": round(memory_mb[1]), "last_mb": round(memory_mb[-1])}  # fmt: skip
    print(json.dumps(line), flush=True)


def _resident_mb() -> float:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    cli.run(main)
