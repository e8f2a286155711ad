"""A run whose experts' capacity drops much says so in one line: not at once, not for ever, and not where none can."""

import math
import pathlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from run.test_loop import run

from bigmac_jax.config import Config, ExecutionConfig, ModelConfig
from bigmac_jax.training import drop_notice
from bigmac_jax.training.drop_notice import DropNotice

from .tools import small

FULL = Config(model=ModelConfig(capacity_factor=1.25))


def said(config: Config, rates: list[float], first: int = 1) -> dict[int, str]:
    """By step; a step's rate is the mean of two layers'."""
    notice = DropNotice(config)
    found = {}
    for step, rate in enumerate(rates, first):
        metrics: Any = SimpleNamespace(parts=SimpleNamespace(aux=SimpleNamespace(drop_rate=np.asarray([0, 2 * rate]))))
        if line := notice.line(step, metrics):
            found[step] = line
    return found


def test_a_run_that_goes_on_dropping_says_so_a_few_times() -> None:
    lines = said(FULL, [0.17] * 2000)
    assert list(lines) == [100, 200, 400, 800, 1600]
    line = lines[100]
    assert "\n" not in line and line.startswith("step 100: of the last 100 steps' choices 17.0% were dropped")
    for part in ("model.capacity_factor=1.25", "model.capacity_factor=inf", "execution.buffer_factor=auto"):
        assert part in line
    assert list(said(FULL, [0.17] * 250, first=5001)) == [5100, 5200]  # once more after each start


def test_the_rate_is_of_a_hundred_steps() -> None:
    assert not said(FULL, [0.17] * 99)
    assert not said(FULL, [0.019] * 1000)
    assert not said(FULL, [drop_notice.MOST] * 100) and list(said(FULL, [0.0201] * 100)) == [100]
    assert not said(FULL, [0.15] * 10 + [0.0] * 990)  # 1.5 % of the first hundred
    assert list(said(FULL, [0.0] * 500 + [0.03] * 100)) == [570]
    lines = said(FULL, [0.4] * 100 + [0.0] * 900)  # what was said of the first steps is not said of the last
    assert list(lines) == [100]
    assert "40.0%" in lines[100]


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(model=ModelConfig("dense", capacity_factor=1.25)),
        Config(model=FULL.model, execution=ExecutionConfig(exchange="ragged")),
    ],
    ids=["dropless", "dense", "an exchange that drops none"],
)
def test_where_nothing_can_be_dropped_nothing_is_read(config: Config) -> None:
    assert not said(config, [math.nan] * 200)


@pytest.mark.full
def test_training_says_it_without_logging(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drop_notice, "_STEPS", 4)
    monkeypatch.setattr(drop_notice, "_EVERY", 2)
    run(small(tmp_path, "model.capacity_factor=0.5", "train.log_every=0", "train.eval_every=0"), tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if "dropped" in line]
    assert len(lines) == 1 and lines[0].startswith("step 4: of the last 4 steps' choices ")
