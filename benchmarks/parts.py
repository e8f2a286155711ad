"""Parts of a CPU step against the plain way to write them: python -m benchmarks.parts [--config=… --config.a.b=…].

Forward and backward on the config's shapes, alternating in one process; JSON lines with the milliseconds of both.

    python -m benchmarks.parts --trace                 where the time of a whole step goes, part by part
    python -m benchmarks.parts --trace --peer=bigmac   of the step that benchmarks.peers times
"""

from bigmac_jax.runtime import environment

environment.prepare()

import functools  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from absl import flags  # noqa: E402
from jax import Array  # noqa: E402

from benchmarks.peers.ours import config_like_peer  # noqa: E402
from benchmarks.stepper import Stepper  # noqa: E402
from benchmarks.timing import alternate, median_ratio  # noqa: E402
from benchmarks.trace import Part, breakdown  # noqa: E402
from bigmac_jax.commands import cli  # noqa: E402
from bigmac_jax.config import Config, load_config  # noqa: E402
from bigmac_jax.model.gathering import Crossing, Weight, on_each_rank  # noqa: E402
from bigmac_jax.model.kernels.flash_attention import causal_attention  # noqa: E402
from bigmac_jax.model.layers import product  # noqa: E402
from bigmac_jax.model.mesh import replicated_spec, split_spec, token_spec  # noqa: E402
from bigmac_jax.selfcheck.rates import memory_rate  # noqa: E402
from bigmac_jax.training.loss import linear_cross_entropy  # noqa: E402
from bigmac_jax.training.metrics import dense_matmul_rate  # noqa: E402

_CONFIG = flags.DEFINE_string("config", "configs/tiny.py", "Config file; --config.a.b=value overrides a field.")
EXACT = Crossing("float32", "float32", "float32")
_TRACE = flags.DEFINE_bool("trace", False, "Trace steps instead, and print what each part of the model takes.")
_PEER = flags.DEFINE_string("peer", "", "With --trace: the structure of a peer, instead of --config.")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Rounds; times are medians.", lower_bound=1)


def main() -> None:
    config = config_like_peer(_PEER.value) if _PEER.value else load_config(_CONFIG.value, cli.OVERRIDES)
    mesh = cli.enter_mesh(config)
    if _TRACE.value:
        return trace(config, mesh)
    m, B, L = config.model, config.data.batch_size, config.data.sequence_length
    draw = np.random.default_rng(0)

    def normal(*shape: int, weight: bool = False) -> Array:
        spec = replicated_spec(len(shape)) if weight else (split_spec if len(shape) == 4 else token_spec)(len(shape))
        return jax.device_put(draw.standard_normal(shape, np.float32), spec)

    heads = [normal(B, L, n, m.head_size) for n in (m.num_heads, m.kv_heads, m.kv_heads)]
    x_BLD, w_DD = normal(B, L, m.hidden_size), normal(m.hidden_size, m.hidden_size, weight=True)
    w_VD = 0.02 * normal(m.vocab_size, m.hidden_size, weight=True)
    targets = jax.device_put(draw.integers(m.vocab_size, size=(B, L), dtype=np.int32), token_spec(2))
    whole = functools.partial(jnp.einsum, "BLD,VD->BLV")
    parts: dict[str, tuple[Callable[..., Array], Callable[..., Array], list[Array]]] = {
        "attention in blocks / jax.nn's": (
            _of_heads(causal_attention),
            _of_heads(functools.partial(jax.nn.dot_product_attention, is_causal=True)),
            heads,
        ),
        "fused cross-entropy / whole logits": (
            lambda x, w: linear_cross_entropy(x, Weight(w, EXACT), targets, targets=None).mean(),
            lambda x, w: optax.softmax_cross_entropy_with_integer_labels(whole(x, w), targets).mean(),
            [x_BLD, w_VD],
        ),
        "projection, weight's gradient of a transposed copy / plain": (
            lambda x, w: on_each_rank(product, (x,), (Weight(w, EXACT),)),
            lambda x, w: x @ w,
            [x_BLD, w_DD],
        ),
    }
    for name, (ours, plain, inputs) in parts.items():
        seconds = alternate({"ours": _runner(ours, inputs), "plain": _runner(plain, inputs)}, _ROUNDS.value)
        line: dict[str, Any] = {"name": name}
        line |= {f"{case}_ms": round(1e3 * statistics.median(rounds), 2) for case, rounds in seconds.items()}
        print(json.dumps(line | {"ratio": round(median_ratio(seconds["ours"], seconds["plain"]), 3)}), flush=True)


def trace(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Prints a line a part."""
    run = Stepper(config, mesh, _ROUNDS.value)
    run()
    wall = run()
    rate, bandwidth = dense_matmul_rate("float32"), memory_rate(cpu=True)
    parts = breakdown(run.compiled, run, run.steps, rate, bandwidth)
    print(f"{'ms':12}{'all':>8}{'products':>10}{'rest':>8}{'floor':>8}")
    for name, part in [*parts.items(), ("all", Part(*map(sum, zip(*parts.values(), strict=True))))]:
        columns = (part.products + part.rest, *part)
        print(f"{name:12}" + "".join(f"{1e3 * v:{w}.1f}" for v, w in zip(columns, (8, 10, 8, 8), strict=True)))
    print(
        f"a step takes {1e3 * wall:.1f} ms, because some of it runs at once; "
        f"floors are of {rate / 1e9:.0f} GFLOP/s and {bandwidth / 1e9:.0f} GB/s"
    )


def _of_heads(attention: Callable[..., Array]) -> Callable[..., Array]:
    """As the model calls it."""
    return lambda *heads: on_each_rank(attention, heads, in_spec=split_spec, out_specs=split_spec(4))


def _runner(function: Callable[..., Array], inputs: list[Array]) -> Callable[[], float]:
    """A function that runs forward and backward once and returns the seconds."""
    argnums = tuple(range(len(inputs)))
    step = jax.jit(jax.value_and_grad(lambda *inputs: jnp.square(function(*inputs)).sum(), argnums=argnums))
    jax.block_until_ready(step(*inputs))

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(step(*inputs))
        return time.perf_counter() - start

    return run


if __name__ == "__main__":
    cli.run(main)
