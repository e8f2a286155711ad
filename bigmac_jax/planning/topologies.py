"""Machines that are not there: slices of TPU chips, whose compiler runs anywhere."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from bigmac_jax.config import ConfigError

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
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{dimensions - 1}}}", shape):
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
