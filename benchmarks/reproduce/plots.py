"""Pictures of results: the paper beside ours in bars, or curves; told apart without colour, too."""

import pathlib
import textwrap
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAPER = {"color": "#d9d9d9", "edgecolor": "black", "hatch": "//"}
HERE = {"color": "#404040", "edgecolor": "black"}
# Of the courses that were timed; the table has the others.
STYLES = (("#c0392b", "--s"), ("#1f4e79", "-o"), ("#2e8b57", ":^"), ("#e08e0b", "-.D"))
AXES = {"%": "%", "×": "times faster", "": "ratio", "of none": "step over the one with none"}


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
    courses = [record for record in result["records"] if "course" in record]
    figure = _curves(courses) if courses and result["name"] == "figure1" else _bars(result)
    figure.suptitle(result["title"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(result: dict[str, Any]) -> plt.Figure:
    """A group a row of the table, of those in the first one's unit; the whiskers are the runs' spread."""
    unit = result["rows"][0]["unit"]
    rows = [row for row in result["rows"] if row["unit"] == unit and row["here"] is not None]
    both = any(row["paper"] is not None for row in rows)
    figure, axes = plt.subplots(figsize=(max(6.0, 0.95 * len(rows)), 3.8), layout="constrained")
    width = 0.4 if both else 0.7
    for number, row in enumerate(rows):
        shift = width / 2 if both else 0.0
        if row["paper"] is not None:
            axes.bar(number - shift, row["paper"], width, label=None if number else "paper", **PAPER)
        low, high = (abs(row["here"] - row.get(name, row["here"])) for name in ("lowest", "highest"))
        whiskers = {"yerr": [[low], [high]], "capsize": 3, "ecolor": "#909090"}
        axes.bar(number + shift, row["here"], width, label=None if number else "here", **whiskers, **HERE)
        text = f"{row['here']:.0f}" if unit == "%" else f"{row['here']:.2f}"
        axes.text(number + shift, row["here"] + high, text, ha="center", va="bottom", fontsize=8)
    labels = ["\n".join(textwrap.fill(part, 13) for part in row["what"].split(", ")) for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylabel(AXES.get(unit, unit))
    axes.margins(y=0.12)
    figure.legend(loc="outside right upper")
    return figure


def _curves(courses: list[dict[str, Any]]) -> plt.Figure:
    """Validation perplexity over minutes on the cluster, and over tokens with the seeds' spread."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
    timed = [course for course in courses if "step_s" in course]
    for name, (color, style) in zip(dict.fromkeys(course["name"] for course in timed), STYLES, strict=True):
        ours = [course for course in timed if course["name"] == name]
        evaluations = list(zip(*(course["evaluations"] for course in ours), strict=True))
        values = [[seed["perplexity"] for seed in at] for at in evaluations]
        minutes = [at[0]["step"] * ours[0]["step_s"] / 60 for at in evaluations]
        tokens = [at[0]["tokens"] / 1e6 for at in evaluations]
        for axes, along in ((left, minutes), (right, tokens)):
            axes.plot(along, [sum(v) / len(v) for v in values], style, color=color, ms=5, label=name)
            axes.fill_between(along, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15)
    left.set(xlabel="minutes of training steps on the cluster", ylabel="validation perplexity, a token", yscale="log")
    left.set_title("by time on hosts with slow links", fontsize=10)
    right.set(xlabel="million tokens")
    right.set_title("by tokens: lines are means of seeds, bands their range", fontsize=10)
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
    return figure
