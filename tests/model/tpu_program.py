"""GPT3-XL's bigmac layer, forward and backward, compiled for a pod that is not there.

python -m model.tpu_program TOPOLOGY EXCHANGE CAPACITY_FACTOR OVERLAP_CHUNKS SEQUENCES
"""

import json
import math
import os
import re
import sys

# libtpu reads these when it is loaded: there is no TPU to be found or to be locked.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from bigmac_jax.config import Config, DataConfig, ExecutionConfig, MeshConfig, ModelConfig
from bigmac_jax.model.mesh import AXES
from bigmac_jax.runtime import environment

from . import program

WIDTH, WIRE, EXPERTS, TOP_K, LENGTH = 2048, 512, 64, 8, 2048


def main(topology: str, exchange: str, factor: str, chunks: str, sequences: str) -> None:
    devices = np.asarray(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    mesh = Mesh(devices.reshape(1, 1, 1, -1, 1), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    model = ModelConfig(
        structure="bigmac", hidden_size=WIDTH, num_heads=16, num_layers=1, num_experts=EXPERTS, top_k=TOP_K,
        capacity_factor=float(factor),
    )  # fmt: skip
    execution = ExecutionConfig("bfloat16", exchange=exchange, buffer_factor=math.inf, overlap_chunks=int(chunks))
    data = DataConfig(batch_size=devices.size * int(sequences), sequence_length=LENGTH)
    config = Config(model=model, execution=execution, mesh=MeshConfig(expert=devices.size), data=data)
    lowered = program.layer(config, gradients=True, mesh=mesh).lower()
    compiled = lowered.compile(compiler_options=environment.compiler_options(devices[0], int(chunks) > 1))
    print(json.dumps(report(compiled.as_text(), compiled.cost_analysis()["flops"], int(sequences) * LENGTH)))


def report(hlo: str, flops: float, tokens: int) -> dict[str, object]:
    """What the scheduled program of one rank holds; useful FLOPs are those of its tokens without padding."""
    kernels = [line for line in hlo.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", hlo)
    return {
        "flops": flops,
        "useful_flops": 6 * tokens * (2 * TOP_K * WIRE * WIDTH + 2 * WIDTH * WIRE + WIDTH * EXPERTS),
        "kernels": len(kernels),
        "kernel_flops": sum(int(re.search(r'"flops":"(\d+)"', line)[1]) for line in kernels),  # type: ignore[index]
        "useful_kernel_flops": 6 * tokens * 2 * TOP_K * WIRE * WIDTH,
        "largest_elements": max(math.prod(map(int, dims.split(","))) for dims in shapes),
        "ragged_all_to_alls": len(re.findall(r" ragged-all-to-all(?:-start)?\(", hlo)),
        "synchronous": len(re.findall(r" all-to-all\(", hlo)),
        "kernels_meanwhile": kernels_meanwhile(hlo),
    }


def kernels_meanwhile(hlo: str) -> dict[str, list[int]]:
    """How many kernels the schedule starts between the start and the end of each asynchronous all-to-all."""
    under_way: dict[str, int] = {}
    done: dict[str, list[int]] = {"forward": [], "backward": []}
    directions = {}
    for line in hlo[hlo.index("\nENTRY ") :].splitlines():
        if start := re.search(r"%(\S+) = .* all-to-all-start\(", line):
            under_way[start[1]] = 0
            directions[start[1]] = "backward" if "transpose(" in line else "forward"
        elif end := re.search(r" all-to-all-done\(.*?%([\w.-]+)\)", line):
            done[directions[end[1]]].append(under_way.pop(end[1]))
        elif 'custom_call_target="tpu_custom_call"' in line:
            under_way = {name: count + 1 for name, count in under_way.items()}
    return done


if __name__ == "__main__":
    main(*sys.argv[1:])
