"""A run that goes on with fewer replicas: the batch stays, in more parts, and one line says so."""

import dataclasses
import json
import math
import pathlib
import random
import re

import jax
import numpy as np
import pytest
from training.tools import leaves_of, read_records, small

from bigmac_jax.config import Config, ConfigError, DataConfig, MeshConfig, ModelConfig, TrainConfig, seal, unseal
from bigmac_jax.data.chat_files import NO_CHAT
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.run.elastic import fit_replicas
from bigmac_jax.run.loop import train
from bigmac_jax.training.workdir import resume_warnings, write_run


def config(mesh: MeshConfig, batch: int, parts: int) -> Config:
    data = DataConfig(tokenizer="bytes", batch_size=batch)
    return Config(mesh=mesh, data=data, train=TrainConfig(accumulate_steps=parts))


ON = {"data": 2, "node": 1, "expert": 2, "tensor": 1}  # the mesh of `FOUR`, whatever its replicas were
FOUR = config(MeshConfig(replica=4, data=2, expert=2), 64, 2)


def test_half_of_the_replicas() -> None:
    found, line = fit_replicas(FOUR, FOUR, ON, 8)
    assert (found.mesh.replica, found.train.accumulate_steps) == (2, 4)
    said = "the run goes on with them, its batch of 64 in 4 parts instead of 2"
    assert line == f"2 of mesh.replica=4 replicas are here: {said}"
    assert found.mesh == dataclasses.replace(FOUR.mesh, replica=2) and found.data == FOUR.data


def test_what_a_start_says_is_against_the_last_one(tmp_path: pathlib.Path) -> None:
    """Not against the replicas and parts that are asked for, which config.json keeps."""
    asked = dataclasses.replace(FOUR, model=ModelConfig(balance_scope="part"))
    meshes = [ON | {"replica": replicas} for replicas in (2, 4)]
    fitted, _ = fit_replicas(asked, asked, meshes[1], 8)
    write_run(
        tmp_path, asked, {}, meshes[0], ByteTokenizer(), parts=fitted.train.accumulate_steps, chat=NO_CHAT, history=None
    )
    assert resume_warnings(tmp_path, fitted, meshes[0], 1) == []
    (line,) = resume_warnings(tmp_path, asked, meshes[1], 1)
    assert line.startswith("train.accumulate_steps 4 → 2: with model.balance_scope=part")
    # An older run.json does not say.
    run = unseal(json.loads((tmp_path / "run.json").read_text()))
    del run["accumulate_steps"]
    (tmp_path / "run.json").write_text(json.dumps(seal(run), allow_nan=False))
    (line,) = resume_warnings(tmp_path, fitted, meshes[0], 1)
    assert line.startswith("train.accumulate_steps 2 → 4: with model.balance_scope=part")


@pytest.mark.full
def test_a_second_start_on_fewer_replicas_says_nothing(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    for steps in (1, 2):
        asked = small(
            tmp_path, "mesh.replica=2", "model.balance_scope=part", "train.eval_every=0", f"train.steps={steps}"
        )
        fitted, _ = fit_replicas(asked, asked, {"replica": 2, "data": 1, "node": 1, "expert": 1, "tensor": 1}, 1)
        with jax.set_mesh(make_mesh(fitted)):
            train(fitted, tmp_path / "run", asked=asked)
    assert fitted.train.accumulate_steps == 2 and "accumulate_steps" not in caplog.text


def test_what_changes_nothing() -> None:
    for devices in (16, 32, 6, 2):
        assert fit_replicas(FOUR, FOUR, ON, devices) == (FOUR, "")
    assert fit_replicas(FOUR, None, {}, 8) == (FOUR, "")  # a new run
    # Who asks for other replicas, or another mesh, is not short of a slice.
    two = dataclasses.replace(FOUR, mesh=dataclasses.replace(FOUR.mesh, replica=2))
    assert fit_replicas(FOUR, two, ON, 8) == (FOUR, "")
    assert fit_replicas(FOUR, FOUR, ON | {"expert": 4}, 8) == (FOUR, "")
    # A batch that never divided is for others to refuse.
    odd = dataclasses.replace(FOUR, data=dataclasses.replace(FOUR.data, batch_size=10))
    assert fit_replicas(odd, odd, ON, 4) == (odd, "")
    # All devices that the other axes leave: as many as the run had.
    free = config(MeshConfig(replica=4, expert=2), 64, 2)
    assert fit_replicas(free, free, ON, 8)[0].mesh == MeshConfig(replica=2, data=2, expert=2)
    without = {axis: ranks for axis, ranks in ON.items() if axis != "data"}  # a run.json that does not say
    assert fit_replicas(free, free, without, 4) == (free, "")


def test_replicas_that_do_not_divide_the_batch() -> None:
    rule = r"3 of mesh\.replica=4 replicas are here, whose 12 shards do not divide data\.batch_size=64; start 2 of them"
    with pytest.raises(ConfigError, match=rule):
        fit_replicas(FOUR, FOUR, ON, 12)


def test_no_part_is_larger_than_before() -> None:
    """Whatever is left, whose parts hold the whole batch."""
    draw = random.Random(0)
    for _ in range(200):
        replicas, data, rows, parts = (draw.choice((1, 2, 3, 4, 6)) for _ in range(4))
        expert = draw.choice((1, 2, 4))
        batch = replicas * data * expert * rows * parts
        before = config(MeshConfig(replica=replicas, data=data, expert=expert), batch, parts)
        left = draw.randint(1, replicas)
        try:
            after, line = fit_replicas(before, before, ON | {"data": data, "expert": expert}, left * data * expert)
        except ConfigError as error:
            assert batch % (left * data * expert)
            start = re.search(r"start (\d+) of them", str(error))
            assert start and batch % (int(start[1]) * data * expert) == 0
            continue
        shards = after.mesh.replica * data * expert * after.train.accumulate_steps
        assert batch % shards == 0 and batch // shards <= rows and bool(line) == (left < replicas)
        assert after.mesh.replica == left


@pytest.mark.full
@pytest.mark.parametrize("sharded", ["copied", "sharded"])
def test_a_run_on_other_numbers_of_replicas(sharded: str, tmp_path: pathlib.Path) -> None:
    """Bit-equal on the same mesh; on one device, on fewer and on more replicas, and back, the losses of one run."""
    base = ("mesh.data=1", "mesh.expert=2", "mesh.fsdp=True", "train.eval_every=0", "train.checkpoint_every=2")
    meshes = {
        "two": ("mesh.replica=2", f"mesh.replica_optimizer={sharded}"),
        "four": ("mesh.replica=4", f"mesh.replica_optimizer={sharded}"),
        "one": ("train.accumulate_steps=2",),
        "data": ("mesh.data=2",),
    }

    def run(name: str, steps: int, workdir: pathlib.Path) -> Config:
        made = small(tmp_path, *base, *meshes[name], f"train.steps={steps}", "optimizer.decay_steps=10")
        with jax.set_mesh(make_mesh(made)):
            train(made, workdir)
        return made

    whole = run("two", 6, tmp_path / "whole")
    losses = [record["loss"] for record in read_records(tmp_path / "whole") if "loss" in record]
    for first in meshes:
        for second in meshes:
            workdir = tmp_path / f"{first}-{second}"
            run(first, 4, workdir)
            last = run(second, 6, workdir)
            found = [record["loss"] for record in read_records(workdir) if "loss" in record]
            assert len(found) == len(losses) == 6 and math.isfinite(sum(found))
            np.testing.assert_allclose(found, losses, rtol=2e-5)
            if first == second == "two":
                assert found == losses
                expected, state = leaves_of(whole, tmp_path / "whole", 6), leaves_of(last, workdir, 6)
                for name, value in expected.items():
                    np.testing.assert_array_equal(state[name], value, err_msg=name)
