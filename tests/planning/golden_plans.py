"""Plans whose every number is stored: python -m tests.planning.golden_plans writes tests/planning/golden_plans.json.

The requests cross what a plan depends on: structures, exchanges, meshes, machines, ways to keep less, objectives and
what a request adds. A change of the planner that is meant shows in the file's difference what it moves.
"""

import json
import pathlib
from typing import Any

from bigmac_jax.config import load_config, strict_json
from bigmac_jax.planning.place import Request
from bigmac_jax.planning.planner import make_plan

ROOT = pathlib.Path(__file__).parents[2]
FILE = pathlib.Path(__file__).with_suffix(".json")
XL = "configs/paper/gpt3_xl.py"
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "the paper's cluster": (XL, ("mesh.expert=32",), {"devices": 32, "hardware": "paper", "paper": True}),
    "a top-1 structure": (f"{XL}:vanilla", ("mesh.expert=4", "mesh.data=8"), {"devices": 32, "hardware": "paper"}),
    "dense with parts": (
        XL,
        ("model.structure=dense", "mesh.data=32", "mesh.expert=1", "mesh.fsdp=True", "train.accumulate_steps=2"),
        {"topology": "v5e:4x8", "tokens": "300B", "terms": True},
    ),
    "hierarchical, hidden": (
        "configs/modern.py",
        ("mesh.node=4", "mesh.expert=8", "execution.exchange=hierarchical", "execution.overlap_chunks=4"),
        {"topology": "h100:4x8", "terms": True, "imbalance": "1.3"},
    ),
    "dedup on racks": (
        "configs/large.py",
        ("execution.exchange=dedup", "execution.wire_dtype=float8_e4m3", "execution.remat=exchange"),
        {"topology": "gb200:8x64", "terms": True},
    ),
    "ragged, slices": (
        "configs/qwen3_30b.py:bigmac",
        ("mesh.replica=2", "data.batch_size=512", "execution.exchange=ragged", "optimizer.name=muon"),
        {"topology": "v6e:4x8", "slices": 2, "tokens": "15T"},
    ),
    "gathered rows": (
        "configs/latent_moe.py:acc",
        ("mesh.expert=16", "mesh.data=2", "execution.exchange=gather"),
        {"topology": "b200:4x8"},
    ),
    "long texts": ("configs/long.py", (), {"topology": "v5p:4x4x4"}),
    "hybrid, latent": (
        "configs/nemotron3_super.py:v5p",
        ("model.blocks=MEM*E",),
        {"topology": "v5p:4x4x8", "imbalance": "1.1"},
    ),
    "moments on the host": (
        "configs/qwen3_30b.py",
        ("execution.offload_optimizer=True", "execution.remat=offload", "optimizer.moment_dtype=bfloat16"),
        {"topology": "v6e:4x8"},
    ),
    "compared": (
        XL,
        ("mesh.expert=32", "model.latent_norm=skip", "model.projection_init=selection"),
        {"topology": "h100:4x8", "compare": True},
    ),
    "swept": (
        XL,
        ("mesh.expert=32",),
        {"devices": 32, "hardware": "paper", "sweep": ("structure=fine_grained,bigmac", "top_k=2,8")},
    ),
    "searched": ("configs/modern.py", (), {"topology": "h100:1x8", "search": True}),
}


BESIDE = (next(iter(CASES)), "compared")  # whose baselines are stored, too


def plan(case: str) -> dict[str, Any]:
    path, overrides, request = CASES[case]
    made = json.loads(strict_json(make_plan(load_config(f"{ROOT}/{path}", overrides), Request(**request))))
    if case not in BESIDE:
        del made["baselines"]
    if "search" in made:
        made["search"] = made["search"][::10]
    return rounded(made)


def rounded(value: Any) -> Any:
    """Eight digits of every number, which rounding on another machine does not move."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


def main() -> None:
    lines = [f"{json.dumps(case)}: {json.dumps(plan(case), allow_nan=False)}" for case in CASES]
    FILE.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
