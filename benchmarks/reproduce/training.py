"""Training steps: the paper's Table 1 (and its inference), Figures 3 and 4, and other ratios."""

import dataclasses

from benchmarks.reproduce.calibrate import calibrate
from benchmarks.reproduce.lab import Lab, Record, exchange_share, median
from benchmarks.reproduce.result import BIGMAC, STRUCTURES, Result, both, top_k, two_level

SIZES = ("small", "medium")
# Table 1: K → share of the exchange in training and in inference, %.
TABLE_1 = {1: (59.9, 51.2), 2: (71.3, 65.2), 4: (84.1, 79.2), 6: (89.1, 86.5), 8: (91.8, 90.6)}


def table1(lab: Lab, rate: float, quick: bool) -> Result:
    """Share of the exchange in a step of fine_grained, by K."""
    result = Result(
        "Table 1: the bottleneck",
        "fine_grained, 64 experts; share of a step that is exchange: what a step takes longer than one whose exchange "
        "is a local reshape. The rate of the links is chosen at K = 8, training; all else is measured. A forward pass "
        "has no gradients to sum and no optimizer, which on these hosts are most of a step's rest, so that its own "
        "exchange weighs more than on the paper's cluster: inference is measured again on faster links, chosen at its "
        "own K = 8 (90.6 %). A pass exchanges half of a step's bytes.",
    )
    ks = (1, 2, 4, 8) if quick else tuple(TABLE_1)

    def shares(what: str, program: str, rate: float) -> None:
        for k in ks:
            cases = (lab.case("small", top_k(k), program=program, rate=rate, local=local) for local in (False, True))
            shaped, local = lab.runs(*cases)
            result.records += shaped + local
            runs = [100 * exchange_share(a["median_s"], b["median_s"]) for a, b in zip(shaped, local, strict=True)]
            share = 100 * exchange_share(median(shaped), median(local))
            result.row(f"{what}, K = {k}", TABLE_1[k][program != "train"], share, "%", runs)

    shares("training", "train", rate)
    for k in ks[-1:] if quick else ks:  # each is another program to compile
        result.traffic[f"fine_grained, K = {k}"] = lab.traffic("small", top_k(k))
    if not quick:
        shares("inference", "forward", rate)
        calibration = calibrate(lab, "small", "forward", TABLE_1[ks[-1]][1] / 100)
        shares(f"inference, {calibration['rate'] / 1e6:.4g} Mbit/s", "forward", calibration["rate"])
        result.records.append({"name": "inference's calibration"} | calibration)
    return result


# Figure 3: K → the best speed-up of four base models.
FIGURE_3 = {4: 2.41, 8: 3.07}


def figure3(lab: Lab, rate: float, quick: bool) -> Result:
    """Training step, bigmac against fine_grained; all runs of the first size, one of the others."""
    result = Result(
        "Figure 3: the training step",
        "fine_grained's step over bigmac's; the paper's numbers are the best of its four base models. And "
        "fine_grained's step at K = 4 over bigmac's at K = 8, which the paper states as 27.7 to 55.4 % faster. Every "
        "run of the first size, one of the second.",
    )
    records: dict[tuple[str, int, str], list[Record]] = {}
    for size in SIZES[:1] if quick else SIZES:
        of_size = lab if size == SIZES[0] else dataclasses.replace(lab, repeats=1)
        for k, paper in FIGURE_3.items():
            fine, big = both(of_size, lab.case(size, top_k(k), rate=rate))
            records |= {(size, k, "fine_grained"): fine, (size, k, "bigmac"): big}
            result.speedup(f"{size}, K = {k}", paper, fine, big)
        fine, big = records[size, 4, "fine_grained"], records[size, 8, "bigmac"]
        result.speedup(f"{size}, K = 4 over bigmac's K = 8", 1.554, fine, big)
    for (size, k, structure), runs in records.items():
        result.records += runs
        result.traffic[f"{size}, {structure}, K = {k}"] = lab.traffic(size, *STRUCTURES[structure], top_k(k))
    return result


# Figure 4: (ep, tp) → K → end to end and exchange alone; for tensor parallelism only ranges are stated.
FIGURE_4 = {(4, 1): {4: (2.37, 3.48), 8: (2.95, 3.72)}, (2, 2): {4: (2.77, 3.73), 8: (2.77, 3.73)}}


def figure4(lab: Lab, rate: float, quick: bool) -> Result:
    """End to end and exchange alone, with and without tensor parallelism."""
    result = Result(
        "Figure 4: expert and tensor parallelism",
        "fine_grained over bigmac, end to end and in the exchange alone. tp = 2 on machines of two hosts, tensor "
        "parallelism inside: one link of 4/3 the rate between them, and 16 times a host's share of it inside. For "
        "tp > 1 the paper states ranges over tp = 1…8 (1.55 to 2.77 and 2.47 to 3.73), whose upper ends stand here.",
    )
    for (expert, tensor), ks in FIGURE_4.items():
        mesh = (f"mesh.expert={expert}", f"mesh.tensor={tensor}", "mesh.split_experts=True") if tensor > 1 else ()
        links = two_level(rate) if tensor > 1 else {"rate": rate}
        for k, (whole, alone) in ks.items():
            fields = (*mesh, top_k(k))
            shaped, local = (both(lab, lab.case("small", *fields, **links, local=local)) for local in (False, True))
            what = f"ep {expert}, tp {tensor}, K = {k}"
            result.speedup(f"{what}, end to end", whole, *shaped)
            fine, big = zip(shaped, local, strict=True)
            result.exchange_speedup(f"{what}, exchange alone", alone, fine, big)
            result.records += [record for runs in (*shaped, *local) for record in runs]
            for structure, more in STRUCTURES.items():
                result.traffic[f"{what}, {structure}"] = lab.traffic("small", *fields, *more)
    return result


def ratios(lab: Lab, rate: float, quick: bool) -> Result:
    """Step time by the down-scaling factor, and LatentMoE's two ways to spend the saving."""
    result = Result(
        "Ratios, and LatentMoE",
        "fine_grained's step (K = 8) over that of bigmac with r = 1/2, 1/4, 1/8, of LatentMoE `eff` (experts as wide "
        "as fine_grained's) and `acc` (and 4 times as many experts and choices).",
    )
    latent = (BIGMAC, "model.expert_hidden_size=16")  # r·h of `small`
    fields = {
        "fine_grained": (top_k(8),),
        "bigmac, r = 1/2": (BIGMAC, top_k(8), "model.down_ratio=0.5"),
        "bigmac, r = 1/4": (BIGMAC, top_k(8)),
        "bigmac, r = 1/8": (BIGMAC, top_k(8), "model.down_ratio=0.125"),
        "LatentMoE eff": (*latent, top_k(8)),
        "LatentMoE acc": (*latent, top_k(32), "model.num_experts=256"),
    }
    runs = dict(zip(fields, lab.runs(*(lab.case("small", *own, rate=rate) for own in fields.values())), strict=True))
    for name in list(fields)[1:]:
        result.speedup(name, None, runs["fine_grained"], runs[name])
    result.records = [record for records in runs.values() for record in records]
    result.traffic = {name: lab.traffic("small", *own) for name, own in fields.items()}
    return result


POLICIES = ("none", "exchange", "layer")


def remat(lab: Lab, rate: float, quick: bool) -> Result:
    """What recomputation costs where the exchange is most of the step."""
    result = Result(
        "Recomputation that keeps the exchange",
        "execution.remat at K = 8: a step over the same structure's with `none`. `layer` exchanges rows a third time "
        "in the backward pass, `exchange` keeps what crossed (bigmac a quarter of what fine_grained keeps) and "
        "recomputes the rest. The paper has no such figure.",
    )
    cases = {
        (structure, policy): lab.case("small", *own, top_k(8), f"execution.remat={policy}", rate=rate)
        for structure, own in STRUCTURES.items()
        for policy in POLICIES
    }
    runs = dict(zip(cases, lab.runs(*cases.values()), strict=True))
    for (structure, policy), records in runs.items():
        result.speedup(f"{structure}, {policy}", None, records, runs[structure, "none"], "of none")
    for policy in POLICIES:
        fine, big = (runs[structure, policy] for structure in STRUCTURES)
        result.speedup(f"fine_grained over bigmac, {policy}", None, fine, big)
    result.records = [record for records in runs.values() for record in records]
    for (structure, policy), case in cases.items():
        result.traffic[f"{structure}, {policy}"] = lab.traffic("small", *case.overrides)
    return result
