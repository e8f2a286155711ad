"""Batches whose loss is NaN or a spike: their update is skipped, or the run rewinds past them, and ends as if it had
never seen them."""

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model.tools import leaves

import bigmac_jax.training.step
from bigmac_jax.config import Config, ConfigError, TrainConfig, check_resume
from bigmac_jax.data.batch import Batch
from bigmac_jax.data.pipeline import TrainIterator, open_stream
from bigmac_jax.data.tokenizer import load_tokenizer
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.run import loop, start
from bigmac_jax.training.bad_steps import NonFiniteLossError, restore_losses, save_position
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.step import TrainState, make_trainer

from .tools import host, leaves_of, read_records, small

NAN, SPIKE = 0, 1  # bytes that no text holds: in a batch, they make its loss NaN, or four times as large


class Batches(Iterator[Batch]):
    """The data, with marks in some batches (by number, from 1), or without some."""

    def __init__(self, data: TrainIterator, marks: dict[int, int], left_out: set[int]):
        self._data, self._marks, self._left_out = data, marks, left_out

    def __next__(self) -> Batch:
        while self._data.get_state()["batches"] + 1 in self._left_out:
            next(self._data)
        batch = next(self._data)
        batch = batch._replace(inputs_BL=batch.inputs_BL.copy())
        if (mark := self._marks.get(self._data.get_state()["batches"])) is not None:
            batch.inputs_BL[0, 0] = mark
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)


def bad_config(folder: pathlib.Path, action: str, *overrides: str) -> Config:
    """Eight steps, whose balance is a bias that a bad step must leave alone."""
    return small(folder, f"train.on_bad_step={action}", "train.steps=8", "train.eval_every=0",
                 "train.keep_checkpoints=9", "model.balance=bias", "optimizer.decay_steps=30", *overrides)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _programs() -> Iterator[None]:
    """The marks take effect. A program is made once: runs differ in steps, bounds and data."""
    loss_fn, compile_step = bigmac_jax.training.step.loss_fn, start._compile

    def marked(model: Any, batch: Any, *rest: Any) -> Any:
        loss, terms = loss_fn(model, batch, *rest)
        tokens_BL = jnp.append(batch.inputs_BL, batch.targets_BL, axis=1)
        factor = jnp.where((tokens_BL == NAN).any(), jnp.nan, jnp.where((tokens_BL == SPIKE).any(), 4.0, 1.0))
        return loss * factor, terms._replace(loss_U=terms.loss_U * factor)

    def once(make: Callable[..., Any], config_at: int) -> Callable[..., Any]:
        made: dict[Any, Any] = {}

        def get(*args: Any) -> Any:
            train = args[config_at].train
            key = train.on_bad_step, train.spike_factor
            if key not in made:
                made[key] = make(*args)
            return made[key]

        return get

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bigmac_jax.training.step, "loss_fn", marked)
        patch.setattr(start, "make_trainer", once(make_trainer, 0))
        patch.setattr(start, "_compile", once(compile_step, 1))
        yield


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Marks batches, or leaves some out, of the runs that follow."""

    def apply(marks: dict[int, int], left_out: Sequence[int] = ()) -> None:
        monkeypatch.setattr(start, "TrainIterator", lambda *args: Batches(TrainIterator(*args), marks, set(left_out)))

    return apply


def run(config: Config, workdir: pathlib.Path) -> loop.Result:
    with jax.set_mesh(make_mesh(config)):
        result = loop.train(config, workdir)
    assert result.finished
    return result


def change(config: Config, **train: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def events(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [record for record in read_records(workdir) if "event" in record]


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_records(workdir) if "loss" in record]


def final(config: Config, workdir: pathlib.Path) -> dict[str, np.ndarray]:
    return leaves_of(config, workdir, config.train.steps)


def position(workdir: pathlib.Path, step: int) -> dict[str, Any]:
    return json.loads((workdir / "checkpoints" / str(step) / "data" / "metadata").read_text())


def resumed_from(step: int, finished: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """A copy of a finished run, as if it had been killed after the checkpoint of `step`."""
    shutil.copytree(finished, workdir)
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return workdir


def by_hand(config: Config, left_out: set[int]) -> dict[str, np.ndarray]:
    """The state after all steps, some of them nothing but a count of the steps and the learning rate's schedule."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def advanced(node: Any) -> Any:
        return node._replace(count=node.count + 1) if is_schedule(node) else node

    with jax.set_mesh(make_mesh(config)):
        trainer = start.make_trainer(config, jax.sharding.get_mesh())
        train_step, _ = start._compile(trainer, config).result()
        data = TrainIterator(config, open_stream(config, "train", load_tokenizer(config)))
        batches = loop._on_device(data, range(config.data.batch_size), config.data.batch_size)
        state = trainer.init(jax.random.key(config.train.seed))
        for number in range(1, config.train.steps + 1):
            batch = next(batches)
            if number in left_out:
                opt_state = jax.tree.map(advanced, state.opt_state, is_leaf=is_schedule)
                state = dataclasses.replace(state, step=state.step + 1, opt_state=opt_state)
            else:
                state, _ = train_step(state, batch, trainer.rate(number - 1))
        data.close()
        return leaves(host(state))


@pytest.mark.full
def test_skip(tmp_path: pathlib.Path, feed: Any, caplog: pytest.LogCaptureFixture) -> None:
    """On two expert ranks. One bad step too many ends the run; it is resumed with a larger bound."""
    config, workdir = bad_config(tmp_path, "skip", "mesh.expert=2"), tmp_path / "run"
    feed({4: NAN, 7: NAN})
    with pytest.raises(NonFiniteLossError, match=r"step 7: .* \(bad steps before it: 1\); .* step 6 is kept") as error:
        run(change(config, max_bad_steps=1), workdir)
    assert "\n" not in str(error.value)
    assert "step 4: loss nan, gradient norm nan; skip, 1 of at most 1 (train.max_bad_steps)" in caplog.text
    run(config, workdir)
    state = final(config, workdir)
    chex.assert_trees_all_equal(state, by_hand(config, {4, 7}))
    assert any("router_bias" in name and np.any(value) for name, value in state.items())
    assert events(workdir) == [
        {"step": step, "event": "skip", "bad/loss": None, "bad/grad_norm": None} for step in (4, 7)
    ]
    assert [step for step, _ in losses(workdir)] == [1, 2, 3, 5, 6, 8]
    assert position(workdir, 8) == {"batches": 8, "bad_steps": 2}


@pytest.mark.parametrize(("what", "advised"), [("stop", True), ("rewind", False), ("skip", False)])
def test_who_stops_is_told_of_the_others(what: str, advised: bool) -> None:
    config = dataclasses.replace(Config(), train=TrainConfig(on_bad_step=what, max_bad_steps=1))
    run: Any = SimpleNamespace(config=config, bad_steps=1, _kept=lambda: "step 4 is kept")
    with pytest.raises(
        NonFiniteLossError, match=r"step 5: loss nan.*bad steps before it: 1\); step 4 is kept"
    ) as error:
        loop._Run._bad(run, 5, SimpleNamespace(loss=np.nan, grad_norm=1.0))
    assert ("or use train.on_bad_step=skip or rewind" in str(error.value)) == advised
    assert "spike" not in str(error.value)


def test_what_a_bad_step_does_may_change_on_resume(tmp_path: pathlib.Path) -> None:
    check_resume(small(tmp_path), bad_config(tmp_path, "stop", "model.balance=aux_loss", "optimizer.decay_steps=0"))
    rewinding = small(tmp_path, "train.on_bad_step=rewind", "train.max_bad_steps=3", "train.spike_factor=3")
    check_resume(small(tmp_path), rewinding)


def test_rewind(tmp_path: pathlib.Path, feed: Any) -> None:
    """Batch 6 is bad at step 6: back to 4, and on with batch 7. So batch 9 is bad at step 7: back to 6."""
    config, workdir = bad_config(tmp_path, "rewind", "train.max_bad_steps=2"), tmp_path / "run"
    feed({6: NAN, 9: NAN})
    assert run(config, workdir).first_step == 0  # of this start, wherever rewinds have gone back to
    rewinds = [(record["step"], record["event"], record["from"]) for record in events(workdir)]
    assert rewinds == [(4, "rewind", 6), (6, "rewind", 7)]
    assert position(workdir, 8) == {"batches": 11, "bad_steps": 2} and position(workdir, 4) == {"batches": 4}
    steps = [record["step"] for record in read_records(workdir)]
    assert steps == [0, 1, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8]  # its start, …, its end


@pytest.mark.full
def test_a_rewind_is_that_of_a_run_that_never_saw_the_batches(tmp_path: pathlib.Path, feed: Any) -> None:
    """Also after a kill; and no further than `max_bad_steps` allows."""
    config, workdir = bad_config(tmp_path, "rewind", "train.max_bad_steps=2"), tmp_path / "run"
    feed({6: NAN, 9: NAN})
    run(config, workdir)
    for killed_after in (6, 4):
        again = resumed_from(killed_after, workdir, tmp_path / f"from {killed_after}")
        run(config, again)
        chex.assert_trees_all_equal(final(config, again), final(config, workdir))
        assert position(again, 8) == position(workdir, 8)
        assert losses(again) == losses(workdir)

    with pytest.raises(NonFiniteLossError, match=r"step 7: .* \(bad steps before it: 1\); .* step 6 is kept"):
        run(change(config, max_bad_steps=1), tmp_path / "bounded")

    feed({}, left_out=(5, 6, 9))
    run(config, tmp_path / "never")
    assert not events(tmp_path / "never")
    chex.assert_trees_all_equal(final(config, workdir), final(config, tmp_path / "never"))
    assert losses(workdir) == losses(tmp_path / "never")


@pytest.mark.full
def test_a_rewind_reads_no_source_too_often(tmp_path: pathlib.Path, feed: Any) -> None:
    """Of 36 windows, at most once, eight steps take 32, and two more batches left out take 40."""
    (tmp_path / "few.txt").write_text("a few words " * 48 + "end")
    mixture = f"data.mixture={tmp_path}/train.jsonl=1,{tmp_path}/few.txt=1x1"
    config = bad_config(tmp_path, "rewind", "data.source=sotu", mixture)
    feed({6: NAN})
    with pytest.raises(ConfigError, match=r"few\.txt would be read 1\.11 times by step 8, and at most 1 times"):
        run(config, tmp_path / "run")


@pytest.mark.full
def test_a_curriculum_goes_by_steps_behind_a_rewind(tmp_path: pathlib.Path, feed: Any) -> None:
    """Batch 6 is bad at step 6, the first of the other source: back to 4, whose next step is of the first one still."""
    (tmp_path / "b.txt").write_text("another text " * 120)
    mixture = (f"data.mixture={tmp_path}/train.jsonl=1,{tmp_path}/b.txt=0", "data.curriculum=5:b=1")
    config = bad_config(tmp_path, "rewind", "data.source=sotu", *mixture)
    feed({6: NAN})
    run(config, tmp_path / "run")
    tokens = {r["step"]: (r["tokens/train"], r["tokens/b"]) for r in read_records(tmp_path / "run") if "loss" in r}
    # Six batches were given by then, one of them of b.
    assert [tokens[step] for step in (4, 5, 6, 8)] == [(128 * a, 128 * b) for a, b in ((4, 0), (6, 1), (6, 2), (6, 4))]
    for killed_after in (6, 4):
        again = resumed_from(killed_after, tmp_path / "run", tmp_path / f"from {killed_after}")
        run(config, again)
        chex.assert_trees_all_equal(final(config, again), final(config, tmp_path / "run"))


def test_rewind_to_the_beginning_and_past_damage(
    tmp_path: pathlib.Path, feed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step is bad: there is no checkpoint. Later the newest checkpoint is damaged when it is needed."""
    config, workdir = bad_config(tmp_path, "rewind"), tmp_path / "run"
    feed({1: NAN, 6: NAN})
    save = Checkpoints.save

    def damaging_save(self: Checkpoints, state: Any, data: Any, config: Config, step: int, *more: Any) -> None:
        save(self, state, data, config, step, *more)
        if step == 4 and data["batches"] == 5:
            self.wait()
            (workdir / "checkpoints" / "4" / "data" / "metadata").unlink()

    monkeypatch.setattr(Checkpoints, "save", damaging_save)
    run(config, workdir)
    assert [(record["step"], record["from"]) for record in events(workdir)] == [(0, 1), (2, 5)]
    assert [step for step, _ in losses(workdir)] == list(range(1, 9))
    assert position(workdir, 8) == {"batches": 12, "bad_steps": 2}
    assert [path.name for path in (workdir / "checkpoints-damaged").iterdir()] == ["4"]


@pytest.mark.full
def test_spikes(tmp_path: pathlib.Path, feed: Any) -> None:
    """The first is not seen, for want of losses to compare; the next is, also by a run that has just been resumed."""
    config = bad_config(tmp_path, "skip", "train.spike_factor=2", "train.steps=22")
    feed({10: SPIKE, 20: SPIKE})
    run(config, tmp_path / "run")
    (event,) = events(tmp_path / "run")
    assert (event["step"], event["event"]) == (20, "skip") and event["bad/loss"] > 8 and event["bad/grad_norm"] > 0
    assert len(position(tmp_path / "run", 22)["losses"]) == 21
    again = resumed_from(18, tmp_path / "run", tmp_path / "again")
    run(config, again)
    assert events(again) == events(tmp_path / "run")
    chex.assert_trees_all_equal(final(config, again), final(config, tmp_path / "run"))


@pytest.mark.parametrize(
    ("override", "message"),
    [("train.on_bad_step=retry", "stop, skip, rewind"), ("train.spike_factor=0.5", "must be above 1, as in 2, or 0"),
     ("train.max_bad_steps=0", "must be at least 1")],
)  # fmt: skip
def test_fields(tmp_path: pathlib.Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(tmp_path, override)


def test_a_checkpoint_keeps_how_many_were_bad_and_the_recent_losses() -> None:
    """Of 32 those that there were yet, at the end."""
    given = {"batches": 7}
    state = TrainState(jnp.asarray(3), {}, {}, {}, losses=jnp.asarray([jnp.inf, 1.5, jnp.nan, 2.5]))  # type: ignore[arg-type]
    assert save_position(given, 0, dataclasses.replace(state, losses=None)) == given == {"batches": 7}
    saved = save_position(given, 2, state)
    assert saved == {"batches": 7, "bad_steps": 2, "losses": [1.5, 2.5]} and given == {"batches": 7}
    there = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = dataclasses.replace(state, losses=jax.ShapeDtypeStruct((5,), jnp.float32, sharding=there))
    assert np.asarray(restore_losses(state, abstract, saved).losses).tolist() == [math.inf] * 3 + [1.5, 2.5]
    for none in ({}, {"losses": []}):
        assert np.asarray(restore_losses(state, abstract, none).losses).tolist() == [math.inf] * 5
    assert restore_losses(state, dataclasses.replace(state, losses=None), saved) is state
