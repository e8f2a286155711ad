"""report.png: a run's losses, expert load, drops and throughput, from its metrics.jsonl."""

import pathlib
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bigmac_jax.config import Config
from bigmac_jax.report.runs import Records
from bigmac_jax.runtime.storage import save_figure
from bigmac_jax.training.metrics_file import read_records


def write_report(workdir: pathlib.Path) -> pathlib.Path | None:
    """Draws workdir/report.png: losses, expert load per layer, drop rate, throughput; None if nothing was logged."""
    records = read_records(workdir)
    training = [r for r in records if "loss" in r]
    if not training:
        return None
    evaluations = [r for r in records if None not in (r.get("eval/loss"), r.get("eval/perplexity"))]
    config = Config.from_json((workdir / "config.json").read_bytes())
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    figure.suptitle(
        f"{config.model.structure}, {config.model.depth} layers, width {config.model.hidden_size}, "
        f"step {training[-1]['step']:,} of {config.train.steps:,}"
    )
    _losses(axes[0, 0], training, evaluations, config.tuning.objective == "dpo")
    _throughput(axes[1, 1], training)
    if "moe/load" in training[-1]:
        _load(figure, axes[0, 1], training[-1])
        _drops(axes[1, 0], training)
    else:
        for axis in (axes[0, 1], axes[1, 0]):
            axis.set_axis_off()
            axis.text(0.5, 0.5, "dense: no experts", ha="center", va="center", color="gray")
    path = workdir / "report.png"
    save_figure(figure, path)
    return path


def _losses(axis: Axes, training: Records, evaluations: Records, of_pairs: bool) -> None:
    """Draws the losses of training, and beside them those of validation, unless they are of another kind."""
    axis.plot(_column(training, "step"), _column(training, "loss"), lw=1, alpha=0.6, label="training")
    if evaluations:
        best = min(evaluations, key=lambda r: r["eval/loss"])
        axis.set_title(f"best validation perplexity {best['eval/perplexity']:.2f} at step {best['step']:,}")
    if evaluations and not of_pairs:
        axis.plot(_column(evaluations, "step"), _column(evaluations, "eval/loss"), "o-", ms=4, label="validation")
    axis.set(xlabel="step", ylabel="DPO loss, a pair" if of_pairs else "loss, nats a token")
    axis.grid(alpha=0.3)
    axis.legend()


def _load(figure: Figure, axis: Axes, last: dict[str, Any]) -> None:
    load_YE = np.asarray(last["moe/load"], float)
    image = axis.imshow(load_YE, aspect="auto", cmap="viridis", vmin=0, vmax=max(2.0, load_YE.max()))
    figure.colorbar(image, ax=axis, label="share of tokens, 1 = balanced")
    axis.set(xlabel="expert", ylabel="layer", title=f"expert load at step {last['step']:,}")
    axis.set_yticks(range(len(load_YE)))


def _drops(axis: Axes, training: Records) -> None:
    layers = np.shape(training[-1]["moe/load"])[:1]
    training = [r for r in training if np.shape(r.get("moe/drop_rate_by_layer", 0)) == layers]
    by_layer_nY = 100 * np.asarray([r["moe/drop_rate_by_layer"] for r in training], float)
    moved = 100 * np.asarray(_column(training, "moe/moved_rate"), float)
    if not (by_layer_nY.any() or (moved > 0).any()):  # how far the busiest expert is from needing a drop
        axis.plot(_column(training, "step"), _column(training, "moe/max_load"), lw=1)
        axis.set(xlabel="step", ylabel="busiest expert, times the mean", title="no choice dropped", ylim=(0, None))
        axis.grid(alpha=0.3)
        return
    for layer, drops_n in enumerate(by_layer_nY.T):
        axis.plot(_column(training, "step"), drops_n, lw=1, label=f"layer {layer}")
    if np.isfinite(moved).any():
        axis.plot(_column(training, "step"), moved, "--", lw=1, color="grey", label="moved, mean of layers")
    axis.set(xlabel="step", ylabel="dropped choices, %", title="drop rate", ylim=(0, None))
    axis.grid(alpha=0.3)
    if by_layer_nY.shape[1] <= 8:
        axis.legend()


def _throughput(axis: Axes, training: Records) -> None:
    rates = _column(training, "tokens_per_s")
    axis.plot(_column(training, "step"), rates, lw=1)
    mfu = np.median(_column(training, "mfu"))
    axis.set(xlabel="step", ylabel="tokens a second", ylim=(0, None))
    axis.set_title(f"median {np.median(rates):,.0f} tokens a second, MFU {mfu:.0%}")
    axis.grid(alpha=0.3)


def _column(records: Records, name: str) -> list[float]:
    return [np.nan if r.get(name) is None else r[name] for r in records]
