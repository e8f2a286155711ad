"""Environment variables and compiler options that make the backend fast, each with its reason.

The entry points call `prepare()` first; it re-executes the program once with SETTINGS in its environment. The training
step is compiled with COMPILER_OPTIONS rather than flags: a wrong flag in XLA_FLAGS or LIBTPU_INIT_ARGS ends the
process, and the kind of TPU is known only once jax runs. BIGMAC_KEEP_ENV=1 turns both off; a variable that is already
set stays.
"""

from __future__ import annotations  # so that a Python that is too old gets as far as the line that says so

import functools
import glob
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

# variable → (value, where, reason with its figure)
SETTINGS = {
    "GLIBC_TUNABLES": (
        "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736",
        "linux",
        "Huge pages for malloc, and freed memory kept: XLA:CPU allocates its buffers anew in every step, and fresh "
        "pages fault one by one. 3 to 4 % of a step of configs/tiny.py (docs/performance.md). Never measured beside an "
        "accelerator, and so left out there.",
    ),
}

# The share of a GPU's memory that a process may use. With it the memory of the hardware files, which `fits` compares
# with, is what there is: 80e9 of the 85e9 bytes that an H100 has.
GPU_MEMORY = 0.94

# Device files of Nvidia's GPUs, and of TPUs with older and newer drivers.
_DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*")

# option → (value, kinds of device (platform, or device_kind), reason with its figure)
_ON_SPARSE_CORES = (
    "Gathers of parameters and sums of gradients run on the sparse cores, beside anything. Qwen3-30B-A3B sharded over "
    "32 chips, 4,096 tokens a chip, by the compiler's estimates: 1.66 s a step instead of 1.85 with libtpu 0.0.42, "
    "1.58 with 0.0.50. Gathers in fusions beside products (…_async_collective_fusion_fuse_all_gather) took 1.58 with "
    "the former; the latter refuses them but on v5e, where alone they are safe (docs/peers.md)."
)
COMPILER_OPTIONS = {
    "xla_tpu_enable_async_all_to_all": (
        True,
        ("TPU v4", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU7x"),
        "Without it no all-to-all overlaps with anything. With it and overlap_chunks=4, 8 or more of a layer's 16 run "
        "beside expert kernels (docs/exchange.md). Not on v5e ('TPU v5 lite'), where a group of 32 fails to compile: "
        "'Async all-to-all not supported on limited ICI'.",
    ),
    **dict.fromkeys(
        (
            "xla_tpu_enable_sparse_core_collective_offload_all_gather",
            "xla_tpu_enable_all_gather_offload_tracing",
            "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
            "xla_tpu_enable_reduce_scatter_offload_tracing",
        ),
        (True, ("TPU v6 lite",), _ON_SPARSE_CORES),
    ),
    "xla_tpu_enable_sparse_core_collective_offload_ragged_all_to_all": (
        True,
        ("TPU v6 lite",),
        "Ragged exchanges run on the sparse cores; without it all are synchronous. Qwen3-30B-A3B with experts over 32 "
        "chips, by the compiler's estimates: 1.47 s a step instead of 1.89 (docs/peers.md).",
    ),
    "xla_gpu_enable_latency_hiding_scheduler": (
        True,
        ("gpu",),
        "Collectives on GPU are asynchronous by default; this schedules computation between their start and end. "
        "Nvidia's JAX images set it; not measured here.",
    ),
}

# Options that are left out where the exchange is ragged: a JAX trainer on GB200 found a backward pass with ragged
# exchanges corrupted by the latency-hiding schedule (marin#8077); not reproduced here, for want of a GPU.
RAGGED_UNSAFE = ("xla_gpu_enable_latency_hiding_scheduler",)

# As COMPILER_OPTIONS, for a step whose exchange goes in chunks (execution.overlap_chunks).
OVERLAP_OPTIONS = {
    "xla_tpu_multi_output_fusion_limit": (
        3,
        ("TPU v4", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU7x"),
        "Or XLA makes one fusion of four chunks' activations, which share the experts' biases, and every chunk waits "
        "for all. GPT3-XL on v6e:4x8: 24 of 24 exchanges asynchronous instead of 20, 14 % of their time hidden behind "
        "matmuls instead of 10 %; by the compiler's estimates the rest of the step pays that back (docs/planning.md).",
    ),
    "xla_gpu_dot_merger_threshold_mb": (
        0,
        ("gpu",),
        "Or XLA joins the products of four chunks that meet the same experts into one of up to 32 MB, which waits for "
        "all. Two layers, h 2,048, 64 experts, 8 × 1,024 tokens of an H100: 13 of 16 exchanges have products beside "
        "them, instead of 5 (tests/programs/test_gpu.py).",
    ),
    "xla_disable_hlo_passes": (
        "multi_output_fusion",
        ("gpu",),
        "Or XLA makes one fusion of the chunks' activations, as on TPU. GPT3-XL, two layers, 16,384 tokens of an H100 "
        "at a time, remat=layer: 20 of 24 exchanges have products beside them, instead of 15; 4 % more temporaries.",
    ),
}


# As COMPILER_OPTIONS, for a step whose optimizer's moments stand in host memory (execution.offload_optimizer).
OFFLOAD_OPTIONS = {
    "xla_gpu_memory_limit_slop_factor": (
        190,
        ("gpu",),
        "Percent of a GPU's memory that XLA plans with; its own are 95. It counts what stands in host memory, too, and "
        "computes products again to save what is not short. Nemotron 3 Nano on eight H100, 29 GiB of moments: 11 % "
        "fewer FLOPs outside of the experts' kernels for 0.3 GiB of the GPU's memory (docs/hybrid.md).",
    ),
}


def prepare() -> None:
    """Re-executes the running program with SETTINGS, once; returns if nothing is missing or there is an accelerator."""
    reserve_gpu_memory()
    if has_accelerator():
        return
    missing = {
        name: value
        for name, (value, platform, _) in SETTINGS.items()
        if sys.platform == platform and name not in os.environ
    }
    if missing and not {"BIGMAC_KEEP_ENV", "BIGMAC_PREPARED"} & os.environ.keys():
        os.execve(
            sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing, "BIGMAC_PREPARED": "1"}
        )


@functools.cache
def software_versions() -> dict[str, str]:
    """Versions of the software that decides a run's numbers, and a digest of this package's code."""
    import hashlib  # here, so that a command has its signal handlers soon
    import importlib.metadata
    import platform

    code, package = hashlib.sha256(), pathlib.Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        if package / "configs" not in path.parents:  # which a wheel has, and a checkout has elsewhere
            code.update(path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy", "grain")}
    return {"Python": platform.python_version()} | versions | {"bigmac_jax's code": code.hexdigest()[:12]}


def has_accelerator() -> bool:
    """Whether jax will run on a GPU or a TPU, as far as can be seen before it is loaded."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] != "cpu"
    return any(glob.glob(pattern) for pattern in _DEVICE_FILES)


def compiler_options(
    device: Any,
    overlap: bool = False,
    ragged: bool = False,
    offload: bool = False,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The compiler's options for a `jax.Device`: those that were given over the defaults.

    Args:
      overlap, ragged, offload: as for `default_options`.
      given: execution.compiler_options.
    """
    defaults = {} if "BIGMAC_KEEP_ENV" in os.environ else default_options(device, overlap, ragged, offload)
    return {name: value for name, (value, _) in defaults.items()} | dict(given or {})


def default_options(device: Any, overlap: bool, ragged: bool, offload: bool) -> dict[str, tuple[Any, str]]:
    """The COMPILER_OPTIONS for a `jax.Device`, each with its reason.

    Args:
      overlap: for a step whose exchange goes in chunks: adds OVERLAP_OPTIONS.
      ragged: for a step with ragged exchanges: leaves out RAGGED_UNSAFE.
      offload: for a step whose moments stand in host memory: adds OFFLOAD_OPTIONS.
    """
    kinds = {device.platform, device.device_kind}
    options = COMPILER_OPTIONS | (OVERLAP_OPTIONS if overlap else {}) | (OFFLOAD_OPTIONS if offload else {})
    found = {name: (value, why) for name, (value, where, why) in options.items() if kinds & set(where)}
    return {name: value for name, value in found.items() if not (ragged and name in RAGGED_UNSAFE)}


def reserve_gpu_memory() -> None:
    """Gives this process GPU_MEMORY of each GPU, which jax asks for when it begins; what is set already stays.

    jax's own share is 0.75: 59 of an H100's 79 GiB. What is left is for the driver, NCCL and cuDNN.
    """
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # jax's, and what it was called before
    if glob.glob(_DEVICE_FILES[0]) and not {"BIGMAC_KEEP_ENV", *names} & os.environ.keys():
        os.environ[names[0]] = str(GPU_MEMORY)
