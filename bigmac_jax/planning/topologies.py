"""Machines that are not there: slices of TPU chips and hosts of GPUs, whose compilers run anywhere."""

import importlib.util
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

from bigmac_jax.config import ConfigError

# Names of topologies, which are those of hardware files.
TPUS = ("v5e", "v5p", "v6e")
GPUS = ("h100", "h200", "b200")


class Topology(NamedTuple):
    """A slice of TPU chips, such as v5e:4x8, or hosts × GPUs, such as h100:4x8."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def torus(self) -> tuple[int, ...] | None:
        """How a slice's links stand; GPUs' have no shape."""
        return self.shape if self.kind in TPUS else None


def parse_topology(name: str) -> Topology:
    """Raises ConfigError for a kind that is not known or a shape that is none."""
    kind, _, shape = name.partition(":")
    if kind not in (*TPUS, *GPUS):
        raise ConfigError(
            f"--topology={name} must begin with one of {', '.join((*TPUS, *GPUS))}, as in --topology=v5e:4x8 (a slice) "
            f"or h100:4x8 (hosts × GPUs)"
        )
    dimensions = 3 if kind == "v5p" else 2
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{dimensions - 1}}}", shape):
        example = "v5p:2x4x4" if dimensions == 3 else f"{kind}:4x8"
        raise ConfigError(f"--topology={name} must have {dimensions} sizes, as in --topology={example}")
    return Topology(name, kind, tuple(int(size) for size in shape.split("x")))


def enlarged(topology: Topology, flag: str) -> str:
    """--devices=N in the words of a topology: so many hosts of the same GPUs; a slice's shape is left open."""
    name, _, devices = flag.partition("=")
    if name != "--devices":
        return flag
    gpus = topology.shape[-1]
    return (
        f"{flag} --hardware={topology.kind}"
        if topology.torus
        else f"--topology={topology.kind}:{int(devices) // gpus}x{gpus}"
    )


def absent_devices(topology: Topology) -> list[Any]:
    """The devices of a machine that is not there, whose compiler is.

    Raises:
      ConfigError: it isn't, or does not know the topology.
    """
    return _tpus(topology) if topology.kind in TPUS else _gpus(topology)


def _gpus(topology: Topology) -> list[Any]:
    """Of hosts × GPUs; needs jax's CUDA plugin, which holds the compiler, and no driver."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise ConfigError(
            f"--topology={topology.name} with --compile needs XLA's GPU compiler; pip install -e '.[gpu]' brings the "
            f"one of this jax (any x86 Linux machine, no GPU)"
        )
    from jax.experimental import topologies

    target = (pathlib.Path(__file__).parent / "hardware" / f"{topology.kind}.textproto").read_text()
    shape = f"1x{topology.shape[0]}x{topology.shape[1]}"  # slices × hosts × GPUs, as jax spells it
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape)
    except Exception as error:
        raise ConfigError(f"--topology={topology.name} is refused by XLA: {first_line(error)}") from None
    return list(found.devices)


def _tpus(topology: Topology) -> list[Any]:
    """Of a slice; needs libtpu, which is the compiler, and no TPU."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={topology.name} with --compile needs the TPU compiler, libtpu; "
            f"pip install -e '.[tpu]' brings the one of this jax (any x86 Linux machine, no TPU)"
        )
    # libtpu reads these when it is loaded: there is no TPU to be found or to be locked, and nothing to warn of.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": f"{topology.kind}-{math.prod(topology.shape)}",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)
    except Exception as error:
        raise ConfigError(f"--topology={topology.name} is not one that libtpu knows: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """Of its message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
