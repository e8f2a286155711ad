"""The tables of docs/reproduction.md and docs/notes/reproduction.md and their pictures, from docs/results/*.json alone.

The page has the rows that decide (`HEADLINES`), the notes have every row, the bytes and the origin of each experiment.
"""

import json
import pathlib
import re
from typing import Any

from benchmarks.markers import put
from benchmarks.reproduce import plots

PAGE, NOTES, IMAGES = "reproduction.md", "notes/reproduction.md", "images/reproduction"
UNITS = {"%": (".1f", " %"), "×": (".2f", "×"), "of none": (".2f", " of `none`"), "": (".3f", "")}  # digits and sign
# Experiments in the order of the pages → which of their rows stand in docs/reproduction.md.
HEADLINES = {
    "figure1": r"step, .* over bigmac's|time to .* over bigmac's|bigmac: mean over .*",
    "table1": r"training, K = [14]|inference, .*, K = [14]",
    "figure3": r"small, .*",
    "figure4": r".*K = 8, .*",
    "figure5": r"prompts of (128|1024), .*",
    "table9": r"all_to_all, K = 8, tokens generated: (1|10)",
    "figure6": r"f = 1\.2, .*",
    "figure7": r".*",
    "ratios": r".*",
    "strategies": r"hierarchical, .*|loss after .* 2e-3: hierarchical, int8 over all_to_all, bfloat16",
    "remat": r"(fine_grained|bigmac), (exchange|layer)",
}
HEAD = ["| | paper | here | here / paper |", "|---|---|---|---|"]


def write(docs: pathlib.Path) -> None:
    """Draws the pictures and replaces what stands between the markers of the page and of its notes."""
    results = read(docs)
    (docs / IMAGES).mkdir(parents=True, exist_ok=True)
    for result in results:
        plots.draw(result, docs / IMAGES / f"{result['name']}.png")
    put(docs / PAGE, [summary(results)], "# The paper, measured again\n\n")
    put(docs / NOTES, map(section, results), "# The paper, measured again: every table\n\n")


def read(docs: pathlib.Path) -> list[dict[str, Any]]:
    results = [json.loads(path.read_text()) for path in sorted((docs / "results").glob("*.json"))]
    known = [result for result in results if result["name"] in HEADLINES]
    return sorted(known, key=lambda result: list(HEADLINES).index(result["name"]))


def summary(results: list[dict[str, Any]]) -> str:
    """The rows that decide, experiment by experiment, in Markdown."""
    lines = list(HEAD)
    for result in results:
        anchor = re.sub(r"[^\w -]", "", result["title"].lower()).replace(" ", "-")
        lines.append(f"| **[{result['title']}]({NOTES}#{anchor})** | | | |")
        lines += [_row(row) for row in result["rows"] if re.fullmatch(HEADLINES[result["name"]], row["what"])]
    return "\n".join(lines)


def section(result: dict[str, Any]) -> str:
    """A result's table, picture and origin, in Markdown."""
    lines = ["", f"## {result['title']}", "", result["about"], "", *HEAD, *map(_row, result["rows"])]
    lines += ["", f"![{result['title']}](../{IMAGES}/{result['name']}.png)", ""]
    return "\n".join([*lines, *(_sent(result) or _left(result)), origin(result)]) + "\n"


def _row(row: dict[str, Any]) -> str:
    digits, unit = UNITS[row["unit"]]
    paper = "" if row["paper"] is None else f"{row['paper']:{digits}}{unit}"
    here = "not reached" if row["here"] is None else f"{row['here']:{digits}}{unit}"
    between = f" ({row['lowest']:{digits}}–{row['highest']:{digits}})" if "lowest" in row else ""
    ratio = f"{row['here'] / row['paper']:.2f}" if row["paper"] and row["here"] is not None else ""
    return f"| {row['what']} | {paper} | {here}{between} | {ratio} |"


def _sent(result: dict[str, Any]) -> list[str]:
    """Bytes of the collectives of training steps, by kind."""
    lines = []
    for what, sent in result["traffic"].items():
        exchange, metadata, other = (sent[f"{kind}_sent_bytes"] / 1e6 for kind in ("exchange", "metadata", "other"))
        lines.append(f"| {what} | {exchange:.2f} | {metadata:.2f} | {other:.2f} | {100 * other / exchange:.1f} % |")
    about = "MB that all hosts send in a step, by the compiled programs; other: gradients' sums, tensor parallelism."
    head = ["| | exchange | its metadata | other | other / exchange |", "|---|---|---|---|---|"]
    return [about, "", *head, *lines, ""] if lines else []


def _left(result: dict[str, Any]) -> list[str]:
    """Bytes that left the hosts in passes and batches, which have no gradients to sum; of the first run."""
    records = [record for record in result["records"] if "link_bytes_a_step" in record and not record["case"]["repeat"]]
    fields = [record["case"]["overrides"] for record in records]
    lines = []
    for record, own in zip(records, fields, strict=True):
        telling = [f.partition(".")[2].replace("=", " = ") for f in own if not all(f in other for other in fields)]
        lines.append(f"| {', '.join(telling)} | {sum(record['link_bytes_a_step']) / 1e6:.2f} |")
    about = "MB that left all hosts in what was timed, its mean, as the kernel counts it; fine_grained if not named."
    return [about, "", "| | on the links |", "|---|---|", *lines, ""] if lines else []


def origin(result: dict[str, Any]) -> str:
    """The command, and when, where and how often that was measured."""
    records = result["records"]
    often = []
    if any("case" in record for record in records):
        often.append(f"{result['runs']} run(s) of {result['steps']} steps, medians")
    if courses := [record["course"] for record in records if "course" in record]:
        seeds = len({course["seed"] for course in courses})
        often.append(f"{courses[0]['steps']} steps of learning, up to {seeds} seeds, means")
    machine, calibration = result["machine"], result["calibration"]
    commits = sorted({record["measured"]["commit"] for record in records if "measured" in record})
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "jax", "flax"))
    fitted = f" ({calibration['share']:.1%} of fine_grained's step at K = 8)" if "share" in calibration else ""
    return (
        f"    {result['command']}\n\n"
        f"{result['date']}, {machine['cores']} cores of {machine['processor']}, {machine['memory_gb']} GB, {versions}, "
        f"commit {', '.join(commits) or machine['commit']}; {'; '.join(often)}; links of "
        f"{calibration['rate'] / 1e6:.4g} Mbit/s{fitted}. Raw: [`{result['name']}.json`]"
        f"(../results/{result['name']}.json)."
    )
