"""Memory of attention by length, compiled for accelerators that are not there.

    python -m benchmarks.attention --topologies=v6e:2x2,h100:1x8

One layer's attention, forward and backward, one sequence of bfloat16 with documents, 16 heads of 128, on one device, by
`auto` and, where it fits, by `xla`. Figures of topologies that were compiled before stay in the file. TPUs need libtpu,
GPUs jax's CUDA plugin (docs/planning.md).
"""

import json
import pathlib
from collections import Counter
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags

from bigmac_jax.config import Config
from bigmac_jax.model.gathering import on_each_rank
from bigmac_jax.model.kernels.flash_attention import causal_attention
from bigmac_jax.model.mesh import batch_spec, make_mesh, split_spec
from bigmac_jax.planning import hlo
from bigmac_jax.planning.hlo_flops import attention_kernel, matmul_flops
from bigmac_jax.planning.topologies import absent_devices, parse_topology

_TOPOLOGIES = flags.DEFINE_list("topologies", ["v6e:2x2"], "Whose first device is compiled for.")
_LENGTHS = flags.DEFINE_list("lengths", [str(4096 << n) for n in range(8)], "4k to 512k.")
_XLA = flags.DEFINE_integer("xla", 16384, "The longest sequence that is also compiled for `xla`, which holds scores.")
_OUTPUT = flags.DEFINE_string("output", "docs/results/attention.json", "Where the figures go.")
_PICTURE = flags.DEFINE_string("picture", "docs/images/attention.png", "Where the picture goes.")


def compiled(
    device: Any, implementation: str, B: int, L: int, N: int, G: int, H: int, dtype: str, segmented: bool
) -> dict[str, Any]:
    """What the program of attention and its gradients holds, on one device."""

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

    mesh = make_mesh(Config(), fit_batch=False, devices=[device])
    with jax.set_mesh(mesh):

        def of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
            spec = split_spec(4) if len(shape) == 4 else batch_spec(2)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

        arrays = [of((B, L, heads, H), dtype) for heads in (N, G, G, N)]
        arrays += [of((B, L), np.int32)] * segmented
        program = jax.jit(run).lower(*arrays).compile()
    stats, module = program.memory_analysis(), hlo.parse(program.as_text())
    called = [i.attributes.get("custom_call_target", "").strip('"') for _, _, i in module.run()]
    kernels = [attention_kernel(i) for _, _, i in module.run()]
    peak = stats.peak_memory_in_bytes - stats.argument_size_in_bytes - stats.output_size_in_bytes
    return {
        "beside": peak if device.platform == "tpu" else stats.temp_size_in_bytes,  # beside arguments and results
        "largest": hlo.largest_buffers(module, 1)[0].bytes,
        "constants": max((i.bytes for _, _, i in module.run() if i.opcode == "constant"), default=0),
        "flops": matmul_flops(module).kernels,
        "calls": dict(Counter(name for name in (*called, *kernels) if name)),
    }


def main(_: list[str]) -> None:
    output = pathlib.Path(_OUTPUT.value)
    result = json.loads(output.read_text()) if output.exists() else {"name": "attention", "beside": {}}
    for topology in _TOPOLOGIES.value:
        device = absent_devices(parse_topology(topology))[0]
        for implementation in ("xla", "auto"):
            lengths = [length for length in map(int, _LENGTHS.value) if implementation != "xla" or length <= _XLA.value]
            row = {}
            for length in lengths:
                row[length] = compiled(device, implementation, 1, length, 16, 16, 128, "bfloat16", True)["beside"]
                print(f"{topology} {implementation} {length}: {row[length] / 2**30:.3f} GiB", flush=True)
            result["beside"][f"{topology.partition(':')[0]}, {implementation}"] = row
    output.write_text(json.dumps(result, indent=1) + "\n")
    draw(result["beside"], pathlib.Path(_PICTURE.value))


def draw(beside: dict[str, dict[str, int]], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name, row in beside.items():
        style = "--" if name.endswith("xla") else "-"
        axes.plot([int(n) for n in row], [size / 2**30 for size in row.values()], style, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([4096 << n for n in range(8)], [f"{4 << n}k" for n in range(8)])
    axes.set_xlabel("tokens of a sequence")
    axes.set_ylabel("GiB beside inputs and results")
    axes.set_title("Attention, forward and backward: 16 heads of 128, bfloat16, documents", fontsize=10)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    app.run(main)
