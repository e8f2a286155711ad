"""Checks of what a host of GPUs gives a process: its driver, and its memory."""

import functools
import importlib.util
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from bigmac_jax.planning.hardware import Hardware
from bigmac_jax.runtime.environment import GPU_MEMORY
from bigmac_jax.selfcheck.checks import Check
from bigmac_jax.selfcheck.on_devices import MismatchError

# The oldest driver for jax's plugin of each CUDA (docs.jax.dev, "Installation").
DRIVERS = {13: 580, 12: 525}
_DRIVER = pathlib.Path("/proc/driver/nvidia/version")


def host_checks(devices: Sequence[Any], hardware: Hardware | None) -> list[Check]:
    """The checks of a host of GPUs; none of another."""
    if devices[0].platform != "gpu":
        return []
    stats = devices[0].memory_stats() or {}
    memory = functools.partial(check_memory, stats.get("bytes_limit"), hardware)
    return [Check("driver", "host", "", check_driver), Check("memory", "host", "", memory)]


def check_driver(file: pathlib.Path = _DRIVER) -> str:
    """Checks that the driver is new enough for the CUDA that jax brings."""
    cuda = next((cuda for cuda in DRIVERS if importlib.util.find_spec(f"jax_cuda{cuda}_plugin")), 0)
    text = file.read_text() if file.exists() else ""
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d+)\.([\d.]+)", text)
    if not (found and cuda):
        return "not said here"
    if int(found[1]) < DRIVERS[cuda]:
        raise MismatchError(
            f"the driver is {found[1]}.{found[2]}, and CUDA {cuda} needs {DRIVERS[cuda]} or newer; use a newer one, or "
            "an older jax's CUDA"
        )
    return f"{found[1]}.{found[2]}, CUDA {cuda}"


def check_memory(limit: int | None, hardware: Hardware | None) -> str:
    """Checks that jax gives a process the memory that `bigmac plan` reckons with."""
    if limit is None or hardware is None:
        return "not said here"
    if limit < 0.99 * hardware.memory_bytes:
        raise MismatchError(
            f"jax gives a process {limit / 2**30:.1f} GiB of a GPU, and `bigmac plan` reckons with "
            f"{hardware.memory_bytes / 2**30:.1f}; set XLA_CLIENT_MEM_FRACTION={GPU_MEMORY} before jax starts, and see "
            "that no other process has some of it"
        )
    return f"{limit / 2**30:.1f} GiB"
