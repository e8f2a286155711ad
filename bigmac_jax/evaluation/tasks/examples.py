"""From rows to what is scored: (context, continuation) pairs, of which one is right, or a prompt and its answers."""

import itertools
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
    """What is scored of a row, or of a document."""

    place: str  # for messages
    pairs: list[tuple[str, str]]  # (context, continuation), one for each choice
    answer: int = 0  # which pair is right
    lengths: tuple[int, ...] = ()  # characters of each choice, for accuracy_norm; none where it stands in the context
    words: int = 0  # of a document before substitutions
    num_bytes: int = 0
    cell: tuple[int, float] | None = None  # (length, depth) of a needle
    prompt: str = ""  # of an answer that the model writes
    references: tuple[str, ...] = ()  # all right answers


def build_examples(task: Task, rows: Sequence[tuple[str, Row]]) -> list[Example]:
    """Builds the examples of a task from its rows, in order.

    Raises:
      ConfigError: a column that is missing or of another kind than the task needs; the line says where.
    """
    columns = [(place, _pick_columns(task, row, place)) for place, row in rows]
    if task.kind == "perplexity":
        return list(_build_documents(task, columns))
    build = {"last_word": _build_last_word, "generate": _build_prompt}.get(task.kind, _build_choices)
    examples = [build(task, row, place) for place, row in columns]
    if task.kind == "classification" and len(counts := {len(example.pairs) for example in examples}) > 1:
        raise ConfigError(
            f"{task.name} has rows with {min(counts)} and with {max(counts)} choices; classes are the same"
        )
    return examples


def _pick_columns(task: Task, row: Row, place: str) -> Row:
    """The columns that the task names, by its names, and those that it derives from them."""
    found: Row = {}
    for name, aliases in (task.columns | task.optional).items():
        found[name] = next((row[alias] for alias in aliases if row.get(alias) is not None), None)
        if found[name] is None and name in task.columns:
            raise ConfigError(
                f"{place}: column {' or '.join(map(repr, aliases))} is missing, which {task.name} needs; "
                f"it has {', '.join(row) or 'none'}"
            )
    try:
        return FUNCTIONS[task.prepare](found) if task.prepare else found
    except (ArithmeticError, AttributeError, LookupError, SyntaxError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{place} is not a row of {task.name} ({reason}); see {task.name} in docs/evaluation.md"
        ) from None


def _build_choices(task: Task, row: Row, place: str) -> Example:
    if len(task.choices) == 1 and "{" not in task.choices[0]:
        name = task.choices[0]
        if not isinstance(listed := _get(name, row, place), list):
            raise ConfigError(f"{place}: {name} holds {type(listed).__name__}; it must be a list of texts")
        choices = [_substitute(task, _as_text(choice, name, place)) for choice in listed]
    else:
        choices = [_render(task, template, row, place) for template in task.choices]
    prompts = [_render(task, template, row, place) for template in task.prompt]
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
    return Example(place, pairs, _find_answer(task, row, place, len(choices)), lengths)


def _find_answer(task: Task, row: Row, place: str, count: int) -> int:
    """The number of the right choice."""
    value = _get(task.answer, row, place)
    try:
        number = task.answer_names.index(value) if value in task.answer_names else int(value)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if not 0 <= number < count:
        names = f", or one of {', '.join(task.answer_names)}" if task.answer_names else ""
        raise ConfigError(f"{place}: {task.answer}={value!r} must be the number of a choice, 0 to {count - 1}{names}")
    return number


def _build_prompt(task: Task, row: Row, place: str) -> Example:
    if "{" in task.answer:
        right = [_render(task, task.answer, row, place)]
    else:
        listed = _get(task.answer, row, place)
        listed = listed if isinstance(listed, list) else [listed]
        right = [_substitute(task, _as_text(value, task.answer, place)) for value in listed]
    if not any(text.strip() for text in right):
        raise ConfigError(f"{place}: {task.answer} is empty; an answer needs some text")
    return Example(place, [], prompt=_render(task, task.prompt[0], row, place), references=tuple(right))


def _build_last_word(task: Task, row: Row, place: str) -> Example:
    context, _, word = _substitute(task, _as_text(_get(task.text, row, place), task.text, place)).rpartition(" ")
    if not word:
        raise ConfigError(f"{place}: {task.text} must end in a word, not in a space; mend the row")
    return Example(place, [(context, _DELIMITER + word)])


def _build_documents(task: Task, rows: Iterable[tuple[str, Row]]) -> Iterable[Example]:
    texts = [(place, _as_text(_get(task.text, row, place), task.text, place)) for place, row in rows]
    if not any(text.strip() for _, text in texts):
        raise ConfigError(f"{texts[0][0]} has no text, nor have rows after it; {task.name} needs words")
    if task.documents:
        joined = "".join(text.removesuffix("\n") + "\n" for _, text in texts)
        ends = [0, *(match.start() for match in re.finditer(task.documents, joined)), len(joined)]
        texts = [
            (f"{task.name} document {number}", joined[start:end].removesuffix("\n"))
            for number, (start, end) in enumerate(itertools.pairwise(ends), 1)
        ]
    for place, text in texts:
        if text.strip():
            words = len(re.split(r"\s+", text))  # as the harness counts: white space at an end adds one
            yield Example(place, [("", _substitute(task, text))], words=words, num_bytes=len(text.encode()))


def _render(task: Task, template: str, row: Row, place: str) -> str:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        text = template.format_map({name: _as_text(_get(name, row, place), name, place) for name in names})
    except ConfigError:
        raise
    except (LookupError, ValueError) as error:
        raise ConfigError(f"{task.name}: {template!r} is not a template ({error}); columns stand in braces") from None
    return _substitute(task, text)


def _get(name: str, row: Row, place: str) -> Any:
    if row.get(name) is None:
        raise ConfigError(f"{place}: there is no {name!r}; name it in the task's columns, beside {', '.join(row)}")
    return row[name]


def _as_text(value: Any, name: str, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{place}: column {name!r} holds {type(value).__name__}, not text; use another column")
    return str(value)


def _substitute(task: Task, text: str) -> str:
    for pattern, replacement in task.substitutions:
        text = re.sub(pattern, replacement, text)
    return text
