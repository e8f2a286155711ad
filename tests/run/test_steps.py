"""What the loop does at which step, and how it gets over a bad one; no model is computed."""

import contextlib
import math
import pathlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from bigmac_jax.config import Config, ModelConfig, TrainConfig
from bigmac_jax.evaluation.perplexity import Score
from bigmac_jax.run import loop
from bigmac_jax.run.loop import Result, _Run
from bigmac_jax.runtime.clock import Clock
from bigmac_jax.training.bad_steps import NonFiniteLossError, RunError
from bigmac_jax.training.partial_checkpoint import Learned
from bigmac_jax.training.step import StepMetrics

LOSSES = {3: 2.0, 5: 3.0, 6: 1.0}  # of evaluations, by step


@pytest.fixture
def of_run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run whose parts note what is asked of them."""
    monkeypatch.setattr(loop, "clock", mock.MagicMock(phase="steps"))
    made = mock.MagicMock(began=0, first_step=0, best=math.inf, score=None, tracing=False, learned=None, bad_steps=0,
                          batches_ahead=0, config=Config(model=ModelConfig(num_experts=8)))  # fmt: skip
    made.mirror.folder = pathlib.Path("folder")
    return made


def with_train(of_run: Any, **train: Any) -> None:
    of_run.config = Config(model=of_run.config.model, train=TrainConfig(**train))


def take(
    of_run: Any, monkeypatch: pytest.MonkeyPatch, stops_at: int = 0, profile: tuple[int, int] | None = None,
    latest: int | None = None,
) -> tuple[list[str], Result]:  # fmt: skip
    """Takes the steps → what happened in order, with the step that it is of."""
    done: list[str] = []

    def step(state: int, batch: str, rate: float) -> tuple[int, str]:
        number = state - 100 + 1
        assert (batch, rate) == (f"batch {number}", (number - 1) / 8)
        done.append(f"step {number}")
        return state + 1, f"metrics {number}"

    def finish(pending: tuple[int, str] | None) -> None:
        if pending is not None:
            assert pending[1] == f"metrics {pending[0]}"
            done.append(f"finish {pending[0]}")

    def evaluate(step: int, state: int) -> Any:
        assert state == 100 + step
        done.append(f"evaluate {step}")
        of_run.score = SimpleNamespace(loss=LOSSES[step])
        return of_run.score

    def save(step: int, state: int, score: Any, whole: bool = True) -> None:
        assert state == 100 + step
        done.append(f"save {step}{' whole' if whole else ''}{f' {score.loss}' if score else ''}")
        of_run.best, saved[0] = min(of_run.best, score.loss if score else math.inf), step

    def stop_trace() -> None:
        if of_run.tracing:
            done.append("stop")
        of_run.tracing = False

    first, saved = of_run.first_step, [latest]
    of_run._finish, of_run._evaluate, of_run._save, of_run._stop_trace = finish, evaluate, save, stop_trace
    of_run._score_tasks = lambda step, state: done.append(f"tasks {step} {state}")
    of_run.trainer.rate = lambda done: done / 8
    of_run.checkpoints.latest = lambda: latest or saved[0]
    of_run.goodput.record = lambda step: {"goodput": step}
    of_run.writer.write = lambda record: done.append(f"write {record['step']} {record['goodput']}")
    votes = SimpleNamespace(cast=lambda: None, passed=lambda: loop.clock.start_step.call_args[0][0] == stops_at)
    given = of_run.data, of_run.inputs.rows, of_run.config.data.batch_size
    batches = {given: [f"batch {first + i}" for i in range(1, 20)]}
    monkeypatch.setattr(loop, "_on_device", lambda *asked: iter(batches[asked]))
    monkeypatch.setattr(loop.hosts, "StopVote", lambda stopped: votes)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: done.append(f"trace into {folder}"))
    monkeypatch.setattr(jax, "block_until_ready", lambda metrics: done.append(f"wait for {metrics}"))
    result = _Run._steps(of_run, step, 100 + first, [], profile)
    return done, result


def test_what_is_done_at_which_step(of_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is dispatched before the one before it is read. Evaluations at 3 and the end, tasks at 4 and the end,
    saves at 2, 4 and the end; and of the best, which is whole."""
    with_train(of_run, steps=5, eval_every=3, tasks_every=4, tasks="copa", checkpoint_every=2)
    done, result = take(of_run, monkeypatch)
    assert done == [
        "step 1", "step 2", "finish 1", "finish 2", "save 2", "step 3", "finish 3", "evaluate 3", "save 3 whole 2.0",
        "step 4", "finish 4", "tasks 4 104", "save 4", "step 5", "finish 5", "evaluate 5", "tasks 5 105",
        "save 5 whole 3.0", "write 5 5",
    ]  # fmt: skip
    assert result == (5, True, of_run.score, 0) and of_run.score.loss == 3.0


@pytest.mark.parametrize(
    ("train", "first", "stops_at", "expected"),
    [
        # Without checkpoints on the way the last is all; without a log each step is finished all the same.
        ({"steps": 3, "eval_every": 3, "checkpoint_every": 0}, 0, 0,
         ["step 1", "step 2", "finish 1", "step 3", "finish 2", "finish 3", "evaluate 3", "save 3 whole 2.0",
          "write 3 3"]),
        ({"steps": 2, "eval_every": 0, "checkpoint_every": 2}, 0, 0,
         ["step 1", "step 2", "finish 1", "finish 2", "save 2 whole", "save 2 whole", "write 2 2"]),
        # Stopped: what is saved then is whole, and the run is not finished.
        ({"steps": 9, "eval_every": 0, "checkpoint_every": 2}, 0, 2,
         ["step 1", "step 2", "finish 1", "finish 2", "save 2 whole", "save 2 whole", "write 2 2"]),
        ({"steps": 9, "eval_every": 0, "checkpoint_every": 9}, 4, 5,
         ["step 5", "finish 5", "save 5 whole", "write 5 5"]),
        ({"steps": 4, "eval_every": 3, "checkpoint_every": 1}, 2, 3,
         ["step 3", "finish 3", "evaluate 3", "save 3 whole 2.0", "save 3 whole 2.0", "write 3 3"]),
        # A loss that is only as good as the best is no new best.
        ({"steps": 7, "eval_every": 6, "checkpoint_every": 9}, 5, 6,
         ["step 6", "finish 6", "evaluate 6", "save 6 whole 1.0", "write 6 6"]),
        ({"steps": 5, "eval_every": 3, "checkpoint_every": 2}, 5, 0, []),
    ],
)  # fmt: skip
def test_how_steps_end(
    train: dict[str, int], first: int, stops_at: int, expected: list[str], of_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_train(of_run, **train)
    of_run.began, of_run.first_step, of_run.best = first, first, 1.0 if first else math.inf
    done, result = take(of_run, monkeypatch, stops_at)
    assert done == expected
    last = max([first, *(int(of.split()[1]) for of in expected)])
    assert result == (last, last == train["steps"], of_run.score, first)


@pytest.mark.parametrize(
    ("profile", "first", "started", "stopped"),
    [((2, 3), 0, 2, 3), ((4, 9), 0, 4, 5), ((5, 5), 0, 5, 5), ((1, 3), 2, 3, 3), ((1, 1), 0, 1, 1), ((6, 9), 0, 0, 0)],
)
def test_a_trace_is_of_the_steps_that_were_asked_for(
    profile: tuple[int, int], first: int, started: int, stopped: int, of_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins before the first, and ends when the last is done."""
    with_train(of_run, steps=5, eval_every=0, checkpoint_every=0)
    of_run.first_step = first
    done, _ = take(of_run, monkeypatch, profile=profile)
    traces = [of for of in done if of.startswith(("trace", "wait", "stop"))]
    if not started:
        assert not {"stop", "trace into folder/profile"} & {*traces}
    else:
        assert traces == ["trace into folder/profile", f"wait for metrics {stopped}", "stop"]
        assert done[done.index(traces[0]) + 1] == f"step {started}"


def test_a_last_step_that_is_not_saved_is_an_error(of_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_train(of_run, steps=2, eval_every=0, checkpoint_every=0)
    with pytest.raises(RunError, match="step 2 is not saved"):
        take(of_run, monkeypatch, latest=1)


def bad_step(step: int = 4) -> NonFiniteLossError:
    metrics: Any = SimpleNamespace(loss=math.nan, grad_norm=2.0)
    return NonFiniteLossError(step, metrics, TrainConfig(), "")


@pytest.mark.parametrize(
    ("action", "before", "most", "rewinds"),
    [("rewind", 1, 2, True), ("rewind", 2, 2, False), ("rewind", 3, 2, False), ("skip", 0, 2, False),
     ("stop", 0, 2, False)],
)  # fmt: skip
def test_who_rewinds(
    action: str, before: int, most: int, rewinds: bool, of_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_train(of_run, on_bad_step=action, max_bad_steps=most)
    of_run.bad_steps, of_run._rewind.return_value = before, "restored"
    of_run._steps.side_effect = [bad_step(), "done"]
    monkeypatch.setattr(loop, "RunConstants", lambda config: None)
    unused = mock.Mock(return_value="")
    monkeypatch.setattr(loop, "unused_profile", unused)
    monkeypatch.setattr(loop.signals, "stop_signals", lambda: contextlib.nullcontext([]))
    if not rewinds:
        with pytest.raises(NonFiniteLossError):
            _Run.loop(of_run, "begun", (1, 2))  # type: ignore[arg-type]
        return
    assert _Run.loop(of_run, "begun", (1, 2)) == "done"  # type: ignore[arg-type, comparison-overlap]
    unused.assert_called_once_with((1, 2), 1, of_run.config.train.steps)
    (_, *first), (_, *second) = (call.args for call in of_run._steps.call_args_list)
    assert first == ["begun", [], (1, 2)] and second == ["restored", [], None]  # a trace is of the first pass


@pytest.mark.parametrize(
    ("action", "before", "most", "skips"),
    [("skip", 1, 2, True), ("skip", 2, 2, False), ("skip", 3, 2, False), ("rewind", 0, 2, False),
     ("stop", 0, 2, False)],
)  # fmt: skip
def test_who_skips(action: str, before: int, most: int, skips: bool, of_run: Any) -> None:
    with_train(of_run, on_bad_step=action, max_bad_steps=most)
    of_run.bad_steps, of_run.timer.steps, metrics = before, 5, SimpleNamespace(loss=math.nan, grad_norm=2.0)
    if skips:
        _Run._bad(of_run, 4, metrics)  # type: ignore[arg-type]
        assert (of_run.bad_steps, of_run.timer.steps) == (before + 1, 6)
        of_run._report.assert_called_once_with("skip", 4, mock.ANY)
    else:
        with pytest.raises(NonFiniteLossError):
            _Run._bad(of_run, 4, metrics)  # type: ignore[arg-type]
        assert (of_run.bad_steps, of_run.timer.steps) == (before, 5)


def test_a_rewind_goes_on_with_the_next_batch(of_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 7 was of batch 9; from step 4 on it is batch 10 that follows."""
    of_run.batches_ahead, of_run.bad_steps, of_run.checkpoints.best_loss.return_value = 2, 1, 3.5
    position = {"batches": 6}
    monkeypatch.setattr(loop, "restore_or_begin", lambda *of: (4, [*of], position))
    monkeypatch.setattr(loop, "clock", clock := Clock())
    clock.begin("steps")
    phases = list[str]()
    of_run._writer.side_effect = lambda: phases.append(clock.phase)
    bad = bad_step(7)
    state = _Run._rewind(of_run, bad)
    assert phases == ["restore"]  # in which a step is not waited for
    assert state == [of_run.config, of_run.trainer, of_run.checkpoints, of_run.models]
    assert (of_run.first_step, of_run.batches_ahead, of_run.bad_steps) == (4, 5, 2)
    assert of_run.best == 3.5 and of_run.learned is of_run._learned(position)
    of_run.data.set_state.assert_called_once_with({"batches": 9}, 4)
    of_run.goodput.go_back.assert_called_once_with(4, 7)
    of_run._check_workdir.assert_called_once_with(7)
    of_run._report.assert_called_once_with("rewind", 4, bad, **{"from": 7})


def test_what_is_written_of_a_bad_step(of_run: Any) -> None:
    _Run._report(of_run, "rewind", 4, bad_step(7), **{"from": 7})
    (record,) = of_run.writer.write.call_args.args
    assert math.isnan(record.pop("bad/loss"))
    assert record == {"step": 4, "event": "rewind", "from": 7, "bad/grad_norm": 2.0}


def metrics_of(bad: bool = False) -> StepMetrics:
    load: Any = SimpleNamespace(aux=SimpleNamespace(load=np.asarray([[0.25, 0.75]], np.float32)))
    scalar: Any = 0.0
    return StepMetrics(scalar, load, scalar, scalar, np.asarray(bad))  # type: ignore[arg-type]


def test_which_steps_are_logged(of_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second one, and the last; a bad one is not learned from."""
    record = {"loss": 1.5, "tokens_per_s": 1234.4, "moe/drop_rate": 0.25}
    monkeypatch.setattr(loop, "step_record", lambda *of: record | {"of": [*of[:1], *of[2:]]})
    of_run.data.tokens_by_source = lambda batches: {"a": 10 * batches}
    of_run.goodput.record = lambda step: {"goodput": step}
    of_run.drops.line.side_effect = lambda step, _: "drops" if step == 3 else ""
    of_run.learned, of_run.batches_ahead, of_run.timer.steps = Learned(np.zeros((1, 2))), 3, 0
    with_train(of_run, steps=5, log_every=2)
    _Run._finish(of_run, None)
    for step in range(1, 6):
        _Run._finish(of_run, (step, metrics_of()))
    shown = "loss 1.500, 1,234 tokens/s, 25.0% dropped"
    assert [call.args for call in of_run.writer.progress.call_args_list] == [
        (1,),
        (2, shown),
        (3,),
        (4, shown),
        (5, shown),
    ]
    written = [call.args[0] for call in of_run.writer.write.call_args_list]
    of = [of_run.timer.read(), of_run.constants]
    assert written == [
        record | {"of": [step, *of], "goodput": step, "tokens/a": 10 * (step + 3)} for step in (2, 4, 5)
    ]  # fmt: skip
    assert of_run.writer.print.call_args_list == [mock.call("drops")] and of_run.timer.steps == 5
    assert of_run.learned.updates_YE.tolist() == [[1.25, 3.75]] and not of_run._bad.called
    _Run._finish(of_run, (4, metrics_of(bad=True)))
    assert of_run._bad.call_args.args == (4, mock.ANY) and of_run.learned.updates_YE.tolist() == [[1.25, 3.75]]
    record.pop("moe/drop_rate")
    with_train(of_run, steps=5, log_every=0)
    for step in (4, 5):
        _Run._finish(of_run, (step, metrics_of()))
    assert [call.args for call in of_run.writer.progress.call_args_list[5:]] == [
        (4,),
        (5, "loss 1.500, 1,234 tokens/s"),
    ]


def test_each_step_that_ends_is_progress(of_run: Any) -> None:
    """Before a save the loop waits for two steps, one behind the other."""
    ticks_before = list[int]()
    bad = mock.MagicMock(__bool__=lambda _: bool(ticks_before.append(loop.clock.tick.call_count)))  # type: ignore[attr-defined]
    of_run.drops.line.return_value = ""
    with_train(of_run, steps=9, log_every=0)
    for step in (1, 2):
        _Run._finish(of_run, (step, metrics_of()._replace(bad=bad)))
    assert ticks_before == [0, 1] and loop.clock.tick.call_count == 2  # type: ignore[attr-defined]


def test_the_first_step_ends_the_start(of_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.clock.phase = "first step"
    of_run.compile_seconds = 2.5
    of_run.drops.line.return_value = ""
    monkeypatch.setattr(loop, "describe_start", "compiled for {} s".format)
    monkeypatch.setattr(loop, "start_record", lambda step: {"step": step})
    with_train(of_run, steps=9, log_every=0)
    _Run._finish(of_run, (4, metrics_of()))
    of_run.writer.print.assert_called_once_with("compiled for 2.5 s")
    of_run.writer.write.assert_called_once_with({"step": 3})
    loop.clock.switch.assert_called_once_with("steps")  # type: ignore[attr-defined]


def test_an_evaluation_by_source(of_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sources the score is that of all together; of one alone there is no other."""
    scores = {"a": Score.from_sums(30.0, 10, 5, 40), "b": Score.from_sums(10.0, 30, 5, 20)}
    asked = list[Any]()

    def evaluate(*given: Any) -> Any:
        given[4](5)
        asked.append(given[:4])
        return SimpleNamespace(score=scores[given[1]])

    monkeypatch.setattr(loop, "evaluate", evaluate)
    monkeypatch.setattr(loop, "streams_by_source", lambda _: {name: name for name in scores})
    of_run.config = Config(train=TrainConfig(accumulate_steps=2))
    data = of_run.config.data
    found = _Run._evaluate(of_run, 7, "state")  # type: ignore[arg-type]
    assert found is of_run.score and found == Score.from_sums(40.0, 40, 10, 60)
    shown = {
        "step": 7,
        "eval/loss": 1.0,
        "eval/perplexity": found.perplexity,
        "eval/bits_per_byte": found.bits_per_byte,
    }
    of_run.writer.write.assert_called_once_with(shown | {"eval/loss/a": 3.0, "eval/loss/b": 1 / 3})
    of_model = of_run.trainer.model("state")
    assert asked == [(of_model, name, data.sequence_length, data.batch_size // 2) for name in "ab"]
    scores[""] = scores.pop("a")
    del scores["b"]
    assert _Run._evaluate(of_run, 8, "state") is scores[""]  # type: ignore[arg-type]
    assert of_run.writer.write.call_args.args[0].keys() == shown.keys()


@pytest.mark.parametrize(
    ("score", "whole", "waited", "best", "experts", "after"),
    [
        (None, False, True, 2.0, 3, 2.0),
        (None, True, True, 2.0, 0, 2.0),
        (3.0, False, True, 2.0, 3, 2.0),
        (1.5, False, True, 2.0, 3, 1.5),  # the caller says what is whole …
        (3.0, False, False, 2.0, 0, 3.0),  # … but that the best save failed, which was of 2.0, is known now
        (4.0, False, False, 2.0, 3, 4.0),
        (5.0, False, False, 2.0, 3, 4.0),
    ],
)
def test_what_a_save_holds(
    score: float | None, whole: bool, waited: bool, best: float, experts: int, after: float, of_run: Any
) -> None:
    """Three of the experts, or all; of the best so far the loss is kept."""
    of_run.learned, of_run.best, of_run.bad_steps = Learned(np.zeros((1, 8)), asked=3), best, 2
    of_run.checkpoints.wait.return_value, of_run.checkpoints.best_loss.return_value = waited, 4.0
    of_run.data.get_state.return_value = {"batches": 9}
    state: Any = SimpleNamespace(losses=None)
    scored: Any = None if score is None else SimpleNamespace(loss=score)
    _Run._save(of_run, 6, state, scored, whole)
    position, loss = {"batches": 9, "bad_steps": 2}, math.inf if score is None else score
    of_run.checkpoints.save.assert_called_once_with(state, position, of_run.config, 6, loss, experts, of_run.learned)
    assert of_run.best == after
    of_run.best, of_run.learned, of_run.checkpoints.save.return_value = best, None, False
    of_run.checkpoints.wait.return_value = True
    _Run._save(of_run, 6, state, scored, whole)
    assert of_run.best == best and of_run.checkpoints.save.call_args.args[5] == 0  # it was not saved


def test_what_restarts_have_lost_is_written(of_run: Any) -> None:
    of_run.first_step, of_run.learned = 4, Learned(np.full((1, 8), 0.25), lost=2.0, asked=3)
    _Run._write_lost(of_run)
    of_run.writer.write.assert_called_once_with({"step": 4, "checkpoint/lost_updates": 0.5, "checkpoint/experts": 3})
    of_run.learned = of_run.learned._replace(asked=0)
    _Run._write_lost(of_run)
    assert of_run.writer.write.call_args.args[0]["checkpoint/experts"] == 8  # all
    of_run.first_step = 0
    _Run._write_lost(of_run)
    of_run.first_step, of_run.learned = 4, None
    _Run._write_lost(of_run)
    assert of_run.writer.write.call_count == 2


def test_who_counts_what_experts_have_learned(of_run: Any) -> None:
    """Who saves some of them, or has once."""
    of_run.first_step = 16
    for asked, position, expected in ((0, {}, None), (3, {}, 3), (0, {"experts": {"updates_YE": [0] * 16}}, 0)):
        model = ModelConfig(num_layers=3, first_dense_layers=1, num_experts=8)
        of_run.config = Config(model=model, train=TrainConfig(experts_per_checkpoint=asked))
        found = _Run._learned(of_run, position)
        assert (found and found.asked) == expected
        if found:
            assert found.updates_YE.tolist() == [[0.0 if position else 2.0] * 8] * 2
    of_run.config = Config(model=ModelConfig("dense"), train=TrainConfig(experts_per_checkpoint=3))
    assert _Run._learned(of_run, {}) is None
