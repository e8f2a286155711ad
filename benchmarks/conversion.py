"""What a converted model reaches: python -m benchmarks.conversion [--folder=runs/conversion --seeds=1234,1,2].

Narrow: configs/tiny.py as fine_grained without shared experts, converted to a quarter of the exchange's width, and
trained for a tenth of its tokens, on the text alone or beside its teacher; against bigmac from the start, on the
teacher's and the added tokens together. Upcycled: the dense model, trained for half of the steps, then as many more as
dense and as experts, for each seed. Each run is a process of its own; started again, it goes on where it stopped.
"""

import json
import pathlib
import subprocess
import sys
from typing import Any

from absl import app, flags

from bigmac_jax.runtime.storage import write_atomically

_FOLDER = flags.DEFINE_string("folder", "runs/conversion", "Of the runs.")
_SEEDS = flags.DEFINE_list("seeds", ["1234", "1", "2"], "Of the upcycled runs.")
_ONLY = flags.DEFINE_list("only", ["narrow", "upcycled"], "Which of the two.")
_OUTPUT = flags.DEFINE_string("output", "docs/results/conversion.json", "Where the figures go.")

STEPS = 2400
MORE = STEPS // 10
UPCYCLED_AT, UPCYCLED_MORE = 1200, 300
# As the whole schedule's end, with a warm-up of its own.
SCHEDULE = {"optimizer.learning_rate": 2e-3, "optimizer.warmup_steps": 20}
FINE = {"model.structure": "fine_grained", "model.num_shared_experts": 0}
# Flags of the conversion and fields of the training behind it.
NARROW: dict[str, tuple[list[str], dict[str, Any]]] = {
    "text": ([], {}),
    "teacher": ([], {"tuning.teacher_weight": 0.5}),
    "teacher alone": ([], {"tuning.teacher_weight": 1.0}),
    "teacher alone, twice the rate": ([], {"tuning.teacher_weight": 1.0, "optimizer.learning_rate": 4e-3}),
    "teacher alone, three times": ([], {"tuning.teacher_weight": 1.0, "optimizer.learning_rate": 6e-3}),
    "teacher and layers": ([], {"tuning.teacher_weight": 0.5, "tuning.hidden_weight": 1.0}),
    "teacher, norm": (["--latent_norm=post_combine"], {"tuning.teacher_weight": 0.5}),
}


def main(_: list[str]) -> None:
    folder, output = pathlib.Path(_FOLDER.value), pathlib.Path(_OUTPUT.value)
    found = json.loads(output.read_text()) if output.exists() else {"name": "conversion"}
    for name in _ONLY.value:
        for key, figures in {"narrow": _narrow, "upcycled": _upcycled}[name](folder):
            found.setdefault(name, {})[key] = figures
            write_atomically(output, (json.dumps(found, indent=1) + "\n").encode())
            print(f"{name}, {key}: {figures}", flush=True)


def _narrow(folder: pathlib.Path) -> Any:
    fine = folder / "fine"
    yield "fine_grained", _train(fine, STEPS, FINE)
    for name, (given, fields) in NARROW.items():
        run = folder / f"narrow {name}"
        fields = SCHEDULE | ({"tuning.teacher": fine} | fields if fields else {})
        report = _convert("latent", fine, run, ["--ratio=0.25", *given], MORE, fields)
        yield f"narrow, {name}", _train(run, MORE, {}, run / "config.json") | {
            "untrained": report["loss_after"], "experts": report["experts"], "layers": report["layers"],
        }  # fmt: skip
    start = {"model.num_shared_experts": 0, "model.latent_norm": "post_combine", "model.projection_init": "random"}
    yield "bigmac", _train(folder / "scratch", STEPS + MORE, start)


def _upcycled(folder: pathlib.Path) -> Any:
    for seed in _SEEDS.value:
        dense, fields = folder / f"dense {seed}", SCHEDULE | {"train.seed": seed}
        own = {"model.structure": "dense", "model.num_shared_experts": 0, "train.seed": seed}
        figures = {"dense": _train(dense, UPCYCLED_AT, own)["loss"]}
        more = folder / f"dense {seed} more"
        figures["dense, more"] = _train(more, UPCYCLED_MORE, fields | {"train.init_from": dense}, None)["loss"]
        sparse = folder / f"upcycled {seed}"
        report = _convert("upcycle", dense, sparse, ["--experts=8", "--top_k=2"], UPCYCLED_MORE, fields)
        figures |= {"before": report["loss_before"], "upcycled": report["loss_after"]}
        figures["upcycled, more"] = _train(sparse, UPCYCLED_MORE, {}, sparse / "config.json")["loss"]
        yield seed, figures


def _train(
    run: pathlib.Path, steps: int, fields: dict[str, Any], config: pathlib.Path | str | None = "configs/tiny.py"
) -> dict[str, Any]:
    """The last validation loss of a run."""
    steps_of = {"train.steps": steps, "train.eval_every": steps // 4, "train.checkpoint_every": steps // 4}
    given = [f"--config.{name}={value}" for name, value in (fields | steps_of).items()]
    own = [f"--config={config}"] if config else []
    _run("train.py", f"--workdir={run}", *own, *given)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"loss": [record["eval/loss"] for record in records if "eval/loss" in record][-1], "steps": steps}


def _convert(
    action: str, source: pathlib.Path, run: pathlib.Path, given: list[str], steps: int, fields: dict[str, Any]
) -> dict[str, Any]:
    """conversion.json of a run, which is made if it is not there."""
    if not (run / "config.json").exists():
        fields = fields | {"train.steps": steps}
        own = [f"--config.{name}={value}" for name, value in fields.items()]
        _run("convert.py", action, f"--workdir={source}", f"--output={run}", *given, *own)
    return json.loads((run / "conversion.json").read_text())


def _run(*argv: str) -> None:
    subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    app.run(main)
