"""Where a narrow exchange pays: python -m benchmarks.pays [--docs=docs].

Predicts the step of two models that differ in the width of what is exchanged alone, as many parameters and as many
FLOPs but for W↓ and W↑, on machines that are known and on a map of machines: bytes a second that a device sends over
its FLOPs a second, and seconds of a message. --docs writes the tables and the picture of pays.md. Half
a minute.
"""

import argparse
import dataclasses
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from benchmarks.markers import put
from bigmac_jax.config import Config, load_config
from bigmac_jax.planning.cost import make_job, step_time
from bigmac_jax.planning.hardware import Hardware, Link, load_hardware
from bigmac_jax.planning.job import Times
from bigmac_jax.planning.published import load_runs, predict_run

RANKS, RATIO = 64, 4
TOKENS = 8192  # of a rank
# What the prediction of a ratio was off at most, of the public comparisons (`comparisons`).
ERROR = 0.11
GBIT = 1e9 / 8


class Place(NamedTuple):
    """A machine of 64 devices, as people rent it."""

    name: str
    hardware: Hardware
    topology: tuple[int, ...] | None = None

    @property
    def together(self) -> int:
        """Devices that fast links join: a slice, a rack or a host."""
        return math.prod(self.topology) if self.topology else self.hardware.machine_ranks

    @property
    def latency(self) -> float:
        """Seconds of a message, over the slowest links that the exchange takes."""
        return (self.hardware.fast if self.together >= RANKS else self.hardware.slow).latency

    @property
    def bytes_a_flop(self) -> float:
        """Bytes that a rank sends a second in the wide exchange, each row for itself, over its peak."""
        wide = config(1, "ragged", 1)
        seconds = make_job(wide, sizes(1), self.hardware, self.topology).exchange
        sent = 4 * wide.model.num_layers * TOKENS * wide.model.top_k * (RANKS - 1) / RANKS * wide.model.hidden_size * 2
        return sent / seconds / self.hardware.peak_flops


def places() -> list[Place]:
    h100, v6e = load_hardware("h100"), load_hardware("v6e")
    rack = dataclasses.replace(load_hardware("gb200"), machine_ranks=64)

    def network(gbit: float) -> Hardware:
        """Hosts of eight H100 that share a network card of so many Gbit/s."""
        return dataclasses.replace(h100, slow=Link(gbit * GBIT / 8, 20e-6))

    return [
        Place("one NVLink rack: 64 GB200", rack),
        Place("8 hosts on InfiniBand: H100, 400 Gb/s a GPU", h100),
        Place("8 hosts on Ethernet: H100, 800 Gb/s a host", network(800)),
        Place("8 hosts on Ethernet: H100, 100 Gb/s a host", network(100)),
        Place("one TPU slice: v5p:4x4x4", load_hardware("v5p"), (4, 4, 4)),
        Place("one TPU slice: v6e:8x8", v6e, (8, 8)),
        Place("two TPU slices over DCN: 2 × v6e:4x8", v6e, (4, 8)),
        Place("the paper's cluster: A40, twice as many", load_hardware("paper")),
    ]


def config(parts: int, exchange: str, chunks: int, nodes: int = 1, more: int = 1) -> Config:
    """Qwen3-30B-A3B, or with an exchange of 1/`parts` of its width and experts `parts` times as wide; nothing dropped.
    `more` times as many experts and choices are each so much narrower."""
    fields = {
        "model.structure": "bigmac" if parts > 1 else "fine_grained", "model.capacity_factor": "inf",
        "model.expert_hidden_size": 768 * parts // more, "model.num_experts": 128 * more, "model.top_k": 8 * more,
        "model.down_ratio": 1 / parts if parts > 1 else 1 / RATIO, "model.balance": "none",
        "execution.exchange": exchange, "execution.overlap_chunks": chunks, "execution.remat": "none",
        "mesh.expert": RANKS // nodes, "mesh.node": nodes, "mesh.data": 1, "mesh.fsdp": True,
        "data.batch_size": TOKENS * RANKS // 4096, "train.accumulate_steps": 1,
    }  # fmt: skip
    return load_config("qwen3_30b", [f"{name}={value}" for name, value in fields.items()])


def sizes(nodes: int) -> dict[str, int]:
    return {"data": 1, "node": nodes, "expert": RANKS // nodes, "tensor": 1}


def predicted(parts: int, place: Place, more: int = 1) -> Times:
    """The fastest of several exchanges, in one chunk and in four, of a model as `config` makes it."""
    exchanges = [("ragged", 1), ("dedup", 1)]
    if place.together < RANKS:
        exchanges.append(("hierarchical", RANKS // place.together))
    times = [
        step_time(config(parts, name, chunks, nodes, more), sizes(nodes), place.hardware, place.topology)
        for name, nodes in exchanges
        for chunks in ((1, 4) if place.hardware.overlaps else (1,))
    ]
    return min(times, key=lambda of: of.total)


def gain(place: Place) -> float:
    """Tokens a second with the narrow exchange over those with the wide one."""
    return predicted(1, place).total / predicted(RATIO, place).total


def verdict(times: float) -> str:
    if times > 1 + ERROR:
        return "pays"
    return "costs" if times < 1 - ERROR else "no difference that the model can tell"


def comparisons() -> list[dict[str, Any]]:
    """Public comparisons on one machine: tokens a second with a narrow exchange over those without."""
    runs = {run.row: run for run in load_runs()}
    pairs = [
        ("no latent | EP64 | 274,954", "latent, work matched (L 3072) | EP64 | 253,332"),
        ("no latent | EP64 | 274,954", "latent, parameters kept (256×3072) | EP64 | 304,612"),
        ("no latent | one GB200 rack | 327,358", "latent 3072 without norm | one GB200 rack | 320,921"),
    ]
    found = []
    for wide, narrow in pairs:
        rate = [predict_run(runs[row]).tokens_per_s / runs[row].devices for row in (wide, narrow)]
        measured = runs[narrow].measured() / runs[wide].measured()
        found.append({"rows": (wide, narrow), "measured": measured, "predicted": rate[1] / rate[0]})
    return found


def grid(points: int = 13) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bytes a FLOP, seconds of a message, gain) of 64 H100 whose links are all alike."""
    h100 = load_hardware("h100")
    rates, latencies = np.geomspace(5e-7, 2e-3, points), np.geomspace(3e-7, 2e-4, points)

    def here(rate: float, latency: float) -> float:
        link = Link(rate * h100.peak_flops, latency)
        return gain(Place("", dataclasses.replace(h100, machine_ranks=RANKS, fast=link, slow=link)))

    return rates, latencies, np.array([[here(rate, latency) for rate in rates] for latency in latencies])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", help="writes the page's tables and its picture to this folder")
    asked = parser.parse_args()
    head = "| 64 devices | bytes a FLOP | exchange, of the wide step | narrow over wide, tokens/s | |"
    table = [f"{head}\n|---|---|---|---|---|\n"]
    for place in places():
        share, times = predicted(1, place).exchange_share, gain(place)
        cells = (place.name, f"{place.bytes_a_flop:.1e}", f"{share:.0%}", f"{times:.2f}", verdict(times))
        table.append(f"| {' | '.join(cells)} |\n")
    print("".join(table))
    pairs = ["| wide → narrow | measured | predicted |\n|---|---|---|\n"]
    for found in comparisons():
        names = " → ".join(row.replace(" | ", ", ") for row in found["rows"])
        pairs.append(f"| {names} | {found['measured']:.3f} | {found['predicted']:.3f} |\n")
    print("".join(pairs))
    if asked.docs:
        docs = pathlib.Path(asked.docs)
        put(docs / "pays.md", table, name="machines")
        put(docs / "pays.md", pairs, name="comparisons")
        draw(docs / "images" / "pays.png")


def draw(path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    rates, latencies, gains = grid()
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    levels = [0, 1 - ERROR, 1 + ERROR, 1.5, 2, 3, math.inf]
    colours = ["#d9a8a0", "#e6e6e6", "#d4e6d4", "#a9d2a9", "#78b878", "#4a9a4a"]
    axes.contourf(rates, latencies, np.minimum(gains, 99), levels=[*levels[:-1], 100], colors=colours)
    lines = axes.contour(rates, latencies, gains, levels=levels[1:-1], colors="0.3", linewidths=0.8)
    axes.clabel(lines, fmt="%.2f×")
    for number, place in enumerate(places()):
        at = place.bytes_a_flop, place.latency
        axes.plot(*at, "ko", markersize=4)
        above = number % 2 == 0
        axes.annotate(place.name.partition(": ")[2] or place.name, at, fontsize=7, ha="center",
                      xytext=(0, 6 if above else -11), textcoords="offset points")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes a second that a device sends / FLOPs a second of its peak")
    axes.set_ylabel("seconds of a message")
    axes.set_title(f"Tokens/s with a quarter of the width over the whole; grey: within ±{ERROR:.0%}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
