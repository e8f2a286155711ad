"""Downstream tasks, defined as data: one TOML file each, whose comments name where its rows and its form come from."""

import dataclasses
import pathlib
import re
import tomllib
from dataclasses import dataclass
from typing import Any

from bigmac_jax.config import ConfigError
from bigmac_jax.config.errors import require
from bigmac_jax.evaluation.tasks.answer_metrics import METRICS
from bigmac_jax.evaluation.tasks.derived_columns import FUNCTIONS
from bigmac_jax.runtime import storage

_FOLDER = pathlib.Path(__file__).parent
TASKS = tuple(sorted(file.stem for file in _FOLDER.glob("*.toml")))


@dataclass(frozen=True)
class Task:
    """A data set that is scored, as its TOML file says. Templates are Python's: "{goal}" is the column goal."""

    name: str  # of the file
    kind: str  # multiple_choice, classification, generate, last_word or perplexity
    source: str = ""  # tfds:NAME, or a file of rows beside the TOML file; empty where rows must be given
    split: str = ""  # of TFDS
    # What a row must have and may have: the name used here → names in data sets, of which the first one found counts.
    columns: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    optional: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    prepare: str = ""  # one of `derived_columns.FUNCTIONS`, which adds columns
    substitutions: tuple[tuple[str, str], ...] = ()  # (regular expression, replacement), of each text, in order
    prompt: tuple[str, ...] = ()  # template of the context; one for each choice where the choice stands in it
    choices: tuple[str, ...] = ()  # templates, one a choice, or the name of a column that lists them
    # The column of the right choice, a number from 0 or one of answer_names. For generate, a template, or the name of a
    # column that lists all right answers.
    answer: str = ""
    answer_names: tuple[str, ...] = ()
    text: str = ""  # the column, for last_word and perplexity
    # For perplexity: all rows are one text, and a document begins where this matches; empty: each row is a document.
    documents: str = ""
    # For generate: `answer_metrics.METRICS`, where an answer ends at the latest, and whether the prompt is a user's
    # message, which goes through the run's chat template.
    metrics: tuple[str, ...] = ("exact_match",)
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    chat: bool = False


@dataclass(frozen=True)
class Needle:
    """A number hidden in a text, at whose end the model is asked for it."""

    name: str
    kind: str
    haystack: str  # where the text comes from, as in data.test_source
    lengths: tuple[float, ...]  # of the whole prompt, as shares of a window
    depths: tuple[float, ...]  # of the needle, from 0 (the text's beginning) to 1 (its end)
    samples: int  # prompts of each length and depth
    digits: int  # of the number
    distractors: int  # other numbers, than which the right one must be likelier
    seed: int
    needle: str  # template
    question: str


_NEEDED = {  # by kind, the fields that a file must have
    "multiple_choice": ("columns", "prompt", "choices", "answer"),
    "classification": ("columns", "prompt", "choices", "answer"),
    "generate": ("columns", "prompt", "answer"),
    "last_word": ("columns", "text"),
    "perplexity": ("columns", "text"),
    "needle": tuple(field.name for field in dataclasses.fields(Needle)),
}


def load_task(name_or_path: str) -> Task | Needle:
    """Reads one of TASKS, or a file of that form.

    Raises:
      ConfigError: no such task, or a field that is missing, unknown or of the wrong type.
    """
    path = _FOLDER / f"{name_or_path}.toml" if name_or_path in TASKS else storage.locate(name_or_path, "--tasks")
    if path.suffix != ".toml" or not path.is_file():
        raise ConfigError(
            f"--tasks={name_or_path} is not a task; use {', '.join(TASKS)}, or the path of a .toml file of that form"
        )
    values = {"name": path.stem} | _read(path)
    kind = values.get("kind")
    if not (isinstance(kind, str) and kind in _NEEDED):
        raise ConfigError(f"{path.name}: kind={kind!r} must be one of {', '.join(_NEEDED)}")
    cls: type[Task | Needle] = Needle if kind == "needle" else Task
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    for name in values:
        if name not in types:
            raise ConfigError(f"{path.name}: {name} is not a field of kind={kind}; use one of {', '.join(types)}")
    for name in _NEEDED[kind]:
        if name not in values:
            raise ConfigError(f"{path.name}: {name} is missing, which kind={kind} needs; see piqa.toml for the form")
    task = cls(**{name: _convert(types[name], value, f"{path.name}: {name}") for name, value in values.items()})
    return _check_task(task, path) if isinstance(task, Task) else _check_needle(task, path)


def _read(path: pathlib.Path) -> dict[str, Any]:
    """The file's fields, on top of those of the task that its `like` names."""
    try:
        values = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except storage.errors() as error:
        raise ConfigError(f"{path} cannot be read ({storage.reason(error)}); give the path of a .toml file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name} is not UTF-8; save it as such") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path.name} is not valid TOML ({error}); see piqa.toml for the form") from None
    like = values.pop("like", None)
    if like is None:
        return values
    if like not in TASKS or like == path.stem:
        raise ConfigError(f"{path.name}: like={like!r} must be another of {', '.join(TASKS)}")
    liked = _read(_FOLDER / f"{like}.toml")
    if (source := liked.get("source")) and not source.startswith("tfds:"):
        liked["source"] = str(_FOLDER / source)  # beside that file, not beside this one
    return liked | values


def _check_task(task: Task, path: pathlib.Path) -> Task:
    if task.prepare and task.prepare not in FUNCTIONS:
        raise ConfigError(f"{path.name}: prepare={task.prepare!r} must be one of {', '.join(FUNCTIONS)}")
    if unknown := [metric for metric in task.metrics if metric not in METRICS]:
        raise ConfigError(f"{path.name}: metrics={unknown[0]!r} must be some of {', '.join(METRICS)}")
    if task.kind == "generate" and (len(task.prompt) != 1 or task.max_tokens < 1):
        raise ConfigError(f"{path.name}: kind=generate needs one prompt, and max_tokens of at least 1")
    for pattern, replacement in [*task.substitutions, (task.documents, "")]:
        try:
            re.sub(pattern, replacement, "")
        except (re.error, IndexError) as error:
            raise ConfigError(
                f"{path.name}: {pattern!r} is not a regular expression with a replacement {replacement!r} ({error})"
            ) from None
    if not task.source or task.source.startswith("tfds:"):
        return task
    source = storage.locate(task.source, f"{path.name}: source")
    return dataclasses.replace(task, source=str(source if storage.is_store(source) else path.parent / source))


def _check_needle(task: Needle, path: pathlib.Path) -> Needle:
    for name in ("samples", "digits"):
        require(getattr(task, name) >= 1, f"{path.name}: {name}={getattr(task, name)} must be at least 1")
    numbers = 9 * 10 ** (task.digits - 1)
    require(
        task.distractors < numbers,
        f"{path.name}: distractors={task.distractors} must be fewer than the {numbers} numbers of "
        f"digits={task.digits}; use fewer, or more digits",
    )
    try:
        task.needle.format(number=1)
    except (AttributeError, LookupError, ValueError) as error:
        raise ConfigError(f"{path.name}: needle={task.needle!r} is not a template with {{number}} ({error})") from None
    return task


def _convert(kind: Any, value: Any, name: str) -> Any:
    """A value of the file as the field's type; one text may stand for a list of one.

    Raises:
      ConfigError: it is of another type.
    """
    if kind == tuple[str, ...]:
        texts = [value] if isinstance(value, str) else value
        good = isinstance(texts, list) and all(isinstance(entry, str) for entry in texts)
        require(good, f"{name}={value!r} must be a text, or a list of texts")
        return tuple(texts)
    if kind == dict[str, tuple[str, ...]]:
        require(isinstance(value, dict), f"{name}={value!r} must be a table")
        return {key: _convert(tuple[str, ...], entry, name) for key, entry in value.items()}
    if kind == tuple[tuple[str, str], ...]:
        good = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
        require(good, f"{name} must be a list of pairs [regular expression, replacement]")
        return tuple(_convert(tuple[str, ...], pair, name) for pair in value)
    if kind == tuple[float, ...]:
        good = isinstance(value, list) and all(type(v) in (int, float) and 0 <= v <= 1 for v in value)
        require(good and len(value) > 0, f"{name}={value!r} must be a list of numbers from 0 to 1")
        return tuple(map(float, value))
    wanted = {str: "a text", bool: "true or false"}.get(kind, "a whole number from 0")
    require(type(value) is kind and not (kind is int and value < 0), f"{name}={value!r} must be {wanted}")
    return value
