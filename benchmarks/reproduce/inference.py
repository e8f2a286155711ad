"""Prefill and generation: the paper's Figure 5 and Table 9."""

import statistics

from benchmarks.reproduce.lab import WARM, Lab
from benchmarks.reproduce.result import Result, both, top_k


def figure5(lab: Lab, rate: float, quick: bool) -> Result:
    """Prefill throughput, by prompt length, at equal tokens a batch."""
    result = Result(
        "Figure 5: inference throughput",
        "Forward passes over prompts, as many tokens in a batch whatever their length; fine_grained's time over "
        "bigmac's. The paper states a range, 1.72 to 2.45, whose upper end stands here.",
    )
    for length in (128, 1024) if quick else (128, 256, 512, 1024):
        case = lab.case("small", *prompts_of(length), program="forward", rate=rate)
        result.compare(lab, f"prompts of {length}, K = 8", 2.45, case)
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
            fields = "data.sequence_length=256", f"execution.exchange={exchange}", top_k(k)
            case = lab.case("small", *fields, program="generation", arguments=arguments, rate=rate, steps=steps)
            fine, big = both(lab, case)
            result.records += fine + big
            for number, new in enumerate(lengths):
                turns = (number - WARM) % len(lengths)  # batches take the lengths by turns, also those not counted
                times = (
                    [{"median_s": statistics.median(run["seconds"][turns :: len(lengths)])} for run in runs]
                    for runs in (fine, big)
                )
                paper = TABLE_9[k][new] if exchange == "all_to_all" else None
                result.speedup(f"{exchange}, K = {k}, tokens generated: {new}", paper, *times)
    return result
