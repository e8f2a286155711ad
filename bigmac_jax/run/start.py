"""Starts a run: opens its data, models and checkpoints, compiles the step, and restores or begins its state."""

import contextlib
import dataclasses
import datetime
import logging
import pathlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from flax import nnx

from bigmac_jax.config import Config, check_resume
from bigmac_jax.data.chat_files import ChatFiles
from bigmac_jax.data.conversations import Conversations
from bigmac_jax.data.pipeline import Stream, TrainIterator, open_stream
from bigmac_jax.data.tokenizer import Tokenizer, load_tokenizer
from bigmac_jax.evaluation.tasks.task_jobs import Job, open_jobs
from bigmac_jax.model.kernels.flash_attention import attention_implementation
from bigmac_jax.model.memory import describe_copies
from bigmac_jax.model.mesh import batch_spec, describe_mesh, platform, slices
from bigmac_jax.model.parameters import Frozen, count_numbers
from bigmac_jax.runtime import collective_order, hosts
from bigmac_jax.runtime.clock import clock
from bigmac_jax.training import manifest, run_data
from bigmac_jax.training.accumulation import describe_first_pass
from bigmac_jax.training.bad_steps import restore_losses
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.dashboards import check_dashboards
from bigmac_jax.training.metrics import describe_auto
from bigmac_jax.training.programs import evaluation_rows, step_program
from bigmac_jax.training.replicas import describe_crossing
from bigmac_jax.training.step import StepMetrics, Trainer, TrainState, make_trainer
from bigmac_jax.training.workdir import (
    check_shared,
    has_run,
    load_run_tokenizer,
    read_config,
    resume_warnings,
    use_saved_template,
    write_run,
)
from bigmac_jax.tuning import pretrained
from bigmac_jax.tuning.pretrained import Pretrained
from bigmac_jax.tuning.reference_scores import reference_nll
from bigmac_jax.tuning.teacher import TEACHER, check_teacher_tokenizer, open_teacher

_log = logging.getLogger(__name__)
Step = Callable[..., tuple[TrainState, StepMetrics]]


class Models(NamedTuple):
    """Other models that a run reads: the one that it begins with, and its teacher."""

    origin: Pretrained | None
    teacher: Pretrained | None


class Inputs(NamedTuple):
    """What a run reads.

    Attributes:
      rows: of the global batch, that this process reads.
      jobs: tasks that are scored during training.
      fingerprints: of the data and the models, by name.
    """

    tokenizer: Tokenizer
    chat: ChatFiles
    train: Stream
    validation: Stream | None
    batches: TrainIterator
    rows: Sequence[int]
    jobs: list[Job]
    fingerprints: dict[str, str]


class Start(NamedTuple):
    """What the loop starts with.

    Attributes:
      compiling: gives the compiled step and the seconds that it took; None where no step is left.
      step: that the run goes on from, and `position` of the data there.
    """

    trainer: Trainer
    compiling: Future[tuple[Step, float]] | None
    checkpoints: Checkpoints
    inputs: Inputs
    models: Models
    step: int
    state: TrainState
    position: dict[str, Any]


def start(config: Config, workdir: pathlib.Path, asked: Config | None = None) -> Start:
    """Opens data, models and checkpoints for the current mesh, and begins to compile; the workdir is locked, and keeps
    `asked`, by default the config.

    Raises:
      ConfigError: the workdir was started with another config, or the data cannot be used.
    """
    mesh = jax.sharding.get_mesh()
    check_shared(workdir)
    resumed, models = _open_models(config, workdir)
    inputs = _open_inputs(config, workdir, resumed, models)
    labels = {name: name if name == "tokenizer" else f"the {name} data" for name in inputs.fingerprints}
    hosts.check_same({labels[name]: digest for name, digest in inputs.fingerprints.items()})
    trainer = make_trainer(config, mesh, models.teacher and models.teacher.config)
    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
    # Everything else that a start needs happens while the step compiles.
    unfinished = (hosts.broadcast(checkpoints.latest()) or 0) < config.train.steps
    compiling = _compile(trainer, config) if unfinished else None
    step, state, position = restore_or_begin(config, trainer, checkpoints, models)
    if step >= config.train.steps and not checkpoints.holds_all(step):
        hosts.say(f"checkpoint {step} holds some of the experts; train on, with train.steps above {step}, to save all")
    _score_reference(config, trainer, inputs, models.origin)
    inputs.batches.set_state(position, step)
    with hosts.raise_together():  # of what process 0 alone meets, such as a full disk
        if hosts.is_first():
            for note in resume_warnings(workdir, config, dict(mesh.shape), step) if resumed and step else ():
                _log.warning("%s", note)
            # Only now: a start that failed leaves the workdir free.
            fingerprints = run_data.fingerprint_held_out(workdir, config) | inputs.fingerprints
            history = None if resumed else pretrained.history_of(models.origin)
            parts, own = config.train.accumulate_steps, inputs.tokenizer
            write_run(workdir, asked or config, fingerprints, dict(mesh.shape), own, inputs.chat, history, parts)
    _describe(config, state, inputs.train.num_tokens, step, models.origin)
    return Start(trainer, compiling, checkpoints, inputs, models, step, state, position)


def _open_models(config: Config, workdir: pathlib.Path) -> tuple[bool, Models]:
    """Whether the run has begun before, which its config must fit, and the models that it needs."""

    def look() -> tuple[bool, bool]:
        check_dashboards(config.train.wandb)
        resumed = has_run(workdir)
        saved = read_config(workdir) if resumed else config
        check_resume(saved, config)
        return resumed, bool(config.train.init_from) and _looks_back(config, saved, workdir)

    resumed, needed = hosts.run_on_first(look)  # others may see the folder later
    origin = pretrained.open_init_from(workdir, config) if needed else None
    return resumed, Models(origin, open_teacher(workdir, config) if config.tuning.teacher else None)


def _looks_back(config: Config, saved: Config, workdir: pathlib.Path) -> bool:
    """Whether a start needs the model that the run begins with: not where it goes on from a checkpoint of all
    parameters, unless a step reads that model, or it is said to lie elsewhere."""
    tuning, place = config.tuning, pretrained.with_absolute_places(saved).train.init_from
    if tuning.lora_rank or tuning.objective == "dpo" or place != config.train.init_from:
        return True
    saves = (workdir / "checkpoints" / str(step) for step in reversed(manifest.list_steps(workdir)))
    return all(map(manifest.is_stripped, saves))


def _open_inputs(config: Config, workdir: pathlib.Path, resumed: bool, models: Models) -> Inputs:
    """Opens tokenizer, chat template, data and tasks, and checks that a resumed run goes on with the same."""
    origin, teacher = models
    date = hosts.broadcast(datetime.datetime.now().isoformat())  # of a chat template, in all processes and splits
    with clock.timed("data"), hosts.raise_together():
        if origin:
            pretrained.compare_models(origin, config)
        if resumed:
            tokenizer, read = load_run_tokenizer(workdir, config), use_saved_template(workdir, config, of_user=True)
        elif origin:
            tokenizer = pretrained.choose_tokenizer(origin, config)
            read = pretrained.with_pretrained_chat(origin, config)
        else:
            tokenizer, read = load_tokenizer(config), config
        with run_data.rows_of_run(workdir) if resumed else contextlib.nullcontext():
            train = open_stream(read, "train", tokenizer, date=date)
            validation = open_stream(read, "validation", tokenizer, date=date) if config.train.eval_every else None
        chat = run_data.chat_files(read, train)
        run_data.check_template(workdir, chat)
        if teacher:
            check_teacher_tokenizer(teacher, config, tokenizer)
        prints = {"tokenizer": tokenizer.fingerprint, "train": train.text}
        prints |= {"validation": validation.text} if validation else {}
        prints |= {pretrained.INIT_FROM: origin.identity} if origin else {}
        prints |= {TEACHER: teacher.identity} if teacher else {}
        rows_prints = run_data.fingerprint_rows({"train": train, "validation": validation})
        if resumed:
            run_data.check_data(workdir, config, prints)
            run_data.check_rows(workdir, rows_prints)
        rows = hosts.local_rows(
            jax.sharding.NamedSharding(jax.sharding.get_mesh(), batch_spec(1)), config.data.batch_size
        )
        batches, jobs = TrainIterator(config, train, rows), _open_tasks(read, tokenizer)
    return Inputs(tokenizer, chat, train, validation, batches, rows, jobs, prints | rows_prints)


def _score_reference(config: Config, trainer: Trainer, inputs: Inputs, origin: Pretrained | None) -> None:
    """Gives DPO's pairs the log-probabilities of the model that the run begins with; with adapters a step has them."""
    pairs, tuning = inputs.train, config.tuning
    if origin is None or tuning.objective != "dpo" or tuning.lora_rank or not isinstance(pairs, Conversations):
        return
    with clock.timed("data"):
        model = nnx.merge(trainer.graphdef, *pretrained.load_parameters(origin, config))
        windows = pairs.pack(config.data.sequence_length)
        windows.reference = reference_nll(model, windows, evaluation_rows(config), not hosts.is_first())


def _open_tasks(config: Config, tokenizer: Tokenizer) -> list[Job]:
    """The tasks that are scored during training; their rows are read now, so that what is wrong is known at once."""
    train, data = config.train, config.data
    if not train.tasks_every:
        return []
    names, template = train.tasks.split(","), config.tuning.chat_template
    return open_jobs(names, [], train.tasks_limit, config, tokenizer, data.sequence_length, template)


def _describe(config: Config, state: TrainState, tokens: int, step: int, origin: Pretrained | None) -> None:
    """Says what is trained, and where it begins."""
    hosts.say(config.describe())
    mesh = jax.sharding.get_mesh()
    told = describe_auto(config), describe_first_pass(config), describe_copies(config, dict(mesh.shape))
    for line in (*told, *describe_crossing(config, mesh.shape["data"], slices(mesh))):
        if line:
            hosts.say(line)
    parameters, of_model = count_numbers(state.params), count_numbers(state.base)
    beside = f" of adapters beside {of_model:,} of the model" if of_model else ""
    variables = jax.tree.leaves(state.rest, is_leaf=lambda node: isinstance(node, Frozen))
    if frozen := count_numbers([variable for variable in variables if isinstance(variable, Frozen)]):
        beside += f" and {frozen:,} that are not trained"
    hosts.say(
        f"{parameters:,} parameters{beside}, {tokens:,} training tokens, "
        + describe_mesh(mesh.shape)
        + (f", {jax.process_count()} processes" if hosts.is_distributed() else "")
        + f", attention by {attention_implementation(config)}"
        + (f", resumed at step {step}" if step else "")
    )
    if origin and not step:
        at, changed = f", step {origin.step}" if origin.step else "", pretrained.compare_models(origin, config)
        hosts.say(f"begins with {origin.place}{at}" + (f"; {', '.join(changed)}" if changed else ""))


def restore_or_begin(
    config: Config, trainer: Trainer, checkpoints: Checkpoints, models: Models
) -> tuple[int, TrainState, dict[str, Any]]:
    """Step, state and data position of the newest intact checkpoint; without one, those that the run begins with."""
    origin, teacher = models
    with clock.timed("restore"):
        found = checkpoints.restore_newest(trainer.abstract_state, config.train)
        if found:
            step, state, position = found
            if config.tuning.lora_rank:
                assert origin is not None, config.train
                state = dataclasses.replace(state, base=pretrained.load_parameters(origin, config)[0])
            state = restore_losses(state, trainer.abstract_state, position)
    if not found:
        with clock.timed("initialise"):
            key = jax.random.key(config.train.seed)
            state = trainer.begin(*pretrained.load_parameters(origin, config), key) if origin else trainer.init(key)
            step, position = 0, {"batches": 0}
    if teacher:
        state = dataclasses.replace(state, teacher=pretrained.read_model(teacher, teacher.config))
    return step, state, position


def _compile(trainer: Trainer, config: Config) -> Future[tuple[Step, float]]:
    """Compiles the training step in a thread → the compiled step, and the seconds that it took."""
    start, mesh = time.perf_counter(), jax.sharding.get_mesh()
    lowered = step_program(config, mesh, trainer).lower()
    looks = platform() == "cpu" and mesh.size > 1 and hosts.is_first()

    def compile_step() -> tuple[Step, float]:
        compiled = lowered.compile()
        if looks and (line := collective_order.note("step", compiled.as_text())):
            _log.warning("%s", line)
        return compiled, time.perf_counter() - start

    pool = ThreadPoolExecutor(1)
    future = pool.submit(compile_step)
    pool.shutdown(wait=False)
    return future
