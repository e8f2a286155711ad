"""What the planner says of drops is what the study of distributions measured."""

import io
import json
import pathlib

import numpy as np
import pytest
from rich.console import Console

from benchmarks.distributions import pages
from benchmarks.distributions.grid import CAPACITY, STUDIES
from bigmac_jax.config import load_config
from bigmac_jax.planning import drops, report
from bigmac_jax.planning.plan import Request, make_plan

ROOT = pathlib.Path(__file__).parents[2]


def test_the_figures_are_those_of_the_study() -> None:
    runs = json.loads((ROOT / "docs/results/distributions.json").read_text())["runs"]
    assert drops.FACTOR == CAPACITY
    conditions = [c for c in STUDIES["shift"] if c.structure == "recipe" and c.then == ("code",)]
    assert set(drops.MEASURED) == {condition.balance for condition in conditions}
    for condition in conditions:
        seeds = pages.of(condition, runs)
        assert len(seeds) == 3
        _, shifted, steady = np.mean([pages.drops(run) for run in seeds], axis=0) / 100
        assert drops.MEASURED[condition.balance] == pytest.approx((steady, shifted), abs=0.0006)


def test_drops_around_a_shift_by_hand() -> None:
    """Of twenty records the tenth before the shift is two, and so is the one after it and the last one."""
    rates = [0.5] * 8 + [0.02, 0.04] + [0.3, 0.6] + [0.9] * 6 + [0.01, 0.03]
    run = {"steps": 100, "step": list(range(5, 101, 5)), "series": {"drop_rate": rates}}
    assert pages.drops(run) == pytest.approx((3.0, 60.0, 2.0))


def test_where_nothing_is_dropped_nothing_is_said() -> None:
    config = load_config(f"{ROOT}/configs/tiny.py", ("model.capacity_factor=1.5", "model.balance=bias"))
    found = drops.drops(config)
    assert found is not None and list(found["by_balance"]) == ["bias", "quantile"] and found["at_factor"] == 1.25
    made = make_plan(config, Request(devices=1))
    assert made["drops"] == found
    console = Console(file=io.StringIO(), width=400, highlight=False)
    report.show(made, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "with balance=bias 2.1 %, or 54.8 % just after the text changes; with balance=quantile 1.2 %, or" in said
    for field in ("model.capacity_factor=inf", "execution.exchange=ragged", "model.structure=dense"):
        assert drops.drops(load_config(f"{ROOT}/configs/tiny.py", ("model.capacity_factor=1.5", field))) is None
