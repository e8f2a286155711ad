"""A Mamba layer's time and memory by execution.mamba_chunk, compiled for TPUs that are not there (needs libtpu).

    python -m benchmarks.mamba --topologies=v5p:2x2x1,v6e:2x2

Forward and backward of one layer of Nemotron 3 Super on one device: 128 heads of 64, 8 groups, states of 128, hidden
size 4096, one sequence of 4,096 tokens in bfloat16. Milliseconds are the compiler's estimates, matrices between hidden
activations included.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from bigmac_jax.config import Config, DataConfig, ExecutionConfig, MeshConfig, ModelConfig
from bigmac_jax.model.attention import Documents
from bigmac_jax.model.gathering import all_but_gathered
from bigmac_jax.model.mamba import Mamba
from bigmac_jax.model.mesh import batch_spec, make_mesh, placed, token_spec
from bigmac_jax.planning import hlo, hlo_schedule
from bigmac_jax.planning.hardware import load_hardware
from bigmac_jax.planning.hlo_flops import matmul_flops
from bigmac_jax.planning.topologies import absent_devices, parse_topology

_TOPOLOGIES = flags.DEFINE_list("topologies", ["v5p:2x2x1"], "Whose first device is compiled for.")
_CHUNKS = flags.DEFINE_list("chunks", ["64", "128", "256", "512"], "Positions of a chunk.")
_LENGTH = flags.DEFINE_integer("length", 4096, "Tokens.")
_DOCUMENTS = flags.DEFINE_bool("documents", False, "Whether the sequence has documents.")


def layer_config(chunk: int, length: int) -> Config:
    model = ModelConfig(
        structure="dense", hidden_size=4096, num_heads=32, mamba_heads=128, mamba_head_dim=64, mamba_groups=8,
        mamba_state=128, blocks="M-",
    )  # fmt: skip
    data = DataConfig(tokenizer="bytes", sequence_length=length, batch_size=1)
    return Config(model, ExecutionConfig(dtype="bfloat16", mamba_chunk=chunk), MeshConfig(data=1), data)


def compiled(device: Any, config: Config, documents: bool) -> Any:
    """The program of a layer and its gradients, as it stands in a loop over layers without rematerialisation."""

    def loss(layer: Mamba, x_BLD: jax.Array, documents: Documents | None) -> jax.Array:
        run = jax.checkpoint(lambda layer, x_BLD: layer(x_BLD, documents), policy=all_but_gathered)
        return jnp.square(run(layer, x_BLD).astype(jnp.float32)).sum()

    mesh, shape = make_mesh(config, devices=[device]), (1, config.data.sequence_length)
    with jax.set_mesh(mesh):
        layer = placed(jax.eval_shape(lambda: Mamba(config, jax.random.key(0))), mesh)

        def of(shape: tuple[int, ...], dtype: Any, spec: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

        x_BLD = of((*shape, config.model.hidden_size), jnp.bfloat16, token_spec(3))
        numbers_BL = of(shape, np.int32, batch_spec(2))
        given = Documents(numbers_BL, numbers_BL) if documents else None
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(layer, x_BLD, given).compile()


def main(_: list[str]) -> None:
    for name in _TOPOLOGIES.value:
        topology = parse_topology(name)
        hardware = load_hardware(topology.kind)
        rates = hlo_schedule.Rates(hardware.clock_hz or 1, hardware.peak_flops, hardware.memory_bandwidth)
        for chunk in map(int, _CHUNKS.value):
            program = compiled(absent_devices(topology)[0], layer_config(chunk, _LENGTH.value), _DOCUMENTS.value)
            stats, module = program.memory_analysis(), hlo.parse(program.as_text())
            beside = stats.peak_memory_in_bytes - stats.argument_size_in_bytes - stats.output_size_in_bytes
            seconds, flops = hlo_schedule.work_seconds(module, rates), matmul_flops(module).total
            print(
                f"{name}, chunk {chunk}: {1e3 * seconds:.1f} ms, {flops / 1e12:.3f} TFLOPs, {beside / 1e6:.0f} MB "
                f"beside arguments and gradients (temporaries {stats.temp_size_in_bytes / 1e6:.0f} MB)",
                flush=True,
            )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    app.run(main)
