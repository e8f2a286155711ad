"""Scores a model on tasks: rows → examples → requests → log-likelihoods or answers → summaries."""

import functools
import hashlib
import logging
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from bigmac_jax.config import Config, ConfigError, strict_json
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.evaluation.loglikelihood import Request, encode_pairs, score_requests
from bigmac_jax.evaluation.score_log import ScoreLog
from bigmac_jax.evaluation.tasks.answer_metrics import METRICS
from bigmac_jax.evaluation.tasks.definitions import Needle, Task, load_task
from bigmac_jax.evaluation.tasks.examples import Example, build_examples
from bigmac_jax.evaluation.tasks.scores import Summary, judge, summarise
from bigmac_jax.evaluation.tasks.task_answers import Prompt, encode_prompts, write_answers
from bigmac_jax.evaluation.tasks.task_rows import read_rows
from bigmac_jax.model.mesh import platform
from bigmac_jax.model.resident import hold
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.runtime import hosts, storage

_VERSION = 1  # of what a window's score means; a new one makes old files unused
_WORDS = {
    "accuracy": "accuracy",
    "accuracy_norm": "by likelihood a character",
    "accuracy_choice": "likelier than all distractors",
    "macro_f1": "F1, mean of classes,",
} | {name: metric.words for name, metric in METRICS.items()}
_log = logging.getLogger(__name__)


class Job(NamedTuple):
    """A task that is ready to be scored."""

    task: Task | Needle
    examples: list[Example]
    requests: list[Request]  # one for each pair of each example
    prompts: list[Prompt]  # one for each example whose answer is written


def open_jobs(
    names: Sequence[str],
    data: Sequence[str],
    limit: int,
    config: Config,
    tokenizer: Tokenizer,
    length: int,
    chat_template: str = "",
) -> list[Job]:
    """Reads the rows of tasks and encodes them.

    Args:
      names: of `TASKS`, or paths of TOML files.
      data: NAME=PATH, rows for the task NAME from a file.
      limit: rows of each task at most, or documents; of needles, spread over lengths and depths; 0 = all.
      length: tokens of a window.
      chat_template: a file, for tasks with chat=true; by default the one beside the tokenizer.

    Raises:
      ConfigError: an unknown task, rows that are missing, or rows that don't have the task's form.
    """
    tasks = {task.name: task for task in map(load_task, dict.fromkeys(names))}
    if len(tasks) < len(set(names)):
        raise ConfigError(f"--tasks={','.join(names)} names two tasks alike; rename a file")
    paths: dict[str, str] = {}
    for entry in data:
        name, _, path = entry.partition("=")
        if name not in tasks or not path:
            raise ConfigError(f"--task_data={entry} must be NAME=PATH, with a name of --tasks={','.join(tasks)}")
        if name in paths:
            raise ConfigError(f"--task_data gives {name} twice, {paths[name]} and {path}; put all rows into one file")
        paths[name] = path
    jobs = []
    for name, task in tasks.items():
        examples = _build(task, paths.get(name, ""), limit, config, tokenizer, length)
        try:
            requests = encode_pairs(tokenizer, [pair for example in examples for pair in example.pairs])
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        prompts: list[Prompt] = []
        if isinstance(task, Task) and task.kind == "generate":
            prompts = encode_prompts(task, examples, config, tokenizer, length, chat_template)
        jobs.append(Job(task, examples, requests, prompts))
    return jobs


def _build(
    task: Task | Needle, path: str, limit: int, config: Config, tokenizer: Tokenizer, length: int
) -> list[Example]:
    """The examples of a task, whose rows are in the file `path`, or else where the task says."""
    name = task.name
    if isinstance(task, Needle):
        from bigmac_jax.evaluation.tasks.needle import build_needles

        if path:
            raise ConfigError(f"--task_data={name}={path}: {name} makes its rows itself; leave it out")
        needles = build_needles(task, config, tokenizer, length)
        count = min(limit or len(needles), len(needles))
        return [needles[i * len(needles) // count] for i in range(count)]  # of all lengths and depths
    source = path or task.source
    if not source:
        raise ConfigError(f"{name} is not in TFDS; give its rows with --task_data={name}=PATH")
    setting = f"--task_data={name}={path}" if path else f"{name}'s source={source}"
    rows = 0 if task.kind == "perplexity" else limit  # a document may be of many
    return build_examples(task, read_rows(source, task.split, rows, config.cache_dir, setting))[: limit or None]


def score_jobs(
    jobs: Sequence[Job],
    model: Transformer,
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    identity: str,
    length: int,
    batch_size: int,
    stride: int = 0,
    quiet: bool = True,
) -> dict[str, Summary]:
    """Scores tasks → the summary of each, by name.

    Writes into `folder`: NAME.jsonl, a line a row; NAME.windows.jsonl, from which a run that was killed goes on;
    needle.png.

    Args:
      model: with all its arrays, also where some of its layers or experts are to stay in host memory.
      identity: of the model, such as a digest of its checkpoint; scores of another one in `folder` are not used.
      stride: of the windows of perplexity tasks (`loglikelihood.cut_windows`).
      quiet: no progress bars.

    Raises:
      ConfigError: in all processes, where one has read other rows.
    """
    if hosts.is_distributed():
        hosts.check_same({f"the rows of {job.task.name}": hosts.digest((job.requests, job.prompts)) for job in jobs})
    computed = f"{_VERSION} {identity} {platform()} {model.config.execution}"
    model_key = hashlib.sha256(computed.encode()).hexdigest()[:16]
    held, summaries = functools.cache(lambda: hold(model.config, model)), {}
    for job in jobs:
        task, examples, requests, prompts = job
        if isinstance(task, Task) and task.kind == "generate":
            rows = write_answers(model, tokenizer, examples, prompts, task.metrics, length, batch_size, quiet)
        else:
            log = ScoreLog(folder / f"{task.name}.windows.jsonl", model_key)
            overlap = stride if task.kind == "perplexity" else 0
            title = "" if quiet else task.name
            results = iter(score_requests(held(), requests, length, batch_size, overlap, log, title))
            log.close()
            rows = [judge(task.kind, example, [next(results) for _ in example.pairs]) for example in examples]
        summaries[task.name] = summarise(task.kind, rows)
        if hosts.is_first():
            _write(job, rows, summaries[task.name], folder)
    return summaries


def _write(job: Job, rows: Sequence[dict[str, Any]], summary: Summary, folder: pathlib.Path) -> None:
    name = job.task.name
    try:
        storage.make_folder(folder)
        lines = (strict_json({"row": example.place} | row) for example, row in zip(job.examples, rows, strict=True))
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        if job.task.kind == "needle":
            from bigmac_jax.evaluation.tasks.needle import draw_needles

            draw_needles(summary["grid"], folder / f"{name}.png", f"needles found: {summary['accuracy']:.0%}")
    except storage.errors() as error:
        _log.warning("%s: its rows cannot be written (%s)", folder, storage.reason(error))


def describe_scores(summaries: dict[str, Summary]) -> list[str]:
    """A line for each task, for people."""
    lines = []
    for name, summary in summaries.items():
        parts = []
        for key in (key for key in _WORDS if key in summary):
            error = summary.get(f"{key}_stderr")
            spread = "" if error is None else f" ± {100 * error:.1f}"
            parts.append(f"{_WORDS[key]} {100 * summary[key]:.1f} %{spread}")
        for key in ("perplexity", "word_perplexity", "bits_per_byte"):
            if key in summary:
                parts.append(f"{key.replace('_', ' ')} {summary[key]:,.4g}")
        count = summary.get("not_finite", 0)
        warning = f", {count:,} of them not finite: the model's activations overflow" if count else ""
        lines.append(f"{name}: {', '.join(parts)} ({summary['rows']:,} rows{warning})")
    return lines


def flatten_scores(summaries: dict[str, Summary]) -> dict[str, float]:
    """The entries of a line of metrics.jsonl: tasks/NAME/FIGURE, without standard errors and grids."""
    return {
        f"tasks/{name}/{key}": value
        for name, summary in summaries.items()
        for key, value in summary.items()
        if isinstance(value, int | float) and not key.endswith("_stderr")
    }
