"""What is learned, over time and over tokens: the paper's Figure 1."""

import statistics
from collections.abc import Sequence

from benchmarks.reproduce.lab import Lab, Record, median
from benchmarks.reproduce.learning import Course, learn, steps_to
from benchmarks.reproduce.result import BIGMAC, SEEDS, SHARED, Result

SIZE = "large"  # h = 128: the smallest width, by doubling, at which docs/quality.md has bigmac ahead


def _equal(width: int) -> tuple[str, ...]:
    """bigmac whose experts are so much narrower that they pay for W↓ and W↑, as many parameters as a 64th of them."""
    return BIGMAC, f"model.expert_hidden_size={width - width // 64}"


RECIPE = "model.latent_norm=skip"  # as bigmac shipped when it was run; W↓ and W↑ start at random (docs/quality.md)
# Figure 1: name → fields. The first four are timed, and the first three learn with every seed.
LEARNERS: dict[str, tuple[str, ...]] = {
    "fine_grained": (),
    "bigmac": (*_equal(128), RECIPE),
    "bigmac, no norm": _equal(128),
    "vanilla": ("model.structure=vanilla",),
    "fine_grained, recipe": (RECIPE,),
    "fine_grained, shared experts": (SHARED,),
    "bigmac, shared experts": (*_equal(128), RECIPE, SHARED),
}
COMPARED, TIMED = tuple(LEARNERS)[:3], tuple(LEARNERS)[:4]
# The width of the other experiments.
NARROW: dict[str, tuple[str, ...]] = {
    "fine_grained, h = 64": (),
    "bigmac, h = 64": (*_equal(64), RECIPE),
}


def figure1(lab: Lab, rate: float, quick: bool) -> Result:
    """Validation perplexity over tokens, three seeds, and over the time that so many steps take on the cluster."""
    result = Result(
        "Figure 1: perplexity over time",
        "bigmac, fine_grained and vanilla with equal MoE parameters on the embedded corpus, h = 128, K = 8 (vanilla: "
        "1), no shared expert: all that a layer adds comes through bigmac's latent of 32. bigmac has a skip "
        "and a norm behind the combine, or neither, as the paper has it; W↓ and W↑ start at random. What is learned "
        "does not depend on time, and a step's time not on what was learned, since buffers are static: runs of three "
        "seeds learn in one process, and time is their steps times the median step on the shaped cluster. Time to a "
        "perplexity is of "
        "the seeds' mean; in brackets each seed to its own fine_grained's, where all come there. One seed: vanilla; "
        "fine_grained with the recipe; and with four shared experts, at full width and together as wide as the model. "
        "Beside it h = 64 with a latent of 16. Perplexities are a byte's.",
    )
    steps = 20 if lab.toy else 300
    seconds = dict(zip(TIMED, lab.runs(*(lab.case(SIZE, *LEARNERS[name], rate=rate) for name in TIMED)), strict=True))
    learned = {name: [learn(lab, course) for course in courses(name, steps)] for name in LEARNERS | NARROW}
    for name in TIMED[1:]:
        result.speedup(f"step, fine_grained's over {name}'s", None, seconds["fine_grained"], seconds[name])
    target = mean_curve(learned["fine_grained"])[-1]["perplexity"]
    for name in TIMED[1:]:
        faster = median(seconds["fine_grained"]) / median(seconds[name])
        one_by_one = [
            steps_to(ours["evaluations"], other["evaluations"][-1]["perplexity"])
            for ours, other in zip(learned[name], learned["fine_grained"], strict=False)
        ]
        reached = steps_to(mean_curve(learned[name]), target)
        all_reached = [faster * steps / each for each in one_by_one if each]
        result.row(
            f"time to perplexity {target:.2f}, fine_grained's over {name}'s",
            1.71 if BIGMAC in LEARNERS[name] else None,
            reached and faster * steps / reached,
            "×",
            all_reached if len(all_reached) == len(one_by_one) else (),
        )
    final = {name: [run["evaluations"][-1]["perplexity"] for run in runs] for name, runs in learned.items()}
    for name, perplexities in final.items():
        result.row(f"perplexity after {steps} steps, {name}", None, statistics.mean(perplexities), "", perplexities)
    for base, *names in (COMPARED, tuple(NARROW)):
        for name in names:
            ratio = statistics.mean(final[name]) / statistics.mean(final[base])
            result.row(f"{name}: mean over {base}'s", None, ratio, "")
            result.row("its standard error", None, ratio * _relative_error(final[name], final[base]), "")
    result.traffic = {name: lab.traffic(SIZE, *LEARNERS[name]) for name in TIMED}
    result.records = [record for records in seconds.values() for record in records]
    for name, runs in learned.items():
        of_step = {"step_s": median(seconds[name])} if name in TIMED else {}
        result.records += [{"name": name} | of_step | run for run in runs]
    return result


def courses(name: str, steps: int) -> list[Course]:
    """One of each seed."""
    fields = (LEARNERS | NARROW)[name]
    seeds = SEEDS if name in (*COMPARED, *NARROW) else SEEDS[:1]
    size = "small" if name in NARROW else SIZE
    return [Course(size, fields, steps, evaluations=6, seed=seed) for seed in seeds]


def mean_curve(runs: Sequence[Record]) -> list[Record]:
    """Perplexity at each evaluation, the seeds' mean."""
    together = zip(*(run["evaluations"] for run in runs), strict=True)
    return [{"step": at[0]["step"], "perplexity": statistics.mean(p["perplexity"] for p in at)} for at in together]


def _relative_error(*groups: Sequence[float]) -> float:
    """Of a ratio of two means."""
    of_each = [statistics.stdev(values) / len(values) ** 0.5 / statistics.mean(values) for values in groups]
    return sum(error**2 for error in of_each) ** 0.5
