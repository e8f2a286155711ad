"""What an experiment returns, and what several experiments share."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.reproduce.lab import Case, Lab, Record, median

BIGMAC = "model.structure=bigmac"
STRUCTURES: dict[str, tuple[str, ...]] = {"fine_grained": (), "bigmac": (BIGMAC,)}  # the base config is fine_grained's
SHARED = "model.num_shared_experts=4"  # of r·h each: together as wide as h
SEEDS = (1234, 1235, 1236)  # of runs that learn


@dataclass
class Result:
    """Attributes:
    title, about: for the page.
    rows: of the table: what, the paper's number, ours, its unit, and of several runs our lowest and highest.
    records: of all cases, as measured.
    traffic: bytes of a step by case, from the compiled programs.
    """

    title: str
    about: str
    rows: list[Record] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    traffic: dict[str, Record] = field(default_factory=dict)

    def row(self, what: str, paper: float | None, here: float | None, unit: str, between: Sequence[float] = ()) -> None:
        """`here` is None for what was not reached."""
        row: Record = {"what": what, "paper": paper, "here": None if here is None else round(here, 4), "unit": unit}
        if len(between) > 1:
            row["lowest"], row["highest"] = round(min(between), 3), round(max(between), 3)
        self.rows.append(row)

    def speedup(
        self, what: str, paper: float | None, slow: Sequence[Record], fast: Sequence[Record], unit: str = "×"
    ) -> None:
        """Median over median; the spread is that of the runs, which took turns."""
        between = [a["median_s"] / b["median_s"] for a, b in zip(slow, fast, strict=True)]
        self.row(what, paper, median(slow) / median(fast), unit, between)

    def exchange_speedup(
        self, what: str, paper: float | None, slow: Sequence[Sequence[Record]], fast: Sequence[Sequence[Record]]
    ) -> None:
        """Of the exchange alone: both are the runs with it and the runs without."""
        alone = [
            [{"median_s": a["median_s"] - b["median_s"]} for a, b in zip(*runs, strict=True)] for runs in (slow, fast)
        ]
        self.speedup(what, paper, *alone)

    def compare(self, lab: Lab, what: str, paper: float | None, case: Case) -> None:
        """Measures a case of fine_grained and the same with bigmac, and adds the speed-up and the records."""
        fine, big = both(lab, case)
        self.records += fine + big
        self.speedup(what, paper, fine, big)


# (lab, rate of the links, whether only the main rows) →
Experiment = Callable[[Lab, float, bool], Result]


def top_k(k: int) -> str:
    return f"model.top_k={k}"


def both(lab: Lab, case: Case) -> tuple[list[Record], list[Record]]:
    """All runs of a case of fine_grained, and of the same with bigmac."""
    cases = (dataclasses.replace(case, overrides=case.overrides + fields) for fields in STRUCTURES.values())
    fine, big = lab.runs(*cases)
    return fine, big


def two_level(rate: float) -> dict[str, Any]:
    """Links of two machines of two hosts.

    With `all_to_all` two hosts send half of their rows through one link, where each sent three quarters through its
    own. Inside, a host has 16 times its share of that link, as with PCIe 4.0 x16 beside an eighth of 100 Gb/s."""
    return {"rate": float(f"{4 / 3 * rate:.4g}"), "machine": 2, "fast_rate": float(f"{16 * 2 / 3 * rate:.4g}")}
