"""What the compiler makes of a training step: for simulated CPU devices, or for a TPU pod that is not there.

The program is the one that train.py runs, compiled for abstract arrays: no parameter is allocated.
"""

import importlib.util
import os
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.mesh import batch_spec, make_mesh
from bigmac_jax.training.step import make_trainer

# Of the TPUs that are planned for: name of a topology → hardware file.
TPUS = ("v5e", "v5p", "v6e")


class Topology(NamedTuple):
    """A slice of TPU chips, such as v5e:4x8."""

    name: str
    kind: str
    shape: tuple[int, ...]


def parse_topology(name: str) -> Topology:
    """Raises ConfigError for a kind that is not known or a shape that is none."""
    kind, _, shape = name.partition(":")
    if kind not in TPUS:
        raise ConfigError(f"--topology={name} must begin with one of {', '.join(TPUS)}, as in --topology=v5e:4x8")
    dimensions = 3 if kind == "v5p" else 2
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){%d}" % (dimensions - 1), shape):
        example = "v5p:2x4x4" if dimensions == 3 else f"{kind}:4x8"
        raise ConfigError(f"--topology={name} must have {dimensions} sizes, as in --topology={example}")
    return Topology(name, kind, tuple(int(size) for size in shape.split("x")))


def tpu_devices(topology: Topology) -> list[Any]:
    """The devices of a slice that is not there; needs libtpu, which is the compiler, and no TPU."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={topology.name} with --compile needs the TPU compiler, libtpu; "
            f"pip install -e '.[tpu]' brings the one of this jax (any x86 Linux machine, no TPU)"
        )
    # libtpu reads these when it is loaded: there is no TPU to be found or to be locked, and little worth a log line.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)
    except Exception as error:
        raise ConfigError(f"--topology={topology.name} is not one that libtpu knows: {_first_line(error)}") from None


class Compiled(NamedTuple):
    """A training step's program, the same for every rank."""

    text: str  # HLO, on TPU in the order of the schedule
    seconds: float  # to trace and compile
    memory: dict[str, int]  # bytes of a rank
    mesh: dict[str, int]


class DoesNotFitError(ConfigError):
    """The compiler gave up: memory."""


def compile_step(config: Config, devices: Sequence[Any]) -> Compiled:
    """Compiles train.py's step for `devices`, all of them.

    Raises:
      ConfigError: the mesh does not fit the devices.
      DoesNotFitError: the compiler found no way to fit the program into memory.
    """
    start = time.perf_counter()
    mesh = make_mesh(config, devices=devices)
    shape = config.data.batch_size, config.data.sequence_length + 1
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, mesh)
        tokens_BL = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, batch_spec(2)))
        lowered = trainer.step.lower(trainer.abstract_state, tokens_BL)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise DoesNotFitError(_first_line(error)) from None
    stats = compiled.memory_analysis()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return Compiled(compiled.as_text(), time.perf_counter() - start, memory, dict(mesh.shape))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
