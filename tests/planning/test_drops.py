"""What the planner says of drops is what the study of distributions measured."""

import io
import json
import math
import pathlib
import re

import numpy as np
import pytest
from rich.console import Console

from benchmarks.distributions import pages
from benchmarks.distributions.grid import ALL, CAPACITY, Condition
from bigmac_jax.config import load_config
from bigmac_jax.planning import drops, report
from bigmac_jax.planning.place import Request
from bigmac_jax.planning.planner import make_plan

ROOT = pathlib.Path(__file__).parents[2]


def test_the_figures_are_those_of_the_study() -> None:
    runs = json.loads((ROOT / "docs/results/distributions.json").read_text())["runs"]
    assert drops.FACTOR == CAPACITY
    for balance, said in drops.MEASURED.items():
        shifting = pages.of(Condition("recipe", ("old",), ("code",), balance), runs)
        mixed = pages.of(Condition("recipe", ALL, balance=balance), runs)
        assert len(shifting) == 3
        _, shifted, one = np.mean([pages.drops(run) for run in shifting], axis=0) / 100
        assert (said.one, said.shifted) == pytest.approx((one, shifted), abs=0.0006)
        if said.mixed is None:
            assert len(mixed) < 3
        else:
            assert len(mixed) == 3
            assert said.mixed == pytest.approx(np.mean([run["drop_rate"] for run in mixed]), abs=0.0006)


def test_drops_around_a_shift_by_hand() -> None:
    """Of twenty records the tenth before the shift is two, and so is the one after it and the last one."""
    rates = [0.5] * 8 + [0.02, 0.04] + [0.3, 0.6] + [0.9] * 6 + [0.01, 0.03]
    run = {"steps": 100, "step": list(range(5, 101, 5)), "series": {"drop_rate": rates}}
    assert pages.drops(run) == pytest.approx((3.0, 60.0, 2.0))
    assert pages.steps_back(run, 30.0) == 5 and pages.steps_back(run, 29.0) == 45
    assert math.isnan(pages.steps_back(run, 0.5))


def test_where_nothing_is_dropped_nothing_is_said() -> None:
    config = load_config(f"{ROOT}/configs/tiny.py", ("model.capacity_factor=1.5", "model.balance=bias"))
    found = drops.measured_drops(config)
    assert found is not None and found["balance"] == "bias" and list(found["measured"]) == list(drops.MEASURED)
    made = make_plan(config, Request(devices=1))
    assert made["drops"] == found
    output = io.StringIO()
    report.show(made, Console(file=output, width=200, highlight=False))
    rows = [line.replace("│", " ").split() for line in output.getvalue().splitlines()]
    assert ["bias", "(configured)", "2.1", "%", "5.3", "%", "54.8", "%"] in rows
    assert ["none", "26.0", "%", "60.8", "%"] in rows
    assert "not measured" not in output.getvalue()
    fields = ("model.capacity_factor=1.5", "model.balance=quantile", "model.balance_step=same")
    same = load_config(f"{ROOT}/configs/tiny.py", fields)
    report.show(make_plan(same, Request(devices=1)), Console(file=output, width=200, highlight=False))
    assert re.search(r"quantile, balance_step=same \(configured\) +│ +not measured ", output.getvalue())
    moving = drops.measured_drops(load_config(f"{ROOT}/configs/tiny.py", (*fields[:1], "model.overflow=next")))
    assert moving is not None and moving["balance"] == "aux_loss, overflow=next"
    for field in (
        "model.capacity_factor=inf",
        "execution.exchange=ragged",
        "execution.exchange=dedup",
        "model.structure=dense",
    ):
        assert (
            drops.measured_drops(load_config(f"{ROOT}/configs/tiny.py", ("model.capacity_factor=1.5", field))) is None
        )


def test_a_searchs_notes_have_it() -> None:
    config = load_config("tiny", ["model.capacity_factor=1.25", "mesh.expert=4", "data.batch_size=64"])
    best = make_plan(config, Request(topology="h100:1x4", search=True))["best"]
    assert any("and nothing is dropped" in note for note in best["notes"])
