"""What a notebook calls: a run in one call, and its record as columns."""

import json
import pathlib

import jax
import numpy as np
import pytest
from training.tools import small

import bigmac_jax
from bigmac_jax.config import ConfigError
from bigmac_jax.planning.place import Request
from bigmac_jax.planning.planner import make_plan
from bigmac_jax.run import loop


@pytest.mark.full
def test_a_run_and_its_record(tmp_path: pathlib.Path) -> None:
    config = small(tmp_path, "train.steps=4", "train.log_every=2", "train.eval_every=3")
    before = jax.sharding.get_mesh()
    first = bigmac_jax.train(config, tmp_path / "run")
    again = bigmac_jax.train(config, str(tmp_path / "run"))
    assert (first.step, first.finished, again.first_step) == (4, True, 4)
    assert jax.sharding.get_mesh() == before  # of the run alone
    columns = bigmac_jax.metrics(tmp_path / "run")
    assert columns["step"].tolist() == [2, 3, 4] and columns["step"].dtype.kind == "i"
    assert np.isnan(columns["loss"]).tolist() == [False, True, False]
    assert np.isnan(columns["eval/loss"]).tolist() == [True, False, False]
    assert columns["moe/load"].shape == (3, 1, 8) and np.isnan(columns["moe/load"][1]).all()
    np.testing.assert_allclose(columns["moe/load"][0].mean(), 1, rtol=1e-3)


def test_columns_of_a_record(tmp_path: pathlib.Path) -> None:
    """Events and starts are no rows, what is not finite is NaN, a step's records are one row."""
    with pytest.raises(ConfigError, match=r"has logged no step in metrics\.jsonl"):
        bigmac_jax.metrics(tmp_path)
    records = [
        {"step": 1, "loss": float("nan")},
        {"step": 1, "event": "skip", "bad/loss": 9.0},
        {"step": 2, "loss": 1},
        {"step": 2, "eval/loss": 3.0},
        {"step": 2, "tasks/copa/accuracy": 0.5},
        {"step": 0, "start/compile_s": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records) + '{"step": 3, "lo'
    )
    columns = bigmac_jax.metrics(tmp_path)
    assert list(columns) == ["step", "loss", "eval/loss", "tasks/copa/accuracy"]
    np.testing.assert_array_equal(columns["step"], [1, 2])
    np.testing.assert_array_equal(columns["loss"], [np.nan, 1])
    np.testing.assert_array_equal(columns["eval/loss"], [np.nan, 3])


@pytest.mark.parametrize(
    ("place", "part"),
    [("s3://bucket/run", "can't be on S3, where Orbax writes no checkpoints"), ("", "is empty; give a")],
)
def test_where_no_run_can_be(place: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        bigmac_jax.train(bigmac_jax.load_config("tiny"), place)


def test_a_plan_is_that_of_the_command() -> None:
    config = bigmac_jax.load_config("tiny")
    asked = bigmac_jax.plan(config, topology="h100:1x8")
    assert asked == make_plan(config, Request(topology="h100:1x8")) and asked["fits"]
    with pytest.raises(ConfigError, match=r"plan\(topologie=…\) is not known; use devices, topology"):
        bigmac_jax.plan(config, topologie="h100:1x8")


def test_rows_are_in_order_and_of_what_was_logged(tmp_path: pathlib.Path) -> None:
    """An evaluation or a task alone is a row, arrays are NaN where there are none, and integers stay integers."""
    load = [[1.5, 0.5], [1.25, 0.75]]
    records = [
        {"step": 4, "eval/loss": 3.0},
        {"step": 6, "tasks/copa/accuracy": 0.5, "tasks/copa/rows": 9},
        {"step": 2, "loss": 5.0, "tokens": 64, "moe/load": load},
        {"step": 4, "loss": 4.0, "tokens": 128, "eval/loss": 3.5},
        {"step": 3, "mtp/loss": 1.0, "event": "rewind"},
    ]
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(text)
    columns = bigmac_jax.metrics(tmp_path)
    assert columns["step"].tolist() == [2, 4, 6] and columns["step"].dtype.kind == "i"
    assert columns["tokens"].dtype == columns["loss"].dtype == float
    np.testing.assert_array_equal(columns["tokens"], [64, 128, np.nan])
    np.testing.assert_array_equal(columns["eval/loss"], [np.nan, 3.5, np.nan])  # what came last
    np.testing.assert_array_equal(columns["tasks/copa/rows"], [np.nan, np.nan, 9])
    np.testing.assert_array_equal(columns["moe/load"], [load, np.full((2, 2), np.nan), np.full((2, 2), np.nan)])
    assert "mtp/loss" not in columns and "event" not in columns


def test_a_run_in_a_notebook_is_on_the_mesh_of_its_config(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The loop is given the config and the folder; the mesh is there for the run alone."""
    config, before = small(tmp_path, "mesh.data=2", "mesh.expert=2", "optimizer.momentum=0.5"), jax.sharding.get_mesh()
    given: list[object] = []

    def run(*of: object) -> str:
        given.extend([*of, dict(jax.sharding.get_mesh().shape)])
        return "a result"

    monkeypatch.setattr(loop, "train", run)
    assert bigmac_jax.train(config, str(tmp_path / "run")) == "a result"
    assert given[:2] == [config, tmp_path / "run"] and jax.sharding.get_mesh() == before
    assert given[2] == {"replica": 1, "data": 2, "node": 1, "expert": 2, "tensor": 1}
    assert ["optimizer.momentum" in record.getMessage() for record in caplog.records] == [True]
