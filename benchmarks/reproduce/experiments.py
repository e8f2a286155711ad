"""The paper's experiments, each a function of the lab and the calibrated rate → the rows of its table.

A row: what, the paper's number, ours, its unit, and where there are several runs the lowest and the highest of ours.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.reproduce.lab import WARM, Case, Lab, Record, exchange_share, spread
from benchmarks.reproduce.learning import Course, learn, time_to

BIGMAC = "model.structure=bigmac"
SIZES = ("small", "medium")
# Table 1: K → share of the exchange in training and in inference, %.
TABLE_1 = {1: (59.9, 51.2), 2: (71.3, 65.2), 4: (84.1, 79.2), 6: (89.1, 86.5), 8: (91.8, 90.6)}


@dataclass
class Result:
    """Attributes:
    title, about: for the page.
    rows: see above.
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


Experiment = Callable[[Lab, float, bool], Result]


def top_k(k: int) -> str:
    return f"model.top_k={k}"


def table1(lab: Lab, rate: float, quick: bool) -> Result:
    """Share of the exchange in a step of fine_grained, by K."""
    result = Result(
        "Table 1: the bottleneck",
        "fine_grained, 64 experts; share of a step that is exchange: what a step takes longer than one whose exchange "
        "is a local reshape. The rate of the links is chosen at K = 8, training; all else is measured. A forward pass "
        "has no gradients to sum and no optimizer, which on these hosts are most of a step's rest, so that its own "
        "exchange weighs more than on the paper's cluster: inference is measured again on faster links, chosen at its "
        "own K = 8.",
    )
    ks = (1, 2, 4, 8) if quick else tuple(TABLE_1)

    def shares(what: str, program: str, rate: float) -> tuple[float, float]:
        """Adds a row for each K → seconds with and without exchange for the last one."""
        for k in ks:
            shaped, local = (
                lab.measure(lab.repeated(lab.case("small", top_k(k), program=program, rate=rate, local=local)))
                for local in (False, True)
            )
            result.records += shaped + local
            runs = [100 * exchange_share(a["median_s"], b["median_s"]) for a, b in zip(shaped, local, strict=True)]
            seconds = spread(shaped)[0], spread(local)[0]
            paper = TABLE_1[k][program != "train"]
            result.row(f"{what}, K = {k}", paper, 100 * exchange_share(*seconds), "%", runs)
        return seconds

    shares("training", "train", rate)
    for k in ks[-1:] if quick else ks:  # each is another program to compile
        result.traffic[f"fine_grained, K = {k}"] = lab.traffic("small", top_k(k))
    if not quick:
        whole, local = shares("inference", "forward", rate)
        wanted = TABLE_1[ks[-1]][1] / 100
        faster = float(f"{rate * (whole - local) / local * (1 - wanted) / wanted:.4g}")
        shares(f"inference, {faster / 1e6:.4g} Mbit/s", "forward", faster)
    return result


# Figure 3: K → the lowest and the highest speed-up of four base models.
FIGURE_3 = {4: (1.53, 2.41), 8: (2.45, 3.07)}


def figure3(lab: Lab, rate: float, quick: bool) -> Result:
    """Training step, bigmac against fine_grained; all runs of the first size, one of the others."""
    result = Result(
        "Figure 3: the training step",
        "fine_grained's step over bigmac's; the paper's numbers are the best of its four base models. And "
        "fine_grained's step at K = 4 over bigmac's at K = 8, which the paper states as 27.7 to 55.4 % faster. Every "
        "run of the first size, one of the second.",
    )
    sizes, ks = ("small",) if quick else SIZES, (4, 8)
    runs = {size: lab.repeats if size == sizes[0] else 1 for size in sizes}
    cases = {
        (size, k, structure): lab.repeated(lab.case(size, *fields, top_k(k), rate=rate))[: runs[size]]
        for size in sizes
        for k in ks
        for structure, fields in (("fine_grained", ()), ("bigmac", (BIGMAC,)))
    }
    lab.measure([case for repeats in cases.values() for case in repeats])
    records = {name: lab.measure(repeats) for name, repeats in cases.items()}
    for size in sizes:
        for k in ks:
            fine, big = (records[size, k, structure] for structure in ("fine_grained", "bigmac"))
            _speedup(result, f"{size}, K = {k}", FIGURE_3[k][1], fine, big)
        if len(ks) > 1:
            what = f"{size}, K = 4 over bigmac's K = 8"
            _speedup(result, what, 1.554, records[size, 4, "fine_grained"], records[size, 8, "bigmac"])
    for (size, k, structure), repeats in records.items():
        result.records += repeats
        fields = (BIGMAC,) if structure == "bigmac" else ()
        result.traffic[f"{size}, {structure}, K = {k}"] = lab.traffic(size, *fields, top_k(k))
    return result


# Figure 4: (ep, tp) → end to end and exchange alone, K = 4 and 8; for tensor parallelism only ranges are stated.
FIGURE_4 = {(4, 1): {4: (2.37, 3.48), 8: (2.95, 3.72)}, (2, 2): {4: (2.77, 3.73), 8: (2.77, 3.73)}}


def figure4(lab: Lab, rate: float, quick: bool) -> Result:
    """End to end and exchange alone, with and without tensor parallelism."""
    result = Result(
        "Figure 4: expert and tensor parallelism",
        "fine_grained over bigmac, end to end and in the exchange alone. For tp > 1 the paper states ranges over "
        "tp = 1…8 (1.55 to 2.77 and 2.47 to 3.73), whose upper ends stand here.",
    )
    for (expert, tensor), ks in FIGURE_4.items():
        mesh = (f"mesh.expert={expert}", f"mesh.tensor={tensor}", "mesh.split_experts=True") if tensor > 1 else ()
        for k, (whole, alone) in ks.items():
            cases = {
                (structure, local): lab.repeated(lab.case("small", *mesh, *fields, top_k(k), rate=rate, local=local))
                for structure, fields in (("fine_grained", ()), ("bigmac", (BIGMAC,)))
                for local in (False, True)
            }
            records = {name: lab.measure(repeats) for name, repeats in cases.items()}
            what = f"ep {expert}, tp {tensor}, K = {k}"
            fine, big = records["fine_grained", False], records["bigmac", False]
            _speedup(result, f"{what}, end to end", whole, fine, big)
            exchange = [
                [a["median_s"] - b["median_s"] for a, b in zip(records[s, False], records[s, True], strict=True)]
                for s in ("fine_grained", "bigmac")
            ]
            ratios = [a / b for a, b in zip(*exchange, strict=True)]
            result.row(f"{what}, exchange alone", alone, sorted(ratios)[len(ratios) // 2], "×", ratios)
            for (structure, local), repeats in records.items():
                result.records += repeats
                fields = (BIGMAC,) if structure == "bigmac" else ()
                if not local:
                    result.traffic[f"{what}, {structure}"] = lab.traffic("small", *mesh, *fields, top_k(k))
    return result


def figure5(lab: Lab, rate: float, quick: bool) -> Result:
    """Prefill throughput, by prompt length, at equal tokens a batch."""
    result = Result(
        "Figure 5: inference throughput",
        "Forward passes over prompts, as many tokens in a batch whatever their length; fine_grained's time over "
        "bigmac's. The paper states a range, 1.72 to 2.45, whose upper end stands here.",
    )
    for length in (128, 1024) if quick else (128, 256, 512, 1024):
        fine, big = _both(lab, lab.case("small", *prompts_of(length), program="forward", rate=rate))
        result.records += fine + big
        _speedup(result, f"prompts of {length}, K = 8", 2.45, fine, big)
    return result


def prompts_of(length: int) -> tuple[str, str]:
    return f"data.sequence_length={length}", f"data.batch_size={8192 // length}"


# Table 9: K → speed-up by the number of tokens that are generated.
PROMPTS = 32
TABLE_9 = {8: {1: 3.11, 2: 2.89, 5: 2.41, 10: 1.99}, 4: {1: 2.81, 2: 2.50, 5: 2.03, 10: 1.62}}


def table9(lab: Lab, rate: float, quick: bool) -> Result:
    """Generation of a few tokens behind prompts of 128, dropless."""
    result = Result(
        "Table 9: generation",
        f"{PROMPTS} prompts of 128 tokens through `Generator`, which drops nothing; fine_grained's time over bigmac's, "
        "from the prompts to the last token. With the paper's all_to_all, which sends static rows with room for the "
        "worst case in both structures; and with gather, which brings every token to every rank once.",
    )
    exchanges, ks = (("all_to_all",), (8,)) if quick else (("all_to_all", "gather"), (8, 4))
    lengths = (1,) if quick else (1, 2, 5, 10)
    arguments = f"--prompts={PROMPTS}", f"--new={','.join(map(str, lengths))}"
    steps = lab.steps * len(lengths)
    for exchange in exchanges:
        for k in ks:
            fields = "data.sequence_length=256", f"data.batch_size={PROMPTS}", f"model.exchange={exchange}", top_k(k)
            case = lab.case("small", *fields, program="generation", arguments=arguments, rate=rate, steps=steps)
            fine, big = _both(lab, case)
            result.records += fine + big
            for number, new in enumerate(lengths):
                turns = (number - WARM) % len(lengths)  # batches take the lengths by turns, also those not counted
                times = (
                    [{"median_s": statistics.median(run["seconds"][turns :: len(lengths)])} for run in runs]
                    for runs in (fine, big)
                )
                paper = TABLE_9[k][new] if exchange == "all_to_all" else None
                _speedup(result, f"{exchange}, K = {k}, tokens generated: {new}", paper, *times)
    return result


OVERLAPPED = "model.exchange=hierarchical", "model.overlap_chunks=4"


def figure6(lab: Lab, rate: float, quick: bool) -> Result:
    """Training with the exchange in chunks that overlap with the experts, on machines of two hosts."""
    result = Result(
        "Figure 6: overlapped and hierarchical exchange",
        "Machines of two hosts: one link of 4/3 the rate between them, and 16 times a host's share of it inside. "
        "hierarchical exchange, tokens in 4 chunks (Tutel's overlap degree), f = 1.2 and dropless. The paper states a "
        "range, 1.71 to 3.09, whose upper end stands here.",
    )
    pairs = two_level(rate)
    for factor in ("1.2", "inf"):
        fields = (*pairs.overrides, *OVERLAPPED, f"model.capacity_factor={factor}")
        fine, big = _both(lab, pairs.case(lab, *fields))
        result.records += fine + big
        _speedup(result, f"f = {factor}, K = 8", 3.09, fine, big)
        for structure, more in (("fine_grained", ()), ("bigmac", (BIGMAC,))):
            result.traffic[f"f = {factor}, {structure}"] = lab.traffic("small", *fields, *more)
    return result


def figure7(lab: Lab, rate: float, quick: bool) -> Result:
    """Prefill with what Figure 6 trains with, f = 1.2."""
    result = Result(
        "Figure 7: inference, overlapped and hierarchical",
        "Forward passes as in Figure 5, on the machines and with the exchange of Figure 6, f = 1.2. The paper states a "
        "range, 1.67 to 1.87, whose upper end stands here.",
    )
    pairs = two_level(rate)
    for length in (128, 1024):
        fields = (*pairs.overrides, *OVERLAPPED, *prompts_of(length))
        fine, big = _both(lab, pairs.case(lab, *fields, program="forward"))
        result.records += fine + big
        _speedup(result, f"prompts of {length}, K = 8", 1.87, fine, big)
    return result


@dataclass(frozen=True)
class TwoLevel:
    """A cluster of two machines of two hosts."""

    rate: float
    fast_rate: float
    overrides: tuple[str, ...] = ("mesh.node=2", "mesh.expert=2")

    def case(self, lab: Lab, *overrides: str, **more: Any) -> Case:
        return lab.case("small", *overrides, rate=self.rate, machine=2, fast_rate=self.fast_rate, **more)


def two_level(rate: float) -> TwoLevel:
    """With `all_to_all` two hosts send half of their rows through one link, where each sent three quarters through its
    own. Inside, a host has 16 times its share of that link, as with PCIe 4.0 x16 beside an eighth of 100 Gb/s."""
    return TwoLevel(float(f"{4 / 3 * rate:.4g}"), float(f"{16 * 2 / 3 * rate:.4g}"))


def strategies(lab: Lab, rate: float, quick: bool) -> Result:
    """Beyond the paper: other exchanges and an 8-bit wire under bigmac, on machines of two hosts."""
    result = Result(
        "Beyond the paper: exchanges",
        "bigmac, K = 8, machines of two hosts (those of Figure 6): the exchange's time as the paper sends it "
        "(all_to_all, bfloat16) over that of other strategies and formats. Losses with f = 1.2 and four shared "
        "experts, as in Figure 1; among so few ranks hierarchical and dedup have room for every row, so that they drop "
        "none where all_to_all does.",
    )
    pairs = two_level(rate)
    seconds: dict[str, list[float]] = {}
    for exchange in ("all_to_all", "dedup", "hierarchical", "gather"):
        for wire in ("bfloat16", "int8"):
            fields = (*pairs.overrides, BIGMAC, f"model.exchange={exchange}", f"model.wire_dtype={wire}")
            shaped, local = (
                lab.measure(lab.repeated(pairs.case(lab, *fields, local=local))) for local in (False, True)
            )
            result.records += shaped + local
            name = f"{exchange}, {wire}"
            seconds[name] = [a["median_s"] - b["median_s"] for a, b in zip(shaped, local, strict=True)]
            ratios = [a / b for a, b in zip(seconds["all_to_all, bfloat16"], seconds[name], strict=True)]
            result.row(name, None, sorted(ratios)[len(ratios) // 2], "×", ratios)
            result.traffic[name] = lab.traffic("small", *fields)
    steps = 30 if lab.toy else 200
    paper, wire = "all_to_all, bfloat16", "model.wire_dtype=int8"
    courses = {
        paper: ("model.exchange=all_to_all",),
        f"{paper}, dropless": ("model.exchange=all_to_all", "model.capacity_factor=inf"),
        "hierarchical, bfloat16": ("model.exchange=hierarchical",),
        "hierarchical, int8, gradients bfloat16": (
            "model.exchange=hierarchical",
            wire,
            "model.wire_dtype_backward=bfloat16",
        ),
        "hierarchical, int8": ("model.exchange=hierarchical", wire),
        "dedup, int8": ("model.exchange=dedup", wire),
    }
    losses = {
        name: learn(lab, Course("small", (BIGMAC, SHARED, *pairs.overrides, *fields), steps, evaluations=0))
        for name, fields in courses.items()
    }
    result.records += [{"name": name} | record for name, record in losses.items()]
    for name in list(courses)[2:]:
        for base in (paper, f"{paper}, dropless"):
            ratio = losses[name]["final_loss"] / losses[base]["final_loss"]
            result.row(f"loss after {steps} steps, {name}, over that of {base}", None, ratio, "")
    return result


SHARED = "model.num_shared_experts=4"  # of r·h each: together as wide as h
# Figure 1: name → fields; the first three are timed, and learn with every seed.
LEARNERS = {
    "fine_grained": (SHARED,),
    "bigmac": (BIGMAC, SHARED),
    "vanilla": ("model.structure=vanilla", SHARED),
    "fine_grained without shared experts": (),
    "bigmac without shared experts": (BIGMAC,),
    "bigmac without shared experts, norm on the latent": (BIGMAC, "model.latent_norm=pre_dispatch"),
}
TIMED, SEEDS = tuple(LEARNERS)[:3], (1234, 1235, 1236)


def figure1(lab: Lab, rate: float, quick: bool) -> Result:
    """Validation perplexity over time on the shaped cluster, and over tokens, three seeds."""
    result = Result(
        "Figure 1: perplexity over time",
        "bigmac, fine_grained and vanilla with equal MoE parameters on the embedded corpus, K = 8 (vanilla: 1), each "
        "with four shared experts, at full width and together as wide as the model. Time: seconds of training steps on "
        "the shaped cluster until fine_grained's final validation perplexity. Tokens: means over three seeds after as "
        "many steps, one process; and, one seed each, the same without shared experts, where all that a layer adds "
        "comes through a latent of 16 (with and without `model.latent_norm=pre_dispatch`). Perplexities are a byte's.",
    )
    steps = 20 if lab.toy else 150
    timed = {name: learn(lab, Course("small", LEARNERS[name], steps, rate, evaluations=6)) for name in TIMED}
    seeds = {name: [learn(lab, course) for course in untimed(name, steps)] for name in LEARNERS}
    last = timed["fine_grained"]["evaluations"][-1]
    for name in TIMED[1:]:
        reached = time_to(timed[name], last["perplexity"])
        what = f"time to perplexity {last['perplexity']:.2f}, fine_grained's over {name}'s"
        result.row(what, 1.71 if name == "bigmac" else None, reached and last["seconds"] / reached, "×")
    final = {name: [run["evaluations"][-1]["perplexity"] for run in runs] for name, runs in seeds.items()}
    for name, perplexities in final.items():
        result.row(f"perplexity after {steps} steps, {name}", None, statistics.mean(perplexities), "", perplexities)
    means = {name: statistics.mean(perplexities) for name, perplexities in final.items()}
    error = statistics.stdev(final["fine_grained"]) / len(SEEDS) ** 0.5 / means["fine_grained"]
    result.row("bigmac's mean over fine_grained's", None, means["bigmac"] / means["fine_grained"], "")
    result.row("1 + relative standard error of fine_grained's mean", None, 1 + error, "")
    result.records = [{"name": name} | timed[name] for name in TIMED]
    result.records += [{"name": name} | run for name, runs in seeds.items() for run in runs]
    return result


def untimed(name: str, steps: int) -> list[Course]:
    """Unshaped, since what is learned does not depend on time."""
    seeds = SEEDS if name in TIMED else SEEDS[:1]
    return [Course("small", LEARNERS[name], steps, evaluations=3, seed=seed) for seed in seeds]


def ratios(lab: Lab, rate: float, quick: bool) -> Result:
    """Step time by the down-scaling factor, and LatentMoE's two ways to spend the saving."""
    result = Result(
        "Ratios, and LatentMoE",
        "fine_grained's step (K = 8) over that of bigmac with r = 1/2, 1/4, 1/8, of LatentMoE `eff` (experts as wide "
        "as fine_grained's) and `acc` (and 4 times as many experts and choices).",
    )
    latent = (BIGMAC, "model.expert_hidden_size=16")  # r·h of `small`
    cases = {f"bigmac, r = 1/{n}": (BIGMAC, f"model.down_ratio={1 / n}", top_k(8)) for n in (2, 4, 8)}
    cases |= {"LatentMoE eff": (*latent, top_k(8)), "LatentMoE acc": (*latent, "model.num_experts=256", top_k(32))}
    fine = lab.measure(lab.repeated(lab.case("small", top_k(8), rate=rate)))
    result.records += fine
    for name, fields in cases.items():
        records = lab.measure(lab.repeated(lab.case("small", *fields, rate=rate)))
        result.records += records
        _speedup(result, name, None, fine, records)
        result.traffic[name] = lab.traffic("small", *fields)
    return result


def _both(lab: Lab, case: Case) -> tuple[list[Record], list[Record]]:
    """All runs of a case of fine_grained, and of the same with bigmac."""
    fine, big = (dataclasses.replace(case, overrides=case.overrides + more) for more in ((), (BIGMAC,)))
    return lab.measure(lab.repeated(fine)), lab.measure(lab.repeated(big))


def _speedup(result: Result, what: str, paper: float | None, slow: Sequence[Record], fast: Sequence[Record]) -> None:
    """Median over median; the spread is that of the runs, paired."""
    between = [a["median_s"] / b["median_s"] for a, b in zip(slow, fast, strict=True)]
    result.row(what, paper, spread(slow)[0] / spread(fast)[0], "×", between)


EXPERIMENTS: dict[str, Experiment] = {
    "table1": table1,
    "figure3": figure3,
    "figure4": figure4,
    "figure5": figure5,
    "table9": table9,
    "figure6": figure6,
    "figure7": figure7,
    "figure1": figure1,
    "ratios": ratios,
    "strategies": strategies,
}
QUICK = ("table1", "figure3", "table9")
