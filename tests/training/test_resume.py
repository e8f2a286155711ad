"""A run that is killed at random moments ends bit-equal to one that was left alone."""

import pathlib
import random
import re
import signal
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import pytest
from model.tools import leaves

from bigmac_jax.config import Config, load_config
from bigmac_jax.mesh import make_mesh
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.step import make_trainer

from .runs import Process, checkpoint_steps, is_saving, last_step
from .tools import read_records, write_config

STEPS = 100
TIMES = {"step_time_s", "tokens_per_s", "mfu", "memory/host_bytes"}  # what differs between two equal runs


class Story(NamedTuple):
    """Two finished workdirs, one of them interrupted, and how the interruptions went."""

    config: Config
    undisturbed: pathlib.Path
    interrupted: pathlib.Path
    killed_at: list[int]
    stopped_at: int
    stop_code: int
    stop_output: str


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder, draw = tmp_path_factory.mktemp("resume"), random.Random(7)
    base, config_file = load_config(write_config(folder)), folder / "config.json"
    overrides = [f"train.steps={STEPS}", "train.log_every=2", "train.checkpoint_every=4", "train.eval_every=28",
                 "model.num_layers=2",
                 "model.dropout=0.1", "model.balance=quantile", "model.first_dense_layers=1",
                 "optimizer.name=muon", "optimizer.schedule=wsd",
                 "optimizer.moment_dtype=bfloat16", "optimizer.average_decay=0.9",
                 f"cache_dir={base.cache_dir}"]  # fmt: skip
    arguments = [f"--config.{override}" for override in overrides]
    config = load_config(config_file, [*overrides, "mesh.data=1", "mesh.expert=2"])

    undisturbed, workdir = folder / "undisturbed", folder / "interrupted"
    process = Process(config_file, undisturbed, *arguments)
    assert process.wait() == 0, process.output

    killed_at: list[int] = []
    for moment in ("metrics", "saving"):
        before = last_step(workdir)
        target = before + 2 * draw.randint(3, 7)
        process = Process(config_file, workdir, *arguments)

        def due(workdir: pathlib.Path, moment: str = moment, target: int = target) -> bool:
            if last_step(workdir) < target:
                return False
            return moment == "metrics" or is_saving(workdir)

        process.kill_when(due, 0 if moment == "saving" else draw.uniform(0, 0.05))
        assert process.wait() == -signal.SIGKILL
        killed_at.append(last_step(workdir))

    target = killed_at[-1] + 2 * draw.randint(2, 5)
    process = Process(config_file, workdir, *arguments)
    process.kill_when(lambda workdir: last_step(workdir) >= target, draw.uniform(0, 0.05), signal.SIGTERM)
    code, output = process.wait(), process.output
    stopped_at = max(checkpoint_steps(workdir))
    process = Process(config_file, workdir, *arguments)
    assert process.wait() == 0, process.output
    return Story(config, undisturbed, workdir, killed_at, stopped_at, code, output)


def test_it_was_interrupted(story: Story) -> None:
    assert 0 < story.killed_at[0] < story.killed_at[1] < story.stopped_at < STEPS, story


def test_sigterm_saves_and_ends_well(story: Story) -> None:
    assert story.stop_code == 0, story.stop_output
    message = re.search(r"stopped and saved at step (\d+) of 100; the same command resumes", story.stop_output)
    assert message and int(message[1]) == story.stopped_at
    assert "Traceback" not in story.stop_output


def final_state(story: Story, workdir: pathlib.Path) -> tuple[dict[str, np.ndarray], Any]:
    with jax.set_mesh(make_mesh(story.config)):
        trainer = make_trainer(story.config, jax.sharding.get_mesh())
        checkpoints = Checkpoints(workdir)
        state, position = checkpoints.restore(STEPS, trainer.abstract_state)
        checkpoints.close()
        return leaves(state), position


def test_parameters_and_optimizer_are_bit_equal(story: Story) -> None:
    state, position = final_state(story, story.interrupted)
    expected, expected_position = final_state(story, story.undisturbed)
    chex.assert_trees_all_equal(state, expected)
    assert position == expected_position == {"batches": STEPS}
    for part in (".nu.", "router_bias", "average.", ".muon.inner_state.mu."):
        assert any(part in name for name in state), part


def test_metrics_are_those_of_one_run(story: Story) -> None:
    """Every line once, in order and equal but for times; a resumed run's first step compiles and is not logged."""

    def lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in record.items() if k not in TIMES} for record in read_records(workdir)]

    expected = [line for line in lines(story.undisturbed) if line["step"] != story.stopped_at + 1]
    assert [line for line in lines(story.interrupted) if line["step"] != story.stopped_at + 1] == expected
    assert [line["step"] for line in expected if "loss" in line][:2] == [2, 4]
    assert [line["step"] for line in expected if "eval/loss" in line] == [28, 56, 84, 100]
