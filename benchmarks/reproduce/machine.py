"""What a measurement was made on: processor, memory, versions. No names of hosts or folders."""

import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def describe_machine() -> dict[str, Any]:
    cpu = re.search(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    memory = re.search(r"MemTotal:\s*(\d+)", _read("/proc/meminfo"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "processor": cpu[1].strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(memory[1]) / 1e6) if memory else None,
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    } | {package: importlib.metadata.version(package) for package in PACKAGES}


def _read(path: str) -> str:
    file = pathlib.Path(path)
    return file.read_text() if file.exists() else ""
