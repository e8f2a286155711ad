"""Runs what is checked on all devices, and compares what comes out."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from bigmac_jax.config import Config, DataConfig, ExecutionConfig, MeshConfig, ModelConfig, OptimizerConfig
from bigmac_jax.model.gathering import on_each_rank
from bigmac_jax.model.mesh import place, rank_spec, replicated_spec
from bigmac_jax.runtime import environment, hosts
from bigmac_jax.selfcheck.numpy_reference import Arrays


class MismatchError(Exception):
    """A part did not compute what it should."""


def compare(actual: Arrays, expected: Arrays, bound: float) -> str:
    """Compares arrays with those expected → a line that says the largest difference.

    An array may have a leading dimension of ranks that the expected one lacks.

    Raises:
      MismatchError: an array differs by more than `bound` times the largest entry of the one expected.
    """
    worst = 0.0
    for name, b in expected.items():
        a = actual[name].astype(np.float64)
        largest = np.abs(b).max()
        off = np.abs(a - b).max() / largest if largest > 0 else math.inf  # zeros show nothing
        if not off <= bound:  # NaN too
            where = ""
            if a.ndim > b.ndim:
                by_rank = np.abs(a - b).reshape(a.shape[0], -1).max(1) / largest
                wrong = [rank for rank, value in enumerate(by_rank) if not value <= bound]
                where = f" on {len(wrong)} of {len(by_rank)} devices" if len(by_rank) > 1 else ""
            raise MismatchError(
                f"{name} is off by {off:.1e} of its largest entry{where}; at most {bound:g} is rounding"
            )
        worst = max(worst, float(off))
    return f"within {worst:.0e}"


def execute(mesh: Mesh, dtype: str, function: Callable[..., Any], values: Any, specs: Any, ragged: bool = False) -> Any:
    """Compiles `function` with training's options, and runs it on NumPy arrays that `specs` place on the mesh → NumPy
    arrays.

    Args:
      dtype: what is computed in; with float32, products keep all digits.
      ragged: whether the function has ragged exchanges, which need an option of their own.
    """
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest" if dtype == "float32" else None):
        arrays = jax.tree.map(place, values, specs)
        program = compile_program(mesh, jax.jit(function).lower(*arrays), ragged)
        return jax.tree.map(np.asarray, program(*arrays))


def compile_program(mesh: Mesh, lowered: Any, ragged: bool = False) -> Any:
    """Compiles with the options of training; on CPU without LLVM's optimisations, because these programs take seconds
    to compile and milliseconds to run."""
    device = mesh.devices.flat[0]
    options = {"xla_backend_optimization_level": 0} if device.platform == "cpu" else {}
    options |= environment.compiler_options(device, ragged=ragged)
    with hosts.raise_together():  # all have compiled before one of them waits for the others
        return lowered.compile(compiler_options=options)


def run_on_each(mesh: Mesh, dtype: str, on_rank: Callable[..., dict[str, Array]], *trees: Any) -> Arrays:
    """Runs `on_rank` on the same arrays on each device → the results of all [S, …]."""
    leaves, form = jax.tree.flatten(trees)

    def on_each(*leaves: Array) -> dict[str, Array]:
        result = on_rank(*jax.tree.unflatten(form, [leaf[0] for leaf in leaves]))
        return {name: value[None] for name, value in result.items()}

    def everywhere(*leaves: Array) -> dict[str, Array]:
        return replicate(on_each_rank(on_each, leaves, in_spec=rank_spec, out_specs=rank_spec(1)))

    copies = [np.broadcast_to(leaf, (mesh.size, *leaf.shape)) for leaf in leaves]
    return execute(mesh, dtype, everywhere, tuple(copies), tuple(rank_spec(copy.ndim) for copy in copies))


def replicate(arrays: dict[str, Array]) -> dict[str, Array]:
    return {name: jax.sharding.reshard(value, replicated_spec(value.ndim)) for name, value in arrays.items()}


def tiny_config(devices: int, nodes: int = 1, ranks: int = 0, use_bias: bool = False, **execution: Any) -> Config:
    """A tiny bigmac model for so many devices, on a mesh whose expert group is `ranks` of them, or all."""
    group = ranks or devices
    return Config(
        model=ModelConfig(
            num_layers=2,
            hidden_size=64,
            num_heads=4,
            num_kv_heads=2,
            vocab_size=264,
            num_experts=devices * max(2, -(-8 // devices)),
            top_k=3,
            expert_hidden_size=32,
            latent_norm="none",  # as in the reference
            projection_init="random",
            capacity_factor=math.inf,
            use_bias=use_bias,
        ),
        execution=ExecutionConfig(unroll_layers=1, **execution),
        mesh=MeshConfig(data=1, node=nodes, expert=group // nodes),
        data=DataConfig(tokenizer="bytes", sequence_length=16, batch_size=devices),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, decay_steps=1000),
    )
