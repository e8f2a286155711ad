"""Programs compiled for TPU pods that are not there; skipped where libtpu (the extra `tpu`) is not installed."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("libtpu", reason="make test-all installs it")
TESTS = pathlib.Path(__file__).parents[1]


def compiled(*arguments: str) -> dict[str, Any]:
    """What `tpu_program.py` reports, run by itself: the TPU compiler's platform must not meet the tests' own."""
    command = [sys.executable, "-m", "model.tpu_program", *arguments]
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "TPU_SKIP_MDS_QUERY": "1"}
    run = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_experts_are_a_kernel_with_the_useful_flops() -> None:
    """GPT3-XL's bigmac layer at ep = 32, forward and backward."""
    report = compiled("all_to_all", "1.05")
    assert report["kernels"] >= 6  # two matmuls, forward; and of their inputs and weights, backward
    assert 1 <= report["flops"] / report["useful_flops"] < 1.1
    # Less than one bfloat16 array of tokens × experts × wire width.
    assert report["largest_bytes"] < 16384 * 64 * 512 * 2 / 4


def test_the_real_ragged_exchange_compiles_with_its_gradient() -> None:
    report = compiled("ragged", "inf")
    assert report["ragged_all_to_alls"] == 4
