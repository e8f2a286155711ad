"""What `bigmac plan --compare` knows of losses: planning/quality.toml, made from docs/results.

Of a width whose models read text that none of them reads twice, those alone count; others are of the embedded corpus.
"""

import itertools
import math
from typing import Any, NamedTuple

from benchmarks.quality import grid, pages, unrepeated
from benchmarks.quality.grid import Condition
from benchmarks.quality.pages import compared, mean, of, over

PATH = "bigmac_jax/planning/quality.toml"
EMBEDDED, UNREPEATED = "embedded", "unrepeated"  # the texts
# The plan's names of what was trained, of both studies; a difference is of the first of two minus the second.
_NAMES = {
    EMBEDDED: {pages.SHIPPED[r]: f"bigmac {r}" for r in pages.SHIPPED}
    | {pages.CONTROL: "fine_grained, norm", "fine_grained": "fine_grained"},
    UNREPEATED: {
        unrepeated.SHIPPED: "bigmac 1/4",
        unrepeated.HALF: "bigmac 1/2",
        unrepeated.TWICE: "bigmac 1/4, twice",
        unrepeated.CONTROL: "fine_grained, norm",
        unrepeated.FINE: "fine_grained",
    },
}
_LONG = (2400, 2500)  # steps of the embedded corpus: a gap grows with the length, so shorter runs say too little
Run = dict[str, Any]


class Gap(NamedTuple):
    """The loss of the first minus that of the second."""

    structures: tuple[str, str]
    width: int
    tokens: int
    nats: float
    error: float
    text: str


def gaps(embedded: list[Run], fresh: list[Run]) -> list[Gap]:
    """Every difference that has a standard error."""
    found = _of_unrepeated(fresh)
    widths = {gap.width for gap in found}
    found += [gap for gap in _of_embedded(embedded) if gap.width not in widths]
    return sorted(found, key=lambda gap: (gap.width, gap.tokens, gap.structures))


def _of_embedded(runs: list[Run]) -> list[Gap]:
    found = []
    for pair in itertools.combinations(_NAMES[EMBEDDED], 2):
        for width, steps in itertools.product(grid.RATES, _LONG):
            ours, theirs = compared(*(Condition(name, {}, width, steps) for name in pair), runs)
            loss, error = over(ours, theirs) if ours and theirs else (math.nan, math.nan)
            if math.isfinite(error):
                names = _NAMES[EMBEDDED][pair[0]], _NAMES[EMBEDDED][pair[1]]
                found.append(Gap(names, width, ours[0]["tokens"], loss, error, EMBEDDED))
    return found


def _of_unrepeated(runs: list[Run]) -> list[Gap]:
    found = []
    for pair in itertools.combinations(_NAMES[UNREPEATED], 2):
        for width, steps in sorted({(run["width"], run["steps"]) for run in runs}):
            ours, theirs = (of(Condition(name, {}, width, steps), runs) for name in pair)
            if len(apart := unrepeated.over(ours, theirs)) > 1:
                names = _NAMES[UNREPEATED][pair[0]], _NAMES[UNREPEATED][pair[1]]
                found.append(Gap(names, width, ours[0]["tokens"], *mean(apart), UNREPEATED))
    return found


def slope(runs: list[Run], lengths: tuple[int, int]) -> tuple[float, float]:
    """Nats that e times the tokens take off fine_grained's loss at h = 128 between two lengths, and their error."""
    (short, of_short), (long, of_long) = (
        mean([run["loss"] for run in of(Condition("fine_grained", {}, 128, steps), runs)]) for steps in lengths
    )
    folds = math.log(lengths[1] / lengths[0])
    return (short - long) / folds, math.hypot(of_short, of_long) / folds


def longest(runs: list[Run]) -> tuple[int, int]:
    """The two longest lengths of which fine_grained has three seeds at h = 128."""
    own = [run["steps"] for run in runs if (run["name"], run["width"]) == (unrepeated.FINE, 128)]
    *_, short, long = sorted({steps for steps in own if own.count(steps) >= len(grid.SEEDS)})
    return short, long


def text(embedded: list[Run], fresh: list[Run]) -> str:
    """The file: a slope for each text, and all gaps."""
    found = gaps(embedded, fresh)
    lines = [
        "# Losses of structures at equal tokens, for bigmac plan --compare. Made from docs/results/quality.json and",
        "# unrepeated.json by python -m benchmarks.quality --jobs=0 (docs/quality.md): 64 experts, K = 8, no shared",
        "# experts, dropless, equal parameters, most of three seeds. An error is one standard error.",
        f"widths = [{min(gap.width for gap in found)}, {max(gap.width for gap in found)}]  # h that was measured",
        f"most_tokens = {max(gap.tokens for gap in found)}  # that a run saw",
    ]
    for name, runs, lengths in ((EMBEDDED, embedded, pages.LENGTHS), (UNREPEATED, fresh, longest(fresh))):
        nats, error = slope(runs, lengths)
        said = "from {:,} to {:,} steps at h = 128".format(*lengths)
        lines += ["", f"# Nats that e times the tokens take off fine_grained's loss, {said}."]
        lines += [f"[slope.{name}]", f"nats = {nats:.4f}", f"error = {error:.4f}"]
    for gap in found:
        first, second = gap.structures
        lines += ["", "[[gap]]  # the loss of the first minus that of the second"]
        lines += [f'structures = ["{first}", "{second}"]', f"width = {gap.width}", f"tokens = {gap.tokens}"]
        lines += [f"nats = {gap.nats:.4f}", f"error = {gap.error:.4f}", f'text = "{gap.text}"']
    return "\n".join(lines) + "\n"
