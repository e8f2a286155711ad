"""A whole training step, structures and dtypes side by side: python -m benchmarks.step [--config=… --config.a.b=…].

One process, cases alternating, on one resident batch; JSON lines with tokens a second, the share of the machine's dense
matmul rate, and the ratio to the first case (below 1 is faster).

    python -m benchmarks.step --cases=fine_grained,bigmac,dense,bigmac:bfloat16
"""

from bigmac_jax import environment

environment.prepare()

import dataclasses  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402

from benchmarks.timing import alternate, median_ratio, summary  # noqa: E402
from bigmac_jax import cli  # noqa: E402
from bigmac_jax.config import Config, load_config  # noqa: E402
from bigmac_jax.counts import flops  # noqa: E402
from bigmac_jax.data.batch import of_windows  # noqa: E402
from bigmac_jax.mesh import batch_spec, place  # noqa: E402
from bigmac_jax.training.metrics import dense_matmul_rate  # noqa: E402
from bigmac_jax.training.step import make_trainer  # noqa: E402

_CONFIG = flags.DEFINE_string("config", "configs/tiny.py", "Config file; --config.a.b=value overrides a field.")
_CASES = flags.DEFINE_list("cases", "fine_grained,bigmac", "Cases STRUCTURE or STRUCTURE:DTYPE.")
_STEPS = flags.DEFINE_integer("steps", 10, "Timed steps of a round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds; a ratio is the median over rounds.", lower_bound=1)


def main() -> None:
    base = load_config(_CONFIG.value, cli.OVERRIDES)
    mesh = cli.enter_mesh(base)
    configs = {case: _with(base, case) for case in _CASES.value}
    cases = {case: stepper(config, mesh, _STEPS.value) for case, config in configs.items()}
    seconds = alternate(cases, _ROUNDS.value)
    tokens, peak = base.data.batch_size * base.data.sequence_length, dense_matmul_rate("float32")
    first = seconds[_CASES.value[0]]
    for case, rounds in seconds.items():
        median = statistics.median(rounds)
        line = {
            "name": case,
            "tokens_per_s": round(tokens / median),
            "share_of_dense_matmul": round(sum(flops(configs[case]).values()) / median / peak, 3),
            f"time_over_{_CASES.value[0]}": round(median_ratio(rounds, first), 3),
        }
        print(json.dumps(line | summary(rounds)), flush=True)


def _with(base: Config, case: str) -> Config:
    structure, _, dtype = case.partition(":")
    model = dataclasses.replace(base.model, structure=structure)
    execution = dataclasses.replace(base.execution, dtype=dtype or base.execution.dtype)
    return dataclasses.replace(base, model=model, execution=execution)


def stepper(config: Config, mesh: jax.sharding.Mesh, steps: int) -> Callable[[], float]:
    """A function that runs `steps` steps and returns the seconds of one."""
    trainer = make_trainer(config, mesh)
    shape = (config.data.batch_size, config.data.sequence_length + 1)
    tokens_BL = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    batch = place(of_windows(tokens_BL), batch_spec(2))
    state, metrics = trainer.step(trainer.init(jax.random.key(0)), batch)
    jax.block_until_ready(metrics)

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = trainer.step(state, batch)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / steps

    return run


if __name__ == "__main__":
    cli.run(main)
