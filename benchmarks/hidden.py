"""How much of the exchange a TPU's schedule hides: python -m benchmarks.hidden [--topologies=…] [--picture=PATH].

Compiles a training step of GPT3-XL with 64 experts at ep = 32 (0.5 M tokens, in parts; four overlap chunks) for slices
that are not there, bigmac and fine_grained, and reads what stands between the start and the end of each exchange. Needs
libtpu (the extra `tpu`); one to three minutes a program. JSON lines; a picture.
"""

from bigmac_jax.runtime import environment

environment.prepare()

import json  # noqa: E402
import pathlib  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
from absl import flags  # noqa: E402

from bigmac_jax.commands import cli  # noqa: E402
from bigmac_jax.config import load_config  # noqa: E402
from bigmac_jax.planning.place import Request  # noqa: E402
from bigmac_jax.planning.planner import make_plan  # noqa: E402

_CONFIG = flags.DEFINE_string(
    "config", "configs/paper/gpt3_xl.py", "Config file; --config.a.b=value overrides a field."
)
_TOPOLOGIES = flags.DEFINE_list("topologies", "v5e:4x8,v6e:4x8,v5p:2x4x4", "Slices of 32 chips.")
_STRUCTURES = flags.DEFINE_list("structures", "bigmac,fine_grained", "Structures.")
_PICTURE = flags.DEFINE_string("picture", "", "Where the picture is written.")

# What fits: v5e has 16 GB a chip.
PARTS = {"v5e": 8}
SETTINGS = ("mesh.expert=32", "execution.remat=layer", "execution.overlap_chunks=4")


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    lines = []
    for topology in _TOPOLOGIES.value:
        for structure in _STRUCTURES.value:
            parts = PARTS.get(topology.partition(":")[0], 4)
            overrides = (*SETTINGS, f"train.accumulate_steps={parts}", *cli.OVERRIDES, f"model.structure={structure}")
            line = _line(make_plan(load_config(_CONFIG.value, overrides), Request(topology=topology, compile=True)))
            lines.append({"topology": topology, "structure": structure} | line)
            print(json.dumps(lines[-1]), flush=True)
    if _PICTURE.value:
        _draw(lines, pathlib.Path(_PICTURE.value))


def _line(plan: dict[str, Any]) -> dict[str, Any]:
    program = plan["program"]
    schedule = program["schedule"]
    return {
        "compile_s": program["compile_seconds"],
        "memory_gib": round(program["memory"]["total"] / 2**30, 2),
        "available_gib": round(program["memory_available"] / 2**30, 2),
        "asynchronous": f"{schedule['asynchronous_in_a_layer']} of {schedule['exchanges_in_a_layer']}",
        "estimated_step_s": round(schedule["estimated_step_seconds"], 4),
        "exchange_s": round(schedule["exchange_seconds"], 4),
        "hidden_s": round(schedule["hidden_seconds"], 4),
        "hidden_share": round(schedule["hidden_share"], 3),
        "ceiling": round(schedule["ceiling"], 3),
        "busy_share": round(schedule["busy_seconds"] / schedule["exchange_seconds"], 3),
        "reached_of_ceiling": round(schedule["reached_of_ceiling"], 3),
    }


def _draw(lines: list[dict[str, Any]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"{line['structure']}\n{line['topology']}" for line in lines]
    seconds = [line["exchange_s"] for line in lines]
    hidden = [100 * line["hidden_share"] for line in lines]
    ceiling = [100 * line["ceiling"] for line in lines]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 3.6), layout="constrained")
    left.bar(names, seconds, color="#c0504d", hatch="//", edgecolor="white")
    for number, value in enumerate(seconds):
        left.text(number, value, f"{value:.2f}", ha="center", va="bottom")
    left.set(title="seconds of exchange a step, by the hardware file", ylim=(0, 1.1 * max(seconds)))
    places, half = range(len(lines)), 0.4
    for shift, shares, label, color in ((0, hidden, "is hidden", "#1f4e79"), (half, ceiling, "could be", "#8eb4e3")):
        right.bar([place + shift for place in places], shares, half, label=label, color=color)
        for place, share in zip(places, shares, strict=True):
            right.text(place + shift, share, f"{share:.0f} %", ha="center", va="bottom", fontsize=8)
    right.set_xticks([place + half / 2 for place in places], names)
    right.set(title="share of the exchange behind matmuls, %", ylim=(0, 100))
    right.legend()
    for axes in (left, right):
        axes.tick_params(axis="x", labelsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    cli.run(main)
