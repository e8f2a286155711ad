"""Which compiler options a device gets, and how much of a GPU's memory a process."""

import fnmatch
import os
import pathlib
import sys
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from bigmac_jax.planning.hardware import load_hardware
from bigmac_jax.runtime import environment
from bigmac_jax.runtime.environment import compiler_options

ASYNC = {"xla_tpu_enable_async_all_to_all": True}
SPARSE_CORES = {  # gathers of parameters, sums of gradients, and ragged exchanges
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_all_gather_offload_tracing": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_reduce_scatter_offload_tracing": True,
    "xla_tpu_enable_sparse_core_collective_offload_ragged_all_to_all": True,
}
V6E = ASYNC | SPARSE_CORES
FUSION = {"xla_tpu_multi_output_fusion_limit": 3}
LIMIT = {"xla_gpu_memory_limit_slop_factor": 190}
HIDING = {"xla_gpu_enable_latency_hiding_scheduler": True}
SPLIT = {"xla_gpu_dot_merger_threshold_mb": 0, "xla_disable_hlo_passes": "multi_output_fusion"}


def test_a_checkout_and_a_wheel_have_the_same_code(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel has the shipped configs inside of the package."""

    def code(name: str, content: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        return environment.software_versions.__wrapped__()["bigmac_jax's code"]

    monkeypatch.setattr(environment, "__file__", str(tmp_path / "runtime" / "environment.py"))
    checkout = code("runtime/environment.py", "a = 1\n")
    assert code("configs/tiny.py", "b = 1\n") == checkout
    assert code("runtime/clock.py", "c = 1\n") != checkout


@pytest.mark.parametrize(
    ("platform", "kinds", "always", "in_chunks", "ragged"),
    [
        ("tpu", ("TPU v4", "TPU v5", "TPU v5p", "TPU7x"), ASYNC, FUSION, ASYNC),
        ("tpu", ("TPU v6 lite",), V6E, FUSION, V6E),
        ("tpu", ("TPU v5 lite", "TPU v3"), {}, {}, {}),
        ("gpu", ("NVIDIA H100 80GB HBM3",), HIDING, SPLIT, {}),
        ("cpu", ("cpu",), {}, {}, {}),
    ],
)
def test_compiler_options(
    platform: str, kinds: tuple[str, ...], always: Any, in_chunks: Any, ragged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BIGMAC_KEEP_ENV", raising=False)
    for kind in kinds:
        device = SimpleNamespace(platform=platform, device_kind=kind)
        assert compiler_options(device) == always
        assert compiler_options(device, overlap=True) == always | in_chunks
        assert compiler_options(device, ragged=True) == ragged
        assert compiler_options(device, overlap=True, ragged=True) == ragged | in_chunks
        assert compiler_options(device, offload=True) == always | (LIMIT if platform == "gpu" else {})
    if platform == "gpu":  # every build of XLA knows the GPU's options, and refuses a name that it doesn't know
        options = compiler_options(device, overlap=True, offload=True)
        jax.jit(lambda x: x + 1, compiler_options=options).lower(1.0).compile()
    given = {"xla_tpu_enable_async_all_to_all": False, "xla_other": 3}
    assert compiler_options(SimpleNamespace(platform="tpu", device_kind="TPU v4"), given=given) == given
    monkeypatch.setenv("BIGMAC_KEEP_ENV", "1")
    assert compiler_options(device, overlap=True) == {}
    assert compiler_options(device, given=given) == given


@pytest.mark.parametrize(
    ("devices", "given", "expected"),
    [
        (["/dev/nvidia0"], {}, "0.94"),
        ([], {}, None),
        (["/dev/nvidia0"], {"XLA_CLIENT_MEM_FRACTION": "0.5"}, "0.5"),
        (["/dev/nvidia0"], {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, None),  # jax refuses both
        (["/dev/nvidia0"], {"BIGMAC_KEEP_ENV": "1"}, None),
    ],
)
def test_memory_of_a_gpu(
    devices: list[str], given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "BIGMAC_KEEP_ENV"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(environment.glob, "glob", lambda pattern: devices if "nvidia" in pattern else [])
    monkeypatch.setenv("JAX_PLATFORMS", "cuda" if devices else "cpu")
    monkeypatch.setattr(environment, "SETTINGS", {})
    environment.prepare()
    assert os.environ.get("XLA_CLIENT_MEM_FRACTION") == expected


def test_it_is_what_plans_reckon_with() -> None:
    """Bytes of the devices as their drivers say them (nvidia-smi, MiB)."""
    for name, mebibytes in {"h100": 81_559, "h200": 143_771, "b200": 183_359, "gb200": 189_471}.items():
        assert load_hardware(name).memory_bytes <= environment.GPU_MEMORY * mebibytes * 2**20


@pytest.mark.parametrize(
    ("platforms", "devices", "expected"),
    [
        ("cpu", ["/dev/nvidia0"], False),
        ("cpu,cuda", ["/dev/nvidia0"], False),
        ("cuda,cpu", [], True),
        ("tpu", [], True),
        ("", [], False),
        ("", ["/dev/accel0"], True),
        ("", ["/dev/vfio/0"], True),
    ],
)
def test_whether_there_is_an_accelerator(
    platforms: str, devices: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first platform that jax is told decides; without one, the files of devices do."""
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(environment.glob, "glob", lambda pattern: fnmatch.filter(devices, pattern))
    assert environment.has_accelerator() is expected


@pytest.mark.parametrize(
    ("given", "system", "again"),
    [
        ({}, "linux", True),
        ({}, "darwin", False),
        ({"GLIBC_TUNABLES": ""}, "linux", False),
        ({"BIGMAC_KEEP_ENV": "1"}, "linux", False),
        ({"BIGMAC_PREPARED": "1"}, "linux", False),
        ({"JAX_PLATFORMS": "cuda"}, "linux", False),
    ],
)
def test_a_program_begins_again_once(
    given: dict[str, str], system: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same arguments, and with what is missing in its environment."""
    begun: list[tuple[Any, ...]] = []
    for name in ("GLIBC_TUNABLES", "BIGMAC_KEEP_ENV", "BIGMAC_PREPARED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"JAX_PLATFORMS": "cpu"} | given).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(environment.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(os, "execve", lambda *asked: begun.append(asked))
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "program", "--flag"])
    environment.prepare()
    settings = {name: value for name, (value, *_) in environment.SETTINGS.items()}
    wanted = {**os.environ, **settings, "BIGMAC_PREPARED": "1"}
    assert begun == ([(sys.executable, [sys.executable, "-m", "program", "--flag"], wanted)] if again else [])
