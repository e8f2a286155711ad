"""Downstream tasks, defined as data: one TOML file each, whose comments name where its rows and its form come from."""

import dataclasses
import pathlib
import re
import tomllib
from dataclasses import dataclass
from typing import Any

from bigmac_jax.config import ConfigError
from bigmac_jax.runtime import storage

_FOLDER = pathlib.Path(__file__).parent
TASKS = tuple(sorted(file.stem for file in _FOLDER.glob("*.toml")))


@dataclass(frozen=True)
class Task:
    """Templates are Python's: "{goal}" is the column goal.

    Attributes:
      name: of its file.
      kind: multiple_choice, classification, generate, last_word or perplexity.
      source: tfds:NAME, or a file of rows beside the TOML file; empty where rows must be given.
      split: of TFDS.
      columns: what a row needs: the name used here → names that data sets give it, the first one found counts.
      optional: the same for what it may have; None where it has not.
      prepare: a function of `derived_columns.FUNCTIONS` that makes more columns of these.
      substitutions: (regular expression, replacement), applied in order to each text that is rendered.
      prompt: template of the context; several where the choice stands in it, one each.
      choices: templates, one a choice, or the one name of a column that lists them.
      answer: the column of the right choice, a number from 0, or one of answer_names; for generate a template, or the
        one name of a column that lists all that is right.
      metrics: for generate, of `task_answers.METRICS`.
      max_tokens, stop: for generate, where a completion ends, if no end of text comes before.
      chat: for generate, whether the prompt is a user's message, which goes through the run's chat template.
      text: the column, for last_word and perplexity.
      documents: for perplexity: all rows are one text, and a document begins where this matches; empty: each row is a
        document.
    """

    name: str
    kind: str
    source: str = ""
    split: str = ""
    columns: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    optional: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    prepare: str = ""
    substitutions: tuple[tuple[str, str], ...] = ()
    prompt: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    answer: str = ""
    answer_names: tuple[str, ...] = ()
    text: str = ""
    documents: str = ""
    metrics: tuple[str, ...] = ("exact_match",)
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    chat: bool = False


@dataclass(frozen=True)
class Needle:
    """A number hidden in text that the model is asked for at its end.

    Attributes:
      haystack: where the text comes from, as data.test_source says it.
      lengths: of the whole prompt, as shares of the tokens that the model is given at most.
      depths: of the needle: 0 is the beginning of the text, 1 its end.
      samples: prompts of each length and depth.
      digits: of the number.
      distractors: other numbers that the right one must be likelier than.
      needle, question: templates.
    """

    name: str
    kind: str
    haystack: str
    lengths: tuple[float, ...]
    depths: tuple[float, ...]
    samples: int
    digits: int
    distractors: int
    seed: int
    needle: str
    question: str


_KINDS: dict[str, tuple[type, tuple[str, ...]]] = {  # and what the kind can't do without
    "multiple_choice": (Task, ("columns", "prompt", "choices", "answer")),
    "classification": (Task, ("columns", "prompt", "choices", "answer")),
    "generate": (Task, ("columns", "prompt", "answer")),
    "last_word": (Task, ("columns", "text")),
    "perplexity": (Task, ("columns", "text")),
    "needle": (Needle, ()),
}


def load_task(name_or_path: str) -> Task | Needle:
    """One of TASKS, or a file of that form.

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
    if kind not in _KINDS:
        raise ConfigError(f"{path.name}: kind={kind!r} must be one of {', '.join(_KINDS)}")
    cls, needed = _KINDS[kind]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{path.name}: {name} is not a field of kind={kind}; use one of {', '.join(fields)}")
    for name, field in fields.items():
        if name not in values and (name in needed or (cls is Needle and field.default is dataclasses.MISSING)):
            raise ConfigError(f"{path.name}: {name} is missing, which kind={kind} needs; see piqa.toml for the form")
    task: Task | Needle = cls(
        **{name: _value(fields[name].type, value, f"{path.name}: {name}") for name, value in values.items()}
    )
    return _checked(task, path) if isinstance(task, Task) else _checked_needle(task, path)


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
    if (source := liked.get("source", "tfds:")) and not source.startswith("tfds:"):
        liked["source"] = str(_FOLDER / source)  # beside that file, not beside this one
    return liked | values


def _checked(task: Task, path: pathlib.Path) -> Task:
    from bigmac_jax.evaluation.tasks.derived_columns import FUNCTIONS
    from bigmac_jax.evaluation.tasks.task_answers import METRICS

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
    if task.source and not task.source.startswith("tfds:"):
        source = storage.locate(task.source, f"{path.name}: source")
        task = dataclasses.replace(task, source=str(source if storage.is_store(source) else path.parent / source))
    return task


def _checked_needle(task: Needle, path: pathlib.Path) -> Needle:
    for name in ("samples", "digits"):
        if getattr(task, name) < 1:
            raise ConfigError(f"{path.name}: {name}={getattr(task, name)} must be at least 1")
    numbers = 9 * 10 ** (task.digits - 1)
    if task.distractors >= numbers:
        raise ConfigError(
            f"{path.name}: distractors={task.distractors} must be fewer than the {numbers} numbers of "
            f"digits={task.digits}; use fewer, or more digits"
        )
    try:
        task.needle.format(number=1)
    except (AttributeError, LookupError, ValueError) as error:
        raise ConfigError(f"{path.name}: needle={task.needle!r} is not a template with {{number}} ({error})") from None
    return task


def _value(kind: Any, value: Any, name: str) -> Any:
    """A value of the file as the field's type; a text where several may stand is one of them."""

    def texts(value: Any) -> tuple[str, ...]:
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
            raise ConfigError(f"{name}={value!r} must be a text, or a list of texts")
        return tuple(listed)

    if kind == tuple[str, ...]:
        return texts(value)
    if kind == dict[str, tuple[str, ...]]:
        if not isinstance(value, dict):
            raise ConfigError(f"{name}={value!r} must be a table")
        return {key: texts(entry) for key, entry in value.items()}
    if kind == tuple[tuple[str, str], ...]:
        if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
            raise ConfigError(f"{name} must be a list of pairs [regular expression, replacement]")
        return tuple(texts(pair) for pair in value)
    if kind == tuple[float, ...]:
        if not isinstance(value, list) or not value or not all(type(v) in (int, float) and 0 <= v <= 1 for v in value):
            raise ConfigError(f"{name}={value!r} must be a list of numbers from 0 to 1")
        return tuple(map(float, value))
    if type(value) is not kind or (kind is int and value < 0):
        wanted = {str: "a text", bool: "true or false"}.get(kind, "a whole number from 0")
        raise ConfigError(f"{name}={value!r} must be {wanted}")
    return value
