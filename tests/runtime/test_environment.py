"""Which compiler options a device gets."""

from types import SimpleNamespace
from typing import Any

import pytest

from bigmac_jax.runtime.environment import compiler_options

ASYNC = {"xla_tpu_enable_async_all_to_all": True}
FUSION = {"xla_tpu_multi_output_fusion_limit": 3}
HIDING = {"xla_gpu_enable_latency_hiding_scheduler": True}
SPLIT = {"xla_gpu_dot_merger_threshold_mb": 0, "xla_disable_hlo_passes": "multi_output_fusion"}


@pytest.mark.parametrize(
    ("platform", "kinds", "always", "in_chunks", "ragged"),
    [
        ("tpu", ("TPU v4", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU7x"), ASYNC, FUSION, ASYNC),
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
    monkeypatch.setenv("BIGMAC_KEEP_ENV", "1")
    assert compiler_options(device, overlap=True) == {}
