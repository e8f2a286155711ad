"""Compiles all programs of a small model for TPUs that are not there, and prints what they hold as JSON.

Run by itself, because the TPU compiler's platform must not meet the tests' own: python -m programs.compiled TOPOLOGY
NAMES OVERRIDES…; several slices as "v6e:4x8 x 2".
"""

import json
import math
import re
import sys
from collections import Counter
from typing import Any

import jax

from bigmac_jax.config import (
    Config,
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    with_overrides,
)
from bigmac_jax.model.counts import parameters
from bigmac_jax.model.mesh import AXES
from bigmac_jax.model.traffic import replica_bytes
from bigmac_jax.planning import hlo, hlo_schedule
from bigmac_jax.planning.abstract_programs import NAMES
from bigmac_jax.planning.compiled_programs import Compiled, compile_program
from bigmac_jax.planning.hardware import load_hardware
from bigmac_jax.planning.hlo_collectives import collectives
from bigmac_jax.planning.hlo_flops import matmul_flops
from bigmac_jax.planning.host_copies import host_copies
from bigmac_jax.planning.topologies import absent_devices, parse_topology
from bigmac_jax.training import loss

# A vocabulary that, whole or split over `tensor`, is the size of nothing else.
VOCAB, EXPERTS, CHUNK = 4192, 64, 2**18
loss._CHUNK_ENTRIES_ACCELERATOR = CHUNK  # of logits: so that a small batch has more than one chunk of them


# Mamba in half of the layers, and a module that predicts the token behind the next one.
HYBRID = ("model.blocks=ME*E", "model.num_layers=2", "model.first_dense_layers=0", "model.mtp_modules=1",
          "model.mamba_groups=4", "model.mamba_state=64")  # fmt: skip


def small() -> Config:
    """Two layers as wide as a tile needs, in bfloat16, over 32 ranks; of a bigmac model with all that makes programs
    differ: grouped heads, a shared expert, a norm of the latent, a finite capacity."""
    return Config(
        ModelConfig(
            num_layers=2, hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, vocab_size=VOCAB,
            num_experts=EXPERTS, top_k=4, num_shared_experts=1, latent_norm="gate", capacity_factor=1.25,
        ),
        ExecutionConfig(dtype="bfloat16"),
        MeshConfig(expert=32),
        DataConfig(tokenizer="bytes", sequence_length=256, batch_size=64),
        OptimizerConfig(),
    )  # fmt: skip


_MAKES_NOTHING = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call")


def facts(compiled: Compiled, config: Config) -> dict[str, Any]:
    module = hlo.parse(compiled.text)
    found = collectives(module, compiled.mesh)
    largest = hlo.largest_buffers(module, 1)
    V, D = config.model.vocab_size, config.model.hidden_size
    logits = [
        math.prod(shape.dims)
        for _, use, instruction in module.run()
        for shape in instruction.shapes
        if not use.fused and {V, V // config.mesh.tensor} & set(shape.dims) and D not in shape.dims
    ]
    exact = [
        instruction.shapes[0].dims
        for _, _, instruction in module.run()
        if instruction.opcode in ("dot", "convolution")
        and "highest" in instruction.attributes.get("operand_precision", "")
    ]
    made = {
        shape
        for _, use, instruction in module.run()
        for shape in instruction.shapes
        if not use.fused and instruction.opcode not in _MAKES_NOTHING
    }
    return {
        "memory": compiled.memory,
        "made": sorted(made, key=lambda shape: shape.bytes)[-20:],  # (dtype, shape) of what an instruction makes
        "beside": compiled.beside,
        "largest_elements": math.prod(largest[0].shape.dims) if largest else 0,
        "logits": max(logits, default=0),  # numbers of the largest array of them
        "exact_products": exact,
        "collectives": [[c.kind, list(c.axes), c.buffer_bytes, c.times, c.role] for c in found],
        "flops": matmul_flops(module).total,
        "kernels": sorted(set(re.findall(r"grouped_matmul_\w+", compiled.text))),
        "calls": dict(Counter(re.findall(r'custom_call_target="([^"]+)"', compiled.text))),
        "overlap": _overlap(module, compiled),
        "host_copies": [[c.bytes, c.times, c.asynchronous, len(c.products)] for c in host_copies(module)],
        "seconds": round(compiled.seconds, 1),
    }


def _overlap(module: hlo.Module, compiled: Compiled) -> list[tuple[bool, int]]:
    """Of each payload exchange: whether it is asynchronous, and how many products run beside it."""
    if not module.scheduled:
        return []
    found = hlo_schedule.overlap(module, compiled.mesh, lambda collective: 1.0, hlo_schedule.Rates(1e9, 1e15)).exchanges
    return [(exchange.collective.asynchronous, len(exchange.matmuls)) for exchange in found]


def main(topology: str, names: str, *overrides: str) -> None:
    place, _, slices = topology.partition(" x ")
    shape = parse_topology(place, int(slices or 1))
    devices = absent_devices(shape)
    config = with_overrides(small(), overrides)
    data = config.mesh.data or len(devices) // config.mesh.fixed_ranks
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES} | {"data": data}
    state = 12 * parameters(config, sizes).of_a_rank
    made = {name: compile_program(config, devices, name) for name in (names.split(",") if names else NAMES)}
    available = load_hardware(shape.kind).memory_bytes
    print(json.dumps({name: facts(program, config) for name, program in made.items()} | {
        "state": state, "available": available, "replica_bytes": replica_bytes(config, sizes)}))  # fmt: skip


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(*sys.argv[1:])
