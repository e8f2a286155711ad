"""The tables and pictures of docs/quality.md, from docs/results/quality.json and nothing else."""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.markers import put
from benchmarks.quality.grid import STRUCTURES, STUDIES, Condition

PAGE, IMAGES = "quality.md", "images/quality"
ABOUT = {
    "norms": "h = 128, latent 32, 1,000 steps of 2,048 tokens: which norm on the latent, and the control.",
    "rates": "Half and twice the learning rate that all other runs have.",
    "balance": "`configs/tiny.py`, 1,000 steps: what keeps the loads even.",
    "longer": "h = 128, latent 32, 2,400 steps.",
    "width 64": "h = 64, 1,000 steps.",
    "ratios": "h = 128, 1,000 steps: ratios of the latent, LatentMoE's two ways to spend it, and norms.",
    "optimizers": "`configs/tiny.py`: AdamW's 2,400 steps, and Muon in three quarters of them.",
    "rates 256": "h = 256, 1,000 steps: half and twice the learning rate.",
    "width 256": "h = 256, 2,500 steps (5.1 M tokens).",
}
Run = dict[str, Any]


def write(docs: pathlib.Path, runs: list[Run]) -> None:
    """Replaces what stands between the markers of the page, and draws what there are runs for."""
    (docs / IMAGES).mkdir(parents=True, exist_ok=True)
    drawn = [draw(docs / IMAGES, runs) for draw in (pareto, widths)]
    parts = [section(name, runs) for name in STUDIES] + [picture for picture in drawn if picture]
    put(docs / PAGE, parts)


def of(condition: Condition, runs: list[Run]) -> list[Run]:
    """All seeds that were run."""
    same = (condition.name, condition.width, condition.steps)
    return [run for run in runs if (run["name"], run["width"], run["steps"]) == same]


def mean(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN of one."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(error)


def section(study: str, runs: list[Run]) -> str:
    """A study's table. Differences are to its first condition."""
    found = [(condition, of(condition, runs)) for condition in STUDIES[study]]
    found = [(condition, seeds) for condition, seeds in found if seeds]
    if not found:
        return ""
    base, base_error = mean([run["loss"] for run in found[0][1]])
    columns = ["", "seeds", "loss", "less than the first", "bits a byte", "wire bytes a token", "MFLOPs a token",
               "MoE parameters", "load"]  # fmt: skip
    head = f"| {' | '.join(columns)} |"
    lines = ["", f"## {study.capitalize()}", "", ABOUT[study], "", head, "|---" * len(columns) + "|"]
    for condition, seeds in found:
        loss, error = mean([run["loss"] for run in seeds])
        apart = "" if seeds is found[0][1] else _within(base - loss, float(np.hypot(error, base_error)), "+")
        one = seeds[0]
        bits, load = (mean([run[name] for run in seeds])[0] for name in ("bits_per_byte", "load_cv"))
        cells = [condition.name, len(seeds), _within(loss, error), apart, f"{bits:.4f}", f"{one['wire_bytes']:,.0f}"]
        cells += [f"{one['flops'] / 1e6:.2f}", f"{one['moe_parameters']:,}", f"{load:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _within(value: float, error: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + ("" if np.isnan(error) else f" ± {error:.3f}")


def pareto(images: pathlib.Path, runs: list[Run]) -> str:
    """Bits a byte against wire bytes a token, of the ratios."""
    found = [(condition, of(condition, runs)) for condition in STUDIES["ratios"]]
    found = [(condition, seeds) for condition, seeds in found if len(seeds) > 1]
    if len(found) < 2:
        return ""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    filled = {"none": "white", "skip+post_combine+gate": "black"}
    markers = dict(zip(STRUCTURES, "soDv<P*", strict=True))
    for condition, seeds in found:
        kind = next(name for name in sorted(markers, key=len, reverse=True) if condition.name.startswith(name))
        bits, error = mean([run["bits_per_byte"] for run in seeds])
        label = kind if seeds[0]["norm"] == "none" else None
        axes.errorbar(
            seeds[0]["wire_bytes"], bits, error, fmt=markers[kind], color="black", capsize=3, ms=8, label=label,
            markerfacecolor=filled[seeds[0]["norm"]],
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set(xlabel="bytes a token on the wire, forward and backward, 8 ranks", ylabel="validation, bits a byte")
    axes.set_title("less is better on both axes; white: no norm, black: latent_norm=gate")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(images / "pareto.png", dpi=110)
    plt.close(figure)
    return f"\n![bits a byte against wire bytes]({IMAGES}/pareto.png)\n"


def widths(images: pathlib.Path, runs: list[Run]) -> str:
    """How far bigmac at r = 1/4 is behind fine_grained, by width, with and without the recipe; and the control."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    drawn = False
    longest = {"width 64": 1000, "norms": 1000, "width 256": 2500}
    styles = {"bigmac 1/4": "k--o", "bigmac 1/4, gate": "k-D", "fine_grained, norm": "k:s"}
    for name, style in styles.items():
        points = []
        for study, steps in longest.items():
            same = {c.name: of(c, runs) for c in STUDIES[study] if c.steps == steps}
            ours, base = same.get(name, []), same.get("fine_grained", [])
            if len(ours) > 1 and len(base) > 1:
                (loss, error), (other, of_other) = (mean([run["loss"] for run in seeds]) for seeds in (ours, base))
                points.append((ours[0]["width"], loss - other, float(np.hypot(error, of_other))))
        if points:
            h, gap, error = zip(*points, strict=True)
            axes.errorbar(h, gap, error, fmt=style, capsize=3, label=name)
            drawn = True
    axes.axhline(0, color="0.5", lw=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="h", ylabel="loss over fine_grained's")
    axes.grid(alpha=0.3)
    if drawn:
        axes.legend()
        figure.savefig(images / "widths.png", dpi=110)
    plt.close(figure)
    return f"\n![the gap against the width]({IMAGES}/widths.png)\n" if drawn else ""
