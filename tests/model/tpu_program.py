"""GPT3-XL's bigmac layer on v5e:4x8, compiled without a TPU: python -m model.tpu_program EXCHANGE CAPACITY_FACTOR."""

import json
import math
import re
import sys

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from bigmac_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from bigmac_jax.mesh import AXES

RANKS, LENGTH = 32, 2048
ROWS = 8  # sequences of a rank: 524,288 tokens a step


def main(exchange: str, factor: str) -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x8")
    devices = np.asarray(topology.devices).reshape(1, 1, RANKS)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    model = ModelConfig(
        structure="bigmac", hidden_size=2048, num_heads=16, num_layers=1, num_experts=64, top_k=8, dtype="bfloat16",
        capacity_factor=float(factor), exchange=exchange,
    )  # fmt: skip
    data = DataConfig(batch_size=RANKS * ROWS, sequence_length=LENGTH)
    config = Config(model=model, mesh=MeshConfig(expert=RANKS), data=data)

    from . import program, tools

    tools.make_mesh = lambda config: mesh  # type: ignore[assignment]
    program.on_mesh = lambda config: jax.set_mesh(mesh)
    compiled = program.layer(config, gradients=True).lower().compile()
    text = compiled.as_text()
    tokens = ROWS * LENGTH
    D, R, K = 2048, 512, 8
    useful = 6 * tokens * (K * 2 * R * D + 2 * D * R + D * 64)
    sizes = {"bf16": 2, "f32": 4, "s32": 4, "u16": 2, "pred": 1, "u8": 1, "s8": 1}
    shapes = re.findall(r"= (bf16|f32|s32|u16|pred|u8|s8)\[([\d,]+)\]", text)
    print(
        json.dumps(
            {
                "kernels": len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
                "flops": compiled.cost_analysis()["flops"],
                "useful_flops": useful,
                "largest_bytes": max(sizes[kind] * math.prod(map(int, dims.split(","))) for kind, dims in shapes),
                "ragged_all_to_alls": len(re.findall(r" ragged-all-to-all(?:-start)?\(", text)),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
