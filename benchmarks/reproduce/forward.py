"""Forward passes over one batch, timed: python -m benchmarks.reproduce.forward --config=… --workdir=DIR [--local].

One process of several, as train.py. WORKDIR/metrics.jsonl gets a line a pass: step, step_time_s. --local: without the
exchange (`benchmarks.local`). The capacity factor is the config's.
"""

from bigmac_jax.runtime import environment

environment.prepare()

import contextlib  # noqa: E402
import pathlib  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402

from benchmarks.local import local_exchange  # noqa: E402
from benchmarks.reproduce.timed import log_steps  # noqa: E402
from bigmac_jax.commands import cli  # noqa: E402
from bigmac_jax.config import load_config  # noqa: E402
from bigmac_jax.model.mesh import batch_spec, place  # noqa: E402
from bigmac_jax.model.transformer import init_model  # noqa: E402
from bigmac_jax.runtime import hosts  # noqa: E402

_CONFIG = flags.DEFINE_string("config", "configs/tiny.py", "Config file; --config.a.b=value overrides a field.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/forward", "Where metrics.jsonl is written.")
_LOCAL = flags.DEFINE_bool("local", False, "Leave the exchange out.")


def main() -> None:
    with hosts.raise_together():
        config = load_config(_CONFIG.value, cli.OVERRIDES)
    cli.enter_mesh(config)
    model = init_model(config, jax.random.key(config.train.seed))
    shape = config.data.batch_size, config.data.sequence_length
    tokens_BL = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    tokens_BL = place(tokens_BL, batch_spec(2))
    with local_exchange() if _LOCAL.value else contextlib.nullcontext():
        forward = hosts.Jit(lambda model, tokens_BL: model(tokens_BL)[0])
        jax.block_until_ready(forward(model, tokens_BL))
    log_steps(
        pathlib.Path(_WORKDIR.value), config.train.steps, lambda: jax.block_until_ready(forward(model, tokens_BL))
    )


if __name__ == "__main__":
    cli.run(main, distributed=True)
