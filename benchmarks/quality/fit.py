"""What `bigmac plan --compare` knows of losses: planning/quality.toml, made from docs/results/unrepeated.json.

All of them are of one text, which none of the models reads twice: gaps of two texts can't stand in one table.
"""

import itertools
import math
from typing import Any, NamedTuple

from benchmarks.quality import grid, unrepeated
from benchmarks.quality.grid import Condition
from benchmarks.quality.pages import mean, of

PATH = "bigmac_jax/planning/quality.toml"
# The plan's names of what was trained; a difference is of the first of two minus the second.
_NAMES = {
    unrepeated.SHIPPED: "bigmac 1/4",
    unrepeated.HALF: "bigmac 1/2",
    unrepeated.TWICE: "bigmac 1/4, twice",
    unrepeated.CONTROL: "fine_grained, norm",
    unrepeated.FINE: "fine_grained",
}
# Nats: what three seeds don't tell within so much says which of them have learnt to copy (docs/quality.md).
_LARGEST_ERROR = 0.06
Run = dict[str, Any]


class Gap(NamedTuple):
    """The loss of the first minus that of the second."""

    structures: tuple[str, str]
    width: int
    tokens: int
    nats: float
    error: float


def gaps(runs: list[Run]) -> list[Gap]:
    """Every difference of three seeds that is known: of two, one may have learnt what the other has not."""
    found = []
    for (first, of_first), (second, of_second) in itertools.combinations(_NAMES.items(), 2):
        for width, steps in sorted({(run["width"], run["steps"]) for run in runs}):
            ours, theirs = (of(Condition(name, {}, width, steps), runs) for name in (first, second))
            if len(apart := unrepeated.over(ours, theirs)) >= len(grid.SEEDS):
                gap = Gap((of_first, of_second), width, ours[0]["tokens"], *mean(apart))
                found += [gap] if gap.error <= _LARGEST_ERROR else []
    return sorted(found, key=lambda gap: (gap.width, gap.tokens, gap.structures))


def slope(runs: list[Run], lengths: tuple[int, int]) -> tuple[float, float]:
    """Nats that e times the tokens take off fine_grained's loss at h = 128 between two lengths, and their error."""
    (short, of_short), (long, of_long) = (
        mean([run["loss"] for run in of(Condition("fine_grained", {}, 128, steps), runs)]) for steps in lengths
    )
    folds = math.log(lengths[1] / lengths[0])
    return (short - long) / folds, math.hypot(of_short, of_long) / folds


def longest(runs: list[Run]) -> tuple[int, int]:
    """The two longest lengths of which fine_grained's loss at h = 128 is known, by three seeds."""
    losses: dict[int, list[float]] = {}
    for run in runs:
        if (run["name"], run["width"]) == (unrepeated.FINE, 128):
            losses.setdefault(run["steps"], []).append(run["loss"])
    known = [steps for steps, own in losses.items() if len(own) >= len(grid.SEEDS) and mean(own)[1] <= _LARGEST_ERROR]
    *_, short, long = sorted(known)
    return short, long


def text(runs: list[Run]) -> str:
    """The file: the slope, and all gaps."""
    short, long = longest(runs)
    nats, error = slope(runs, (short, long))
    lines = [
        "# Losses of structures at equal tokens, for bigmac plan --compare. Made from docs/results/unrepeated.json by",
        "# python -m benchmarks.quality --jobs=0 (docs/quality.md): differences of three equal seeds. An error",
        f"# is one standard error; differences with one above {_LARGEST_ERROR} are left out.",
        'models = "64 experts, K = 8, no shared experts, dropless, equal parameters"',
        "",
        f"# Nats that e times the tokens take off fine_grained's loss, from {short:,} to {long:,} steps at h = 128.",
        "[slope]",
        f"nats = {nats:.4f}",
        f"error = {error:.4f}",
    ]
    for gap in gaps(runs):
        first, second = gap.structures
        lines += ["", "[[gap]]  # the loss of the first minus that of the second"]
        lines += [f'structures = ["{first}", "{second}"]', f"width = {gap.width}", f"tokens = {gap.tokens}"]
        lines += [f"nats = {gap.nats:.4f}", f"error = {gap.error:.4f}"]
    return "\n".join(lines) + "\n"
