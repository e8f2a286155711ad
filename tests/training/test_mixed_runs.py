"""A run on a mixture: what it logs, that it goes on bit for bit, and with other weights."""

import logging
import pathlib

import chex
import pytest

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.run.loop import train

from .tools import leaves_of, of_training, read_records, small, text

pytestmark = pytest.mark.full


def mixed(folder: pathlib.Path, mixture: str, *overrides: str) -> Config:
    (folder / "a.txt").write_text("".join(text(20, 7)))
    (folder / "b.txt").write_text("".join(text(6, 8)).upper())
    mixture = mixture.replace("a=", f"{folder}/a.txt=").replace("b=", f"{folder}/b.txt=")
    return small(folder, "data.source=sotu", f"data.mixture={mixture}", "data.validation_source=", "data.test_source=",
                 "optimizer.decay_steps=30", *overrides)  # fmt: skip


def run(config: Config, workdir: pathlib.Path) -> list[dict]:
    import jax

    with jax.set_mesh(make_mesh(config)):
        train(config, workdir)
    return read_records(workdir)


def test_bit_for_bit_and_with_other_weights(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    config = mixed(tmp_path, "a=3,b=1x9", "data.curriculum=5:b=1", "train.steps=8")
    records = run(config, tmp_path / "one")
    assert [r["tokens/a"] for r in records if "loss" in r] == [96, 192, 288, 384, 480, 480, 480, 480]
    assert [r["tokens/b"] for r in records if "loss" in r][-1] == 32 * 5 + 128 * 3
    (score, *_) = [r for r in records if "eval/loss" in r]
    assert min(score["eval/loss/a"], score["eval/loss/b"]) < score["eval/loss"] < max(
        score["eval/loss/a"], score["eval/loss/b"]
    )  # fmt: skip

    first = mixed(tmp_path, "a=3,b=1x9", "data.curriculum=5:b=1", "train.steps=4")
    run(first, tmp_path / "two")
    again = run(config, tmp_path / "two")
    chex.assert_trees_all_equal(*(leaves_of(config, tmp_path / name, 8) for name in ("one", "two")))
    last = [next(of_training(r) for r in records_ if r["step"] == 8 and "loss" in r) for records_ in (records, again)]
    assert last[0] == last[1]

    changed = mixed(tmp_path, "b=3,a=1", "train.steps=10")
    records = run(changed, tmp_path / "two")
    assert "data.mixture" in caplog.text and "each source goes on where it was" in caplog.text
    assert next(r["tokens/a"] for r in records if r["step"] == 10 and "loss" in r) == 480 + 2 * 32
    (tmp_path / "b.txt").write_text("something else " * 300)
    with pytest.raises(ConfigError, match="holds other data than this workdir was started with"):
        run(small(tmp_path, "data.source=sotu", f"data.mixture={tmp_path}/b.txt=3,{tmp_path}/a.txt=1",
                  "data.validation_source=", "data.test_source=", "optimizer.decay_steps=30", "train.steps=12"),
            tmp_path / "two")  # fmt: skip


def test_a_source_that_would_be_used_up(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(ConfigError, match=r"b\.txt would be read .* at most 1 times"):
        run(mixed(tmp_path, "a=1,b=1x1", "train.steps=60"), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
