"""What a run starts from: data, a compiled step, and the state of its newest intact checkpoint."""

import dataclasses
import logging
import pathlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from flax import nnx

from bigmac_jax.config import Config, check_resume
from bigmac_jax.data.conversations import Conversations
from bigmac_jax.data.pipeline import Stream, TrainIterator, open_stream
from bigmac_jax.data.tokenizer import Tokenizer, load_tokenizer
from bigmac_jax.evaluation.tasks.task_jobs import Job, open_jobs
from bigmac_jax.model.kernels.flash_attention import attention_implementation
from bigmac_jax.model.mesh import batch_spec
from bigmac_jax.runtime import hosts
from bigmac_jax.runtime.clock import clock
from bigmac_jax.training import bad_steps, manifest
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.dashboards import check_boards
from bigmac_jax.training.dialogues import check_rows, check_template, rows_of, run_chat
from bigmac_jax.training.metrics import describe_auto
from bigmac_jax.training.programs import evaluation_rows, step_program
from bigmac_jax.training.step import StepMetrics, Trainer, TrainState, make_trainer
from bigmac_jax.training.workdir import (
    changes_of_loss,
    check_data,
    check_shared,
    has_run,
    read_config,
    run_tokenizer,
    with_own_template,
    write_run,
)
from bigmac_jax.tuning.pretrained import (
    ORIGIN,
    Origin,
    differences,
    load,
    origin_of,
    tokenizer_from,
    with_chat_of,
    with_places,
)
from bigmac_jax.tuning.reference_scores import reference_nll
from bigmac_jax.tuning.teacher import TEACHER, fitting, read_teacher, teacher_of

_log = logging.getLogger(__name__)
Step = Callable[..., tuple[TrainState, StepMetrics]]


class Start(NamedTuple):
    """Attributes:
    compiling: gives the compiled step and the seconds that it took; None where no step is left.
    rows: of the global batch, that this process reads.
    step: that the run goes on from, and `position` of the data there.
    """

    trainer: Trainer
    compiling: Future[tuple[Step, float]] | None
    checkpoints: Checkpoints
    data: TrainIterator
    rows: Sequence[int]
    validation: Stream | None
    step: int
    state: TrainState
    position: dict[str, Any]
    origin: Origin | None
    teacher: Origin | None
    tokenizer: Tokenizer
    jobs: list[Job]


def start(config: Config, workdir: pathlib.Path) -> Start:
    """For the current mesh; the workdir is held.

    Raises:
      ConfigError: the workdir was started with another config, or the data cannot be used.
    """
    mesh = jax.sharding.get_mesh()
    check_shared(workdir)
    with hosts.raise_together():
        check_boards(config.train.wandb)
        resumed = has_run(workdir)
        saved = read_config(workdir) if resumed else config
        check_resume(saved, config)
        moved = with_places(saved).train.init_from != config.train.init_from
        # A run that has a checkpoint of all parameters does not look back.
        preferred = config.tuning.objective == "dpo"
        begins = config.tuning.lora_rank or preferred or moved or not manifest.steps(workdir)
    origin = origin_of(workdir, config) if config.train.init_from and begins else None
    teacher = teacher_of(workdir, config) if config.tuning.teacher else None
    with clock.timed("data"), hosts.raise_together():
        if resumed:
            tokenizer = run_tokenizer(workdir, config, of_user=True)
        else:
            tokenizer = tokenizer_from(origin, config) if origin else load_tokenizer(config)
        changed = differences(origin, config) if origin else []
        read = (
            with_own_template(workdir, config, of_user=True)
            if resumed
            else with_chat_of(origin, config)
            if origin
            else config
        )
        train_stream = open_stream(read, "train", tokenizer)
        validation = open_stream(read, "validation", tokenizer) if config.train.eval_every else None
        chat = run_chat(read, train_stream)
        check_template(workdir, chat)
        data_is = {"tokenizer": tokenizer.fingerprint, "train": train_stream.text}
        data_is |= {"validation": validation.text} if validation else {}
        rows_are = rows_of({"train": train_stream, "validation": validation})
        data_is |= {ORIGIN: origin.identity} if origin else {}
        teacher = fitting(teacher, config, tokenizer) if teacher else None
        data_is |= {TEACHER: teacher.identity} if teacher else {}
        if resumed:
            check_data(workdir, config, data_is)
            check_rows(workdir, rows_are)
        data_is |= rows_are
        jobs = _tasks(read, tokenizer)
        rows = hosts.local_rows(jax.sharding.NamedSharding(mesh, batch_spec(1)), config.data.batch_size)
        data = TrainIterator(config, train_stream, rows)
    hosts.check_same({f"the {name} data" if name != "tokenizer" else name: digest for name, digest in data_is.items()})
    trainer = make_trainer(config, mesh, teacher and teacher.config)
    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
    # Everything else that a start needs happens while the step compiles.
    compiling = _compile(trainer, config) if (hosts.broadcast(checkpoints.latest()) or 0) < config.train.steps else None
    newest, state, position = restored(config, trainer, checkpoints, origin, teacher)
    if preferred and origin and not config.tuning.lora_rank and isinstance(train_stream, Conversations):
        with clock.timed("data"):
            model = nnx.merge(trainer.graphdef, *load(origin, config))
            windows = train_stream.pack(config.data.sequence_length)
            windows.reference = reference_nll(model, windows, evaluation_rows(config), not hosts.is_first())
    data.set_state(position, newest)
    if hosts.is_first():
        for note in changes_of_loss(workdir, config, dict(mesh.shape)) if resumed and newest else ():
            _log.warning("%s", note)
        # Only now: a start that failed leaves the workdir free.
        write_run(workdir, config, data_is, dict(mesh.shape), tokenizer, chat)
    _describe(config, state, train_stream.num_tokens, newest)
    if origin and not newest:
        at = f", step {origin.step}" if origin.step else ""
        hosts.say(f"begins with {origin.place}{at}" + (f"; {', '.join(changed)}" if changed else ""))
    return Start(
        trainer, compiling, checkpoints, data, rows, validation, newest, state, position, origin, teacher,
        tokenizer, jobs,
    )  # fmt: skip


def _tasks(config: Config, tokenizer: Tokenizer) -> list[Job]:
    """What is scored during training; its rows are read now, so that what is wrong with them is known at once."""
    train, data = config.train, config.data
    if not train.tasks_every:
        return []
    names, template = train.tasks.split(","), config.tuning.chat_template
    return open_jobs(names, [], train.tasks_limit, config, tokenizer, data.sequence_length, template)


def _describe(config: Config, state: TrainState, tokens: int, newest: int) -> None:
    hosts.say(config.describe())
    if config.model.is_moe and config.execution.exchange == "auto":
        hosts.say(describe_auto(config))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    of_model = sum(leaf.size for leaf in jax.tree.leaves(state.base))
    beside = f" of adapters beside {of_model:,} of the model" if of_model else ""
    hosts.say(
        f"{parameters:,} parameters{beside}, {tokens:,} training tokens, mesh "
        + " × ".join(f"{axis} {size}" for axis, size in jax.sharding.get_mesh().shape.items())
        + (f", {jax.process_count()} processes" if hosts.is_distributed() else "")
        + f", attention by {attention_implementation(config)}"
        + (f", resumed at step {newest}" if newest else "")
    )


def restored(
    config: Config, trainer: Trainer, checkpoints: Checkpoints, origin: Origin | None, teacher: Origin | None
) -> tuple[int, TrainState, dict[str, Any]]:
    """Step, state and data position of the newest intact checkpoint; or 0 and those that a run begins with."""
    with clock.timed("restore"):
        found = checkpoints.restore_newest(trainer.abstract_state)
        if found:
            step, state, position = found
            if config.tuning.lora_rank:
                assert origin is not None, config.train
                state = dataclasses.replace(state, base=load(origin, config)[0])
            state = bad_steps.with_losses(state, trainer.abstract_state, position)
    if not found:
        with clock.timed("initialise"):
            key = jax.random.key(config.train.seed)
            state = trainer.begin(*load(origin, config), key) if origin else trainer.init(key)
            step, position = 0, {"batches": 0}
    return step, dataclasses.replace(state, teacher=read_teacher(teacher)) if teacher else state, position


def _compile(trainer: Trainer, config: Config) -> Future[tuple[Step, float]]:
    """Compiles the training step in a thread → the compiled step, and the seconds that it took."""
    start = time.perf_counter()
    lowered = step_program(config, jax.sharding.get_mesh(), trainer).lower()
    pool = ThreadPoolExecutor(1)
    future = pool.submit(lambda: (lowered.compile(), time.perf_counter() - start))
    pool.shutdown(wait=False)
    return future
