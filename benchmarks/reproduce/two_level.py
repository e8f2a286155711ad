"""Machines of two hosts, fast links inside and one slow link between: Figures 6 and 7, and exchanges made for them."""

import itertools
import statistics
from collections.abc import Sequence

from benchmarks.reproduce.inference import prompts_of
from benchmarks.reproduce.lab import Lab
from benchmarks.reproduce.learning import Course, learn
from benchmarks.reproduce.result import BIGMAC, SEEDS, SHARED, STRUCTURES, Result, two_level

MACHINES = "mesh.node=2", "mesh.expert=2"
OVERLAPPED = "execution.exchange=hierarchical", "execution.overlap_chunks=4"


def figure6(lab: Lab, rate: float, quick: bool) -> Result:
    """Training with the exchange in chunks that overlap with the experts, on machines of two hosts."""
    result = Result(
        "Figure 6: overlapped and hierarchical exchange",
        "Machines of two hosts: one link of 4/3 the rate between them, and 16 times a host's share of it inside. "
        "hierarchical exchange, tokens in 4 chunks (Tutel's overlap degree), f = 1.2 and dropless: among so few ranks "
        "it has room for every row at f = 1.2, so that the two are one program, measured twice. The paper states a "
        "range, 1.71 to 3.09, whose upper end stands here.",
    )
    for factor in ("1.2", "inf"):
        fields = (*MACHINES, *OVERLAPPED, f"model.capacity_factor={factor}")
        result.compare(lab, f"f = {factor}, K = 8", 3.09, lab.case("small", *fields, **two_level(rate)))
        for structure, more in STRUCTURES.items():
            result.traffic[f"f = {factor}, {structure}"] = lab.traffic("small", *fields, *more)
    return result


def figure7(lab: Lab, rate: float, quick: bool) -> Result:
    """Prefill with what Figure 6 trains with, f = 1.2."""
    result = Result(
        "Figure 7: inference, overlapped and hierarchical",
        "Forward passes as in Figure 5, on the machines and with the exchange of Figure 6, f = 1.2. The paper states a "
        "range, 1.67 to 1.87, whose upper end stands here.",
    )
    for length in (128, 1024):
        fields = (*MACHINES, *OVERLAPPED, *prompts_of(length))
        case = lab.case("small", *fields, program="forward", **two_level(rate))
        result.compare(lab, f"prompts of {length}, K = 8", 1.87, case)
    return result


PAPERS = "all_to_all, bfloat16"
# Learning rate → fields and seeds. At the first, Figure 1's, the order of summation moves a seed's loss by a percent.
LEARNING_RATES: dict[str, tuple[tuple[str, ...], Sequence[int]]] = {
    "8e-3": ((), range(1234, 1239)),
    "2e-3": (("optimizer.learning_rate=2e-3", "optimizer.final_learning_rate=2e-4"), SEEDS),
}
# Exchanges whose losses are compared → fields.
LEARNERS = {
    PAPERS: ("execution.exchange=all_to_all",),
    "hierarchical, bfloat16": ("execution.exchange=hierarchical",),
    "hierarchical, int8": ("execution.exchange=hierarchical", "execution.wire_dtype=int8"),
}


def strategies(lab: Lab, rate: float, quick: bool) -> Result:
    """Beyond the paper: other exchanges and an 8-bit wire under bigmac, on machines of two hosts."""
    result = Result(
        "Beyond the paper: exchanges",
        "bigmac, K = 8, machines of two hosts (those of Figure 6): the exchange's time as the paper sends it "
        "(all_to_all, bfloat16) over that of other strategies and formats. Losses at h = 64 with f = 1.2 and four "
        "shared experts, at Figure 1's learning rate and at a quarter of it, seed by seed; among so few ranks "
        "hierarchical has room for every row, so that it drops none where all_to_all does.",
    )
    runs = {}
    for exchange in ("all_to_all", "dedup", "hierarchical", "gather"):
        for wire in ("bfloat16", "int8"):
            name = f"{exchange}, {wire}"
            fields = (*MACHINES, BIGMAC, f"execution.exchange={exchange}", f"execution.wire_dtype={wire}")
            runs[name] = lab.runs(*(lab.case("small", *fields, **two_level(rate), local=x) for x in (False, True)))
            result.records += [record for records in runs[name] for record in records]
            result.exchange_speedup(name, None, runs[PAPERS], runs[name])
            result.traffic[name] = lab.traffic("small", *fields)
    steps = 30 if lab.toy else 200
    for learning_rate, (rates, seeds) in LEARNING_RATES.items():
        losses = {}
        for name, fields in LEARNERS.items():
            overrides = (BIGMAC, SHARED, *MACHINES, *fields, *rates)
            learned = [learn(lab, Course("small", overrides, steps, evaluations=0, seed=seed)) for seed in seeds]
            losses[name] = [record["final_loss"] for record in learned]
            result.records += [{"name": name} | record for record in learned]
        for base, name in itertools.combinations(LEARNERS, 2):
            between = [a / b for a, b in zip(losses[name], losses[base], strict=True)]
            what = f"loss after {steps} steps at {learning_rate}: {name} over {base}"
            result.row(what, None, statistics.fmean(losses[name]) / statistics.fmean(losses[base]), "", between)
    return result
