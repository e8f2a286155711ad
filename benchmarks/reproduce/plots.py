"""Pictures of results: bars of the paper and ours side by side, told apart without colour."""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAPER = {"color": "#d9d9d9", "edgecolor": "black", "hatch": "//"}
HERE = {"color": "#404040", "edgecolor": "black"}


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
    """One group of bars a row of the result's table; the whiskers are the runs' spread."""
    rows = result["rows"]
    figure, axes = plt.subplots(figsize=(max(6.0, 0.9 * len(rows)), 3.6), layout="constrained")
    both = any(row["paper"] is not None for row in rows)
    width = 0.4 if both else 0.7
    for number, row in enumerate(rows):
        shift = width / 2 if both else 0.0
        if row["paper"] is not None:
            axes.bar(number - shift, row["paper"], width, label="paper" if number == 0 else None, **PAPER)
        low, high = (abs(row["here"] - row.get(name, row["here"])) for name in ("lowest", "highest"))
        axes.bar(
            number + shift, row["here"], width, yerr=[[low], [high]], capsize=3, ecolor="#808080",
            label="here" if number == 0 else None, **HERE,
        )  # fmt: skip
        text = f"{row['here']:.0f}" if row["unit"] == "%" else f"{row['here']:.2f}"
        axes.text(number + shift, row["here"] + high, text, ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(rows)), [row["what"].replace(", ", "\n") for row in rows], fontsize=8)
    axes.set_ylabel({"%": "%", "×": "times faster"}.get(rows[0]["unit"], rows[0]["unit"]))
    axes.set_title(result["title"])
    axes.margins(y=0.12)
    axes.legend(loc="lower right" if rows[0]["unit"] == "%" else "best")
    figure.savefig(path, dpi=110)
    plt.close(figure)
