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
    return {
        "processor": cpu[1].strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(memory[1]) / 1e6) if memory else None,
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "commit": commit(),
    } | {package: importlib.metadata.version(package) for package in PACKAGES}


def commit() -> str:
    """Of this repository, and a + where files that it knows were changed."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":/", ":/!docs"], capture_output=True)
    return head.stdout.strip() + ("+" if changed.returncode == 1 else "")


def _read(path: str) -> str:
    file = pathlib.Path(path)
    return file.read_text() if file.exists() else ""
