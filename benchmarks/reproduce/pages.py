"""docs/reproduction.md and its pictures, from docs/results/*.json and nothing else."""

import json
import pathlib
from typing import Any

from benchmarks.reproduce import plots

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
PAGE, IMAGES = "reproduction.md", "images/reproduction"
ORDER = ("figure1", "table1", "figure3", "figure4", "figure5", "table9", "figure6", "figure7", "ratios", "strategies")


def write(docs: pathlib.Path) -> None:
    """Draws the pictures and replaces what stands between the markers of the page."""
    results = read(docs)
    (docs / IMAGES).mkdir(parents=True, exist_ok=True)
    for result in results:
        plots.draw(result, docs / IMAGES / f"{result['name']}.png")
    page = docs / PAGE
    text = page.read_text() if page.exists() else f"# The paper, measured again\n\n{BEGIN}\n{END}\n"
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{''.join(section(result) for result in results)}\n{END}{after}")


def read(docs: pathlib.Path) -> list[dict[str, Any]]:
    results = [json.loads(path.read_text()) for path in sorted((docs / "results").glob("*.json"))]
    known = [result for result in results if result["name"] in ORDER]
    return sorted(known, key=lambda result: ORDER.index(result["name"]))


def section(result: dict[str, Any]) -> str:
    """A result's table, picture and origin, in Markdown."""
    lines = ["", f"## {result['title']}", "", result["about"], ""]
    lines += ["| | paper | here | here / paper |", "|---|---|---|---|"]
    for row in result["rows"]:
        paper = "" if row["paper"] is None else _number(row["paper"], row["unit"])
        ratio = f"{row['here'] / row['paper']:.2f}" if row["paper"] and row["here"] is not None else ""
        between = f" ({_number(row['lowest'])}–{_number(row['highest'])})" if "lowest" in row else ""
        lines.append(f"| {row['what']} | {paper} | {_number(row['here'], row['unit'])}{between} | {ratio} |")
    lines += ["", f"![{result['title']}]({IMAGES}/{result['name']}.png)", ""]
    if result["traffic"]:
        lines += ["MB that all hosts send in a step, from the compiled programs; other: the gradients' sums.", ""]
        lines += ["| | exchange | its metadata | other | other / exchange |", "|---|---|---|---|---|"]
        for what, sent in result["traffic"].items():
            exchange, metadata, other = (sent[f"{kind}_sent_bytes"] / 1e6 for kind in ("exchange", "metadata", "other"))
            share = 100 * other / exchange
            lines.append(f"| {what} | {exchange:.2f} | {metadata:.2f} | {other:.2f} | {share:.1f} % |")
        lines.append("")
    return "\n".join([*lines, origin(result)]) + "\n"


def origin(result: dict[str, Any]) -> str:
    machine, calibration = result["machine"], result["calibration"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "jax", "flax"))
    fitted = f" ({calibration['share']:.1%} of fine_grained's step at K = 8)" if "share" in calibration else ""
    return (
        f"    {result['command']}\n\n"
        f"{result['date']}, {machine['cores']} cores of {machine['processor']}, {machine['memory_gb']} GB, {versions}, "
        f"commit {machine['commit']}; {result['runs']} run(s) of {result['steps']} steps, medians; links of "
        f"{calibration['rate'] / 1e6:.4g} Mbit/s{fitted}. Raw: [`{result['name']}.json`]"
        f"(results/{result['name']}.json)."
    )


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "not reached"
    return f"{value:.1f} %" if unit == "%" else f"{value:.2f}{' ' + unit if unit and unit != '×' else unit}"
