"""How answers that a model writes are judged against those that are right."""

import functools
import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigmac_jax.config import ConfigError

Summary = dict[str, Any]
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Whether the prediction is one of the references, except for white space around it."""
    return float(prediction.strip() in [reference.strip() for reference in references])


def number(prediction: str, references: Sequence[str]) -> float:
    """Whether the first number of the prediction is the last one of a reference (GSM8K's stand behind a derivation)."""

    def numbers(text: str) -> list[float]:
        return [float(digits.replace(",", "")) for digits in _NUMBER.findall(text)]

    first = numbers(prediction)[:1]
    return float(bool(first) and first in [numbers(reference)[-1:] for reference in references])


def f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of words with the best reference, without articles, case and punctuation (SQuAD, arXiv 1606.05250)."""

    def words(text: str) -> list[str]:
        text = "".join(character for character in text.lower() if character not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def compare(ours: list[str], theirs: list[str]) -> float:
        if not ours or not theirs:
            return float(ours == theirs)
        return 2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))

    return max(compare(words(prediction), words(reference)) for reference in references)


def rouge(kind: str, prediction: str, references: Sequence[str]) -> float:
    """The best F-measure, with Porter's stemmer, as papers report it."""
    scorer = load_library(kind).RougeScorer([kind], use_stemmer=True)
    return max(float(scorer.score(reference, prediction)[kind].fmeasure) for reference in references)


class Metric(NamedTuple):
    words: str  # its name for people
    score: Callable[[str, Sequence[str]], float] | None = None  # None: sacrebleu's, of all texts together


METRICS = {
    "exact_match": Metric("exact match", exact_match),
    "number": Metric("right numbers", number),
    "f1": Metric("F1 of words", f1),
    "rouge1": Metric("ROUGE-1", functools.partial(rouge, "rouge1")),
    "rouge2": Metric("ROUGE-2", functools.partial(rouge, "rouge2")),
    "rougeL": Metric("ROUGE-L", functools.partial(rouge, "rougeL")),
    "bleu": Metric("BLEU"),
    "chrf": Metric("chrF"),
}


def load_library(metric: str) -> Any:
    """The module that computes a metric, if that is not this one; ConfigError if it is not installed."""
    ours = ("exact_match", "number", "f1")
    try:
        name = "rouge_score.rouge_scorer" if metric.startswith("rouge") else "sacrebleu"
        return None if metric in ours else importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"metrics={metric} needs a package; pip install 'bigmac_jax[tasks]'") from None


def judge_answer(prediction: str, references: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """Judges one answer → its row, in which a metric that is of all texts together is None."""
    scores = {name: METRICS[name].score for name in metrics}
    return {"prediction": prediction, "references": list(references)} | {
        name: score and score(prediction, references) for name, score in scores.items()
    }


def summarise_answers(rows: Sequence[dict[str, Any]]) -> Summary:
    """Sums up rows: each metric, with a standard error where each row has a score of its own."""
    summary: Summary = {}
    for metric in (name for name in METRICS if name in rows[0]):
        if METRICS[metric].score:
            summary |= mean(metric, [row[metric] for row in rows])
            continue
        most = max(len(row["references"]) for row in rows)
        by_place = [[row["references"][i] if i < len(row["references"]) else None for row in rows] for i in range(most)]
        score = getattr(load_library(metric), f"corpus_{metric}")
        predictions = [row["prediction"].strip() for row in rows]
        summary |= {metric: score(predictions, by_place).score / 100, f"{metric}_stderr": None}  # it counts to 100
    not_finite = sum(row.get("overflows", False) for row in rows)
    return summary | {"rows": len(rows)} | ({"not_finite": not_finite} if not_finite else {})


def mean(name: str, values: Sequence[float]) -> Summary:
    """The mean, and its standard error (None of a single value)."""
    n = len(values)
    with np.errstate(invalid="ignore"):  # NaN of what is infinite
        error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return {name: math.fsum(values) / n, f"{name}_stderr": error}
