"""Checkpoints: bit-equal, in the background, the newest and the best, on any mesh."""

import functools
import pathlib
import shutil
import threading
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tools import leaves, random_tokens

import bigmac_jax
from bigmac_jax import tuning
from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.training import checkpoint
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.checkpoint_arrays import DamagedError
from bigmac_jax.training.step import TrainState
from bigmac_jax.training.workdir import read_config
from bigmac_jax.tuning import restore

from .tools import Session, as_saved, host, session, small

MESHES = {
    "1x8 fsdp": ("expert=8", "fsdp=True"),
    "2x2": ("data=2", "expert=2"),
    "1x1": (),
    "two machines": ("node=2", "expert=2"),
    "tensor": ("data=2", "expert=2", "tensor=2", "fsdp=True", "split_experts=True"),
}


# Both optimizers, of which each keeps something of some parameters, and an average.
OPTIMIZER = ("optimizer.name=muon", "optimizer.moment_dtype=bfloat16", "optimizer.average_decay=0.5")


def config_on(folder: pathlib.Path, mesh: str) -> Config:
    return small(folder, *OPTIMIZER, *(f"mesh.{field}" for field in MESHES[mesh]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A workdir saved after two steps on eight expert ranks, fully sharded, and what the run did next."""
    folder = tmp_path_factory.mktemp("saved")
    config, workdir = config_on(folder, "1x8 fsdp"), folder / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(config.to_json())
    with session(config) as run:
        for seed in range(2):
            run.step(random_tokens(config, seed))
        state = host(run.state)
        checkpoints = Checkpoints(workdir, keep=1)
        checkpoints.save(run.state, {"batches": 2}, config, 2, eval_loss=5.0)
        loss = run.step(random_tokens(config, 2)).loss  # donates what is being written
        checkpoints.close()
        restore_and_go_on(run, workdir, state, loss)
    return {"folder": folder, "workdir": workdir, "config": config, "state": state, "next_loss": loss}


def restore_and_go_on(run: Session, workdir: pathlib.Path, state: TrainState, next_loss: float) -> None:
    """Everything comes back bit-equal on the current mesh, and training goes on with the same loss."""
    checkpoints = Checkpoints(workdir)
    abstract = run.trainer.abstract_state
    run.state, position = checkpoints.restore(2, abstract)
    checkpoints.close()
    assert position == {"batches": 2}
    chex.assert_trees_all_equal(leaves(run.state), leaves(state))
    for leaf, wanted in zip(jax.tree.leaves(run.state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == wanted.sharding and leaf.dtype == wanted.dtype
    loss = run.step(random_tokens(config_on(workdir.parent, "1x1"), 2)).loss
    np.testing.assert_allclose(loss, next_loss, rtol=1e-6)
    assert run.state.step == 3


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["1x1", "tensor", "2x2", "two machines"])
def test_elastic(saved: dict[str, Any], mesh: str) -> None:
    """Saved on eight ranks (where the fixture restores it, too), restored on other meshes."""
    with session(config_on(saved["folder"], mesh)) as run:
        restore_and_go_on(run, saved["workdir"], saved["state"], saved["next_loss"])


def test_restore_gives_config_and_model(saved: dict[str, Any]) -> None:
    config = config_on(saved["folder"], "2x2")
    with jax.set_mesh(make_mesh(config)):
        for step in ("best", 2):
            found, model = restore(str(saved["workdir"]), step)
            assert found == as_saved(saved["config"]) == read_config(saved["workdir"])
            assert isinstance(model, Transformer)
            chex.assert_trees_all_equal(leaves(model), leaves(saved["state"].average))
        other, _ = restore(saved["workdir"], config=config)
        assert other == config


def test_reading_changes_nothing(tmp_path: pathlib.Path) -> None:
    """A checkpoint that a training process is just writing is not for a reader to clean up."""
    config = small(tmp_path)
    unfinished = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    unfinished.mkdir(parents=True)
    with jax.set_mesh(make_mesh(config)):
        for _ in range(2):
            with pytest.raises(ConfigError, match="holds no checkpoint"):
                restore(tmp_path)
        assert unfinished.exists()
        shutil.rmtree(tmp_path / "checkpoints")
        with pytest.raises(ConfigError, match="holds no checkpoint"):
            restore(tmp_path)
        assert not (tmp_path / "checkpoints").exists()


def test_restore_is_importable_from_the_package() -> None:
    """A Python contract of the design: it is the one that merges adapters, too."""
    assert bigmac_jax.restore is tuning.restore


def trivial(step: int) -> TrainState:
    values = jnp.full(3, step, jnp.float32)
    return TrainState(jnp.asarray(step), {"w": values}, {"bias": values}, {"mu": values})


def write(workdir: pathlib.Path, losses: list[float | None], keep: int) -> None:
    checkpoints = Checkpoints(workdir, keep)
    for step, loss in enumerate(losses, 1):
        checkpoints.save(trivial(step), {"batches": step}, Config(), step, loss)
    checkpoints.close()


def test_a_save_may_take_hours(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax gives up late, and to wait for one is progress while somebody writes: else the watchdog ends the job."""
    checkpoints, ticked, file = Checkpoints(tmp_path, keep=1), threading.Event(), tmp_path / "checkpoints" / "part"
    assert checkpoints._manager._checkpointer._async_manager._timeout_secs > 10 * 3600  # type: ignore

    def finish() -> None:
        for size in range(500):
            file.write_bytes(bytes(size))
            if ticked.wait(0.01):
                return

    monkeypatch.setattr(checkpoint.clock, "watching", functools.partial(checkpoint.clock.watching, every=0.005))
    monkeypatch.setattr(checkpoint.clock, "tick", ticked.set)
    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", finish)
    assert checkpoints.wait() and ticked.is_set()
    monkeypatch.undo()
    checkpoints.close()


def refusal(workdir: pathlib.Path, step: str) -> str:
    checkpoints = Checkpoints(workdir)
    with pytest.raises(ConfigError) as error:
        checkpoints.resolve(step)
    checkpoints.close()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_keeps_the_newest_and_the_best(tmp_path: pathlib.Path) -> None:
    write(tmp_path, [3.0, 1.0, 2.0, None, 1.5], keep=2)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()} == {"2", "4", "5"}
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert [checkpoints.resolve(step) for step in ("latest", "best", "4")] == [5, 2, 4]
    assert checkpoints.latest() == 5 and checkpoints.best_loss() == 1.0
    state, position = checkpoints.restore(2, trivial(0))
    chex.assert_trees_all_equal(state, trivial(2))
    assert position == {"batches": 2}

    checkpoints.save(trivial(6), {"batches": 6}, Config(), 6, 0.5)
    checkpoints.wait()
    assert checkpoints.resolve("best") == 6 and checkpoints.best_loss() == 0.5
    checkpoints.save(trivial(7), {"batches": 7}, Config(), 6, 0.1)  # of a step that is there: nothing
    checkpoints.wait()
    assert checkpoints.best_loss() == 0.5
    checkpoints.close()
    for step in ("3", "abc", "-1", "", "²"):
        message = refusal(tmp_path, step)
        assert f"step={step} is not a checkpoint" in message and "[5, 6]" in message


def test_a_save_that_orbax_leaves_out_has_failed(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """It writes none below the newest."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (2, 1):
        checkpoints.save(trivial(step), {"batches": step}, Config(), step, None)
    checkpoints.close()
    assert "the checkpoint of step 1 could not be written (RuntimeError: there is one of step 2); older" in caplog.text


def test_without_an_evaluation_the_best_is_the_latest(tmp_path: pathlib.Path) -> None:
    write(tmp_path, [None, None], keep=1)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.resolve("best") == 2 and checkpoints.best_loss() == float("inf")
    checkpoints.close()


def test_step_0_is_a_save_as_others_are(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a model that came from elsewhere: it is tidied behind, and set aside where it is the damaged one."""
    checkpoints, tidied = Checkpoints(tmp_path, keep=2), list[bool]()
    for step in (0, 1):
        checkpoints.save(trivial(step), {"batches": step}, Config(), step, None)
        with monkeypatch.context() as patched:
            patched.setattr(checkpoints._folder, "remove_unfinished", lambda: tidied.append(True))
            checkpoints.wait()
            checkpoints.wait()  # of nothing
    assert len(tidied) == 2
    answers = iter([DamagedError("it has no experts", 0), (trivial(1), {"batches": 1})])

    def restore(*_: Any) -> Any:  # of some experts, which takes others from the save of step 0
        if isinstance(answer := next(answers), DamagedError):
            raise answer
        return answer

    monkeypatch.setattr(checkpoints, "restore", restore)
    assert checkpoints.restore_newest(trivial(0))[0] == 1
    checkpoints.close()
    assert [path.name for path in (tmp_path / "checkpoints-damaged").iterdir()] == ["0"]


def test_no_checkpoint(tmp_path: pathlib.Path) -> None:
    assert "holds no checkpoint; train first" in refusal(tmp_path, "latest")
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        read_config(tmp_path)
