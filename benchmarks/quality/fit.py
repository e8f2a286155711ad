"""What `bigmac plan --compare` knows of losses: planning/quality.toml, made from docs/results/quality.json."""

import math
from typing import Any

from benchmarks.quality.grid import Condition, normed
from benchmarks.quality.pages import CONTROL, LENGTHS, SHIPPED, compared, mean, of, over

PATH = "bigmac_jax/planning/quality.toml"
# The plan's names of what was trained.
_NAMES = {"fine_grained": "fine_grained", CONTROL: CONTROL, **{SHIPPED[r]: f"bigmac {r}" for r in SHIPPED}}
_PAIRS = [(SHIPPED[ratio], base) for ratio in SHIPPED for base in ("fine_grained", CONTROL)]
_PAIRS.append((CONTROL, "fine_grained"))
_WIDTHS = (64, 128, 256)
_LONG = (2400, 2500)  # steps: a gap grows with the length, so shorter runs say too little


def text(runs: list[dict[str, Any]]) -> str:
    """The file: the slope, and every difference that has a standard error."""
    gaps = []
    for first, base in _PAIRS:
        for width in _WIDTHS:
            for steps in _LONG:
                ours, theirs = compared(*(Condition(name, {}, width, steps) for name in (first, base)), runs)
                loss, error = over(ours, theirs) if ours and theirs else (math.nan, math.nan)
                if math.isfinite(error):
                    gaps.append((_NAMES[first], _NAMES[base], width, ours[0]["tokens"], loss, error))
    (short, of_short), (long, of_long) = (
        mean([run["loss"] for run in of(normed("fine_grained", "none", steps=steps), runs)]) for steps in LENGTHS
    )
    folds = math.log(LENGTHS[1] / LENGTHS[0])
    slope, error = (short - long) / folds, math.hypot(of_short, of_long) / folds
    lines = [
        "# Losses of structures at equal tokens, for bigmac plan --compare. Made from docs/results/quality.json by",
        "# python -m benchmarks.quality --jobs=0 (docs/quality.md): 64 experts, K = 8, no shared experts, dropless,",
        "# equal parameters, three seeds. An error is one standard error.",
        f"widths = [{min(gap[2] for gap in gaps)}, {max(gap[2] for gap in gaps)}]  # h that was measured",
        f"most_tokens = {max(gap[3] for gap in gaps)}  # that a run saw",
        "",
        "# Nats that e times the tokens take off fine_grained's loss, from {:,} to {:,} steps at h = 128.".format(
            *LENGTHS
        ),
        "[slope]",
        f"nats = {slope:.4f}",
        f"error = {error:.4f}",
    ]
    for first, base, width, tokens, loss, of_loss in gaps:
        lines += [
            "",
            "[[gap]]  # the loss of the first minus that of the second",
            f'structures = ["{first}", "{base}"]',
        ]
        lines += [f"width = {width}", f"tokens = {tokens}", f"nats = {loss:.4f}", f"error = {of_loss:.4f}"]
    return "\n".join(lines) + "\n"
