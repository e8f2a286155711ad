"""What is learned, over time and over tokens: the paper's Figure 1."""

import statistics

from benchmarks.reproduce.lab import Lab
from benchmarks.reproduce.learning import Course, learn, time_to
from benchmarks.reproduce.result import BIGMAC, SEEDS, SHARED, Result

# W↓ and W↑ of a layer have as many parameters as a 64th of its experts, which are so much narrower.
EQUAL = (BIGMAC, "model.expert_hidden_size=63")
RECIPE = "model.latent_norm=skip"  # as bigmac ships (docs/quality.md)
# Figure 1: name → fields; the first four are timed, and learn with every seed.
LEARNERS: dict[str, tuple[str, ...]] = {
    "fine_grained": (),
    "bigmac": (*EQUAL, RECIPE),
    "bigmac, no norm": EQUAL,
    "vanilla": ("model.structure=vanilla",),
    "fine_grained, recipe": (RECIPE,),
    "fine_grained, shared experts": (SHARED,),
    "bigmac, shared experts": (*EQUAL, RECIPE, SHARED),
}
TIMED = tuple(LEARNERS)[:4]


def figure1(lab: Lab, rate: float, quick: bool) -> Result:
    """Validation perplexity over time on the shaped cluster, and over tokens, three seeds."""
    result = Result(
        "Figure 1: perplexity over time",
        "bigmac, fine_grained and vanilla with equal MoE parameters on the embedded corpus, h = 64, K = 8 (vanilla: "
        "1), no shared expert: all that a layer adds comes through bigmac's latent of 16. bigmac is as it ships, with "
        "a skip and a norm behind the combine, and without them, as the paper has it. Time: seconds of training steps "
        "on the shaped cluster until fine_grained's final validation perplexity. Tokens: means over three seeds after "
        "as many steps, one process; fine_grained with the recipe, too, which says whether it is that or the latent; "
        "and with four shared experts, at full width and together as wide as the model, one seed. Perplexities are a "
        "byte's.",
    )
    steps = 20 if lab.toy else 150
    timed = {name: learn(lab, Course("small", LEARNERS[name], steps, rate, evaluations=6)) for name in TIMED}
    seeds = {name: [learn(lab, course) for course in untimed(name, steps)] for name in LEARNERS}
    last = timed["fine_grained"]["evaluations"][-1]
    for name in TIMED[1:]:
        reached = time_to(timed[name], last["perplexity"])
        what = f"time to perplexity {last['perplexity']:.2f}, fine_grained's over {name}'s"
        result.row(what, 1.71 if BIGMAC in LEARNERS[name] else None, reached and last["seconds"] / reached, "×")
    final = {name: [run["evaluations"][-1]["perplexity"] for run in runs] for name, runs in seeds.items()}
    for name, perplexities in final.items():
        result.row(f"perplexity after {steps} steps, {name}", None, statistics.mean(perplexities), "", perplexities)
    means = {name: statistics.mean(perplexities) for name, perplexities in final.items()}
    error = statistics.stdev(final["fine_grained"]) / len(SEEDS) ** 0.5 / means["fine_grained"]
    for name in TIMED[1:3]:
        result.row(f"{name}: mean over fine_grained's", None, means[name] / means["fine_grained"], "")
    result.row("1 + relative standard error of fine_grained's mean", None, 1 + error, "")
    result.traffic = {name: lab.traffic("small", *LEARNERS[name]) for name in TIMED}
    result.records = [{"name": name} | timed[name] for name in TIMED]
    result.records += [{"name": name} | run for name, runs in seeds.items() for run in runs]
    return result


def untimed(name: str, steps: int) -> list[Course]:
    """Unshaped, since what is learned does not depend on time."""
    seeds = SEEDS[:1] if SHARED in LEARNERS[name] else SEEDS
    return [Course("small", LEARNERS[name], steps, evaluations=3, seed=seed) for seed in seeds]
