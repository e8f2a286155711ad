"""Several real processes (gloo, loopback): the same numbers as one, and an end whatever happens to one of them."""

import json
import os
import pathlib
import re
import shutil
import signal
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from model.tools import assert_close, leaves
from threads_as_processes import run_as_processes

from bigmac_jax.config import Config, ConfigError, load_config
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.run.loop import train
from bigmac_jax.runtime import hosts
from bigmac_jax.runtime.workdir_lock import lock_workdir
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.step import make_trainer

from .runs import Job, checkpoint_steps
from .then_generate import complete
from .tools import of_training, read_records, write_config

STEPS, TIMEOUT = 20, 6
HANGING, STOPPED = 3, 4
MESH = ("mesh.data=2", "mesh.expert=2")


class Story(NamedTuple):
    """One process, two, which then complete prompts, and two that were not left alone."""

    config: Config
    alone: pathlib.Path  # one process, four devices
    calm: pathlib.Path  # 2 × 2
    said: list[str]  # by the two
    disturbed: pathlib.Path  # 2 × 2: stopped, resumed, killed
    stopped: tuple[list[int], list[str], set[int]]  # exit codes, outputs, checkpoints
    killed: tuple[list[int], list[str], float]  # exit codes, outputs, seconds


OVERRIDES = (*MESH, f"train.steps={STEPS}", "train.keep_checkpoints=100", f"train.eval_every={STEPS}",
             "train.checkpoint_every=0", "model.balance=bias")  # fmt: skip


def two(folder: pathlib.Path, workdir: pathlib.Path, *more: str, **options: Any) -> Job:
    flags = [f"--config.{override}" for override in (*OVERRIDES, *more)]
    return Job(2, folder / "config.json", workdir, "--cpu_devices=2", f"--peer_timeout={TIMEOUT}", *flags, **options)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("hosts")
    file = write_config(folder)
    config, every_step = load_config(file, OVERRIDES), "train.checkpoint_every=1"
    alone, calm, disturbed = folder / "alone", folder / "calm", folder / "disturbed"
    with jax.set_mesh(make_mesh(config)):
        train(load_config(file, (*OVERRIDES, every_step)), alone)
    with two(folder, calm, every_step, script=("tests/training/then_generate.py",)) as run:
        assert run.wait() == [0, 0], run.outputs
        said = run.outputs

    without = "train.eval_every=0"
    with two(folder, disturbed, without) as run:
        run.until(STOPPED)
        run.processes[1].send_signal(signal.SIGTERM)
        stopped = run.wait(), run.outputs, checkpoint_steps(disturbed)
    with two(folder, disturbed, every_step, without) as run:
        run.until(max(stopped[2]) + 3)
        run.processes[1].kill()
        start = time.monotonic()
        killed = run.wait(), run.outputs, time.monotonic() - start
    return Story(config, alone, calm, said, disturbed, stopped, killed)


def state(story: Story, workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    with jax.set_mesh(make_mesh(story.config)):
        trainer = make_trainer(story.config, jax.sharding.get_mesh())
        checkpoints = Checkpoints(workdir)
        restored, position = checkpoints.restore(step, trainer.abstract_state)
        checkpoints.close()
        assert position == {"batches": step}
        return leaves(restored)


def losses(workdir: pathlib.Path) -> np.ndarray:
    records = [record for record in read_records(workdir) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return np.array([record["loss"] for record in records])


def test_losses_are_those_of_one_process(story: Story) -> None:
    ours, reference = losses(story.calm), losses(story.alone)
    assert reference[0] - reference[-1] > 0.5  # it has learnt something
    assert abs(ours[0] / reference[0] - 1) < 1e-6
    np.testing.assert_allclose(ours, reference, rtol=1e-3)
    evaluations = [[r["eval/loss"] for r in read_records(w) if "eval/loss" in r] for w in (story.calm, story.alone)]
    assert len(evaluations[0]) == 1
    np.testing.assert_allclose(*evaluations, rtol=1e-3)


def test_gradients_are_those_of_one_process(story: Story) -> None:
    """Adam's first moment after one step is a tenth of the clipped gradient."""
    ours, reference = state(story, story.calm, 1), state(story, story.alone, 1)
    moments = [{k: v for k, v in leaves.items() if ".mu." in k} for leaves in (ours, reference)]
    assert len(moments[1]) > 5
    assert_close(*moments)


def test_sigterm_to_one_saves_on_all(story: Story) -> None:
    codes, outputs, saved = story.stopped
    assert codes == [0, 0], outputs
    message = re.search(rf"stopped and saved at step (\d+) of {STEPS}; the same command resumes", outputs[0])
    assert message and "stopped" not in outputs[1], outputs
    assert saved == {int(message[1])} and STOPPED <= int(message[1]) < STEPS


def test_the_same_layout_is_bit_equal_whatever_happened(story: Story) -> None:
    """Stopped, resumed and killed: up to there it is what nobody disturbed."""
    last = max(checkpoint_steps(story.disturbed))
    assert last > max(story.stopped[2])
    chex.assert_trees_all_equal(state(story, story.disturbed, last), state(story, story.calm, last))
    ours, reference = (
        [kept for record in read_records(workdir) if len(kept := of_training(record)) > 1 and "loss" in record]
        for workdir in (story.disturbed, story.calm)
    )
    assert len(ours) > max(story.stopped[2]) and ours == reference[: len(ours)]


def test_two_processes_complete_what_one_does(story: Story) -> None:
    with jax.set_mesh(make_mesh(story.config)):
        alone = complete(story.config, story.calm)
    together = [json.loads(line) for line in story.calm.with_suffix(".jsonl").read_text().splitlines()]
    assert [len(row["tokens"]) for row in alone] == [6, 3, 5]
    for one, two in zip(alone, together, strict=True):
        assert list(one["tokens"]) == two["tokens"]
        np.testing.assert_allclose(two["logprobs"], one["logprobs"], atol=1e-5)


@pytest.mark.full
def test_a_hung_process_ends_all_and_is_named(tmp_path: pathlib.Path) -> None:
    """Its threads beat on, so only the steps tell."""
    script = ("tests/training/hanging.py", "1", str(HANGING))
    flags = [f"--config.{field}" for field in (*MESH, "train.eval_every=0", f"train.steps={STEPS}")]
    with Job(2, write_config(tmp_path), tmp_path / "run", "--cpu_devices=2", f"--peer_timeout={TIMEOUT}", *flags,
             script=script) as run:  # fmt: skip
        run.until(HANGING - 1)
        start = time.monotonic()
        codes, outputs, seconds = run.wait(), run.outputs, time.monotonic() - start
    assert codes == [3, 3] and seconds < 2 * TIMEOUT + 10, (codes, seconds, outputs)
    line = rf"error: no step has ended for \d+ s: process 1 \(\d+ on \S+, step {HANGING}\) did not start step \d+\n"
    assert all(re.search(line, output) for output in outputs), outputs


def test_a_killed_process_ends_all_and_is_named(story: Story) -> None:
    codes, outputs, seconds = story.killed
    assert codes == [3, -signal.SIGKILL] and seconds < TIMEOUT + 10, (codes, seconds, outputs)
    # Where it was is what it last said, a second ago.
    assert re.search(r"error: process 1 \(\d+ on \S+, [\w, ]+\) has died\n", outputs[0]), outputs
    assert outputs[0].count("error: ") == 1 and "Traceback" not in outputs[0], outputs


def test_a_second_job_is_refused(tmp_path: pathlib.Path) -> None:
    config, workdir = load_config(write_config(tmp_path), ("mesh.data=1",)), tmp_path / "run"
    workdir.mkdir()
    line = rf"--workdir={workdir} is in use by process {os.getpid()} on \S+; wait for it, stop it, or give another"
    with jax.set_mesh(make_mesh(config)), lock_workdir(workdir), pytest.raises(ConfigError, match=line):
        train(config, workdir)
    assert {path.name for path in workdir.iterdir()} == {".lock"}


@pytest.mark.full
def test_processes_that_differ_are_refused(tmp_path: pathlib.Path) -> None:
    """Each field is named with both values, once."""
    file = write_config(tmp_path)
    other = ["--config.model.top_k=3", f"--config.cache_dir={tmp_path}/elsewhere"]
    own = (["--config.optimizer.learning_rate=0.5"], other)
    with Job(2, file, tmp_path / "run", "--cpu_devices=1", own=own) as job:
        assert job.wait(60) == [2, 2]
        assert job.outputs[0].splitlines()[-1] == (
            "error: process 1 was started with model.top_k=3, optimizer.learning_rate=0.01, process 0 with "
            "model.top_k=2, optimizer.learning_rate=0.5; start all with the same command, files and packages"
        )
        assert "error" not in job.outputs[1]
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.full
def test_two_processes_pass_over_a_damaged_checkpoint(story: Story, tmp_path: pathlib.Path) -> None:
    workdir = shutil.copytree(story.disturbed, tmp_path / "run")
    steps = sorted(checkpoint_steps(workdir))
    for file in (workdir / "checkpoints" / str(steps[-1])).rglob("ocdbt.process_*/d/*"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    flags = [f"--config.{override}" for override in (*MESH, f"train.steps={STEPS + 2}", "train.keep_checkpoints=100",
             f"train.eval_every={STEPS}", "model.balance=bias")]  # fmt: skip
    with Job(2, write_config(tmp_path), workdir, "--cpu_devices=2", *flags) as run:
        assert run.wait() == [0, 0], run.outputs
        assert f"checkpoint {steps[-1]} is damaged" in run.outputs[0] and "damaged" not in run.outputs[1]
        assert f"resumed at step {steps[-2]}" in run.outputs[0]


@pytest.mark.full
@pytest.mark.parametrize(
    ("script", "common", "own"),
    [
        (("eval.py",), ("--split=validation",), ("--stride=0", "--stride=8")),
        (("generate.py",), ("--prompt=the", "--json"), ("--max_tokens=3", "--max_tokens=4")),
        (("convert.py", "export"), ("--output={folder}/out",), ("--dtype=float32", "--dtype=bfloat16")),
    ],
)
def test_other_commands_compare_too(
    story: Story, tmp_path: pathlib.Path, script: Sequence[str], common: Sequence[str], own: Sequence[str]
) -> None:
    arguments = ["--cpu_devices=2", *(part.format(folder=tmp_path) for part in common)]
    shutil.copytree(story.calm, tmp_path / "run")
    with Job(2, None, tmp_path / "run", *arguments, script=script, own=[[flag] for flag in own]) as job:
        assert job.wait() == [2, 2], job.outputs
        last = job.outputs[0].splitlines()[-1]
        assert last.startswith(f"error: process 1 was started with {own[1]}, process 0 with {own[0]}; "), job.outputs


@pytest.mark.full
def test_what_was_killed_ends_as_if_it_had_not_been(story: Story, tmp_path: pathlib.Path) -> None:
    write_config(tmp_path)
    shutil.copytree(story.disturbed, tmp_path / "killed")
    with two(tmp_path, tmp_path / "killed") as run:
        assert run.wait() == [0, 0], run.outputs
    chex.assert_trees_all_equal(state(story, tmp_path / "killed", STEPS), state(story, story.calm, STEPS))


def test_one_process_speaks(story: Story) -> None:
    for line in ("bigmac: 8 experts", "parameters, ", "validation perplexity"):
        assert line in story.said[0] and line not in story.said[1]


def test_the_watch_needs_no_files(story: Story) -> None:
    assert not (story.disturbed / "hosts").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 2, 0, False), r"--coordinator missing: .*--coordinator=HOST:PORT, --num_processes=N and --process_id=I"),
        (("host:1", 0, -1, False), r"--num_processes, --process_id missing"),
        (("host:1", 2, 2, False), r"--process_id=2 must be below --num_processes=2; count from 0"),
        (("host", 2, 0, False), r"--coordinator=host must be HOST:PORT"),
        ((":1", 2, 0, False), r"--coordinator=:1 must be HOST:PORT"),
        (("host:0", 2, 0, False), r"must be HOST:PORT with a port of 1 to 65535, as in --coordinator=10.0.0.1:1234"),
        (("host:65536", 2, 1, False), r"--coordinator=host:65536 must be HOST:PORT"),
        (("host:1²", 2, 1, False), r"--coordinator=host:1² must be HOST:PORT"),
        (("host:1", 2, 0, True), r"--distributed takes the processes from the cluster; drop it, or"),
        (("", 0, -1, True), r"--distributed found no cluster .* give --coordinator"),
    ],
)
def test_incomplete_arguments_are_one_line(
    arguments: tuple[str, int, int, bool], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax._src.distributed.xla_bridge, "backends_are_initialized", lambda: False)
    with pytest.raises(ConfigError, match=message) as error:
        hosts.connect(*arguments, 1)
    assert "\n" not in str(error.value)
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (P("a"), [2, 3]),
        (P("b"), range(16)),  # copied over the border of the processes, which `a` splits
        (P(("b", "a")), [2, 3, 10, 11]),
        (P(), range(16)),
    ],
    ids=str,
)
def test_a_process_reads_the_rows_its_devices_hold(spec: P, expected: Sequence[int]) -> None:
    sharding = NamedSharding(jax.make_mesh((8, 1) if spec == P("a") else (4, 2), ("a", "b")), spec)
    whole = sharding.devices_indices_map((16,))

    class OfProcess1:
        """Which has devices 2 and 3 of eight, or of `a`'s eight rows the second."""

        def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> Any:
            mine = (1,) if spec == P("a") else (2, 3)
            return {device: index for device, index in whole.items() if device.id in mine}

    assert hosts.local_rows(OfProcess1(), 16) == list(expected)
    batch = np.arange(16 * 3).reshape(16, 3)
    np.testing.assert_array_equal(hosts.make_global_array(sharding, range(16), batch, 16), batch)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({}, ""),
        ({"b": 3}, "process 1 was started with b=3, process 0 with b=2"),
        ({"a": 0, "c": "z"}, "process 1 was started with a=0, c=z, process 0 with a=1, c=x"),
        ({"d": 1}, "process 1 was started with another version of the program, process 0 with another version of"),
    ],
)
def test_processes_compare_their_fields(other: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three, which are threads here; the third has the values of the first."""

    def compare(process: int) -> None:
        hosts.check_same({"a": 1, "b": 2, "c": "x"} | (other if process == 1 else {}))

    answers = [str(error or "") for error in run_as_processes(monkeypatch, 3, compare)]
    assert len(set(answers)) == 1 and answers[0].startswith(said) and bool(answers[0]) == bool(said)


def test_a_program_waits_once_until_all_have_compiled_it(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    compile_ = jax.stages.Lowered.compile

    def compiles(lowered: Any) -> Any:
        events.append("compiled")
        return compile_(lowered)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiles)
    monkeypatch.setattr(hosts, "is_distributed", lambda: True)
    monkeypatch.setattr(hosts, "gather", lambda message: events.append("waited"))

    @hosts.Jit
    def scale(x_N: jax.Array, *, by: int) -> jax.Array:
        jax.debug.callback(lambda: events.append("ran"))
        return by * x_N

    for x_N, by in ((np.ones(2), 2), (np.ones(2), 2), (np.ones(3), 2), (np.ones(3), 5)):
        chex.assert_trees_all_equal(np.asarray(scale(jax.device_put(x_N), by=by)), by * x_N)
        jax.effects_barrier()
    new = ["compiled", "waited", "ran"]
    assert events == [*new, "ran", *new, *new]


@pytest.mark.full
def test_one_process_compiles_longer_than_gloo_waits(tmp_path: pathlib.Path) -> None:
    with Job(4, None, tmp_path / "run", script=("tests/training/slow_compiler.py", "40")) as job:
        assert job.wait() == [0] * 4, job.outputs
        assert [output.splitlines()[-1] for output in job.outputs] == ["2.0", "4.0"] * 2


@pytest.mark.full
def test_a_process_that_dies_before_it_has_devices_ends_all(tmp_path: pathlib.Path) -> None:
    """The watchdog begins behind that: jax notices after half a minute, while the other waits in C for the devices."""
    with Job(2, write_config(tmp_path), tmp_path / "run", f"--peer_timeout={TIMEOUT}",
             script=("tests/training/dying.py", "1")) as run:  # fmt: skip
        assert run.wait(90) == [3, -signal.SIGKILL], run.outputs
    line = r"error: process 0 aborted: another one is gone, or the lines above say why\n"
    assert re.search(line, run.outputs[0]), run.outputs


@pytest.mark.full
def test_a_stopped_process_ends_all_and_is_named(tmp_path: pathlib.Path) -> None:
    """It neither dies nor beats; when it goes on it finds out and ends too."""
    with Job(
        2, write_config(tmp_path), tmp_path / "run", "--cpu_devices=2", f"--peer_timeout={TIMEOUT}",
        "--config.train.steps=100000", "--config.train.eval_every=0", "--config.train.checkpoint_every=0",
    ) as run:  # fmt: skip
        run.until(5)
        run.processes[1].send_signal(signal.SIGSTOP)
        assert run.processes[0].wait(TIMEOUT + 20) == 3, run.outputs
        run.processes[1].send_signal(signal.SIGCONT)
        assert run.wait()[0] == 3, run.outputs
    line = r"error: process 1 \(\d+ on \S+, (?:step \d+|[a-z ]+)(?:, [a-z ]+)?\) has given no sign of life for \d+ s\n"
    assert re.search(line, run.outputs[0]), run.outputs


@pytest.mark.full
def test_four_processes_and_slurm_and_evaluation(story: Story, tmp_path: pathlib.Path) -> None:
    """Four processes of one device, started as srun does; then two evaluate what they trained."""
    file = write_config(tmp_path)
    overrides = ["mesh.node=2", "mesh.expert=2", f"train.steps={STEPS}", "model.balance=bias",
                 f"train.eval_every={STEPS}", "train.checkpoint_every=0"]  # fmt: skip
    flags = [f"--config.{override}" for override in overrides]
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "4"}
    with Job(
        4, file, tmp_path / "four", "--cpu_devices=1", *flags,
        environments=[{**slurm, "SLURM_PROCID": str(i), "SLURM_LOCALID": "0"} for i in range(4)],
    ) as run:  # fmt: skip
        assert run.wait() == [0] * 4, run.outputs
    ours, reference = losses(tmp_path / "four"), losses(story.alone)
    assert abs(ours[0] / reference[0] - 1) < 1e-6
    np.testing.assert_allclose(ours, reference, rtol=1e-3)

    with Job(2, None, tmp_path / "four", "--cpu_devices=2", "--json", "--split=validation", script=("eval.py",)) as run:
        assert run.wait() == [0, 0], run.outputs
        score = json.loads(run.outputs[0].splitlines()[-1])
        assert "perplexity" not in run.outputs[1]
    (expected,) = (r["eval/loss"] for r in read_records(tmp_path / "four") if "eval/loss" in r)
    assert score["loss"] == pytest.approx(expected, rel=1e-6)
