"""Prints a plan as tables for people."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from bigmac_jax.model.mesh import describe_mesh
from bigmac_jax.planning.job import TERMS
from bigmac_jax.planning.report_programs import make_table, program_table, programs_table, show_program, show_resident
from bigmac_jax.planning.units import count, duration, is_near, percent, size, work


def show(plan: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints everything in a plan of `planner.make_plan`, the configured structure beside the others."""
    console = console or Console(highlight=False)
    console.width = max(console.width, 160)  # narrower columns would cut numbers
    if "best" in plan:
        _best(console, plan)
    where = plan["topology"] or (f"{plan['devices']} devices" if plan["devices"] > 1 else "")
    where = f"{plan['slices']} × {where}" if plan["slices"] > 1 else where
    console.print(f"[bold]{plan['description']}[/bold]")
    console.print(
        f"{where}{', ' if where else ''}{describe_mesh(plan['mesh'])}, {plan['tokens_per_step']:,} tokens a step\n"
    )
    if plan["imbalance"] > 1:
        console.print(
            f"the busiest rank has {plan['imbalance']:.2f} times the mean's rows, and the others wait for it\n"
        )
    if "copies" in plan:
        console.print(f"{plan['copies']}\n")
    columns = {plan["structure"]: plan} | plan["baselines"]
    console.print(_costs(columns))
    for name, column in columns.items():
        if "error" in column:
            console.print(f"{name}: {column['error']}")
        elif not is_near(column["parameters_total"], plan["parameters_total"]):
            share = column["parameters_total"] / plan["parameters_total"]
            active = is_near(column["parameters_active"], plan["parameters_active"])
            console.print(
                f"{name} has {percent(share)} of the parameters of {plan['structure']}"
                + (": as many are active for a token" if active else ", and no width of its experts comes nearer")
            )
    if "exchanges" in plan:
        console.print(_exchanges(plan))
    if "drops" in plan:
        console.print(_drops(plan["drops"]))
    if "recomputation" in plan:
        console.print(_recomputation(plan["recomputation"]))
    tables: dict[str, Callable[[Any], Table]] = {
        "compiler_options": _options,
        "terms": _terms,
        "paper": _paper,
        "paper_comparison": _comparison,
        "program": program_table,
        "sweep": _sweep,
        "search": _search,
    }
    for key, table in tables.items():
        if key in plan and "compiler" not in plan[key]:
            console.print(table(plan[key]))
    if "compare" in plan:
        _compare(console, plan["compare"])
    if "scale" in plan:
        _scale(console, plan["scale"])
    if "resident" in plan:
        show_resident(console, plan["resident"], plan.get("programs", {}).get("decode", {}).get("host_copies"))
    if "programs" in plan:
        if "compiler" not in plan.get("program", {"compiler": ""}):
            show_program(console, plan["program"])
        console.print(programs_table(plan))
        for name, program in plan["programs"].items():
            if "compiler" in program:
                console.print(f"[bold]{name} does not fit or compile[/bold]: {program['compiler']}")
            if change := program.get("change") or program.get("advice", {}).get("change"):
                console.print(f"{name}: try {change}")


def _best(console: Console, plan: Mapping[str, Any]) -> None:
    """What a search found: one line, then flags to paste; lines that are pasted are not wrapped."""
    best = plan["best"]
    have = f"{size(best['memory'])} of a device's {size(plan['memory_available'])}"
    if best["fits"]:
        console.print(
            f"[bold]Fits best, of {plan['searched']['fit']:,}[/bold]: {best['tokens_per_s']:,.0f} tokens/s predicted, "
            f"{have}, {percent(best['headroom'])} left; with", soft_wrap=True,
        )  # fmt: skip
    else:
        others = ", or ".join(best["would_fit"]) or "nothing that was tried: use devices with more memory"
        console.print(
            f"[bold]Nothing fits[/bold] with {percent(plan['searched']['headroom'])} of the memory left; the nearest "
            f"takes {have}. Would fit: {others}. The nearest is", soft_wrap=True,
        )  # fmt: skip
    console.print(" ".join(best["flags"]) or "the config as it is", soft_wrap=True)
    for note in best["notes"]:
        console.print(f"this changes what is computed: {note}", soft_wrap=True)
    if other := best["without_first_pass"]:
        console.print(
            "a pass that counts all parts' loads first is in it; balanced part by part (docs/model.md) "
            f"{other['tokens_per_s']:,.0f} tokens/s, with {' '.join(other['flags'])}", soft_wrap=True,
        )  # fmt: skip
    console.print()


def _costs(columns: Mapping[str, Mapping[str, Any]]) -> Table:
    valid = {name: column for name, column in columns.items() if "error" not in column}
    table = make_table("A training step", "", *valid)

    def row(label: str, value: Any) -> None:
        table.add_row(label, *(value(column) for column in valid.values()))

    row("width of an expert, or of the MLP", lambda c: f"{c['expert_width']:,}")
    row("parameters", lambda c: count(c["parameters_total"]))
    row("  active for a token", lambda c: count(c["parameters_active"]))
    row("FLOPs", lambda c: work(c["flops_per_step"]))
    row("all-to-all, all ranks", lambda c: size(c["all_to_all_bytes_per_step"]))
    for part in ("parameters", "optimizer", "gradients", "activations", "temporaries", "total"):
        row(f"memory of a rank: {part}", lambda c, part=part: size(c["memory"][part]))
    for part in ("optimizer", "activations"):
        if any(column["host_memory"][part] for column in valid.values()):
            row(f"host memory of a rank: {part}", lambda c, part=part: size(c["host_memory"][part]))
    if all("checkpoint" in column for column in valid.values()):
        row("checkpoint", lambda c: size(c["checkpoint"]["bytes"]))
        for key, label in (("partial_bytes", "  of some of the experts"), ("kept_bytes", "  all that are kept")):
            if any(key in column["checkpoint"] for column in valid.values()):
                row(label, lambda c, key=key: size(c["checkpoint"][key]) if key in c["checkpoint"] else "")
    if all("headroom" in column for column in valid.values()):
        row("share of it that is left", lambda c: percent(c["headroom"]))
    if all("time" in column for column in valid.values()):
        table.add_section()
        here = [part for part in TERMS if any(c["time"][part] for c in valid.values())]
        for part in (*here, "total"):
            row(f"predicted: {part}", lambda c, part=part: duration(c["time"][part]))
        row("predicted: share of exchange", lambda c: percent(c["time"]["exchange_share"]))
        row("predicted: tokens/s", lambda c: f"{c['time']['tokens_per_s']:,.0f}")
        row("predicted: MFU", lambda c: percent(c["time"]["mfu"]))
        row("predicted: MFU, attention causal", lambda c: percent(c["time"]["mfu_causal"]))
    if "training" in next(iter(valid.values())):
        asked = count(next(iter(valid.values()))["training"]["tokens"])
        row(f"days for {asked} tokens, steps alone", lambda c: f"{c['training']['days']:,.1f}")
        row("  device-hours", lambda c: f"{c['training']['device_hours']:,.0f}")
    return table


def _options(rows: list[Mapping[str, Any]]) -> Table:
    table = Table("option of the compiler", "", "why", title="The training step is compiled with", title_justify="left",
                  title_style="bold", show_lines=True)  # fmt: skip
    before = ""
    for row in rows:
        value = str(row["value"]).lower() if isinstance(row["value"], bool) else str(row["value"])
        why = row["why"] or "execution.compiler_options"
        table.add_row(row["name"], value, "as above" if why == before else why)
        before = why
    return table


def _terms(rows: list[Mapping[str, Any]]) -> Table:
    table = make_table(
        "Terms of the predicted step (docs/planning-truth.md)", "", "seconds", "of the step", "what it is"
    )
    table.columns[-1].justify = "left"
    for row in rows:
        table.add_row(row["term"], duration(row["seconds"]), percent(row["share"]), row["what"])
    return table


def _exchanges(plan: Mapping[str, Any]) -> Table:
    # Without hardware nothing is known of machines.
    links = ("sent, fast links", "slow links") if plan["hardware"] else ("sent along expert", "along node")
    rounds = plan["most_rounds"]
    title = "Bytes of the exchange, all ranks" + (f" (of one round; at worst {rounds} rounds)" if rounds > 1 else "")
    table = make_table(title, "", "rows with a token", *links, "metadata")
    for name, sent in plan["exchanges"].items():
        metadata = sent["metadata_fast"] + sent["metadata_slow"]
        cells = (sent["payload"], sent["padded_fast"], sent["padded_slow"], metadata)
        table.add_row(name + (" (configured)" if name == plan["exchange"] else ""), *map(size, cells))
    return table


def _drops(drops: Mapping[str, Any]) -> Table:
    title = f"Choices that a capacity factor of {drops['at_factor']:g} dropped (docs/distributions.md)"
    table = make_table(title, "model.balance", "one domain", "four mixed", "just after a change")
    for name, shares in drops["measured"].items():
        cells = [shares[key] for key in ("one", "mixed", "shifted")]
        configured = " (configured)" if name == drops["balance"] else ""
        table.add_row(name + configured, *("" if share is None else percent(share) for share in cells))
    if drops["balance"] not in drops["measured"]:
        table.add_row(f"{drops['balance']} (configured)", *["not measured"] * 3)
    return table


def _recomputation(rows: list[Mapping[str, Any]]) -> Table:
    table = make_table("What a rank keeps for the backward pass, by execution.remat; predicted",
                       "", "activations", "of the exchange", "in host memory", "exchange", "step")  # fmt: skip
    for row in rows:
        kept = size(row["exchanged"]) if row["remat"] in ("none", "exchange") else ""
        host = size(row["host"]) if row["host"] else ""
        table.add_row(
            row["remat"], size(row["activations"]), kept, host, duration(row["exchange"]), duration(row["total"])
        )
    return table


def _paper(paper: Mapping[str, Any]) -> Table:
    but = f"; they know nothing of this {', '.join(paper['left_out'])}" if paper["left_out"] else ""
    table = make_table(f"The paper's formulas (capacity factor 1, 2 bytes a number){but}", "", "")
    table.add_row("parameters", count(paper["parameters"]))
    table.add_row("FLOPs", work(paper["flops_per_step"]))
    table.add_row("all-to-all", size(paper["all_to_all_bytes_per_step"]))
    return table


def _comparison(rows: list[Mapping[str, Any]]) -> Table:
    table = make_table("The paper's cluster, one scale and one latency fitted to Table 1's training exchanges",
                       "", "paper", "model", "difference")  # fmt: skip
    for row in rows:
        name = row["name"] + (" (fitted)" if row["fitted"] else "")
        table.add_row(name, f"{row['paper']:,.2f}", f"{row['model']:,.2f}", f"{row['model'] - row['paper']:+,.2f}")
    return table


def _compare(console: Console, found: Mapping[str, Any]) -> None:
    """Structures at an equal loss, and whether what differs is more than its error."""
    title = f"Time to the loss that {found['of']} reaches in {count(found['tokens'])} tokens"
    table = make_table(title, "", "step", "behind at equal tokens", "measured at", "tokens", "time", "days", "")
    for row in found["structures"]:
        step = duration(row["step"]) if "step" in row else ""
        days = f"{row['seconds'] / 86400:,.2f}" if "seconds" in row else ""
        if "time_factor" not in row:
            table.add_row(row["structure"], step, *[""] * 4, days, row.get("error", "configured"))
            continue
        behind, factor, time = (row[name] for name in ("behind", "tokens_factor", "time_factor"))
        said = "slower" if time["value"] > 1 else "faster"
        lengths = " to ".join(map(count, sorted({*row["measured_tokens"]})))
        table.add_row(
            row["structure"], step, f"{behind['value']:+.3f} ± {behind['error']:.3f}", f"h = {row['width']}, {lengths}",
            *(f"× {of['value']:.3f} ± {of['error']:.3f}" for of in (factor, time)), days,
            f"{said}, by {'more' if row['differs'] else 'no more'} than its error",
        )  # fmt: skip
    console.print(table)
    if beyond := [row["structure"] for row in found["structures"] if row.get("extrapolated")]:
        console.print(
            f"[bold]EXTRAPOLATED[/bold]: this is h = {found['width']:,} with {count(found['tokens'])} tokens, beyond "
            f"what was measured of {'; '.join(beyond)}"
        )
    measured = found["measured"]
    console.print(
        f"± is one standard error of the losses ({measured['page']}: {measured['models']}), without the steps'; the "
        "last column's is two"
    )


def _scale(console: Console, found: Mapping[str, Any]) -> None:
    """Tokens a second of a device, and where and why each structure stops scaling."""
    devices, tokens = found["devices"], found["tokens_per_step"]
    curves = {name: curve for name, curve in found["structures"].items() if "points" in curve}
    each = (
        f"{tokens[0] / devices[0]:,.0f} tokens of each device" if found["kind"] == "weak" else f"{tokens[0]:,} in all"
    )
    title = f"Tokens a second of a device, predicted; {found['kind']} scaling: a step has {each}"
    table = make_table(title, "devices", *curves)
    for number, count_ in enumerate(devices):
        points = [curve["points"][number] for curve in curves.values()]
        cells = [f"{p['tokens_per_s_per_device']:,.0f}" if "time" in p else f"no {p['lacks']}" for p in points]
        table.add_row(f"{count_:,}", *cells)
    console.print(table)
    lacks = {"memory": "nothing fits", "mesh": "no mesh is valid"}
    for name, curve in found["structures"].items():
        if "error" in curve:
            console.print(f"{name}: {curve['error']}")
        elif (stops := curve["stops"]) is None:
            rates = [point["tokens_per_s_per_device"] for point in curve["points"] if "time" in point]
            console.print(f"{name} keeps {percent(rates[-1] / rates[0])} at {devices[-1]:,} devices")
        elif stops["term"] in lacks:
            console.print(f"{name} stops at {stops['devices']:,} devices: {lacks[stops['term']]}")
        else:
            console.print(
                f"{name} stops at {stops['devices']:,} devices, which keep {percent(stops['share'])}, by "
                f"{stops['term']}: {duration(1e6 * stops['grew'][stops['term']])} more of a device for a million tokens"
            )
    console.print(
        f"Scaling: a device keeps {percent(found['keeps'])} of what it does on the fewest. Each point is the best of "
        "a search, where larger meshes grow from smaller ones (docs/planning.md)"
    )


_TIME_COLUMNS = ("step", "exchange", "tokens/s")


def _time_cells(time: Mapping[str, float]) -> list[str]:
    return [duration(time["total"]), percent(time["exchange_share"]), f"{time['tokens_per_s']:,.0f}"]


def _sweep(rows: list[Mapping[str, Any]]) -> Table:
    timed = all("time" in row for row in rows)
    columns = "parameters", "FLOPs", "all-to-all", "memory", *(_TIME_COLUMNS if timed else ())
    table = make_table("Sweep", *rows[0]["fields"], *columns)
    for row in rows:
        table.add_row(
            *row["fields"].values(), count(row["parameters_total"]), work(row["flops_per_step"]),
            size(row["all_to_all_bytes_per_step"]), size(row["memory"]["total"]),
            *(_time_cells(row["time"]) if timed else []),
        )  # fmt: skip
    return table


def _search(rows: list[Mapping[str, Any]]) -> Table:
    """The first dozen."""
    title = "The fastest that fit, by the cost model" if any(row["fits"] for row in rows) else "The nearest to fit"
    table = make_table(title, " × ".join(rows[0]["mesh"]), "fsdp", "split experts", "exchange", "chunks", "remat",
                       "moments", "parts", "memory", "left", *_TIME_COLUMNS)  # fmt: skip
    yes = {True: "yes", False: ""}
    for row in rows[:12]:
        moments = {"host": row["offload_optimizer"], "split": row["replica_optimizer"] == "sharded"}
        table.add_row(
            " × ".join(map(str, row["mesh"].values())), yes[row["fsdp"]], yes[row["split_experts"]], row["exchange"],
            str(row["overlap_chunks"]), row["remat"], ", ".join(name for name, is_so in moments.items() if is_so),
            str(row["accumulate_steps"]), size(row["memory"]),
            percent(row["headroom"]), *_time_cells(row["time"]),
        )  # fmt: skip
    return table
