"""A whole training step, structures and dtypes side by side: python -m benchmarks.step [--config=… --config.a.b=…].

One process, cases alternating, on one resident batch; JSON lines with tokens a second, the share of the machine's dense
matmul rate, and the ratio to the first case (below 1 is faster).

    python -m benchmarks.step --cases=fine_grained,bigmac,dense,bigmac:bfloat16
"""

from bigmac_jax.runtime import environment

environment.prepare()

import dataclasses  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402

from absl import flags  # noqa: E402

from benchmarks.stepper import Stepper  # noqa: E402
from benchmarks.timing import alternate, median_ratio, summary  # noqa: E402
from bigmac_jax.commands import cli  # noqa: E402
from bigmac_jax.config import Config, load_config  # noqa: E402
from bigmac_jax.model.counts import flops  # noqa: E402
from bigmac_jax.training.metrics import dense_matmul_rate  # noqa: E402

_CONFIG = flags.DEFINE_string("config", "configs/tiny.py", "Config file; --config.a.b=value overrides a field.")
_CASES = flags.DEFINE_list("cases", "fine_grained,bigmac", "Cases STRUCTURE or STRUCTURE:DTYPE.")
_STEPS = flags.DEFINE_integer("steps", 10, "Timed steps of a round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds; a ratio is the median over rounds.", lower_bound=1)


def main() -> None:
    base = load_config(_CONFIG.value, cli.OVERRIDES)
    mesh = cli.enter_mesh(base)
    configs = {case: _with(base, case) for case in _CASES.value}
    cases = {case: Stepper(config, mesh, _STEPS.value) for case, config in configs.items()}
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


if __name__ == "__main__":
    cli.run(main)
