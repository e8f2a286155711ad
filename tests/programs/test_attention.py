"""Attention's kernels, forward and backward, compiled for accelerators that are not there."""

import sys
from typing import Any

import pytest

from .running import TESTS, run_json

MIB = 2**20


def attention(topology: str, *cases: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Of cases (implementation, B, L, N, G, H, dtype, whether there are documents)."""
    texts = [",".join(map(str, case)) for case in cases]
    found = run_json([sys.executable, "-m", "programs.attention", topology, *texts], TESTS)
    return [found[text] for text in texts]


def flops(B: int, L: int, N: int, H: int) -> int:
    """Two products forward and seven backward, two of them again for each gradient; causal, so of half of L × L."""
    return (2 + 7) * 2 * B * N * L * L * H // 2


@pytest.mark.tpu
def test_memory_on_tpu_grows_with_the_length() -> None:
    """XLA's attention of the first needs 35 GiB, of the last 1.5 TiB."""
    batch, *rows = attention(
        "v6e:2x2",
        ("auto", 8, 4096, 16, 16, 128, "bfloat16", False),
        *(("auto", 1, length, 16, 16, 128, "bfloat16", True) for length in (32768, 131072)),
    )
    assert batch["beside"] < 1.5 * 1024 * MIB and batch["flops"] == flops(8, 4096, 16, 128)
    short, long = rows
    assert long["flops"] == flops(1, 131072, 16, 128)
    assert long["beside"] < 5 * short["beside"] and long["largest"] < 5 * short["largest"]
    for found in (batch, *rows):
        assert {"splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"} <= set(found["calls"])
        assert found["constants"] < MIB


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_heads_on_tpu(topology: str) -> None:
    """The longest blocks, with all sizes of heads; lengths that are no blocks."""
    cases = [("splash", 1, 2048, 4, 2, H, dtype, True) for H in (64, 96, 192, 256) for dtype in ("bfloat16", "float32")]
    cases += [("splash", 2, length, 4, 4, 64, "bfloat16", False) for length in (128, 1000, 1100)]
    for case, found in zip(cases, attention(topology, *cases), strict=True):
        assert found["calls"]["tpu_custom_call"] == 3, case


@pytest.mark.gpu
@pytest.mark.parametrize("topology", ["h100:1x8", "b200:1x8"])
def test_heads_on_gpu(topology: str) -> None:
    """In `auto`: cuDNN's where it takes the case, else Triton's, whose blocks fit into shared memory."""
    cases = [
        ("auto", 1, 2048, 4, 2, H, dtype, segmented)
        for H in (64, 96, 128, 256)
        for dtype in ("bfloat16", "float32")
        for segmented in (False, True)
    ]
    for case, found in zip(cases, attention(topology, *cases), strict=True):
        *_, H, dtype, segmented = case
        if dtype == "bfloat16" and H <= 128 and not segmented:
            assert {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"} <= set(found["calls"]), case
        else:
            assert found["calls"]["mha_forward"] == found["calls"]["mha_backward"] == 1, case
            assert found["flops"] == flops(1, 2048, 4, H), case


@pytest.mark.gpu
def test_memory_on_gpu_grows_with_the_length() -> None:
    short, long = attention("h100:1x8", *(("auto", 1, L, 16, 4, 128, "bfloat16", True) for L in (16384, 65536)))
    assert long["beside"] < 5 * short["beside"] and long["largest"] < 5 * short["largest"]
