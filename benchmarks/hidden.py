"""How much of the exchange a TPU's schedule hides: python -m benchmarks.hidden [--topologies=…] [--picture=PATH].

Compiles a training step of GPT3-XL with 64 experts at ep = 32 (0.5 M tokens, in parts; four overlap chunks) for slices
that are not there, bigmac and fine_grained, and reads what stands between the start and the end of each exchange. Needs
libtpu (the extra `tpu`); one to three minutes a program. JSON lines; a picture.
"""

from bigmac_jax import environment

environment.prepare()

import json  # noqa: E402
import pathlib  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
from absl import flags  # noqa: E402

from bigmac_jax import cli  # noqa: E402
from bigmac_jax.config import load_config  # noqa: E402
from bigmac_jax.planning.plan import Request, make_plan  # noqa: E402

_CONFIG = flags.DEFINE_string(
    "config", "configs/paper/gpt3_xl.py", "Config file; --config.a.b=value overrides a field."
)
_TOPOLOGIES = flags.DEFINE_list("topologies", "v5e:4x8,v6e:4x8,v5p:2x4x4", "Slices of 32 chips.")
_STRUCTURES = flags.DEFINE_list("structures", "bigmac,fine_grained", "Structures.")
_PICTURE = flags.DEFINE_string("picture", "", "Where the picture is written.")

# What fits: v5e has 16 GB a chip.
PARTS = {"v5e": 8}
SETTINGS = ("mesh.expert=32", "model.remat=True", "model.overlap_chunks=4")


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
        "exchange_s": round(schedule["exchange_seconds"], 4),
        "hidden_s": round(schedule["hidden_seconds"], 4),
        "hidden_share": round(schedule["hidden_share"], 3),
        "ceiling": round(schedule["ceiling"], 3),
        "reached_of_ceiling": round(schedule["reached_of_ceiling"], 3),
    }


def _draw(lines: list[dict[str, Any]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    names = [f"{line['structure']}\n{line['topology']}" for line in lines]
    hidden = [line["hidden_s"] for line in lines]
    could = [line["ceiling"] * line["exchange_s"] - line["hidden_s"] for line in lines]
    rest = [line["exchange_s"] * (1 - line["ceiling"]) for line in lines]
    bottom = [0.0] * len(lines)
    parts = (("hidden behind matmuls", hidden, "#1f4e79", ""), ("could be", could, "#8eb4e3", ".."),
             ("cannot be", rest, "#c0504d", "//"))  # fmt: skip
    for label, values, color, hatch in parts:
        axes.bar(names, values, bottom=bottom, label=label, color=color, hatch=hatch, edgecolor="white")
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    for number, line in enumerate(lines):
        axes.text(number, line["exchange_s"], f"{100 * line['hidden_share']:.0f} %", ha="center", va="bottom")
    axes.set_ylabel("seconds of exchange a step")
    axes.set_title("GPT3-XL, ep = 32: the exchange by the hardware file, and the share that the schedule hides")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    cli.run(main)
