"""Programs compiled for TPU pods that are not there; skipped where libtpu (the extra `tpu`) is not installed."""

import functools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("libtpu", reason="make test-all installs it")
TESTS = pathlib.Path(__file__).parents[1]
TOKENS = 8 * 2048  # of a rank


@functools.cache
def compiled(*arguments: str) -> dict[str, Any]:
    """What `tpu_program.py` reports, run by itself: the TPU compiler's platform must not meet the tests' own."""
    command = [sys.executable, "-m", "model.tpu_program", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_experts_are_a_kernel_with_the_useful_flops() -> None:
    """GPT3-XL's bigmac layer at ep = 32, forward and backward."""
    report = compiled("v5e:4x8", "all_to_all", "1.05", "1", "8")
    assert report["kernels"] == 6  # two matmuls, and the gradients of their inputs and weights
    assert 1 < report["flops"] / report["useful_flops"] < 1.1
    # XLA takes a kernel's FLOPs from its own estimate, so both parts are looked at: the capacity factor pads the
    # experts by 5 %, and what is not a kernel is the router, the projections and some elementwise work.
    assert 1.05 < report["kernel_flops"] / report["useful_kernel_flops"] < 1.055
    rest = {name: report[name] - report[name.replace("flops", "kernel_flops")] for name in ("flops", "useful_flops")}
    assert 1 < rest["flops"] / rest["useful_flops"] < 1.1


def test_nothing_of_tokens_by_experts_is_allocated() -> None:
    """The largest array is the experts' hidden rows, tokens × top-k × expert width."""
    report = compiled("v5e:4x8", "all_to_all", "1.05", "1", "8")
    assert report["largest_elements"] < 1.055 * TOKENS * 8 * 2048 < TOKENS * 64 * 512


def test_the_real_ragged_exchange_compiles_with_its_gradient() -> None:
    report = compiled("v6e:4x8", "ragged", "inf", "1", "1")
    assert report["ragged_all_to_alls"] == 4  # there and back, forward and backward
    assert report["kernels"] == 6


def test_auto_takes_no_ragged_exchange_on_v5e() -> None:
    """There it is 'not supported in limited ICI routing settings'."""
    report = compiled("v5e:4x8", "auto", "inf", "1", "1")
    assert report["ragged_all_to_alls"] == 0
    assert report["kernels"] == 6


def test_experts_compute_while_rows_are_on_the_wire() -> None:
    """Four chunks: in each direction all but the first dispatch and the last return can have company."""
    report = compiled("v6e:4x8", "all_to_all", "1.05", "4", "2")
    assert report["synchronous"] == 0
    for counts in report["kernels_meanwhile"].values():
        assert len(counts) == 8
        assert sum(count > 0 for count in counts) >= 4, counts
