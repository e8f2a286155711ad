"""From rows to what is scored: (context, continuation) pairs, and which of them is right."""

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bigmac_jax.config import ConfigError
from bigmac_jax.evaluation.tasks.definitions import Task
from bigmac_jax.evaluation.tasks.derived_columns import FUNCTIONS
from bigmac_jax.evaluation.tasks.task_rows import Row

_DELIMITER = " "  # between a prompt and an answer


@dataclass(frozen=True)
class Example:
    """Attributes:
    place: for messages.
    pairs: (context, continuation); one for each choice.
    answer: which pair is right.
    lengths: characters of each choice, which accuracy_norm divides by; none where the choice stands in the context.
    words, num_bytes: of a document before substitutions.
    cell: (length, depth) of a needle.
    prompt, references: of what is to be generated, and all that is right.
    """

    place: str
    pairs: list[tuple[str, str]]
    answer: int = 0
    lengths: tuple[int, ...] = ()
    words: int = 0
    num_bytes: int = 0
    cell: tuple[int, float] | None = None
    prompt: str = ""
    references: tuple[str, ...] = ()


def build_examples(task: Task, rows: Sequence[tuple[str, Row]]) -> list[Example]:
    """The examples of a task's rows, in order.

    Raises:
      ConfigError: a column that is missing or of another kind than the task needs; the line says where.
    """
    columns = [(place, _columns(task, row, place)) for place, row in rows]
    if task.kind == "perplexity":
        return list(_documents(task, columns))
    build = {"last_word": _last_word, "generate": _generate}.get(task.kind, _multiple_choice)
    examples = [build(task, row, place) for place, row in columns]
    if task.kind == "classification" and len(counts := {len(example.pairs) for example in examples}) > 1:
        raise ConfigError(
            f"{task.name} has rows with {min(counts)} and with {max(counts)} choices; classes are the same"
        )
    return examples


def _columns(task: Task, row: Row, place: str) -> Row:
    """The columns that the task names, by its names."""
    found: Row = {}
    for name, aliases in (task.columns | task.optional).items():
        alias = next((alias for alias in aliases if row.get(alias) is not None), None)
        if alias is None and name in task.columns:
            raise ConfigError(
                f"{place}: column {' or '.join(map(repr, aliases))} is missing, which {task.name} needs; "
                f"it has {', '.join(row) or 'none'}"
            )
        found[name] = None if alias is None else row[alias]
    if task.prepare:
        try:
            found = FUNCTIONS[task.prepare](found)
        except (ArithmeticError, AttributeError, LookupError, SyntaxError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{place} is not a row of {task.name} ({reason}); see {task.name} in docs/evaluation.md"
            ) from None
    return found


def _multiple_choice(task: Task, row: Row, place: str) -> Example:
    if len(task.choices) == 1 and "{" not in task.choices[0]:
        listed = _column(task.choices[0], row, place)
        if not isinstance(listed, list):
            raise ConfigError(f"{place}: {task.choices[0]} holds {type(listed).__name__}; it must be a list of texts")
        choices = [_substituted(task, _as_text(choice, task.choices[0], place)) for choice in listed]
    else:
        choices = [_rendered(task, template, row, place) for template in task.choices]
    prompts = [_rendered(task, template, row, place) for template in task.prompt]
    in_prompt = len(prompts) > 1
    if in_prompt and len(choices) == 1:
        choices *= len(prompts)
    if not in_prompt:
        prompts *= len(choices)
    if len(choices) < 2 or len(prompts) != len(choices):
        raise ConfigError(
            f"{place}: {len(prompts)} prompts and {len(choices)} choices must be as many, and two at least"
        )
    lengths = () if in_prompt else tuple(map(len, choices))
    if 0 in lengths:
        raise ConfigError(f"{place}: choice {lengths.index(0)} is empty; give each choice some text")
    pairs = [(prompt, _DELIMITER + choice) for prompt, choice in zip(prompts, choices, strict=True)]
    return Example(place, pairs, _answer(task, row, place, len(choices)), lengths)


def _answer(task: Task, row: Row, place: str, count: int) -> int:
    value = _column(task.answer, row, place)
    if value in task.answer_names:
        number = task.answer_names.index(value)
    else:
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            number = -1
    if not 0 <= number < count:
        names = f", or one of {', '.join(task.answer_names)}" if task.answer_names else ""
        raise ConfigError(f"{place}: {task.answer}={value!r} must be the number of a choice, 0 to {count - 1}{names}")
    return number


def _generate(task: Task, row: Row, place: str) -> Example:
    if "{" in task.answer:
        right = [_rendered(task, task.answer, row, place)]
    else:
        listed = _column(task.answer, row, place)
        right = [
            _substituted(task, _as_text(v, task.answer, place))
            for v in (listed if isinstance(listed, list) else [listed])
        ]
    if not any(text.strip() for text in right):
        raise ConfigError(f"{place}: {task.answer} is empty; an answer needs some text")
    return Example(place, [], prompt=_rendered(task, task.prompt[0], row, place), references=tuple(right))


def _last_word(task: Task, row: Row, place: str) -> Example:
    context, _, word = _substituted(task, _as_text(_column(task.text, row, place), task.text, place)).rpartition(" ")
    if not word:
        raise ConfigError(f"{place}: {task.text} must end in a word, not in a space; mend the row")
    return Example(place, [(context, _DELIMITER + word)])


def _documents(task: Task, rows: Iterable[tuple[str, Row]]) -> Iterable[Example]:
    texts = [(place, _as_text(_column(task.text, row, place), task.text, place)) for place, row in rows]
    if not any(text.strip() for _, text in texts):
        raise ConfigError(f"{texts[0][0]} has no text, nor have rows after it; {task.name} needs words")
    if task.documents:
        joined = "".join(text if text.endswith("\n") else text + "\n" for _, text in texts)
        starts = [match.start() for match in re.finditer(task.documents, joined)]
        ends = [*starts, len(joined)]
        texts = [
            (f"{task.name} document {n + 1}", joined[a:b].removesuffix("\n"))
            for n, (a, b) in enumerate(zip([0, *starts], ends, strict=True))
        ]
    for place, text in texts:
        if text.strip():
            words = len(re.split(r"\s+", text))  # as the harness counts: white space at an end adds one
            yield Example(place, [("", _substituted(task, text))], words=words, num_bytes=len(text.encode()))


def _rendered(task: Task, template: str, row: Row, place: str) -> str:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        values = {name: _as_text(_column(name, row, place), name, place) for name in names}
        text = template.format_map(values)
    except (LookupError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{task.name}: {template!r} is not a template ({error}); columns stand in braces") from None
    return _substituted(task, text)


def _column(name: str, row: Row, place: str) -> Any:
    if row.get(name) is None:
        raise ConfigError(f"{place}: there is no {name!r}; name it in the task's columns, beside {', '.join(row)}")
    return row[name]


def _as_text(value: Any, name: str, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{place}: column {name!r} holds {type(value).__name__}, not text; use another column")
    return str(value)


def _substituted(task: Task, text: str) -> str:
    for pattern, replacement in task.substitutions:
        text = re.sub(pattern, replacement, text)
    return text
