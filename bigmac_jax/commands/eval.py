"""Scores a trained model: python eval.py --workdir=DIR [--step=best] [--split=test | --text_file=PATH | --tasks=A]."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from bigmac_jax.commands import cli
from bigmac_jax.config import Config, ConfigError, strict_json, with_mesh
from bigmac_jax.config.names import ask
from bigmac_jax.config.reads import evaluation_notes
from bigmac_jax.data.conversations import Conversations
from bigmac_jax.data.corpus import has_splits
from bigmac_jax.data.pipeline import count_targets, text_stream
from bigmac_jax.data.splits import SPLITS
from bigmac_jax.data.token_cache import TokenStream
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.evaluation.loglikelihood import check_windows
from bigmac_jax.evaluation.perplexity import evaluate
from bigmac_jax.evaluation.sources import has_own_sources, open_sources, report_sources
from bigmac_jax.evaluation.tasks.definitions import load_task
from bigmac_jax.evaluation.tasks.task_jobs import Job, describe_scores, open_jobs, score_jobs
from bigmac_jax.model.resident import check_resident, hold, is_resident, with_resident
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.runtime import hosts, storage
from bigmac_jax.runtime.progress import Progress, Waiting
from bigmac_jax.training.programs import evaluation_rows
from bigmac_jax.training.restore import find_checkpoint
from bigmac_jax.training.run_data import open_run_stream, say_data_place
from bigmac_jax.training.workdir import load_run_tokenizer, locate_workdir, read_config, use_saved_template
from bigmac_jax.tuning import restore

_WORKDIR = flags.DEFINE_string("workdir", "runs/tiny", "A run of train.py.")
_STEP = flags.DEFINE_string("step", "latest", "latest, best (by eval/loss) or the number of a checkpoint.")
_SPLIT = flags.DEFINE_string("split", "test", "train, validation or test.")
_TEXT_FILE = flags.DEFINE_string("text_file", "", "Score this file instead of a split.")
_SOURCES = flags.DEFINE_list(
    "sources", [], "Score each of these: names of a mixture's sources, `all` of them, data sets (at --split) or files."
)
_TASKS = flags.DEFINE_list("tasks", [], "Score these instead of a split: names of tasks, or paths of .toml files.")
_TASK_DATA = flags.DEFINE_multi_string("task_data", [], "NAME=PATH, the rows of a task from a file; repeat for more.")
_LIMIT = flags.DEFINE_integer("limit", 0, "Rows of each task at most, or documents; 0 = all.", lower_bound=0)
_LENGTH = flags.DEFINE_integer("length", 0, "Tokens the model is given at most; 0 takes the run's.", lower_bound=0)
_STRIDE = flags.DEFINE_integer(
    "stride", 0, "Slide windows by so many tokens, each of which is given --length - --stride; 0 = no overlap.", 0
)
_DOCUMENTS = flags.DEFINE_enum(
    "documents", None, ["stream", "masked"],
    "stream: windows of the stream; masked: each document by itself. By default as the run was trained.",
)  # fmt: skip
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 0, "Sequences at a time; 0 takes a part of the run's step.", lower_bound=0
)
_RESIDENT_LAYERS = flags.DEFINE_integer(
    "resident_layers", None, "Experts stand in host memory, of so many layers on the device; 0: all on the device.", 0
)
_RESIDENT_EXPERTS = flags.DEFINE_integer(
    "resident_experts", None, "Likewise, with so many experts of every layer on the device, the most used ones.", 0
)
_JSON = flags.DEFINE_bool("json", False, "Print the JSON object alone.")


Outcome = tuple[list[str], dict[str, Any]]  # lines for people, and the JSON object
Streams = dict[str, TokenStream | Conversations]  # by name


class Trained(NamedTuple):
    """The run that is scored, and what its model is given."""

    workdir: pathlib.Path
    config: Config
    tokenizer: Tokenizer
    length: int  # tokens of a window
    rows: int  # windows at a time


def main() -> None:
    with hosts.raise_together():
        trained = _read_run()
        score = _choose(trained)
    cli.agree(trained.config, __name__)
    mesh = cli.enter_mesh(trained.config, fit_batch=False)
    check_resident(trained.config, mesh)
    cli.warn(evaluation_notes(trained.config, cli.given_fields(), mesh.shape["data"]))
    lines, result = score()
    if not _JSON.value:
        hosts.say("\n".join(lines))
    hosts.say(strict_json(result))


def _read_run() -> Trained:
    workdir = locate_workdir(_WORKDIR.value)
    saved = read_config(workdir)
    config = with_resident(with_mesh(saved, cli.OVERRIDES), _RESIDENT_LAYERS.value, _RESIDENT_EXPERTS.value)
    if _SPLIT.value not in SPLITS:
        raise ConfigError(f"--split={_SPLIT.value} must be train, validation or test{ask(_SPLIT.value, SPLITS)}")
    length = check_windows(config, _LENGTH.value, _STRIDE.value)
    rows = _BATCH_SIZE.value or evaluation_rows(saved)
    return Trained(workdir, config, load_run_tokenizer(workdir, config), length, rows)


def _choose(trained: Trained) -> Callable[[], Outcome]:
    """Opens the tasks or texts that the flags name, and returns the function that scores them."""
    choices = {
        "--tasks": _TASKS.value,
        "--sources": _SOURCES.value,
        f"--text_file={_TEXT_FILE.value}": _TEXT_FILE.value,
    }
    given = [flag for flag, value in choices.items() if value]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} are two things to score; give one")
    if not _TASKS.value and (_TASK_DATA.value or _LIMIT.value):
        raise ConfigError("--task_data and --limit are of tasks; give --tasks=NAME,… too")
    _check_used(trained.config)
    if not _TASKS.value:
        return functools.partial(_score_texts, trained, _open_texts(trained))
    config = use_saved_template(trained.workdir, trained.config)
    template = config.tuning.chat_template
    jobs = open_jobs(_TASKS.value, _TASK_DATA.value, _LIMIT.value, config, trained.tokenizer, trained.length, template)
    return functools.partial(_score_tasks, trained, jobs)


def _check_used(config: Config) -> None:
    """Raises ConfigError for a flag that was given and changes nothing about what is scored."""
    tasks, file, sources = _TASKS.value, _TEXT_FILE.value, _SOURCES.value
    unused: dict[str, str] = {}
    if tasks:
        unused = {"split": "is of texts", "documents": "is of a text; a task's questions never see each other"}
        if all(load_task(name).kind != "perplexity" for name in tasks):
            unused["stride"] = "is of texts and of perplexity tasks"
    elif config.tuning.objective != "pretrain" and not file:
        unused = dict.fromkeys(("stride", "documents"), "is of texts; rows of conversations are scored whole")
    if file:
        unused["split"] = "is of data sets; a file is scored as a whole"
    elif sources and not has_own_sources(config, sources) and not any(map(has_splits, sources)):
        unused["split"] = "is of data sets and of the run's own sources; files are scored as a whole"
    for name, why in unused.items():
        flag = flags.FLAGS[name]
        if flag.present and flag.value:
            raise ConfigError(f"--{name}={flag.value} {why}; leave it out")


def _open_texts(trained: Trained) -> Streams:
    """The tokens of each source, or of the file, or of the split."""
    workdir, config, tokenizer = trained.workdir, trained.config, trained.tokenizer
    if _SOURCES.value:
        return open_sources(workdir, config, _SOURCES.value, _SPLIT.value, tokenizer)
    if _TEXT_FILE.value:
        file = storage.locate(_TEXT_FILE.value, "--text_file")
        return {str(file): text_stream(file, tokenizer)}
    return {_SPLIT.value: open_run_stream(workdir, config, _SPLIT.value, tokenizer)}


def _score_tasks(trained: Trained, jobs: list[Job]) -> Outcome:
    workdir, _, tokenizer, length, rows = trained
    step, identity = find_checkpoint(workdir, _STEP.value)
    model = _restore(trained, str(step))
    folder = workdir / "tasks" / str(step)
    summaries = score_jobs(jobs, model, tokenizer, folder, identity, length, rows, _STRIDE.value, _is_quiet())
    return describe_scores(summaries), {"step": step, "tasks": summaries}


def _score_texts(trained: Trained, streams: Streams) -> Outcome:
    workdir, config, _, length, rows = trained
    hosts.check_same({f"the text of {name}": stream.text[:12] for name, stream in streams.items()})
    model = hold(config, _restore(trained, _STEP.value))
    if has_own_sources(config, _SOURCES.value) if _SOURCES.value else not _TEXT_FILE.value:
        say_data_place(workdir, config, _SPLIT.value)
    documents = _DOCUMENTS.value or config.data.documents
    evaluations = {}
    for name, stream in streams.items():
        with Progress(name, count_targets(stream), "token", scaled=True, silent=_is_quiet()) as bar:
            evaluations[name] = evaluate(model, stream, length, rows, bar.update, _STRIDE.value, documents)
    if _SOURCES.value:
        lines, result = report_sources(evaluations)
        return lines, result | {"documents": documents}
    ((name, (score, *_)),) = evaluations.items()
    if isinstance(streams[name], Conversations):
        return [f"{name}, answers alone: {score.describe()}"], score._asdict()
    how = "each document by itself" if documents == "masked" else "windows of the stream"
    return [f"{name}, {how}: {score.describe()}"], score._asdict() | {"documents": documents}


def _restore(trained: Trained, step: str) -> Transformer:
    with Waiting("reading the model", _is_quiet()):
        return restore(trained.workdir, step, trained.config, in_host=is_resident(trained.config))[1]


def _is_quiet() -> bool:
    return _JSON.value or not hosts.is_first()
