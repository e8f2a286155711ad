"""Columns that are computed from a row's others, as lm-evaluation-harness computes them, where templates can't."""

import ast
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def hellaswag(row: Row) -> Row:
    """Adds `context`, whose last sentence, ctx_b, is capitalised.

    TFDS has the two parts joined. In WikiHow's rows ctx_b is empty, in ActivityNet's it is what follows the last full
    stop: that gives the same context in all 10,042 rows of the validation split.
    """
    if row["ctx_b"] is not None and row["ctx_a"] is not None:
        return row | {"context": f"{row['ctx_a']} {row['ctx_b'].capitalize()}"}
    context = row["context"]
    start = context.rfind(". ") + 2
    if start == 1 or context.endswith(".") or (row["source_id"] or "").startswith("wikihow"):
        return row
    return row | {"context": context[:start] + context[start:].capitalize()}


def winogrande(row: Row) -> Row:
    """Adds what stands `before` and `after` the blank: a choice fills it, and what follows is scored."""
    before, blank, after = row["sentence"].partition("_")
    if not blank:
        raise ValueError("its sentence has no blank, _")
    return row | {"before": before, "after": after.strip()}


def race(row: Row) -> Row:
    """Adds `prompt`, `options` and `answer` of an article's last question; the others stand answered in the prompt."""
    problems = row["problems"]  # how Hugging Face's copy for the harness has it
    if problems is None:
        problems = [
            {"question": question, "options": options, "answer": answer}
            for question, options, answer in zip(row["questions"], row["options"], row["answers"], strict=True)
        ]
    elif isinstance(problems, str):
        problems = ast.literal_eval(problems)
    *earlier, last = problems
    prompt = f"Article: {row['article']}\n\n"
    for problem in earlier:
        question, answer = problem["question"], problem["options"]["ABCD".index(problem["answer"])]
        if question.endswith("  _  ."):
            prompt += f"{question.removesuffix('_  .')[:-1]}{answer}\n"
        else:
            prompt += f"Question: {question}\nAnswer: {answer}\n"
    return row | {"prompt": prompt + last["question"], "options": last["options"], "answer": last["answer"]}


def squad(row: Row) -> Row:
    """Adds `texts`, all right answers, which data sets list beside their places."""
    answers = row["answers"]
    return row | {"texts": list(dict.fromkeys(answers["text"] if isinstance(answers, dict) else answers))}


FUNCTIONS: dict[str, Callable[[Row], Row]] = {
    function.__name__: function for function in (hellaswag, winogrande, race, squad)
}
