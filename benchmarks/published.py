"""The planner against published runs: python -m benchmarks.published [--fit] [--terms] [--search] [--docs=docs].

Predicts every run of `bigmac_jax/planning/published` from its shape, machine and layout, and prints the error: tokens a
second predicted over measured, minus one. One constant for each kind of machine, the share of its peak that products
reach, is fitted to two thirds of the rows (--fit); a third, chosen by a hash of what the rows say, judges. --docs
writes docs/planning-truth.md's tables, its picture and docs/results/published.md. Half a minute of one core.
"""

import argparse
import collections
import dataclasses
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.markers import put
from bigmac_jax.config import Config, DataConfig, ExecutionConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from bigmac_jax.planning.candidates import Machine
from bigmac_jax.planning.cost import step_time
from bigmac_jax.planning.hardware import load_hardware
from bigmac_jax.planning.job import TERMS, Times
from bigmac_jax.planning.published import Run, load_runs, machine_of, predict_run
from bigmac_jax.planning.search import flags as changed_flags
from bigmac_jax.planning.search import search

# Machines that share a constant, and the watts of the one whose share it is: those of others take and give it in
# proportion.
KINDS = {
    "h100": "Hopper", "h200": "Hopper", "h800": "Hopper", "v5e": "TPU v5", "v5p": "TPU v5",
    "b200": "Blackwell", "b300": "Blackwell", "gb200": "Blackwell", "gb300": "Blackwell",
}  # fmt: skip
WATTS = {"Hopper": 700, "Blackwell": 1200}
GROUPS: dict[str, Callable[[Run], bool]] = {
    "all": lambda run: True,
    "MoE": lambda run: run.is_moe,
    "dense": lambda run: not run.is_moe,
    "GPU": lambda run: load_hardware(run.machine).platform == "gpu",
    "TPU": lambda run: load_hardware(run.machine).platform == "tpu",
}
TITLE = """# Published runs, measured and predicted

Tokens a second of a device. Made by `python -m benchmarks.published --docs=docs`;
[planning-truth.md](../planning-truth.md) says what it means.

"""
# A term of which a row's step has less is none of that row's.
CONCERNED = 0.02
# Runs whose model, sharding and precision a config of ours can say.
SEARCHED = (
    "Qwen3-30B-A3B | 8 | 12,040",
    "Qwen3-30B-A3B | 16 H100, EP16 | 244.0",
    "Qwen3-30B | GB200 | 504.2",
    "Llama2-7B, BS2 | 8 H100 | 11,362",
    "Qwen3-30B, DeepEP | 8 GPUs of B200 class | 14,796",
    "Qwen3-30B, DeepEP | 128 GPUs of B200 class | 13,856",
    "dense 32B | 256 v5e, seq 2048 | 132",
)


def kind_of(run: Run) -> str:
    return KINDS.get(run.machine, run.machine)


def share_of(run: Run, share: float) -> float:
    """The share of the peak of a run's machine, if its kind's is `share`."""
    watts = load_hardware(run.machine).watts
    return share * watts / WATTS[kind_of(run)] if watts else share


def error(run: Run, share: float = 0.0, without: str = "") -> float:
    """Tokens a second predicted over measured, minus one.

    Args:
      share: of the kind, instead of the hardware files'.
      without: a term that is left out.
    """
    times = predict_run(run, machine_of(run, share_of(run, share)))
    if without:
        times = dataclasses.replace(times, **{without: 0.0})
    return times.tokens_per_s / run.devices / run.measured() - 1


def fit(runs: Iterable[Run], without: str = "") -> dict[str, float]:
    """The share of the peak for each kind that makes the mean of |log(predicted / measured)| smallest."""
    by_kind = collections.defaultdict(list)
    for run in runs:
        if not run.set_aside:
            by_kind[kind_of(run)].append(run)

    def miss(share: float, of_kind: Sequence[Run]) -> float:
        return statistics.fmean(abs(math.log(1 + error(of, share, without))) for of in of_kind)

    return {
        kind: min((n / 100 for n in range(20, 101)), key=lambda share: miss(share, of_kind))
        for kind, of_kind in sorted(by_kind.items())
    }


def summary(errors: Sequence[float]) -> dict[str, Any]:
    sizes = [abs(size) for size in errors]
    return {
        "rows": len(sizes),
        "median": statistics.median(sizes),
        "within_25": sum(size <= 0.25 for size in sizes) / len(sizes),
        "mean": statistics.fmean(errors),
    }


def without(term: str, runs: Sequence[Run]) -> dict[str, Any] | None:
    """What the errors of rows set aside are without a term, its constant fitted anew, over the rows that it concerns;
    None where it concerns none."""
    concerned = [run for run in runs if run.set_aside and _share(predict_run(run), term) >= CONCERNED]
    if not concerned:
        return None
    shares = fit(runs, term)
    found = [error(run, shares[kind_of(run)], term) for run in concerned]
    return {"with": summary([error(run) for run in concerned]), "without": summary(found)}


def _share(times: Times, term: str) -> float:
    return getattr(times, term) / times.total


def as_config(run: Run) -> tuple[Config, dict[str, int]]:
    """The run as a config of ours, with moments in 16 bits, and its mesh's ranks by axis."""
    shape = run.shape()
    a, moe, devices = shape.attention, shape.moe, run.devices * load_hardware(run.machine).cores
    experts: dict[str, Any] = {"structure": "dense", "expert_hidden_size": shape.mlp.width}
    if moe:
        experts = {"structure": "fine_grained", "num_experts": moe.experts, "top_k": moe.top_k,
                   "expert_hidden_size": moe.width, "capacity_factor": run.capacity or math.inf}  # fmt: skip
    model = ModelConfig(
        num_layers=a.layers, hidden_size=shape.hidden, num_heads=a.heads, num_kv_heads=a.kv_heads,
        head_dim=a.head_size, vocab_size=shape.vocab, gated=shape.gated, activation="silu", tie_embeddings=shape.tied,
        balance="none" if run.routing == "forced" else "bias", **experts,
    )  # fmt: skip
    parts = max(1, round(run.batch / devices / run.micro * load_hardware(run.machine).cores))
    config = Config(
        model=model,
        execution=ExecutionConfig(
            dtype="bfloat16",
            reduce_dtype="bfloat16",
            exchange="dedup" if run.dedup else "all_to_all",
            remat="layer" if run.remat == "layer" else "none",
        ),
        mesh=MeshConfig(expert=run.expert, fsdp=True),
        data=DataConfig(tokenizer="", sequence_length=run.length, batch_size=run.batch),
        train=TrainConfig(accumulate_steps=parts),
        optimizer=OptimizerConfig(moment_dtype="bfloat16"),
    )  # fmt: skip
    return config, {"data": devices // run.expert, "node": 1, "expert": run.expert, "tensor": 1}


def search_run(run: Run) -> dict[str, Any]:
    """The published mesh and the best that a search finds, by the model."""
    hardware = load_hardware(run.machine)
    config, sizes = as_config(run)
    theirs = step_time(config, sizes, hardware)
    best = search(config, Machine(math.prod(sizes.values()), hardware, headroom=0))[0]
    return {
        "row": run.row,
        "published": theirs.tokens_per_s / run.devices,
        "best": best.times.tokens_per_s / run.devices,
        "fits": best.fits,
        "differs": changed_flags(config, best.config),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, what in (
        ("fit", "fits the constants, and prints them beside those of the hardware files"),
        ("terms", "prints each run's terms, as shares of its step"),
        ("search", "searches for a faster mesh for those runs that a config can say"),
    ):
        parser.add_argument(f"--{name}", action="store_true", help=what)
    parser.add_argument("--docs", help="writes the page, its picture and the results to this folder")
    asked, runs = parser.parse_args(), load_runs()
    if asked.fit:
        for kind, share in fit(runs).items():
            held = {run.machine: load_hardware(run.machine).matmul_efficiency for run in runs if kind_of(run) == kind}
            print(f"{kind}: {share:.2f}; in the hardware files {held}")
    for run in sorted(runs, key=lambda run: (kind_of(run), run.model)):
        times = predict_run(run)
        mark = "*" if run.set_aside else " "
        print(f"{mark} {error(run):+6.0%}  {run.measured():9,.0f}  {run.row} [{run.software}] {run.precision}")
        if asked.terms:
            shares = {name: _share(times, name) for name in TERMS}
            print(" " * 21 + ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005))
    for name, choose in GROUPS.items():
        for aside in (True, False):
            found = summary([error(run) for run in runs if choose(run) and run.set_aside == aside])
            print(
                f"{'set aside' if aside else 'fitted to'}, {name}: rows | median | within 25 % | mean: {_words(found)}"
            )
    searched = [search_run(run) for run in runs if run.row in SEARCHED] if asked.search or asked.docs else []
    for found in searched:
        rates = f"{found['published']:,.0f} as published, {found['best']:,.0f}"
        print(f"{found['row']}: {rates} with {' '.join(found['differs'])}")
    if asked.docs:
        write(pathlib.Path(asked.docs), runs, searched)


def _words(found: dict[str, Any]) -> str:
    return " | ".join(
        (str(found["rows"]), f"{found['median']:.1%}", f"{found['within_25']:.0%}", f"{found['mean']:+.1%}")
    )


def write(docs: pathlib.Path, runs: Sequence[Run], searched: Sequence[dict[str, Any]]) -> None:
    """Writes the tables of the page, the picture and the results."""
    page = docs / "planning-truth.md"
    rows = [f"| | {' | '.join(('rows', 'median', 'within 25 %', 'mean'))} |\n|---|---|---|---|---|\n"]
    for aside in (True, False):
        for name, choose in GROUPS.items():
            found = summary([error(run) for run in runs if choose(run) and run.set_aside == aside])
            label = ("set aside" if aside else "fitted to") + ("" if name == "all" else f", {name}")
            rows.append(f"| {label} | {_words(found)} |\n")
    put(page, rows, name="errors")
    constants = ["| kind | share of the peak that products reach | rows |\n|---|---|---|\n"]
    for kind, share in fit(runs).items():
        count = sum(kind_of(run) == kind and not run.set_aside for run in runs)
        constants.append(f"| {kind} | {share:.2f}{f' at {WATTS[kind]:,} W' if kind in WATTS else ''} | {count} |\n")
    put(page, constants, name="constants")
    ablated = {term: found for term in TERMS if term != "matmul" and (found := without(term, runs))}
    terms = ["| term | rows set aside | median, with → without | within 25 % |\n|---|---|---|---|\n"]
    for term, found in ablated.items():
        a, b = found["with"], found["without"]
        median, within = f"{a['median']:.1%} → {b['median']:.1%}", f"{a['within_25']:.0%} → {b['within_25']:.0%}"
        terms.append(f"| {term}: {TERMS[term]} | {a['rows']} | {median} | {within} |\n")
    put(page, terms, name="terms")
    meshes = ["| run | tokens/s a device, its mesh → the best found | what differs |\n|---|---|---|\n"]
    for found in searched:
        differs = " ".join(flag.removeprefix("--config.") for flag in found["differs"])
        meshes.append(f"| {_cell(found['row'])} | {found['published']:,.0f} → {found['best']:,.0f} | `{differs}` |\n")
    put(page, meshes, name="meshes")
    table = ["| model, machine, figure | program | measured | predicted | error |\n|---|---|---|---|---|\n"]
    for run in sorted(runs, key=lambda run: (not run.set_aside, kind_of(run), run.model)):
        predicted = run.measured() * (1 + error(run))
        mark = " (aside)" if run.set_aside else ""
        figures = f"{run.measured():,.0f} | {predicted:,.0f} | {error(run):+.0%}"
        table.append(f"| {_cell(run.row)}{mark} | {run.software} | {figures} |\n")
    put(docs / "results" / "published.md", table, title=TITLE)
    draw(docs / "images" / "planning-truth.png", runs)


def _cell(text: str) -> str:
    return text.replace(" | ", ", ")


def draw(path: pathlib.Path, runs: Sequence[Run]) -> None:
    """Predicted against measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    for number, kind in enumerate(sorted({kind_of(run) for run in runs})):
        for aside, marker in ((False, "."), (True, "o")):
            chosen = [run for run in runs if kind_of(run) == kind and run.set_aside == aside]
            axes.plot([run.measured() for run in chosen], [run.measured() * (1 + error(run)) for run in chosen], marker,
                      color=f"C{number}", fillstyle="none" if aside else "full",
                      label=kind if not aside else None)  # fmt: skip
    ends = (80, 60_000)
    axes.loglog(ends, ends, color="0.5", linewidth=1)
    axes.fill_between(ends, [0.75 * end for end in ends], [1.25 * end for end in ends], color="0.9", zorder=0)
    axes.set_xlabel("tokens/s a device, published")
    axes.set_ylabel("predicted")
    axes.set_title("139 published runs; rings: no constant was fitted to them; grey: within 25 %", fontsize=10)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
