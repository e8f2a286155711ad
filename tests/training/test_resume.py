"""A run that is killed at random moments ends bit-equal to one that was left alone."""

import pathlib
import random
import re
import signal
import time
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import pytest
from model.tools import leaves

from bigmac_jax.config import Config, load_config
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.step import make_trainer

from .runs import Process, checkpoint_steps, is_saving, last_step
from .tools import of_training, read_records, write_config

STEPS = 44
# When it is killed; benchmarks.soak has more of them.
MOMENTS = [("saving",), pytest.param(("metrics", "saving"), marks=pytest.mark.full)]


class Story(NamedTuple):
    """Two finished workdirs, one of them interrupted, and how the interruptions went."""

    config: Config
    undisturbed: pathlib.Path
    interrupted: pathlib.Path
    killed_at: list[int]
    stopped_at: int
    stop_code: int
    stop_output: str
    seconds: float  # from the first start of the interrupted one to its end


@pytest.fixture(scope="module", params=MOMENTS, ids=" and ".join)
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder, draw = tmp_path_factory.mktemp("resume"), random.Random(7)
    base, config_file = load_config(write_config(folder)), folder / "config.json"
    overrides = [f"train.steps={STEPS}", "train.log_every=2", "train.checkpoint_every=4", "train.eval_every=20",
                 "model.num_layers=2",
                 "model.dropout=0.1", "model.balance=quantile",
                 f"model.balance_step={'next' if len(request.param) == 1 else 'same'}", "model.first_dense_layers=1",
                 "optimizer.name=muon", "optimizer.schedule=wsd",
                 "optimizer.moment_dtype=bfloat16", "optimizer.average_decay=0.9",
                 f"cache_dir={base.cache_dir}"]  # fmt: skip
    arguments = [f"--config.{override}" for override in overrides]
    config = load_config(config_file, [*overrides, "mesh.data=1", "mesh.expert=2"])

    undisturbed, workdir = folder / "undisturbed", folder / "interrupted"
    process = Process(config_file, undisturbed, *arguments, "--config.train.checkpoint_every=22")
    assert process.wait() == 0, process.output

    killed_at: list[int] = []
    begin = time.time()
    for moment in request.param:
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
    return Story(config, undisturbed, workdir, killed_at, stopped_at, code, output, time.time() - begin)


def test_it_was_interrupted(story: Story) -> None:
    moments = [0, *story.killed_at, story.stopped_at, STEPS]
    assert sorted(set(moments)) == moments, story


def test_sigterm_saves_and_ends_well(story: Story) -> None:
    assert story.stop_code == 0, story.stop_output
    message = re.search(r"stopped and saved at step (\d+) of 44; the same command resumes", story.stop_output)
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
        return [line for record in read_records(workdir) if len(line := of_training(record)) > 1]

    expected = [line for line in lines(story.undisturbed) if line["step"] != story.stopped_at + 1]
    assert [line for line in lines(story.interrupted) if line["step"] != story.stopped_at + 1] == expected
    all_ = lines(story.undisturbed)
    assert [line["step"] for line in all_ if "loss" in line][:2] == [2, 4]
    assert [line["step"] for line in all_ if "eval/loss" in line] == [20, 40, 44]


def test_the_time_of_all_starts_is_accounted_for(story: Story) -> None:
    """One start was killed, so that steps are lost, and one was stopped."""
    records = [record for record in read_records(story.interrupted) if "goodput/wall_s" in record]
    last = {name.removeprefix("goodput/"): value for name, value in records[-1].items() if name.startswith("goodput/")}
    parts = {name: value for name, value in last.items() if name not in ("wall_s", "since_unix_s")}
    assert sum(parts.values()) == pytest.approx(last["wall_s"], rel=0.02)
    assert 0 <= story.seconds - last["wall_s"] < 10  # the report is drawn behind the last record
    assert all(parts[f"{name}_s"] > 0 for name in ("steps", "data_wait", "compile", "save", "evaluate", "start"))
    assert parts["restart_s"] > 0 and parts["lost_s"] > 0
    walls = [record["goodput/wall_s"] for record in records]
    assert walls == sorted(walls) and len({record["goodput/since_unix_s"] for record in records}) == 1
    undisturbed = read_records(story.undisturbed)[-1]
    assert undisturbed["goodput/lost_s"] == undisturbed["goodput/restart_s"] == 0


def test_each_start_says_what_it_did(story: Story) -> None:
    starts = [record for record in read_records(story.interrupted) if "start/compile_s" in record]
    assert starts[0]["step"] == 0 and starts[-1]["step"] == story.stopped_at
    assert {"start/imports_s", "start/data_s", "start/restore_s", "start/first_step_s"} <= starts[-1].keys()
    # The line leaves out what took no time: imports of a fork, compilation from a cache, a first step.
    (line,) = re.findall(r"^start: ([^;\n]*)", story.stop_output, re.MULTILINE)
    printed = {part.rsplit(" ", 2)[0]: float(part.split()[-2]) for part in line.replace("other ", "start ").split(", ")}
    written = {name.removeprefix("start/").removesuffix("_s").replace("_", " "): seconds
               for name, seconds in starts[-2].items() if name.startswith("start/")}  # fmt: skip
    assert printed and printed.keys() <= written.keys()
    for name, seconds in written.items():
        assert printed.get(name, 0.0) == pytest.approx(seconds, abs=0.06), (name, line)
