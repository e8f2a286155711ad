"""What the loop and the input pipeline cost: python -m benchmarks.loop [--config=configs/tiny.py --config.…].

Prints JSON lines: tokens a second of the jitted step in a bare loop on one resident batch, of the training loop, of
the input pipeline alone, and their ratios.
"""

from bigmac_jax.runtime import environment

environment.prepare()

import dataclasses  # noqa: E402
import json  # noqa: E402
import pathlib  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402

import jax  # noqa: E402
from absl import flags  # noqa: E402

from benchmarks.timing import alternate, median_ratio, summary  # noqa: E402
from bigmac_jax.commands import cli  # noqa: E402
from bigmac_jax.config import Config, load_config  # noqa: E402
from bigmac_jax.data.batch import Batch  # noqa: E402
from bigmac_jax.data.pipeline import TrainIterator, open_stream  # noqa: E402
from bigmac_jax.data.tokenizer import load_tokenizer  # noqa: E402
from bigmac_jax.model.mesh import batch_spec, place  # noqa: E402
from bigmac_jax.run.loop import train  # noqa: E402
from bigmac_jax.training.metrics_file import read_records  # noqa: E402
from bigmac_jax.training.step import make_trainer  # noqa: E402

_CONFIG = flags.DEFINE_string("config", "configs/tiny.py", "Config file.")
_STEPS = flags.DEFINE_integer("steps", 30, "Timed steps of a round.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds; the two loops alternate, and a ratio is the median over rounds.")


def main() -> None:
    steps = _STEPS.value
    config = load_config(_CONFIG.value, cli.OVERRIDES)
    # Two logged intervals, of which the second is the steady state: the first steps touch fresh memory.
    quiet = dataclasses.replace(config.train, steps=2 * steps, log_every=steps, eval_every=0, checkpoint_every=0)
    config = dataclasses.replace(config, train=quiet)
    mesh = cli.enter_mesh(config)
    stream = open_stream(config, "train", load_tokenizer(config))
    batch = next(TrainIterator(config, stream))
    trainer = make_trainer(config, mesh)

    cases = {
        "bare_step": lambda: _bare_loop(trainer, batch, steps),
        "training_loop": lambda: _training_loop(config),
    }
    seconds = alternate(cases, _ROUNDS.value)
    tokens = config.data.batch_size * config.data.sequence_length
    pipeline = _pipeline(TrainIterator(config, stream), tokens)
    for name, rounds in seconds.items():
        rate = round(tokens / statistics.median(rounds))
        print(json.dumps({"name": name, "tokens_per_s": rate, **summary(rounds)}))
    print(json.dumps({"name": "input_pipeline", "tokens_per_s": round(pipeline)}))
    ratios = {
        "loop_over_bare_step": round(median_ratio(seconds["training_loop"], seconds["bare_step"]), 4),
        "pipeline_over_step": round(pipeline * statistics.median(seconds["bare_step"]) / tokens, 1),
    }
    print(json.dumps(ratios))


def _bare_loop(trainer, batch: Batch, steps: int) -> float:
    """Seconds a step."""
    batch = place(batch, batch_spec(2))
    state = trainer.init(jax.random.key(0))
    for done in range(5):
        state, metrics = trainer.step(state, batch, trainer.rate(done))
    jax.block_until_ready(metrics)
    start = time.perf_counter()
    for done in range(5, 5 + steps):
        state, metrics = trainer.step(state, batch, trainer.rate(done))
    jax.block_until_ready(metrics)
    return (time.perf_counter() - start) / steps


def _training_loop(config: Config) -> float:
    """Seconds a step of a real run, as it logs them."""
    with tempfile.TemporaryDirectory() as workdir:
        train(config, pathlib.Path(workdir))
        return read_records(pathlib.Path(workdir))[-1]["step_time_s"]


def _pipeline(iterator, tokens: int) -> float:
    """Tokens a second of the input alone."""
    next(iterator)
    start, batches = time.perf_counter(), 0
    while time.perf_counter() - start < 3:
        next(iterator)
        batches += 1
    return batches * tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    cli.run(main)
