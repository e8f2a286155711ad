"""One MoE layer, forward and backward: python -m benchmarks.layer [--cpu_devices=8 --ranks=8] [--cases=…].

A case is STRUCTURE[:EXCHANGE[:CAPACITY_FACTOR[:GROUPED_MATMUL[:WIRE_DTYPE]]]]; all run in one process, alternating.
Dropless exchanges have room for their worst case (execution.buffer_factor=inf).
JSON lines: tokens_per_s; useful_gflops (experts, router and projections, no padding) and their share of the rate of a
2048³ float32 matmul in the same run; routing_share, the time of the router, the plan and the grouping alone over the
layer's; wire_bytes (payload of one rank, forward and backward); exchange_s, the time less that of the same program with
the all-to-alls replaced by a local reshape (not of gather and ragged, which need other collectives); temporary_mb of
the compiled program.

    python -m benchmarks.layer
    python -m benchmarks.layer --cpu_devices=8 --ranks=8 --cases=bigmac:all_to_all:1.25,fine_grained:all_to_all:1.25
"""

from bigmac_jax.runtime import environment

environment.prepare()

import json  # noqa: E402
import math  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402
from jax import Array  # noqa: E402

from benchmarks.local import local_exchange  # noqa: E402
from benchmarks.timing import alternate, median_ratio  # noqa: E402
from bigmac_jax.commands import cli  # noqa: E402
from bigmac_jax.config import Config, DataConfig, ExecutionConfig, MeshConfig, ModelConfig  # noqa: E402
from bigmac_jax.model.choose_exchange import choose_exchange  # noqa: E402
from bigmac_jax.model.exchange import Gather, Ragged  # noqa: E402
from bigmac_jax.model.exchange.costs import wire_bytes  # noqa: E402
from bigmac_jax.model.experts import layout  # noqa: E402
from bigmac_jax.model.mesh import AXES, rank_spec, ranks, token_spec  # noqa: E402
from bigmac_jax.model.moe import MoE  # noqa: E402
from bigmac_jax.model.traffic import tokens_at_a_time  # noqa: E402
from bigmac_jax.training.metrics import dense_matmul_rate  # noqa: E402

_CASES = flags.DEFINE_list("cases", "fine_grained,bigmac", "Cases, see above.")
_TOKENS = flags.DEFINE_integer("tokens", 8192, "Tokens over all ranks.")
_HIDDEN = flags.DEFINE_integer("hidden", 512, "h.")
_EXPERTS = flags.DEFINE_integer("experts", 64, "E.")
_TOP_K = flags.DEFINE_integer("top_k", 8, "K.")
_RANKS = flags.DEFINE_integer("ranks", 1, "Ranks of a machine.")
_NODES = flags.DEFINE_integer("nodes", 1, "Machines of the expert group.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds; times are medians.")
_CHUNKS = flags.DEFINE_integer("overlap_chunks", 1, "execution.overlap_chunks.")
_FORWARD = flags.DEFINE_bool("forward", False, "Time the forward pass alone.")


def main() -> None:
    configs = {case: _config(case) for case in _CASES.value}
    cli.enter_mesh(next(iter(configs.values())))
    peak = dense_matmul_rate("float32")
    cases: dict[str, Callable[[], float]] = {}
    compiled = {}
    for case, config in configs.items():
        compiled[case], cases[case] = _layer(config)
        cases[case + " routing"] = _routing(config)
        if _can_be_local(config):
            with local_exchange():
                _, cases[case + " local"] = _layer(config)
    seconds = alternate(cases, _ROUNDS.value)
    print(json.dumps({"name": "dense_2048", "gflops": round(peak / 1e9, 1)}), flush=True)
    first = _CASES.value[0]
    for case, config in configs.items():
        m, median = config.model, statistics.median(seconds[case])
        gflops = _useful_flops(m) / median / 1e9
        tokens = tokens_at_a_time(config, ranks())
        exchange = choose_exchange(config, m.capacity_factor, tokens)
        one_way = [
            wire_bytes(exchange, tokens, m.choices, m.wire_size, f) for f in (exchange.forward, exchange.backward)
        ]
        line = {
            "name": case,
            "ms": round(1e3 * median, 1),
            "best_ms": round(1e3 * min(seconds[case]), 1),
            "tokens_per_s": round(_TOKENS.value / median),
            "useful_gflops": round(gflops, 1),
            "share_of_dense": round(1e9 * gflops / peak, 3),
            f"time_over_{first}": round(median_ratio(seconds[case], seconds[first]), 3),
            "routing_share": round(statistics.median(seconds[case + " routing"]) / median, 3),
            "wire_bytes": config.execution.overlap_chunks * sum(one_way),
            "temporary_mb": round(compiled[case].memory_analysis().temp_size_in_bytes / 2**20, 1),
        }
        if _can_be_local(config):
            line["exchange_s"] = round(median - statistics.median(seconds[case + " local"]), 4)
        print(json.dumps(line), flush=True)


def _config(case: str) -> Config:
    defaults = ["bigmac", "all_to_all", "inf", "auto", "float32"]
    given = case.split(":")
    structure, exchange, factor, matmul, wire = given + defaults[len(given) :]
    model = ModelConfig(
        structure=structure,
        hidden_size=_HIDDEN.value,
        num_heads=4,
        num_layers=1,
        num_experts=_EXPERTS.value,
        top_k=_TOP_K.value,
        capacity_factor=float(factor),
    )
    execution = ExecutionConfig(
        exchange=exchange, overlap_chunks=_CHUNKS.value, grouped_matmul=matmul, wire_dtype=wire, buffer_factor=math.inf
    )
    ranks = _NODES.value * _RANKS.value
    data = DataConfig(batch_size=ranks, sequence_length=_TOKENS.value // ranks)
    return Config(model, execution, MeshConfig(node=_NODES.value, expert=_RANKS.value), data)


def _layer(config: Config) -> tuple[Any, Callable[[], float]]:
    """The compiled layer with its gradients, and a function that runs it once and returns the seconds."""
    layer, x_BLD, dy_BLD = _inputs(config)

    def loss(layer: MoE, x_BLD: Array, dy_BLD: Array) -> Array:
        y_BLD, _ = layer(x_BLD)
        return jnp.sum(y_BLD * dy_BLD)

    return _timed(loss if _FORWARD.value else jax.grad(loss, argnums=(0, 1)), layer, x_BLD, dy_BLD)


def _routing(config: Config) -> Callable[[], float]:
    """Scores, top-k, the plan of the exchange, and the grouping of the rows that arrive."""
    m = config.model
    layer, x_BLD, _ = _inputs(config)

    def on_rank(experts_BLK: Array) -> Any:
        experts_TK = experts_BLK.reshape(-1, m.choices)
        exchange = choose_exchange(config, m.capacity_factor, experts_TK.shape[0])
        plan = exchange.plan(experts_TK)
        made: Any = plan
        if plan.expert_NK is not None:
            share = experts_TK.size // exchange.local_experts
            made = plan, layout(config, plan.expert_NK, exchange.local_experts, share, plan.most_local)
        return jax.tree.map(lambda value: value[None], made)

    def routing(layer: MoE, x_BLD: Array) -> Any:
        experts_BLK = layer.route(x_BLD, True)[0].experts_BLK
        return jax.shard_map(on_rank, in_specs=token_spec(3), out_specs=rank_spec(1), axis_names=set(AXES))(experts_BLK)

    return _timed(routing, layer, x_BLD)[1]


def _inputs(config: Config) -> tuple[MoE, Array, Array]:
    layer = jax.jit(lambda key: MoE(config, key))(jax.random.key(0))
    shape = config.data.batch_size, config.data.sequence_length, config.model.hidden_size
    draw = np.random.default_rng(0).standard_normal
    x_BLD, dy_BLD = (jax.device_put(draw(shape).astype(np.float32), token_spec(3)) for _ in range(2))
    return layer, x_BLD, dy_BLD


def _timed(function: Callable[..., Any], *inputs: Any) -> tuple[Any, Callable[[], float]]:
    compiled = jax.jit(function).lower(*inputs).compile()
    jax.block_until_ready(compiled(*inputs))

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        return time.perf_counter() - start

    return compiled, run


def _useful_flops(m: ModelConfig) -> float:
    """Matmul FLOPs of forward and backward."""
    D, R = m.hidden_size, m.wire_size
    per_token = m.choices * 2 * R * m.expert_width + D * m.expert_count
    per_token += 2 * D * R if m.structure == "bigmac" else 0
    return (2.0 if _FORWARD.value else 6.0) * per_token * _TOKENS.value


def _can_be_local(config: Config) -> bool:
    """Whether all-to-alls are all that the layer sends."""
    exchange = choose_exchange(config, config.model.capacity_factor, tokens_at_a_time(config, ranks()))
    return exchange.ranks > 1 and not isinstance(exchange, Gather | Ragged)


if __name__ == "__main__":
    cli.run(main)
