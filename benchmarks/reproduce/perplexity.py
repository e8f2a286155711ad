"""What is learned, over time and over tokens: the paper's Figure 1."""

import statistics

from benchmarks.reproduce.lab import Lab
from benchmarks.reproduce.learning import Course, learn, time_to
from benchmarks.reproduce.result import BIGMAC, SEEDS, SHARED, Result

# Figure 1: name → fields; the first three are timed, and learn with every seed.
LEARNERS = {
    "fine_grained": (SHARED,),
    "bigmac": (BIGMAC, SHARED),
    "vanilla": ("model.structure=vanilla", SHARED),
    "fine_grained without shared experts": (),
    "bigmac without shared experts": (BIGMAC,),
    "bigmac without shared experts, norm on the latent": (BIGMAC, "model.latent_norm=pre_dispatch"),
}
TIMED = tuple(LEARNERS)[:3]


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
    result.traffic = {name: lab.traffic("small", *LEARNERS[name]) for name in TIMED}
    result.records = [{"name": name} | timed[name] for name in TIMED]
    result.records += [{"name": name} | run for name, runs in seeds.items() for run in runs]
    return result


def untimed(name: str, steps: int) -> list[Course]:
    """Unshaped, since what is learned does not depend on time."""
    seeds = SEEDS if name in TIMED else SEEDS[:1]
    return [Course("small", LEARNERS[name], steps, evaluations=3, seed=seed) for seed in seeds]
