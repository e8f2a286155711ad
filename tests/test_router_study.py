"""What docs/routers.md's study reads of a run, and its table, by hand."""

import json
import pathlib

import pytest

from benchmarks.router_runs import CHOICES, Condition, conditions, read, table
from bigmac_jax.config import load_config
from bigmac_jax.training.choices import choices_at


def test_arms() -> None:
    """Six, whose configs are valid; half of them begin with half of the choices, and end with all."""
    arms = conditions(1000)
    assert len({arm.key(1) for arm in arms}) == 6 == len({arm.name for arm in arms})
    for arm in arms:
        config = load_config("configs/tiny.py", arm.overrides(3))
        assert (config.model.router, config.model.top_k, config.train.seed) == (arm.router, CHOICES, 3)
        ends = [choices_at(config, done) for done in (0, 999)]  # type: ignore[arg-type]
        assert [end if end is None else int(end) for end in ends] == ([4, 8] if arm.grows else [None, None])


def test_what_is_read_of_a_run(tmp_path: pathlib.Path) -> None:
    """Two layers of two experts. Above 1.25 times the mean are 0.75 and 0.25 of two experts at step 200, and nothing at
    step 110; step 100 is too long ago."""
    loads = {100: [[2, 0], [2, 0]], 110: [[1.2, 0.8], [1, 1]], 200: [[2, 0], [0.5, 1.5]]}
    records = [
        {"step": step, "loss": 2.0, "moe/load": load, "moe/router_entropy": 0.5, "moe/max_load": 1.5}
        for step, load in loads.items()
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [{"step": 0}, *records]))
    found = read(tmp_path)
    assert found["would_drop"] == pytest.approx((0.75 + 0.25) / 8, abs=1e-4)
    assert found["max_load_in_training"] == pytest.approx((1.2 + 1 + 2 + 1.5) / 4)
    assert found["losses"] == [[100, 2.0], [110, 2.0], [200, 2.0]]


def test_table() -> None:
    """Means and standard errors of two seeds; the difference is of equal seeds: 0.1 and 0.3."""

    def run(router: str, seed: int, loss: float) -> dict[str, object]:
        name = Condition(router, False, 1000).name
        rest = {"loss_of_half": loss + 1, "entropy": 2.0, "max_load": 3.0, "would_drop": 0.125}
        return {"name": name, "seed": seed, "loss": loss} | rest

    lines = table([run("linear", 1, 4.0), run("linear", 2, 4.2), run("hyper", 1, 4.1), run("hyper", 2, 4.5)]).split(
        "\n"
    )
    assert len(lines) == 4
    assert "linear, 8 choices | 2 | 4.1000 ± 0.1000 |  | 5.1000 ± 0.1000 | 2.00 ± 0.00" in lines[2]
    assert "hyper, 8 choices | 2 | 4.3000 ± 0.2000 | +0.2000 ± 0.1000 |" in lines[3] and "| 12.5 % |" in lines[3]
