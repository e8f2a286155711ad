"""Prints what a plan says of compiled programs, and of what stands in host memory."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from bigmac_jax.planning.units import duration, size, work


def make_table(title: str, *columns: str) -> Table:
    """A table with a title; all columns but the first are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def program_table(program: Mapping[str, Any]) -> Table:
    """The collectives of a compiled step."""
    title = f"The compiled program ({program['device_kind']}, {program['compile_seconds']} s)"
    table = make_table(title, "collectives of a rank", "axes", "what", "pass", "async", "count", "sent")
    for row in program["collectives"]:
        where = "in each layer" if row["in_each_layer"] else ""
        table.add_row(
            f"{row['kind']} {where}", ", ".join(row["axes"]), row["role"], row["direction"],
            "yes" if row["asynchronous"] else "", f"{row['count']:,}", size(row["sent_bytes"]),
        )  # fmt: skip
    return table


def programs_table(plan: Mapping[str, Any]) -> Table:
    """Memory of a rank in each program."""
    columns = "arguments", "temporaries", "total", "alive beside it", "fits", "compiled in"
    table = make_table("Memory of a rank by program", "", *columns)
    yes = {True: "yes", False: "no", None: ""}
    for name, program in plan["programs"].items():
        if "compiler" in program:
            table.add_row(name, *[""] * 4, "no", "")
            continue
        memory = program["memory"]
        cells = (memory["arguments"], memory["temporaries"], memory["total"], program["memory_beside"])
        table.add_row(name, *map(size, cells), yes[program.get("fits")], f"{program['compile_seconds']} s")
    restore = plan["restore"]
    for name in filter(restore.__contains__, ("train", "generate")):
        table.add_row(f"restore, to {name}", "", "", size(restore[name]), "", yes[restore.get("fits")], "")
    return table


def show_program(console: Console, program: Mapping[str, Any]) -> None:
    """Prints what a compiled step holds, computes and sends."""
    memory = program["memory"]
    have = f" of {size(program['memory_available'])}" if "memory_available" in program else ""
    console.print(
        f"memory of a rank: {size(memory['total'])}{have} ({size(memory['arguments'])} parameters and optimizer, "
        f"{size(memory['temporaries'])} temporaries)"
    )
    console.print(
        f"matmul FLOPs: {work(program['flops_per_step'])}; "
        f"exchange: {size(program['exchange_sent_bytes'])} sent "
        f"({size(program['exchange_buffer_bytes'])} with what ranks keep for themselves), "
        f"{size(program['metadata_sent_bytes'])} metadata; other collectives {size(program['other_sent_bytes'])}"
    )
    if advice := program.get("advice"):
        console.print(f"[bold]does not fit[/bold]: try {advice['change']}; the largest arrays of the step:")
        for array in advice["largest"]:
            console.print(f"  {size(array['bytes']):>10}  {array['shape']}  {array['of']}")
    if schedule := program.get("schedule"):
        _print_schedule(console, schedule)


def _print_schedule(console: Console, schedule: Mapping[str, Any]) -> None:
    """What runs beside a step's collectives."""
    if schedule["exchange_seconds"]:
        console.print(
            f"schedule: {schedule['asynchronous_in_a_layer']} of {schedule['exchanges_in_a_layer']} payload exchanges "
            f"of the layer loop are asynchronous; {100 * schedule['hidden_share']:.1f} % of "
            f"{duration(schedule['exchange_seconds'])} is hidden behind matmuls, of at most "
            f"{100 * schedule['ceiling']:.1f} % ({100 * schedule['reached_of_ceiling']:.0f} % of what can be); "
            f"beside {100 * schedule['busy_seconds'] / schedule['exchange_seconds']:.0f} % the chip does something"
        )
    parameters = schedule["parameters"]
    if seconds := parameters["seconds"]:
        console.print(
            f"gathers of parameters and sums of gradients: {duration(seconds)}, "
            f"{parameters['asynchronous_in_a_step']} of {parameters['collectives_in_a_step']} asynchronous; "
            f"{100 * parameters['hidden_seconds'] / seconds:.0f} % of it is hidden behind matmuls, beside "
            f"{100 * parameters['busy_seconds'] / seconds:.0f} % the chip does something"
        )
    console.print(
        f"by the compiler's estimates a step computes {duration(schedule['work_seconds'])}, and with the "
        f"collectives that nothing runs beside takes {duration(schedule['estimated_step_seconds'])}"
    )
    if note := schedule.get("note"):
        console.print(note)


def show_resident(console: Console, found: Mapping[str, Any], copies: Mapping[str, Any] | None) -> None:
    """Experts in host memory: bytes, the copies of a decode step, and times of a token."""
    by_layer = "resident_layers" in found
    held = f"{size(found['ring_bytes'])} of {found['resident_layers']} layers" if by_layer else (
        f"{size(found['slot_bytes'])} of {found['resident_experts']} experts of each layer")  # fmt: skip
    console.print(
        f"experts in host memory: {size(found['host_bytes'])} of {found['layers']} layers for each rank, "
        f"{held} on the device"
    )
    if copies and by_layer:  # else the program does not say how often it copies
        console.print(
            f"a decode step copies {size(copies['bytes'])} from there in {copies['copies']:,} copies, "
            f"{copies['asynchronous']:,} asynchronous, {copies['beside_products']:,} beside matrix products"
        )
    if "decode" not in found:
        return
    names = ("copy_ms", "compute_ms", "step_ms", "ms_per_token", "on_device_ms")
    times = (
        "copies",
        "the device meanwhile" if by_layer else "the device",
        "step",
        "a token",
        "all experts on the device",
    )
    counts = () if by_layer else ("chosen_experts", "missing_experts")
    of_counts = () if by_layer else ("chosen of a layer", "copied of a layer")
    table = make_table("A step that decodes, predicted", "requests", *of_counts, *times)
    for row in found["decode"]:
        numbers = (f"{row[name]:,.1f}" for name in counts)
        table.add_row(f"{row['requests']:,}", *numbers, *(f"{row[name]:,.2f} ms" for name in names))
    console.print(table)
