"""GPT3-XL planned for a TPU pod that is not there; skipped where libtpu (the extra `tpu`) is not installed."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from bigmac_jax.config import ConfigError, load_config
from bigmac_jax.planning import topologies
from bigmac_jax.planning.place import Request
from bigmac_jax.planning.planner import make_plan

ROOT = pathlib.Path(__file__).parents[2]
HERE = topologies.importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HERE, reason="make test-all installs libtpu")


def planned(topology: str, parts: int, *overrides: str) -> dict[str, Any]:
    command = [
        sys.executable, "plan.py", "--config=configs/paper/gpt3_xl.py", "--config.mesh.expert=32", "--compile",
        "--json", f"--topology={topology}", "--config.execution.remat=layer", "--config.execution.overlap_chunks=4",
        f"--config.train.accumulate_steps={parts}", *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])["program"]


def test_without_libtpu_one_line_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    config = load_config(ROOT / "configs/paper/gpt3_xl.py", ("mesh.expert=32",))
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[tpu\]'"):
        make_plan(config, Request(topology="v6e:4x8", compile=True))


@needs_libtpu
@pytest.mark.full
def test_exchanges_are_asynchronous_and_hidden_as_far_as_they_can_be() -> None:
    made = planned("v6e:4x8", 4)
    schedule = made["schedule"]
    assert made["fits"] and made["compile_seconds"] < 600
    assert schedule["exchanges_in_a_layer"] == 24 and schedule["asynchronous_in_a_layer"] >= 22
    assert 0.8 <= schedule["reached_of_ceiling"] <= 1 and 0 < schedule["hidden_share"] <= schedule["ceiling"]
    assert made["exchange_sent_bytes"] * 32 == made["exchange_buffer_bytes"] * 31


@needs_libtpu
@pytest.mark.full
def test_v5e_says_that_it_has_no_asynchronous_exchange_and_what_does_not_fit() -> None:
    made = planned("v5e:4x8", 4)
    assert made["schedule"]["asynchronous_in_a_layer"] == 0 and "limited ICI" in made["schedule"]["note"]
    assert not made["fits"] and made["advice"]["change"] == "--config.train.accumulate_steps=8"
    assert made["advice"]["largest"][0]["bytes"] > 2**28


@needs_libtpu
@pytest.mark.full
def test_what_the_compiler_refuses_for_its_size() -> None:
    made = planned("v5e:4x8", 4, "--config.model.num_layers=30")
    assert not made["fits"] and made["change"] == "--config.train.accumulate_steps=8"
    assert "Ran out of memory" in made["compiler"]


@needs_libtpu
def test_a_slice_that_libtpu_does_not_know() -> None:
    with pytest.raises(ConfigError, match="not one that libtpu knows"):
        topologies.absent_devices(topologies.parse_topology("v6e:3x7"))
