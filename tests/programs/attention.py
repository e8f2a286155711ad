"""Compiles attention, forward and backward, for accelerators that are not there, and prints what it holds as JSON.

Run by itself, as programs.compiled: python -m programs.attention TOPOLOGY CASE…; a case is the implementation, B, L, N,
G, H, dtype and whether there are documents, between commas.
"""

import json
import sys
from collections import Counter
from typing import Any

import jax
import numpy as np

from bigmac_jax.config import Config, DataConfig, ExecutionConfig, MeshConfig, ModelConfig, OptimizerConfig
from bigmac_jax.mesh import batch_spec, make_mesh, on_each_rank, split_spec
from bigmac_jax.model.attention_kernels import causal_attention
from bigmac_jax.planning import hlo
from bigmac_jax.planning.topologies import absent_devices, parse_topology


def facts(
    device: Any, implementation: str, B: int, L: int, N: int, G: int, H: int, dtype: str, segmented: bool
) -> dict[str, Any]:
    def attention(q: Any, k: Any, v: Any, *segments: Any) -> Any:
        return on_each_rank(
            lambda q, k, v, *segments: causal_attention(q, k, v, *(segments or (None,)), implementation),
            (q, k, v, *segments),
            in_spec=[*[split_spec(4)] * 3, batch_spec(2)][: 3 + len(segments)],
            out_specs=split_spec(4),
        )

    def run(q: Any, k: Any, v: Any, dy: Any, *segments: Any) -> Any:
        y, pull = jax.vjp(lambda q, k, v: attention(q, k, v, *segments), q, k, v)
        return y, pull(dy)

    mesh = make_mesh(
        Config(ModelConfig(), ExecutionConfig(), MeshConfig(), DataConfig(), OptimizerConfig()),
        fit_batch=False,
        devices=[device],
    )
    with jax.set_mesh(mesh):

        def of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
            spec = split_spec(4) if len(shape) == 4 else batch_spec(2)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

        arrays = [of((B, L, heads, H), dtype) for heads in (N, G, G, N)]
        arrays += [of((B, L), np.int32)] * segmented
        compiled = jax.jit(run).lower(*arrays).compile()
    stats, module = compiled.memory_analysis(), hlo.parse(compiled.as_text())
    called = [i.attributes.get("custom_call_target", "").strip('"') for _, _, i in module.run()]
    kernels = [hlo.attention_kernel(i) for _, _, i in module.run()]
    largest = hlo.largest_buffers(module, 1)[0].bytes
    constants = max((i.bytes for _, _, i in module.run() if i.opcode == "constant"), default=0)
    peak = stats.peak_memory_in_bytes - stats.argument_size_in_bytes - stats.output_size_in_bytes
    return {
        "beside": peak if device.platform == "tpu" else stats.temp_size_in_bytes,  # beside arguments and results
        "largest": largest,
        "constants": constants,
        "flops": hlo.matmul_flops(module).kernels,
        "calls": dict(Counter(name for name in (*called, *kernels) if name)),
    }


def main(topology: str, *cases: str) -> None:
    device = absent_devices(parse_topology(topology))[0]
    found = {}
    for case in cases:
        implementation, *sizes, dtype, segmented = case.split(",")
        found[case] = facts(device, implementation, *map(int, sizes), dtype, segmented == "True")
    print(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(*sys.argv[1:])
