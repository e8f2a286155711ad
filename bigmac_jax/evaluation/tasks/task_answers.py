"""Tasks whose answers the model writes: prompts, completions, and how these are judged against what is right."""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.chat_template import ChatError, load_chat
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.evaluation.tasks.definitions import Task
from bigmac_jax.evaluation.tasks.examples import Example
from bigmac_jax.inference.generator import Generator
from bigmac_jax.inference.generator import Request as Prompt
from bigmac_jax.inference.sampling import Sampling
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.runtime.progress import Progress

Summary = dict[str, Any]
# What a metric is called, for people.
METRICS = {
    "exact_match": "exact match",
    "number": "right numbers",
    "f1": "F1 of words",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
}
_ROUGE = ("rouge1", "rouge2", "rougeL")
_OF_ALL = ("bleu", "chrf")  # of all texts together
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def encode_prompts(
    task: Task, examples: Sequence[Example], config: Config, tokenizer: Tokenizer, length: int, chat_template: str
) -> list[Prompt]:
    """What the model is given; a prompt that is too long with its answer loses its beginning, as in
    lm-evaluation-harness.

    Raises:
      ConfigError: the answers alone are too long, or a prompt that the chat template refuses.
    """
    for metric in task.metrics:
        _library(metric)  # before anything is generated
    if task.max_tokens >= length:
        raise ConfigError(f"{task.name}: max_tokens={task.max_tokens} must be below the {length} tokens of the model")
    stop = task.stop
    if not task.chat:
        encoded = tokenizer.encode_batch([example.prompt for example in examples])
    else:
        chat, encoded = load_chat(tokenizer, chat_template, config.data.tokenizer, "the run's chat template"), []
        stop = (*stop, *(text for text in chat.stop if text not in stop))
        for example in examples:
            try:
                encoded.append(chat.prompt([{"role": "user", "content": example.prompt}]))
            except ChatError as error:
                raise ConfigError(f"{example.place}: {error}") from None
    room, sampling = length - task.max_tokens, Sampling(task.max_tokens, stop=stop)
    return [Prompt(tuple(ids[-room:] or [tokenizer.eos_id]), sampling) for ids in encoded]


def write_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    prompts: Sequence[Prompt],
    metrics: Sequence[str],
    length: int,
    batch_size: int,
    quiet: bool,
) -> list[dict[str, Any]]:
    """A row for each example: what the model writes, greedily, and what that is worth."""
    generator = Generator(model.config, model, length, batch_size, tokenizer)
    with Progress("completions", len(prompts), "prompt", silent=quiet) as bar:
        completions = generator.generate(prompts, on_done=lambda number, completion: bar.update())
    return [
        {"prediction": completion.text, "references": list(example.references)}
        | {m: METRIC[m](completion.text, example.references) for m in metrics if m not in _OF_ALL}
        | dict.fromkeys([m for m in metrics if m in _OF_ALL])
        for completion, example in zip(completions, examples, strict=True)
    ]


def summarise(rows: Sequence[dict[str, Any]]) -> Summary:
    summary: Summary = {}
    for metric in (name for name in METRICS if name in rows[0]):
        if metric not in _OF_ALL:
            summary |= mean(metric, [row[metric] for row in rows])
            continue
        most = max(len(row["references"]) for row in rows)
        by_place = [[row["references"][i] if i < len(row["references"]) else None for row in rows] for i in range(most)]
        of = getattr(_library(metric), f"corpus_{metric}")
        # sacrebleu counts to 100.
        score = of([row["prediction"].strip() for row in rows], by_place).score / 100
        summary |= {metric: score, f"{metric}_stderr": None}
    return summary | {"rows": len(rows)}


def mean(name: str, values: Sequence[float]) -> Summary:
    """The mean, and its standard error (None of a single value)."""
    n = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return {name: math.fsum(values) / n, f"{name}_stderr": error}


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Whether it is one of them, but for white space around it."""
    return float(prediction.strip() in [reference.strip() for reference in references])


def number(prediction: str, references: Sequence[str]) -> float:
    """Whether the first number that is written is the last one of a reference (GSM8K's stand behind their way)."""

    def numbers(text: str) -> list[float]:
        return [float(digits.replace(",", "")) for digits in _NUMBER.findall(text)]

    first = numbers(prediction)[:1]
    return float(bool(first) and first in [numbers(reference)[-1:] for reference in references])


def f1(prediction: str, references: Sequence[str]) -> float:
    """Of words, with the best reference; articles, case and punctuation don't count (SQuAD, arXiv 1606.05250)."""

    def words(text: str) -> list[str]:
        text = "".join(character for character in text.lower() if character not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def of(reference: str) -> float:
        ours, theirs = words(prediction), words(reference)
        if not ours or not theirs:
            return float(ours == theirs)
        common = (Counter(ours) & Counter(theirs)).total()
        return 2 * common / (len(ours) + len(theirs))

    return max(map(of, references))


def _rouge(kind: str) -> Callable[[str, Sequence[str]], float]:
    def score(prediction: str, references: Sequence[str]) -> float:
        """The best F-measure, with Porter's stemmer, as papers report it."""
        scorer = _library(kind).RougeScorer([kind], use_stemmer=True)
        return max(float(scorer.score(reference, prediction)[kind].fmeasure) for reference in references)

    return score


METRIC: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match, "number": number, "f1": f1, **{kind: _rouge(kind) for kind in _ROUGE},
}  # fmt: skip


def _library(metric: str) -> Any:
    """What computes a metric that is not our own."""
    try:
        if metric in _ROUGE:
            from rouge_score import rouge_scorer

            return rouge_scorer
        if metric in _OF_ALL:
            import sacrebleu

            return sacrebleu
    except ImportError:
        raise ConfigError(f"metrics={metric} needs a package; pip install 'bigmac_jax[tasks]'") from None
    return None
