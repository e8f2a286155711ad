"""What plan.py shows: tables for people, and a picture."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from bigmac_jax.config import ConfigError

PALETTE = ("#1f4e79", "#c0504d", "#9bbb59", "#8064a2", "#4bacc6", "#f79646", "#7f7f7f", "#bfbfbf")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "--", "oo")  # for black and white


def show(plan: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints everything in a plan, the configured structure beside the others."""
    console = console or Console(highlight=False)
    console.width = max(console.width, 150)  # narrower columns would cut numbers
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    where = plan["topology"] or f"{plan['devices']} devices"
    console.print(f"[bold]{plan['description']}[/bold]")
    console.print(f"{where}, mesh {mesh}, {plan['tokens_per_step']:,} tokens a step\n")
    columns = {plan["structure"]: plan} | plan["baselines"]
    console.print(_costs(columns))
    for name, column in columns.items():
        if "error" in column:
            console.print(f"{name}: {column['error']}")
    if "exchanges" in plan:
        console.print(_exchanges(plan))
    if "recomputation" in plan:
        console.print(_recomputation(plan["recomputation"]))
    tables: dict[str, Callable[[Any], Table]] = {
        "paper": _paper,
        "paper_comparison": _comparison,
        "program": _program,
        "sweep": _sweep,
        "search": _search,
    }
    for key, table in tables.items():
        if key in plan and "compiler" not in plan[key]:
            console.print(table(plan[key]))
    if "programs" in plan:
        if "compiler" not in plan["program"]:
            _program_notes(console, plan["program"])
        console.print(_programs(plan))
        for name, program in plan["programs"].items():
            if "compiler" in program:
                console.print(f"[bold]{name} does not fit or compile[/bold]: {program['compiler']}")
            if change := program.get("change") or program.get("advice", {}).get("change"):
                console.print(f"{name}: try {change}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _costs(columns: Mapping[str, Mapping[str, Any]]) -> Table:
    valid = {name: column for name, column in columns.items() if "error" not in column}
    table = _table("A training step", "", *valid)

    def row(label: str, value: Any) -> None:
        table.add_row(label, *(value(column) for column in valid.values()))

    row("parameters", lambda c: count(c["parameters_total"]))
    row("  active for a token", lambda c: count(c["parameters_active"]))
    row("FLOPs", lambda c: f"{c['flops_per_step'] / 1e12:,.2f} T")
    row("all-to-all, all ranks", lambda c: size(c["all_to_all_bytes_per_step"]))
    for part in ("parameters", "optimizer", "gradients", "activations", "logits", "total"):
        row(f"memory of a rank: {part}", lambda c, part=part: size(c["memory"][part]))
    if all("time" in column for column in valid.values()):
        table.add_section()
        here = [part for part in ("tensor", "parameters") if any(c["time"][part] for c in valid.values())]
        for part in ("matmul", "exchange", "hidden", *here, "gradients", "optimizer", "total"):
            row(f"predicted: {part}", lambda c, part=part: duration(c["time"][part]))
        row("predicted: share of exchange", lambda c: f"{100 * c['time']['exchange_share']:.1f} %")
        row("predicted: tokens/s", lambda c: f"{c['time']['tokens_per_s']:,.0f}")
        row("predicted: MFU", lambda c: f"{100 * c['time']['mfu']:.1f} %")
    return table


def _exchanges(plan: Mapping[str, Any]) -> Table:
    # Without hardware nothing is known of machines.
    links = ("sent, fast links", "slow links") if plan["hardware"] else ("sent along expert", "along node")
    rounds = plan["most_rounds"]
    title = "Bytes of the exchange, all ranks" + (f" (of one round; at worst {rounds} rounds)" if rounds > 1 else "")
    table = _table(title, "", "rows with a token", *links, "metadata")
    for name, sent in plan["exchanges"].items():
        metadata = sent["metadata_fast"] + sent["metadata_slow"]
        cells = (sent["payload"], sent["padded_fast"], sent["padded_slow"], metadata)
        table.add_row(name + (" (configured)" if name == plan["exchange"] else ""), *map(size, cells))
    return table


def _recomputation(rows: list[Mapping[str, Any]]) -> Table:
    table = _table("What a rank keeps for the backward pass, by execution.remat; predicted",
                   "", "activations", "of the exchange", "exchange", "step")  # fmt: skip
    for row in rows:
        kept = size(row["exchanged"]) if row["remat"] != "layer" else ""
        table.add_row(row["remat"], size(row["activations"]), kept, duration(row["exchange"]), duration(row["total"]))
    return table


def _paper(paper: Mapping[str, Any]) -> Table:
    but = f"; they know nothing of this {', '.join(paper['left_out'])}" if paper["left_out"] else ""
    table = _table(f"The paper's formulas (capacity factor 1, 2 bytes a number){but}", "", "")
    table.add_row("parameters", count(paper["parameters"]))
    table.add_row("FLOPs", f"{paper['flops_per_step'] / 1e12:,.2f} T")
    table.add_row("all-to-all", size(paper["all_to_all_bytes_per_step"]))
    return table


def _comparison(rows: list[Mapping[str, Any]]) -> Table:
    table = _table("The paper's cluster, one scale and one latency fitted to Table 1's training exchanges",
                   "", "paper", "model", "difference")  # fmt: skip
    for row in rows:
        name = row["name"] + (" (fitted)" if row["fitted"] else "")
        table.add_row(name, f"{row['paper']:,.2f}", f"{row['model']:,.2f}", f"{row['model'] - row['paper']:+,.2f}")
    return table


def _program(program: Mapping[str, Any]) -> Table:
    title = f"The compiled program ({program['device_kind']}, {program['compile_seconds']} s)"
    table = _table(title, "collectives of a rank", "axes", "what", "pass", "async", "count", "sent")
    for row in program["collectives"]:
        where = "in each layer" if row["in_each_layer"] else ""
        table.add_row(
            f"{row['kind']} {where}", ", ".join(row["axes"]), row["role"], row["direction"],
            "yes" if row["asynchronous"] else "", f"{row['count']:,}", size(row["sent_bytes"]),
        )  # fmt: skip
    return table


def _programs(plan: Mapping[str, Any]) -> Table:
    """What each holds on a rank."""
    table = _table("Memory of a rank by program", "", "arguments", "temporaries", "total", "alive beside it", "fits",
                   "compiled in")  # fmt: skip
    yes = {True: "yes", False: "no", None: ""}
    for name, program in plan["programs"].items():
        if "compiler" in program:
            table.add_row(name, *[""] * 4, "no", "")
            continue
        memory = program["memory"]
        cells = (memory["arguments"], memory["temporaries"], memory["total"], program["memory_beside"])
        table.add_row(name, *map(size, cells), yes[program.get("fits")], f"{program['compile_seconds']} s")
    restore = plan["restore"]
    for name in ("train", "generate"):
        table.add_row(f"restore, to {name}", "", "", size(restore[name]), "", yes[restore.get("fits")], "")
    return table


def _program_notes(console: Console, program: Mapping[str, Any]) -> None:
    memory = program["memory"]
    have = f" of {size(program['memory_available'])}" if "memory_available" in program else ""
    console.print(
        f"memory of a rank: {size(memory['total'])}{have} ({size(memory['arguments'])} parameters and optimizer, "
        f"{size(memory['temporaries'])} temporaries)"
    )
    console.print(
        f"matmul FLOPs: {program['flops_per_step'] / 1e12:,.2f} T; "
        f"exchange: {size(program['exchange_sent_bytes'])} sent "
        f"({size(program['exchange_buffer_bytes'])} with what ranks keep for themselves), "
        f"{size(program['metadata_sent_bytes'])} metadata; other collectives {size(program['other_sent_bytes'])}"
    )
    if advice := program.get("advice"):
        console.print(f"[bold]does not fit[/bold]: try {advice['change']}; the largest arrays of the step:")
        for array in advice["largest"]:
            console.print(f"  {size(array['bytes']):>10}  {array['shape']}  {array['of']}")
    if schedule := program.get("schedule"):
        console.print(
            f"schedule: {schedule['asynchronous_in_a_layer']} of {schedule['exchanges_in_a_layer']} payload exchanges "
            f"of the layer loop are asynchronous; {100 * schedule['hidden_share']:.1f} % of "
            f"{duration(schedule['exchange_seconds'])} is hidden behind matmuls, of at most "
            f"{100 * schedule['ceiling']:.1f} % ({100 * schedule['reached_of_ceiling']:.0f} % of what can be); "
            f"beside {100 * schedule['busy_seconds'] / schedule['exchange_seconds']:.0f} % the chip does something"
        )
        console.print(
            f"by the compiler's estimates a step computes {duration(schedule['work_seconds'])}, and with the "
            f"exchange that nothing runs beside takes {duration(schedule['estimated_step_seconds'])}"
        )
        if note := schedule.get("note"):
            console.print(note)


def _sweep(rows: list[Mapping[str, Any]]) -> Table:
    fields = list(rows[0]["fields"])
    timed = all("time" in row for row in rows)
    costs = ["parameters", "FLOPs", "all-to-all", "memory"] + (["step", "exchange", "tokens/s"] if timed else [])
    table = _table("Sweep", *fields, *costs)
    for row in rows:
        cells = [count(row["parameters_total"]), f"{row['flops_per_step'] / 1e12:,.1f} T",
                 size(row["all_to_all_bytes_per_step"]), size(row["memory"]["total"])]  # fmt: skip
        if timed:
            time = row["time"]
            cells += [duration(time["total"]), f"{100 * time['exchange_share']:.1f} %", f"{time['tokens_per_s']:,.0f}"]
        table.add_row(*map(str, row["fields"].values()), *cells)
    return table


def _search(rows: list[Mapping[str, Any]]) -> Table:
    """The first dozen."""
    title = f"Fastest of {len(rows)} candidates, by the cost model"
    table = _table(title, "data × node × expert", "exchange", "chunks", "remat",
                   "parts", "memory", "fits", "step", "exchange", "tokens/s")  # fmt: skip
    for row in rows[:12]:
        time = row["time"]
        table.add_row(
            " × ".join(map(str, row["mesh"].values())), row["exchange"], str(row["overlap_chunks"]),
            row["remat"], str(row["accumulate_steps"]), size(row["memory"]),
            "yes" if row["fits"] else "no", duration(time["total"]), f"{100 * time['exchange_share']:.1f} %",
            f"{time['tokens_per_s']:,.0f}",
        )  # fmt: skip
    return table


def count(number: float) -> str:
    """3.73 B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number:g}"


def size(number: float) -> str:
    """1,488.00 GiB."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= limit:
            return f"{number / limit:,.2f} {unit}"
    return f"{number:g} B"


def duration(seconds: float) -> str:
    """1.23 s, 12.3 ms."""
    for limit, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= limit:
            return f"{seconds / limit:.3g} {unit}"
    return f"{1e6 * seconds:.3g} µs" if seconds else "0"


def draw(plan: Mapping[str, Any], path: pathlib.Path) -> None:
    """A picture of the plan: a sweep if there is one, else bytes, memory and, where they are known, times.

    Raises:
      ConfigError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if "sweep" in plan:
        figure = _draw_sweep(plt, plan["sweep"])
    else:
        columns = {plan["structure"]: plan} | plan["baselines"]
        valid = {name: column for name, column in columns.items() if "error" not in column}
        panels = [_draw_memory] + [_draw_exchanges] * ("exchanges" in plan) + [_draw_times] * ("time" in plan)
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4.5 * len(panels), 3.6), layout="constrained", squeeze=False
        )
        for panel, ax in zip(panels, axes[0], strict=True):
            panel(ax, valid)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot={path} can't be written ({error}); use a .png in a folder that exists") from None
    plt.close(figure)


def _stack(ax: Any, names: list[str], parts: Mapping[str, list[float]]) -> None:
    bottom = [0.0] * len(names)
    for (part, values), color, hatch in zip(parts.items(), PALETTE, HATCHES, strict=False):
        ax.bar(names, values, bottom=bottom, label=part, color=color, hatch=hatch, edgecolor="white", linewidth=0.5)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    ax.legend(fontsize=7)
    ax.tick_params(axis="x", labelrotation=15)


def _draw_memory(ax: Any, columns: Mapping[str, Mapping[str, Any]]) -> None:
    kinds = ("parameters", "optimizer", "gradients", "activations", "logits")
    _stack(ax, list(columns), {k: [c["memory"][k] / 2**30 for c in columns.values()] for k in kinds})
    ax.set_ylabel("GiB a rank")
    ax.set_title("memory (activations estimated)", fontsize=10)


def _draw_exchanges(ax: Any, columns: Mapping[str, Mapping[str, Any]]) -> None:
    """Of the configured structure."""
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
    times = [c["time"] for c in columns.values()]
    parts = {
        "matmul": [t["matmul"] for t in times],
        "exchange not hidden": [t["exchange"] - t["hidden"] for t in times],
        **{p: [t[p] for t in times] for p in ("tensor", "parameters") if any(t[p] for t in times)},
        "gradients": [t["gradients"] for t in times],
        "optimizer": [t["optimizer"] for t in times],
    }
    _stack(ax, list(columns), parts)
    ax.set_ylabel("seconds a step, predicted")
    ax.set_title("time", fontsize=10)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _draw_sweep(plt: Any, rows: list[Mapping[str, Any]]) -> Any:
    """Against the field with the most values; a line for every combination of the others."""
    fields = list(rows[0]["fields"])
    along = max(fields, key=lambda name: len({swept["fields"][name] for swept in rows}))
    timed = all("time" in row for row in rows)
    panels = [("all-to-all, GiB a step", lambda row: row["all_to_all_bytes_per_step"] / 2**30)]
    if timed:
        panels += [
            ("share of the exchange, %", lambda row: 100 * row["time"]["exchange_share"]),
            ("predicted tokens/s", lambda row: row["time"]["tokens_per_s"]),
        ]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained", squeeze=False)
    lines: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(tuple(row["fields"][name] for name in fields if name != along), []).append(row)
    styles = ("-o", "--s", ":^", "-.D", "-v", "--x", ":+", "-.*")
    for (label, value), ax in zip(panels, axes[0], strict=True):
        for number, (rest, line) in enumerate(lines.items()):
            values = [_number(row["fields"][along]) for row in line]
            style, color = styles[number % len(styles)], PALETTE[number % len(PALETTE)]
            ax.plot(values, [value(row) for row in line], style, color=color, label=" ".join(rest) or None)
        ax.set(xlabel=along, ylabel=label, ylim=(0, None))
        if fields != [along]:
            ax.legend(fontsize=7)
    return figure
