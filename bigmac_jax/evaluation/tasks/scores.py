"""Accuracies and perplexities of tasks, from the log-likelihoods of their examples, with standard errors."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigmac_jax.evaluation.loglikelihood import Result
from bigmac_jax.evaluation.perplexity import Score, exp
from bigmac_jax.evaluation.tasks.answer_metrics import Summary, mean, summarise_answers
from bigmac_jax.evaluation.tasks.examples import Example


def judge(kind: str, example: Example, results: Sequence[Result]) -> dict[str, Any]:
    """Judges one example → its row: log-likelihoods in nats, the prediction, and whether it is right. Without a
    prediction nothing is: no order holds where a log-likelihood is not finite."""
    scores = np.array([result.loglikelihood for result in results])
    row: dict[str, Any] = {"loglikelihoods": scores.tolist()}
    finite = _is_finite(row)
    if kind == "last_word":
        return row | {"right": finite and results[0].greedy}
    if kind == "perplexity":
        return row | {"tokens": results[0].tokens, "words": example.words, "bytes": example.num_bytes}
    prediction = int(scores.argmax()) if finite else None
    row |= {"answer": example.answer, "prediction": prediction, "right": prediction == example.answer}
    if example.lengths:
        row["right_norm"] = finite and int((scores / np.array(example.lengths)).argmax()) == example.answer
    if example.cell:
        tokens, depth = example.cell
        row |= {"length": tokens, "depth": depth, "found": finite and results[example.answer].greedy}
    return row


def _is_finite(row: dict[str, Any]) -> bool:
    return all(map(math.isfinite, row["loglikelihoods"]))


def summarise(kind: str, rows: Sequence[dict[str, Any]]) -> Summary:
    """Sums up the rows of a task: accuracies or perplexities, the mean log-likelihood of what is right, their standard
    errors, and the number of rows, also of those whose log-likelihoods are not finite, if there are any."""
    if kind == "generate":
        return summarise_answers(rows)
    not_finite = sum(not _is_finite(row) for row in rows)
    counts = {"rows": len(rows)} | ({"not_finite": not_finite} if not_finite else {})
    if kind == "perplexity":
        nll = -math.fsum(row["loglikelihoods"][0] for row in rows)
        tokens, words, num_bytes = (sum(row[name] for row in rows) for name in ("tokens", "words", "bytes"))
        score = Score.from_sums(nll, tokens, words, num_bytes)
        byte_perplexity = exp(nll / max(1, num_bytes))
        return score._asdict() | {"byte_perplexity": byte_perplexity, "loglikelihood": -nll} | counts
    summary: Summary = {}
    right = "found" if kind == "needle" else "right"
    for name, column in {"accuracy": right, "accuracy_norm": "right_norm"}.items():
        if column in rows[0]:
            summary |= mean(name, [row[column] for row in rows])
    right_scores = [row["loglikelihoods"][row.get("answer", 0)] for row in rows]
    if kind == "classification":
        summary["macro_f1"] = macro_f1([row["answer"] for row in rows], [row["prediction"] for row in rows])
    if kind == "last_word":
        summary["perplexity"] = exp(-math.fsum(right_scores) / len(rows))
    if kind == "needle":
        summary |= mean("accuracy_choice", [row["right"] for row in rows]) | {"grid": _grid(rows)}
    return summary | mean("loglikelihood", right_scores) | counts


def macro_f1(answers: Sequence[int], predictions: Sequence[int | None]) -> float:
    """F1 of each class that occurs, 2 · right / (predicted + in the data), averaged over classes."""
    scores = []
    for label in {*answers, *predictions} - {None}:
        right = sum(a == label == p for a, p in zip(answers, predictions, strict=True))
        scores.append(2 * right / (answers.count(label) + predictions.count(label)))
    return math.fsum(scores) / len(scores)


def _grid(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The share of needles that was found, by length and depth; None where there was none."""
    lengths, depths = sorted({row["length"] for row in rows}), sorted({row["depth"] for row in rows})

    def share(length: int, depth: float) -> float | None:
        found = [row["found"] for row in rows if (row["length"], row["depth"]) == (length, depth)]
        return sum(found) / len(found) if found else None

    shares = [[share(length, depth) for depth in depths] for length in lengths]
    return {"lengths": lengths, "depths": depths, "accuracy": shares}
