"""What docs/quality.md compares, what is read of a run, and the line that is drawn through gaps."""

import json
import pathlib

import numpy as np
import pytest

from benchmarks.quality import pages
from benchmarks.quality.grid import STUDIES, Condition
from benchmarks.quality.runs import describe, read

COMPARED = {c for study in ("norms", "longer", "ratios", "width 64", "width 256") for c in STUDIES[study]}
OTHER_SIZES = ("eff 1/4", "acc 1/4")  # LatentMoE's own


@pytest.mark.parametrize("width", [64, 128, 256])
def test_moe_parameters_are_equal(width: int) -> None:
    """To the last one: W↓, W↑ and W_g are paid for by narrower experts."""
    same = [c for c in COMPARED if c.width == width and not c.name.startswith(OTHER_SIZES)]
    assert len(same) > 5
    assert {describe(c, 1)["moe_parameters"] for c in same} == {3 * 64 * 2 * width * width // 4}


def test_a_run_belongs_to_one_condition() -> None:
    for study, conditions in STUDIES.items():
        keys = [c.key(seed) for c in conditions for seed in c.seeds]
        assert len(keys) == len(set(keys)), study


def test_the_gap_at_another_width() -> None:
    """Of gaps that lie on a line, that line; runs of fewer steps don't count, whatever their width."""
    conditions = {c for study in pages.OF_WIDTHS for c in STUDIES[study]}
    losses = {"fine_grained": lambda h: 4.0, "bigmac 1/4, skip": lambda h: 4.5 - 0.01 * np.log2(h)}
    runs = [
        {"name": c.name, "width": c.width, "steps": c.steps, "seed": seed, "loss": losses[c.name](c.width) + noise}
        for c in conditions
        if c.name in losses
        for seed, noise in enumerate((-0.001, 0.001))
    ]
    gaps = pages.gaps(runs)["bigmac 1/4, skip"]
    assert [gap[:2] for gap in gaps] == [(64, 1000), (64, 2400), (128, 1000), (128, 2400), (256, 2500)]
    said = pages.extrapolated("x", [*gaps, (128, 100, 9.0, 0.1), (512, 1000, 9.0, 0.1)])
    assert "at h = 2,048 is +0.390 ± 0.00" in said and "changes -0.010 ± 0.00" in said


def test_what_a_gap_is_worth() -> None:
    """A quarter more tokens are a fifth of the time, which three quarters of an exchange of 26.7 % are.

    Against half of the bytes: 1.25 · (1 - 3/4 x) = 1 - 1/2 x at x = 4/7.
    """
    quarter, half = pages.Cost(wire=0.25), pages.Cost(wire=0.5)
    assert pages.break_even(np.log(1.25), quarter) == pytest.approx((0.25, 0.2 / 0.75))
    assert pages.break_even(np.log(1.25), quarter, half)[1] == pytest.approx(4 / 7)
    assert pages.break_even(np.log(2.5), quarter, half)[1] > 1  # whatever the network
    assert pages.break_even(np.log(0.8), quarter)[1] < 0
    # A tenth more FLOPs and as many tokens: 1.1 · (1 - x) + 1/4 x = 1 at x = 2/17.
    assert pages.break_even(0.0, pages.Cost(0.25, 1.1)) == pytest.approx((0.0, 2 / 17))
    both = pages.Cost(0.25, 1.1), pages.Cost(0.5, 1.2)
    more, share = pages.break_even(np.log(1.25), *both)
    assert (1 + more) * both[0].seconds(share) == pytest.approx(both[1].seconds(share))
    wire = {"fine_grained": 8, "bigmac 1/4, skip": 2, "bigmac 1/2": 4, "fine_grained, norm": 8, "acc 1/4, skip": 8}
    off = dict.fromkeys(wire, 0.0) | {"bigmac 1/4, skip": np.log(1.25), "bigmac 1/2": -0.1}
    runs = [
        {
            "name": name,
            "width": 128,
            "steps": steps,
            "seed": seed,
            "loss": 9.0 - np.log(steps) + more + noise,
            "wire_bytes": wire[name],
            "flops": 1e6,
        }
        for name, more in off.items()
        for steps in (1000, 2400)
        for seed, noise in enumerate((-0.01, 0.01)[: 1 if "norm" in name else 2])  # of one seed no error is known
    ]
    rows = [line for line in pages.worth(runs).splitlines() if line.startswith("| bigmac")]
    assert rows == [
        "| bigmac 1/4, skip | fine_grained | 128 | 1,000 | +0.223 ± 0.014 | +25 % | 27 % |",
        "| bigmac 1/2 | fine_grained | 128 | 1,000 | -0.100 ± 0.014 | -10 % | always |",
        "| bigmac 1/4, skip | fine_grained | 128 | 2,400 | +0.223 ± 0.014 | +25 % | 27 % |",
    ]


def test_the_tables_of_what_is_shipped() -> None:
    """Losses 4 ± 0.1 and 3.8 ± 0.1, each of two seeds, are 0.2 ± 0.14 apart; what was not run is left empty.

    One seed is compared with the same seed, not with a mean.
    """
    losses = {
        ("fine_grained", 128, 1000): [3.9, 4.1],
        ("bigmac 1/4, skip, selected", 128, 1000): [3.7, 3.9],
        ("bigmac 1/4, skip", 128, 2400): [3.0],
        ("fine_grained", 128, 2400): [3.5],
        ("fine_grained, norm", 256, 2500): [2.0, 3.0],
        ("bigmac 1/2, skip, selected", 256, 2500): [2.25],
    }
    runs = [
        {"name": name, "width": width, "steps": steps, "seed": seed, "loss": loss}
        for (name, width, steps), seeds in losses.items()
        for seed, loss in enumerate(seeds)
    ]
    assert pages.shipped(runs).splitlines() == [
        "| h | steps | r = 1/4, over fine_grained | r = 1/4, over the control | r = 1/2, over fine_grained "
        "| r = 1/2, over the control |",
        "|---|---|---|---|---|---|",
        "| 128 | 1,000 | -0.200 ± 0.141 |  |  |  |",
        "| 256 | 2,500 |  |  |  | +0.250 |",
    ]
    rows = [line.split(" | ")[1:] for line in pages.recipe(runs).splitlines() if "skip" in line or "selection" in line]
    assert rows[:2] == [["", "-0.500 |"], ["-0.200 ± 0.141", " |"]]


def test_each_at_its_best_rate() -> None:
    """But not at one of fewer seeds, nor of what was not run at its width's own."""
    condition = Condition("x", {}, 256, 2500)
    losses = {"x": [3.0, 3.2], "x, rate × 2": [2.9, 3.1], "x, rate × 0.5": [2.0], "x, norm, rate × 2": [1.0, 1.0]}
    runs = [
        {"name": name, "width": 256, "steps": 2500, "loss": loss} for name, seeds in losses.items() for loss in seeds
    ]
    assert [run["loss"] for run in pages.tuned(condition, runs)] == [2.9, 3.1]
    assert [run["loss"] for run in pages.tuned(condition, runs[:2])] == [3.0, 3.2]
    assert pages.tuned(condition, runs[2:]) == []
    # Beside what was tried at one rate, it is at that.
    once = {"name": "y", "width": 256, "steps": 2500, "loss": 3.0}
    other = Condition("y", {}, 256, 2500)
    for ours, theirs in (condition, other), (other, condition):
        seeds = pages.compared(ours, theirs, [*runs, once])
        assert [seeds[0][0]["loss"], seeds[1][0]["loss"]] == [3.0, 3.0]


def test_what_nothing_beats() -> None:
    points = {"wide": (4.0, 1.0), "as wide": (4.0, 1.5), "cheap": (1.0, 2.0), "beaten": (2.0, 2.1), "half": (2.0, 1.2)}
    assert pages.front(points) == ["cheap", "half", "wide"]


def test_what_is_read_of_a_run(tmp_path: pathlib.Path) -> None:
    """Loads of every step that was logged, their mean over the last hundred; losses where it was evaluated."""
    logged = [{"step": step, "moe/load_cv": step / 1000, "moe/max_load": 2.0, "moe/drop_rate": 0.0}
              for step in range(100, 301, 50)]  # fmt: skip
    evaluated = [{"step": step, "eval/loss": 900 / step, "eval/bits_per_byte": 300 / step} for step in (150, 300)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*logged, *evaluated]))
    assert read(tmp_path) == {
        "loss": 3.0,
        "bits_per_byte": 1.0,
        "evaluations": [[150, 6.0], [300, 3.0]],
        "load_cv": 0.275,
        "max_load": 2.0,
        "loads": [[100, 0.1], [150, 0.15], [200, 0.2], [250, 0.25], [300, 0.3]],
        "drop_rate": 0.0,
    }
