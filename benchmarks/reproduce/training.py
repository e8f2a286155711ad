"""Training steps: the paper's Table 1 (and its inference), Figures 3 and 4, and other ratios."""

from benchmarks.reproduce.calibrate import calibrate
from benchmarks.reproduce.lab import Lab, exchange_share, spread
from benchmarks.reproduce.result import BIGMAC, STRUCTURES, Result, both, top_k

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
            shaped, local = (
                lab.measure(lab.repeated(lab.case("small", top_k(k), program=program, rate=rate, local=local)))
                for local in (False, True)
            )
            result.records += shaped + local
            runs = [100 * exchange_share(a["median_s"], b["median_s"]) for a, b in zip(shaped, local, strict=True)]
            share = 100 * exchange_share(spread(shaped)[0], spread(local)[0])
            result.row(f"{what}, K = {k}", TABLE_1[k][program != "train"], share, "%", runs)

    shares("training", "train", rate)
    for k in ks[-1:] if quick else ks:  # each is another program to compile
        result.traffic[f"fine_grained, K = {k}"] = lab.traffic("small", top_k(k))
    if not quick:
        shares("inference", "forward", rate)
        faster = calibrate(lab, "small", "forward", TABLE_1[ks[-1]][1] / 100)["rate"]
        shares(f"inference, {faster / 1e6:.4g} Mbit/s", "forward", faster)
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
    sizes = SIZES[:1] if quick else SIZES
    cases = {
        (size, k, structure): lab.repeated(lab.case(size, *fields, top_k(k), rate=rate))[
            : None if size == sizes[0] else 1
        ]
        for size in sizes
        for k in FIGURE_3
        for structure, fields in STRUCTURES.items()
    }
    lab.measure([case for runs in cases.values() for case in runs])
    records = {name: lab.measure(runs) for name, runs in cases.items()}
    for size in sizes:
        for k, paper in FIGURE_3.items():
            result.speedup(f"{size}, K = {k}", paper, records[size, k, "fine_grained"], records[size, k, "bigmac"])
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
        "fine_grained over bigmac, end to end and in the exchange alone. For tp > 1 the paper states ranges over "
        "tp = 1…8 (1.55 to 2.77 and 2.47 to 3.73), whose upper ends stand here.",
    )
    for (expert, tensor), ks in FIGURE_4.items():
        mesh = (f"mesh.expert={expert}", f"mesh.tensor={tensor}", "mesh.split_experts=True") if tensor > 1 else ()
        for k, (whole, alone) in ks.items():
            fields = (*mesh, top_k(k))
            shaped, local = (both(lab, lab.case("small", *fields, rate=rate, local=local)) for local in (False, True))
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
    cases = {f"bigmac, r = 1/{n}": (BIGMAC, f"model.down_ratio={1 / n}", top_k(8)) for n in (2, 4, 8)}
    cases |= {"LatentMoE eff": (*latent, top_k(8)), "LatentMoE acc": (*latent, "model.num_experts=256", top_k(32))}
    fine = lab.measure(lab.repeated(lab.case("small", top_k(8), rate=rate)))
    result.records += fine
    for name, fields in cases.items():
        records = lab.measure(lab.repeated(lab.case("small", *fields, rate=rate)))
        result.records += records
        result.speedup(name, None, fine, records)
        result.traffic[name] = lab.traffic("small", *fields)
    return result
