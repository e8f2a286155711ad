"""Draws plans for plan.py --plot."""

import pathlib
from collections.abc import Mapping
from typing import Any

from bigmac_jax.config import ConfigError
from bigmac_jax.planning.job import exposed
from bigmac_jax.runtime import storage

PALETTE = ("#1f4e79", "#c0504d", "#9bbb59", "#8064a2", "#4bacc6", "#f79646", "#7f7f7f", "#bfbfbf")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "--", "oo")  # for black and white
STYLES = ("-o", "--s", ":^", "-.D", "-v", "--x", ":+", "-.*")


def draw(plan: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws how structures scale, or a sweep, if the plan has one; else memory, bytes of the exchange and, where they
    are known, times.

    Raises:
      ConfigError: the file cannot be written.
    """
    if "scale" in plan:
        figure = _draw_scale(plan["scale"])
    elif "sweep" in plan:
        figure = _draw_sweep(plan["sweep"])
    else:
        columns = {plan["structure"]: plan} | plan["baselines"]
        valid = {name: column for name, column in columns.items() if "error" not in column}
        panels = [_draw_memory] + [_draw_exchanges] * ("exchanges" in plan) + [_draw_times] * ("time" in plan)
        figure, axes = _panels(4.5 * len(panels), 3.6, len(panels))
        for panel, ax in zip(panels, axes, strict=True):
            panel(ax, valid)
    try:
        storage.save_figure(figure, path)
    except storage.errors(ValueError) as error:
        raise ConfigError(f"--plot={path} can't be written ({error}); use a .png in a folder that exists") from None


def _panels(width: float, height: float, count: int) -> tuple[Any, list[Any]]:
    """A figure of so many inches, and its axes from left to right."""
    from matplotlib.figure import Figure  # its import takes long, and most plans are not drawn

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _stack(ax: Any, names: list[str], parts: Mapping[str, list[float]]) -> None:
    bottom = [0.0] * len(names)
    for number, (part, values) in enumerate(parts.items()):
        again, color = divmod(number, len(PALETTE))  # a ninth part has the first's colour, and another hatch
        hatch = HATCHES[(color + again) % len(HATCHES)]
        ax.bar(
            names,
            values,
            bottom=bottom,
            label=part,
            color=PALETTE[color],
            hatch=hatch,
            edgecolor="white",
            linewidth=0.5,
        )
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    ax.legend(fontsize=7)
    ax.tick_params(axis="x", labelrotation=15)


def _draw_memory(ax: Any, columns: Mapping[str, Mapping[str, Any]]) -> None:
    kinds = ("parameters", "optimizer", "gradients", "activations", "temporaries")
    _stack(ax, list(columns), {k: [c["memory"][k] / 2**30 for c in columns.values()] for k in kinds})
    ax.set_ylabel("GiB a rank")
    ax.set_title("memory (estimated)", fontsize=10)


def _draw_exchanges(ax: Any, columns: Mapping[str, Mapping[str, Any]]) -> None:
    """Bytes of each exchange with the configured structure."""
    exchanges = next(iter(columns.values()))["exchanges"]
    parts = {
        "slow links": [sent["padded_slow"] / 2**30 for sent in exchanges.values()],
        "fast links": [sent["padded_fast"] / 2**30 for sent in exchanges.values()],
        "metadata": [(sent["metadata_fast"] + sent["metadata_slow"]) / 2**30 for sent in exchanges.values()],
    }
    _stack(ax, list(exchanges), parts)
    ax.set_ylabel("GiB a step, all ranks")
    ax.set_title(f"bytes of the exchange, {next(iter(columns))}", fontsize=10)


def _draw_times(ax: Any, columns: Mapping[str, Mapping[str, Any]]) -> None:
    """Seconds of each term that are not hidden, which add up to the step."""
    times = [exposed(column["time"]) for column in columns.values()]
    parts = {term: [time[term] for time in times] for term in times[0] if any(time[term] for time in times)}
    _stack(ax, list(columns), parts)
    ax.set_ylabel("seconds a step, predicted")
    ax.set_title("time", fontsize=10)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _draw_sweep(rows: list[Mapping[str, Any]]) -> Any:
    """Costs over the field with the most values, with a line for every combination of the others."""
    fields = list(rows[0]["fields"])
    along = max(fields, key=lambda name: len({swept["fields"][name] for swept in rows}))
    timed = all("time" in row for row in rows)
    panels = [("all-to-all, GiB a step", lambda row: row["all_to_all_bytes_per_step"] / 2**30)]
    if timed:
        panels += [
            ("share of the exchange, %", lambda row: 100 * row["time"]["exchange_share"]),
            ("predicted tokens/s", lambda row: row["time"]["tokens_per_s"]),
        ]
    figure, axes = _panels(4.2 * len(panels), 3.4, len(panels))
    lines: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(tuple(row["fields"][name] for name in fields if name != along), []).append(row)
    for (label, value), ax in zip(panels, axes, strict=True):
        for number, (rest, line) in enumerate(lines.items()):
            values = [_number(row["fields"][along]) for row in line]
            style, color = STYLES[number % len(STYLES)], PALETTE[number % len(PALETTE)]
            ax.plot(values, [value(row) for row in line], style, color=color, label=" ".join(rest) or None)
        ax.set(xlabel=along, ylabel=label, ylim=(0, None))
        if fields != [along]:
            ax.legend(fontsize=7)
    return figure


def _draw_scale(found: Mapping[str, Any]) -> Any:
    """Tokens a second of a device over devices; a curve of each structure, with a ring where it stops scaling."""
    figure, (ax,) = _panels(6, 3.8, 1)
    for (name, curve), color, style in zip(found["structures"].items(), PALETTE, STYLES, strict=False):
        points = [(p["devices"], p["tokens_per_s_per_device"]) for p in curve.get("points", ()) if "time" in p]
        if points:
            ax.plot(*zip(*points, strict=True), style, color=color, label=name)
            stops = (curve["stops"] or {}).get("devices")
            ringed = [point for point in points if point[0] == stops]
            ax.plot([x for x, _ in ringed], [y for _, y in ringed], "o", ms=12, mfc="none", color=color)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="devices", ylabel="predicted tokens/s of a device", ylim=(0, None))
    ax.set_title(f"{found['kind']} scaling; ring: under {100 * found['keeps']:.0f} %", fontsize=10)
    ax.legend(fontsize=7)
    return figure
