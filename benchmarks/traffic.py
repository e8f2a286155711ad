"""What crosses the links for each token: python -m benchmarks.traffic [--nodes=4 --ranks=8 …] [--picture=PATH].

Bytes that a rank sends for a token of one layer, forward (both exchanges, padding and metadata included), inside its
machine and to others, by structure, strategy and wire format; JSON lines and a picture. tests/model/test_traffic.py
holds these numbers against the collectives of the compiled program.
"""

import json
import pathlib

import matplotlib
from absl import app, flags

from bigmac_jax.model.exchange import STRATEGIES
from bigmac_jax.model.exchange.costs import cost
from bigmac_jax.model.exchange.wire import row_bytes
from bigmac_jax.model.mesh import EXPERT_GROUP

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_HIDDEN = flags.DEFINE_integer("hidden", 2048, "h.")
_RATIO = flags.DEFINE_float("ratio", 0.25, "r.")
_EXPERTS = flags.DEFINE_integer("experts", 64, "E.")
_TOP_K = flags.DEFINE_integer("top_k", 8, "K.")
_NODES = flags.DEFINE_integer("nodes", 4, "Machines.")
_RANKS = flags.DEFINE_integer("ranks", 8, "Ranks of a machine.")
_TOKENS = flags.DEFINE_integer("tokens", 16384, "Tokens of a rank.")
_FACTOR = flags.DEFINE_float("capacity_factor", 1.1, "Room over the rows expected at uniform routing.")
_PICTURE = flags.DEFINE_string("picture", "", "Where the picture is written.")

CASES = (
    ("fine_grained", "all_to_all", "bfloat16"),
    ("bigmac", "all_to_all", "bfloat16"),
    ("bigmac", "dedup", "bfloat16"),
    ("bigmac", "hierarchical", "bfloat16"),
    ("bigmac", "hierarchical", "int8"),
)


def main(_: list[str]) -> None:
    lines = [_line(*case) for case in CASES]
    for line in lines:
        print(json.dumps(line))
    if _PICTURE.value:
        _draw(lines, pathlib.Path(_PICTURE.value))


def _line(structure: str, exchange: str, format: str) -> dict[str, object]:
    T, K = _TOKENS.value, _TOP_K.value
    width = round(_HIDDEN.value * (_RATIO.value if structure == "bigmac" else 1))
    sizes = (_NODES.value, _RANKS.value)
    strategy = STRATEGIES[exchange](_EXPERTS.value, sizes, _FACTOR.value, EXPERT_GROUP, format)
    spent = cost(strategy, T, K)
    sent = spent.dispatch.plus(spent.combine).times(row_bytes(format, width) / T)
    return {
        "name": f"{structure}, {exchange}, {format}",
        "slow_bytes": round(sent.slow),
        "fast_bytes": round(sent.fast),
        "metadata_bytes": round(sum(spent.metadata) / T),
    }


def _draw(lines: list[dict], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
    names = [line["name"] for line in lines][::-1]
    left = [0.0] * len(lines)
    kinds = (("slow_bytes", "between machines"), ("fast_bytes", "inside a machine"), ("metadata_bytes", "metadata"))
    for (kind, label), color in zip(kinds, ("#c0392b", "#2980b9", "#7f8c8d"), strict=True):
        sizes = [line[kind] / 1024 for line in lines][::-1]
        axes.barh(names, sizes, left=left, label=label, color=color)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    most = max(line["slow_bytes"] for line in lines)
    for line, total in zip(lines[::-1], left, strict=True):
        slow = line["slow_bytes"]
        note = f" {slow / 1024:.1f} KiB between machines" + (f", 1/{most / slow:.1f}" if slow < most else "")
        axes.text(total, line["name"], note, va="center")
    axes.set_xlim(0, 1.5 * max(left))
    axes.set_xlabel("KiB sent for a token, one layer, forward")
    axes.set_title(
        f"width {_HIDDEN.value}; each token goes to K = {_TOP_K.value} of {_EXPERTS.value} experts on {_NODES.value} "
        f"machines of {_RANKS.value} ranks;\nbuffers have room for {_FACTOR.value:g} × the rows of an even choice",
        fontsize=10,
    )
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    app.run(main)
