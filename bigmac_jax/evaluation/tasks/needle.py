"""Needle in a haystack: prompts of chosen length, made from the corpus, with a number hidden at a chosen depth."""

import dataclasses
import itertools
import pathlib
import random
import re
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.data.corpus import open_documents
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.evaluation.tasks.definitions import Needle
from bigmac_jax.evaluation.tasks.examples import Example
from bigmac_jax.runtime.storage import save_figure

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def build_needles(task: Needle, config: Config, tokenizer: Tokenizer, length: int) -> list[Example]:
    """Builds the examples of every length and depth; the right number is the first choice of each.

    A prompt holds whole sentences, as many as fit with the needle, the question and the answer.

    Raises:
      ConfigError: lengths too short for the needle, or too little text.
    """
    draw = random.Random(task.seed)
    data = dataclasses.replace(config.data, source=task.haystack, test_source=task.haystack, mixture="", curriculum="")
    texts = open_documents(data, "test", config.cache_dir)
    sentences = [" ".join(s.split()) for text in texts for s in _SENTENCE_END.split(text) if s.strip()]
    sizes = [len(ids) for ids in tokenizer.encode_batch([f" {sentence}" for sentence in sentences])]
    examples: list[Example] = []
    for share, depth, _ in itertools.product(task.lengths, task.depths, range(task.samples)):
        tokens, numbers = int(share * length), dict[int, None]()
        while len(numbers) <= task.distractors:
            numbers[draw.randrange(10 ** (task.digits - 1), 10**task.digits)] = None
        number = next(iter(numbers))
        needle = task.needle.format(number=number)
        left = tokens + 1 - len(tokenizer.encode(f"{needle}{task.question} {number}"))
        start = draw.randrange(len(sentences))
        hay = _take_fitting(sentences[start:] + sentences[:start], sizes[start:] + sizes[:start], left)
        if not hay:
            raise ConfigError(
                f"{task.name}: the needle, its question and a sentence do not fit into {tokens} tokens, {share:g} of "
                f"{length}; use longer lengths, or --length"
            )
        place = round(depth * len(hay))
        text = "".join(f" {s}" for s in hay[:place]) + needle + "".join(f" {s}" for s in hay[place:])
        pairs = [(text.strip() + task.question, f" {value}") for value in numbers]
        examples.append(Example(f"{task.name} {len(examples) + 1}", pairs, cell=(tokens, depth)))
    return examples


def _take_fitting(sentences: list[str], sizes: list[int], left: int) -> list[str]:
    """Sentences from the first one on, of `left` tokens together; those too long for what is left are skipped."""
    fit = []
    for sentence, size in zip(sentences, sizes, strict=True):
        if size <= left:
            fit.append(sentence)
            left -= size
        if left < 4:
            break
    return fit


def draw_needles(grid: dict[str, Any], path: pathlib.Path, title: str) -> None:
    """Draws the share of needles found, `grid`, as a heat map of length and depth."""
    figure = Figure(figsize=(1.5 + len(grid["lengths"]), 4.5), layout="constrained")
    axis = figure.subplots()
    values_DL = 100 * np.asarray(grid["accuracy"], float).T
    image = axis.imshow(values_DL, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values_DL):
        if not np.isnan(value):  # where no needle was looked for
            axis.text(column, row, f"{value:.0f}", ha="center", va="center")
    axis.set(xlabel="length, tokens", ylabel="depth of the needle, %", title=title)
    axis.set_xticks(range(len(grid["lengths"])), [f"{length:,}" for length in grid["lengths"]])
    axis.set_yticks(range(len(grid["depths"])), [f"{100 * depth:.0f}" for depth in grid["depths"]])
    figure.colorbar(image, ax=axis, label="found, %")
    save_figure(figure, path)
