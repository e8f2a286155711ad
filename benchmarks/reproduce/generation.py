"""Completions of one batch of prompts, timed: python -m benchmarks.reproduce.generation --config=… --workdir=DIR.

One process of several, as train.py. Through `Generator`, dropless. WORKDIR/metrics.jsonl gets a line a batch: step,
step_time_s, from the prompts' ids to the last token. Several --new are taken by turns, a batch each.
"""

from bigmac_jax.runtime import environment

environment.prepare()

import itertools  # noqa: E402
import pathlib  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402

from benchmarks.reproduce.timed import log_steps  # noqa: E402
from bigmac_jax.commands import cli  # noqa: E402
from bigmac_jax.config import load_config  # noqa: E402
from bigmac_jax.data.tokenizer import ByteTokenizer  # noqa: E402
from bigmac_jax.inference import Generator  # noqa: E402
from bigmac_jax.model.transformer import init_model  # noqa: E402
from bigmac_jax.runtime import hosts  # noqa: E402

_CONFIG = flags.DEFINE_string("config", "configs/tiny.py", "Config file; --config.a.b=value overrides a field.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/generation", "Where metrics.jsonl is written.")
_PROMPT = flags.DEFINE_integer("prompt", 128, "Tokens of a prompt.")
_PROMPTS = flags.DEFINE_integer("prompts", 32, "Prompts of the batch.")
_NEW = flags.DEFINE_list("new", "1", "Tokens to generate; a list is taken by turns.")


def main() -> None:
    with hosts.raise_together():
        config = load_config(_CONFIG.value, cli.OVERRIDES)
    cli.enter_mesh(config)
    model = init_model(config, jax.random.key(config.train.seed))
    draw = np.random.default_rng(0)
    shape = _PROMPTS.value, _PROMPT.value
    prompts = [tuple(row) for row in draw.integers(config.model.vocab_size, size=shape).tolist()]

    lengths = [int(new) for new in _NEW.value]
    turns = itertools.cycle(lengths)

    def once() -> None:
        generator.generate(prompts, max_tokens=next(turns), ignore_eos=True)

    generator = Generator(
        config, model, batch_size=len(prompts), tokenizer=ByteTokenizer(), exchange=config.execution.exchange
    )
    for _ in lengths:
        once()  # compiles
    log_steps(pathlib.Path(_WORKDIR.value), config.train.steps, once)


if __name__ == "__main__":
    cli.run(main, distributed=True)
