"""Machines that are only compiled for: slices of TPU chips and hosts or racks of GPUs, whose compilers run anywhere."""

import importlib.util
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

from bigmac_jax.config import ConfigError
from bigmac_jax.planning.hardware import Hardware, load_hardware
from bigmac_jax.planning.hardware.torus import larger

# Names of topologies, which are those of hardware files.
TPUS = ("v5e", "v5p", "v6e", "tpu7x")
GPUS = ("h100", "h200", "h800", "b200", "b300", "gb200", "gb300")


class Topology(NamedTuple):
    """Slices of TPU chips, such as v5e:4x8, or hosts (racks) × GPUs, such as h100:4x8 or gb200:4x64."""

    name: str
    kind: str  # one of TPUS or GPUS
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """All of them: a chip of some TPUs is several devices of jax."""
        return self.slices * math.prod(self.shape)

    @property
    def torus(self) -> tuple[int, ...] | None:
        """Chips along each axis of a TPU slice; None for GPUs, which a switch joins."""
        return self.shape if self.kind in TPUS else None


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Reads KIND:SHAPE, of so many slices; ConfigError for a kind that is not known, a shape of other dimensions, or
    slices of GPUs."""
    kind, _, shape = name.partition(":")
    if kind not in (*TPUS, *GPUS):
        raise ConfigError(
            f"--topology={name} must begin with one of {', '.join((*TPUS, *GPUS))}, as in --topology=v5e:4x8 (a slice) "
            f"or h100:4x8 (hosts × GPUs)"
        )
    dimensions = 3 if kind in ("v5p", "tpu7x") else 2
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{dimensions - 1}}}", shape):
        example = f"{kind}:2x4x4" if dimensions == 3 else f"{kind}:4x8"
        raise ConfigError(f"--topology={name} must have {dimensions} sizes, as in --topology={example}")
    sizes = tuple(int(size) for size in shape.split("x"))
    if slices > 1 and kind in GPUS:
        hosts, gpus = sizes
        raise ConfigError(
            f"--slices={slices} is of TPUs; the hosts or racks of GPUs stand in the topology: use "
            f"--topology={kind}:{slices * hosts}x{gpus}"
        )
    return Topology(name, kind, sizes, slices)


def respell_devices(topology: Topology, flag: str, hardware: Hardware) -> str:
    """Respells --devices=N as a topology of the same kind: of larger slices, and where there are none, of more; or of
    more hosts of as many GPUs. Other flags stay."""
    name, _, number = flag.partition("=")
    if name != "--devices":
        return flag
    chips, slices = int(number) // hardware.cores, topology.slices
    if topology.torus:
        shape = larger(topology.shape, chips // topology.chips, hardware.machine_ranks // hardware.cores)
        slices = chips // math.prod(shape)
    else:
        shape = chips // topology.shape[1], topology.shape[1]
    of_slices = f" --slices={slices}" if slices != topology.slices else ""
    return f"--topology={topology.kind}:{'x'.join(map(str, shape))}{of_slices}"


def absent_devices(topology: Topology) -> list[Any]:
    """The devices of a machine that is not there, for its compiler: libtpu, or jax's CUDA plugin without a driver.

    Raises:
      ConfigError: the compiler is not installed, or does not know the topology.
    """
    is_tpu = topology.kind in TPUS
    library, compiler, extra, chip = (
        ("libtpu", "the TPU compiler, libtpu", "tpu", "TPU")
        if is_tpu
        else ("jax_cuda13_plugin", "XLA's GPU compiler", "gpu", "GPU")
    )
    if importlib.util.find_spec(library) is None:
        raise ConfigError(
            f"--topology={topology.name} with --compile needs {compiler}; pip install -e '.[{extra}]' brings the one "
            f"of this jax (any x86 Linux machine, no {chip})"
        )
    return _tpus(topology) if is_tpu else _gpus(topology)


def _gpus(topology: Topology) -> list[Any]:
    from jax.experimental import topologies

    target = (pathlib.Path(__file__).parent / "hardware" / f"{topology.kind}.textproto").read_text()
    shape = f"1x{topology.shape[0]}x{topology.shape[1]}"  # slices × hosts × GPUs, as jax spells it
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape)
    except Exception as error:
        raise ConfigError(f"--topology={topology.name} is refused by XLA: {first_line(error)}") from None
    return list(found.devices)


def _tpus(topology: Topology) -> list[Any]:
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
        several: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
        if any(rings := _rings(topology)):
            several["wrap"] = rings
        if math.prod(topology.shape) == 1:  # hosts of 2 × 2 chips would not divide it
            several["chips_per_host_bounds"] = (1, 1, 1)
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **several).devices)
    except Exception as error:
        raise ConfigError(f"--topology={topology.name} is not one that libtpu knows: {first_line(error)}") from None


def _rings(topology: Topology) -> tuple[bool, ...]:
    """Which axes of a TPU slice are rings; libtpu takes all for lines, and three of them."""
    torus = load_hardware(topology.kind).torus
    assert torus is not None, topology
    rings = torus.slice(topology.shape).rings[-len(topology.shape) :]
    return (*rings, *[False] * (3 - len(rings)))


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 300 characters; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
