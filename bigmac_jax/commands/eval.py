"""Scores a trained model: python eval.py --workdir=DIR [--step=best] [--split=test | --text_file=PATH | --tasks=A]."""

from collections.abc import Callable
from typing import Any

from absl import flags

from bigmac_jax.commands import cli
from bigmac_jax.config import ConfigError, strict_json, with_mesh
from bigmac_jax.config.reads import notes_of_evaluation
from bigmac_jax.data.conversations import Conversations
from bigmac_jax.data.pipeline import text_stream
from bigmac_jax.data.token_cache import TokenStream
from bigmac_jax.evaluation.loglikelihood import check_windows
from bigmac_jax.evaluation.perplexity import evaluate, read
from bigmac_jax.evaluation.sources import open_sources, own_sources, report
from bigmac_jax.evaluation.tasks.run import describe, open_jobs, score_jobs
from bigmac_jax.runtime import hosts, storage
from bigmac_jax.runtime.progress import Progress
from bigmac_jax.training.programs import evaluation_rows
from bigmac_jax.training.restore import find_checkpoint
from bigmac_jax.training.workdir import name_data, read_config, run_folder, run_stream, run_tokenizer, with_own_template
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
_LIMIT = flags.DEFINE_integer("limit", 0, "Rows of each task at most; 0 = all.", lower_bound=0)
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
_JSON = flags.DEFINE_bool("json", False, "Print the JSON object alone.")


def main() -> None:
    workdir = run_folder(_WORKDIR.value)
    with hosts.together():
        saved = read_config(workdir)
        config = with_mesh(saved, cli.OVERRIDES)
        if _SPLIT.value not in ("train", "validation", "test"):
            raise ConfigError(f"--split={_SPLIT.value} must be train, validation or test")
        length = check_windows(config, _LENGTH.value, _STRIDE.value)
        tokenizer = run_tokenizer(workdir, config)
        text_file = _TEXT_FILE.value and storage.locate(_TEXT_FILE.value, "--text_file")
        if _TASKS.value:
            if _SOURCES.value:
                raise ConfigError("--tasks and --sources are two things to score; give one")
            if _DOCUMENTS.value:
                raise ConfigError("--documents is of a text; a task's questions never see each other; leave it out")
            if text_file:
                raise ConfigError(f"--tasks and --text_file={text_file} are two things to score; give one")
            own = with_own_template(workdir, config)
            template = own.tuning.chat_template
            jobs = open_jobs(_TASKS.value, _TASK_DATA.value, _LIMIT.value, own, tokenizer, length, template)
        else:
            if _TASK_DATA.value or _LIMIT.value:
                raise ConfigError("--task_data and --limit are of tasks; give --tasks=NAME,… too")
            if text_file and _SOURCES.value:
                raise ConfigError(f"--sources and --text_file={text_file} are two things to score; give one")
            streams: dict[str, TokenStream | Conversations]
            if _SOURCES.value:
                streams = open_sources(workdir, config, _SOURCES.value, _SPLIT.value, tokenizer)
            elif text_file:
                streams = {str(text_file): text_stream(text_file, tokenizer)}
            else:
                streams = {_SPLIT.value: run_stream(workdir, config, _SPLIT.value, tokenizer)}
    cli.agree(config, __name__)
    mesh = cli.enter_mesh(config, fit_batch=False)
    cli.warn(notes_of_evaluation(config, cli.given_fields(), mesh.shape["data"]))
    quiet = _JSON.value or not hosts.is_first()
    size = _BATCH_SIZE.value or evaluation_rows(saved)
    step, identity = find_checkpoint(workdir, _STEP.value) if _TASKS.value else (_STEP.value, "")
    _, model = restore(workdir, str(step), config)
    if not (_TASKS.value or text_file or _SOURCES.value) or own_sources(config, _SOURCES.value):
        name_data(workdir, config, _SPLIT.value)
    result: dict[str, Any]
    if _TASKS.value:
        folder = workdir / "tasks" / str(step)
        summaries = score_jobs(jobs, model, tokenizer, folder, identity, length, size, _STRIDE.value, quiet)
        lines, result = describe(summaries), {"step": step, "tasks": summaries}
    else:
        documents = _DOCUMENTS.value or config.data.documents
        readings: dict[str, Any] = {}
        reader: Callable[..., Any] = read if _SOURCES.value else evaluate
        for title, stream in streams.items():
            with Progress(title, stream.num_tokens - 1, "token", scaled=True, silent=quiet) as bar:
                readings[title] = reader(model, stream, length, size, bar.update, _STRIDE.value, documents)
        how = "each document by itself" if documents == "masked" else "windows of the stream"
        if any(isinstance(stream, Conversations) for stream in streams.values()):
            how = "answers alone"
        if _SOURCES.value:
            lines, result = report(readings)
        else:
            ((title, score),) = readings.items()
            lines, result = [f"{title}, {how}: {score.describe()}"], score._asdict()
        result |= {"documents": documents}
    if not _JSON.value:
        hosts.say("\n".join(lines))
    hosts.say(strict_json(result))


def run() -> None:
    cli.run(main, distributed=True)
