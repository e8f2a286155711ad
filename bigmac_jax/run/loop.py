"""The training loop: dispatch a step, then read the metrics of the one before, so that the device never waits."""

import functools
import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bigmac_jax.config import Config
from bigmac_jax.data.batch import Batch
from bigmac_jax.data.pipeline import TrainIterator, streams_by_source
from bigmac_jax.evaluation.perplexity import Score, evaluate
from bigmac_jax.evaluation.tasks.task_jobs import describe_scores, flatten_scores, score_jobs
from bigmac_jax.model.mesh import batch_spec
from bigmac_jax.run.start import Start, Step, restore_or_begin, start
from bigmac_jax.runtime import hosts, signals, storage
from bigmac_jax.runtime.clock import clock
from bigmac_jax.runtime.mirror import Mirror
from bigmac_jax.runtime.workdir_lock import lock_workdir
from bigmac_jax.training.bad_steps import NonFiniteLossError, RunError, save_position
from bigmac_jax.training.drop_notice import DropNotice
from bigmac_jax.training.goodput import Goodput, describe_start, start_record
from bigmac_jax.training.metrics import MetricsWriter, RunConstants, SilentWriter, StepTimer, step_record
from bigmac_jax.training.metrics_file import read_records
from bigmac_jax.training.partial_checkpoint import LEARNED, Learned
from bigmac_jax.training.programs import evaluation_rows
from bigmac_jax.training.step import StepMetrics, TrainState
from bigmac_jax.tuning.pretrained import with_absolute_places

_log = logging.getLogger(__name__)


class Result(NamedTuple):
    """How a run ended."""

    step: int
    finished: bool  # False: stopped by SIGTERM or SIGINT, saved, to be resumed
    score: Score | None  # of the validation split at the last evaluation
    first_step: int = 0  # that this start went on from


def train(
    config: Config,
    workdir: pathlib.Path,
    profile: tuple[int, int] | None = None,
    notes: Sequence[str] = (),
    asked: Config | None = None,
) -> Result:
    """Trains in `workdir` on the current mesh, from its newest checkpoint if it has one.

    Args:
      profile: (first, last) step of a trace for TensorBoard or Perfetto, written to workdir/profile.
      notes: lines to say before anything is read.
      asked: what the workdir keeps, if the run was asked for more replicas than are here (`run.elastic`).

    Raises:
      ConfigError: the workdir was started with another config or is in use, or the data cannot be used.
      RunError: a loss that train.on_bad_step does not get over, or a last checkpoint that could not be written,
        or a workdir that was moved or removed.
    """
    clock.begin("start")
    try:
        config = with_absolute_places(config)
        with lock_workdir(workdir) as is_held:
            for note in notes:
                hosts.say(note)
            started = start(config, workdir, asked and with_absolute_places(asked))
            run = _Run(config, workdir, started, is_held)
            try:
                return run.loop(started.state, profile)
            finally:
                started.inputs.batches.close()
                run.close()
    finally:
        clock.reset()


class _Run:
    """A run in progress: its loop, and what it carries from step to step."""

    def __init__(self, config: Config, workdir: pathlib.Path, started: Start, is_held: Callable[[], bool]):
        self.config, self.workdir, self.trainer, self.compiling = config, workdir, started.trainer, started.compiling
        self.checkpoints, self.inputs, self.models = started.checkpoints, started.inputs, started.models
        self.data, self.began, self.first_step = started.inputs.batches, started.step, started.step
        self.bad_steps = started.position.get("bad_steps", 0)
        self.learned = self._learned(started.position)
        self.batches_ahead = started.position["batches"] - started.step  # batches that rewinding has left out
        self.best = hosts.broadcast(started.checkpoints.best_loss())
        self.score: Score | None = None
        self.tracing = False
        self.is_held, self.lost = is_held, False
        self.compile_seconds = 0.0
        self.mirror = Mirror(workdir)  # of what grows: metrics, events, traces
        if hosts.is_first():
            self.mirror.fetch("metrics.jsonl")
            self.mirror.fetch("wandb/id")
        self.goodput = Goodput(read_records(self.mirror.folder), started.step)
        self.writer = self._writer()
        self.timer = StepTimer()
        self.drops = DropNotice(config)

    def _learned(self, position: dict[str, Any]) -> Learned | None:
        """What the experts have learned, of a run that saves some of them at a time, or has once."""
        train, model = self.config.train, self.config.model
        if not model.moe_layers or not (train.experts_per_checkpoint or LEARNED in position):
            return None
        shape = model.moe_layers, model.expert_count
        return Learned.read(position.get(LEARNED), shape, self.first_step).asked_for(train.experts_per_checkpoint)

    def _writer(self) -> MetricsWriter | SilentWriter:
        train = self.config.train
        with hosts.raise_together():
            if hosts.is_first():
                return MetricsWriter(self.mirror.folder, self.first_step, train.steps, train.wandb, self.workdir)
        return SilentWriter()

    def loop(self, state: TrainState, profile: tuple[int, int] | None) -> Result:
        """Takes the remaining steps, again from a checkpoint where a bad step rewinds."""
        with clock.timed("compile"):
            train_step = self._compiled()
            self.constants = RunConstants(self.config)  # measures the machine, which has nothing else to do now
        if (line := unused_profile(profile, self.first_step + 1, self.config.train.steps)) and hosts.is_first():
            _log.warning("%s", line)
        self._write_lost()
        with signals.stop_signals() as stopped:  # until here there was nothing to save: they ended the process
            clock.switch("first step")
            while True:
                try:
                    return self._steps(train_step, state, stopped, profile)
                except NonFiniteLossError as error:
                    if self.config.train.on_bad_step != "rewind" or self.bad_steps >= self.config.train.max_bad_steps:
                        raise
                    bad = error.with_traceback(None)  # which holds the bad state
                state, profile = self._rewind(bad), None  # a trace is of the first pass

    def _steps(
        self, train_step: Step, state: TrainState, stopped: list[int], profile: tuple[int, int] | None
    ) -> Result:
        """Takes the remaining steps, once."""
        train, step = self.config.train, self.first_step
        batches = _on_device(self.data, self.inputs.rows, self.config.data.batch_size)
        self.timer.restart()
        pending: tuple[int, StepMetrics] | None = None
        score: Score | None = None
        vote, stopping = hosts.StopVote(stopped), False
        while step < train.steps and not stopping:
            if profile and not self.tracing and profile[0] <= step + 1 <= profile[1]:
                jax.profiler.start_trace(str(self.mirror.folder / "profile"))
                self.tracing = True
            with clock.timed("data wait"):
                batch = next(batches)
            clock.start_step(step + 1)
            state, metrics = train_step(state, batch, self.trainer.rate(step))
            vote.cast()
            self._finish(pending)
            step += 1
            pending = step, metrics
            if profile and step == min(profile[1], train.steps):
                jax.block_until_ready(metrics)
                self._stop_trace()
            last = step == train.steps
            evaluates = train.eval_every and (step % train.eval_every == 0 or last)
            scores_tasks = train.tasks_every and (step % train.tasks_every == 0 or last)
            saves = train.checkpoint_every and step % train.checkpoint_every == 0
            stopping = vote.passed()  # once a step: what is saved at the last one is whole
            if evaluates or scores_tasks or saves:
                self._finish(pending)  # only a state whose loss is known to be finite is evaluated or kept
                pending = None
            score = self._evaluate(step, state) if evaluates else None
            if scores_tasks:
                self._score_tasks(step, state)
            # Process 0's say: the others' sums may differ in the last bit.
            new_best = score is not None and train.checkpoint_every > 0 and hosts.broadcast(score.loss < self.best)
            if new_best or saves:
                self._save(step, state, score, whole=new_best or last or stopping)
        self._finish(pending)
        if step > self.first_step:
            self._save(step, state, score)
        with clock.timed("save"):
            self.checkpoints.wait()
        if step > self.first_step:
            self.writer.write({"step": step} | self.goodput.record(step))
            if hosts.broadcast(self.checkpoints.latest()) != step:
                raise RunError(
                    f"step {step} is not saved (see above), {self._kept()}; free space in {self.workdir} and run the "
                    f"same command again"
                )
        return Result(step, step >= train.steps, self.score, self.began)

    def _compiled(self) -> Step:
        """Waits for the compiled step."""
        if self.compiling is None:
            return self.trainer.step
        with self.writer.waiting("compiling the step"):
            compiled, self.compile_seconds = self.compiling.result()
        # The step's first collectives connect groups of processes, for which gloo waits 30 s: process 0, which alone
        # finds its program in the cache, waits here for those that compile theirs.
        hosts.gather("")
        return compiled

    def _finish(self, pending: tuple[int, StepMetrics] | None) -> None:
        """Waits for a dispatched step, checks its loss, and logs it if it is due."""
        if pending is None:
            return
        step, metrics = pending
        train = self.config.train
        bad = bool(metrics.bad)  # waits for the device
        clock.tick()  # the next step's wait, if one follows, begins here
        if bad:
            self._bad(step, metrics)
            return
        if self.learned is not None:
            self.learned.add(np.asarray(metrics.parts.aux.load, np.float64))
        if clock.phase == "first step":
            self.writer.print(describe_start(self.compile_seconds))
            self.writer.write(start_record(step - 1))
            clock.switch("steps")
        self.timer.steps += 1
        if line := self.drops.line(step, metrics):
            self.writer.print(line)
        due = train.log_every and step % train.log_every == 0
        if not due and step != train.steps:
            self.writer.progress(step)
            return
        record = step_record(step, metrics, self.timer.read(), self.constants) | self.goodput.record(step)
        by_source = self.data.tokens_by_source(step + self.batches_ahead)
        record |= {f"tokens/{name}": tokens for name, tokens in by_source.items()}
        self.writer.write(record)
        self.mirror.copy_sometimes()
        drops = f", {rate:.1%} dropped" if (rate := record.get("moe/drop_rate", 0)) else ""
        self.writer.progress(step, f"loss {record['loss']:.3f}, {record['tokens_per_s']:,.0f} tokens/s{drops}")

    def _bad(self, step: int, metrics: StepMetrics) -> None:
        """Logs a step whose update was skipped, or raises NonFiniteLossError."""
        train = self.config.train
        end = f" (bad steps before it: {self.bad_steps})" if self.bad_steps else ""
        end += f"; {self._kept()}; lower optimizer.learning_rate or optimizer.clip_norm"
        end += ", or use train.on_bad_step=skip or rewind" if train.on_bad_step == "stop" else ""
        bad = NonFiniteLossError(step, metrics, train, end)
        if train.on_bad_step != "skip" or self.bad_steps >= train.max_bad_steps:
            raise bad
        self.bad_steps += 1
        self.timer.steps += 1
        self._report("skip", step, bad)

    def _rewind(self, bad: NonFiniteLossError) -> TrainState:
        """Goes back to the newest checkpoint; the data goes on with the batch after the bad one."""
        self._check_workdir(bad.step)
        self._stop_trace()
        self.bad_steps += 1
        given = bad.step + self.batches_ahead
        with clock.timed("restore"):
            self.checkpoints.wait()
            self.first_step, state, position = restore_or_begin(
                self.config, self.trainer, self.checkpoints, self.models
            )
        self.best = hosts.broadcast(self.checkpoints.best_loss())  # which may have been set aside
        self.learned = self._learned(position)
        self.batches_ahead = given - self.first_step
        self.goodput.go_back(self.first_step, bad.step)
        self.data.set_state({"batches": given}, self.first_step)
        with clock.timed("restore"):  # a long file takes longer than a step may
            self.writer.close()
            self.writer = self._writer()
        self._report("rewind", self.first_step, bad, **{"from": bad.step})
        self._write_lost()
        return state

    def _write_lost(self) -> None:
        """Writes what restarts have lost so far of the experts' updates."""
        if self.learned is not None and self.first_step:
            count = self.learned.in_a_save or self.config.model.expert_count
            lost = {"checkpoint/lost_updates": self.learned.lost_share, "checkpoint/experts": count}
            self.writer.write({"step": self.first_step} | lost)

    def _report(self, event: str, step: int, bad: NonFiniteLossError, **more: int) -> None:
        """Reports a bad step to stderr and metrics.jsonl."""
        most = self.config.train.max_bad_steps
        if hosts.is_first():
            _log.warning("%s; %s, %d of at most %d (train.max_bad_steps)", bad.what, event, self.bad_steps, most)
        figures = {"bad/loss": bad.loss, "bad/grad_norm": bad.grad_norm}
        self.writer.write({"step": step, "event": event, **more, **figures})

    def _kept(self) -> str:
        kept = self.checkpoints.latest()
        return f"the checkpoint of step {kept} is kept" if kept is not None else "no checkpoint had been written"

    def _evaluate(self, step: int, state: TrainState) -> Score:
        length, rows = self.config.data.sequence_length, evaluation_rows(self.config)
        with clock.timed("evaluate"):
            model = self.trainer.model(state)
            scores = {
                name: evaluate(model, part, length, rows, lambda tokens: clock.tick()).score
                for name, part in streams_by_source(self.inputs.validation).items()
            }
        self.score = scores[""] if "" in scores else Score.combine(list(scores.values()))
        shown = {name: getattr(self.score, name) for name in ("loss", "perplexity", "bits_per_byte")}
        by_source = {f"eval/loss/{name}": score.loss for name, score in scores.items() if name}
        self.writer.write({"step": step} | {f"eval/{name}": value for name, value in shown.items()} | by_source)
        self.writer.print(
            f"step {step}: validation perplexity {self.score.perplexity:.2f}, "
            f"{self.score.bits_per_byte:.4f} bits per byte"
        )
        return self.score

    def _score_tasks(self, step: int, state: TrainState) -> None:
        self._check_workdir(step)
        with clock.timed("evaluate"):
            summaries = score_jobs(
                self.inputs.jobs,
                self.trainer.plain_model(state),
                self.inputs.tokenizer,
                self.workdir / "tasks" / str(step),
                hosts.broadcast(f"training at {time.time_ns()}"),  # a step that is rewound is of another model
                self.config.data.sequence_length,
                evaluation_rows(self.config),
            )
        self.writer.write({"step": step} | flatten_scores(summaries))
        for line in describe_scores(summaries):
            self.writer.print(f"step {step}: {line}")

    def _save(self, step: int, state: TrainState, score: Score | None, whole: bool = True) -> None:
        self._check_workdir(step)
        loss = math.inf if score is None else score.loss
        with clock.timed("save"):
            if not self.checkpoints.wait():  # the best one may not be there
                self.best = self.checkpoints.best_loss()
                whole = whole or loss < self.best
            experts = 0 if whole or self.learned is None else self.learned.in_a_save
            position = save_position(self.data.get_state(), self.bad_steps, state)
            self.mirror.copy()  # a checkpoint's records are there before it is
            saved = self.checkpoints.save(state, position, self.config, step, loss, experts, self.learned)
        self.best = min(self.best, loss if saved else math.inf)

    def _check_workdir(self, step: int) -> None:
        """Raises RunError, in all processes, where the workdir is no longer this run's: another job may write there."""
        self.lost = not hosts.broadcast(self.is_held())
        if self.lost:
            raise RunError(
                f"--workdir={self.workdir} was moved or removed while it trained, and step {step} is not saved; to go "
                f"on from its last checkpoint, give the place where it is now"
            )

    def _stop_trace(self) -> None:
        if self.tracing:
            jax.profiler.stop_trace()
        self.tracing = False

    def close(self) -> None:
        self._stop_trace()
        self.writer.close()
        self.mirror.close()
        self.checkpoints.close(self.lost)
        if self.lost or not hosts.is_first():
            return
        from bigmac_jax.report.plots import write_report  # matplotlib's import would hold up the first step

        try:
            with clock.timed("report"):
                write_report(self.workdir)
        except storage.errors(ValueError) as error:  # of a full disk, which also cuts lines of metrics.jsonl
            _log.warning("report.png is not drawn (%s)", error)


def unused_profile(profile: tuple[int, int] | None, first: int, last: int) -> str:
    """A line where a run of the steps `first` to `last` takes none of those that are to be traced."""
    if profile is None or first > last or (profile[0] <= last and profile[1] >= first):
        return ""
    shown = f"{profile[0]}:{profile[1]}"
    return f"--profile={shown} traces nothing: this start takes steps {first} to {last}; give it some of these"


def _on_device(data: TrainIterator, rows: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """Makes global batches, sharded over the mesh; `rows` are those that `data` gives."""
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), batch_spec(2))
    on_device = functools.partial(hosts.make_global_array, sharding, rows, size=batch_size)
    return (jax.tree.map(on_device, batch) for batch in data)
