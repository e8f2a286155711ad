"""Does masking documents cost quality? python -m benchmarks.documents [--steps=1200 --seeds=1,2,3]

Trains configs/tiny.py on the paragraphs of the embedded corpus, each a document of its own, with documents that see
each other and without, and scores every run both ways: windows of the stream, and document by document. Runs are
resumed where they stopped; what is finished is not run again. Prints a JSON line a run, and writes them all.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
from absl import app, flags

from bigmac_jax.config import load_config
from bigmac_jax.data.corpus import open_documents

_STEPS = flags.DEFINE_integer("steps", 1200, "Of a run.", lower_bound=1)
_SEEDS = flags.DEFINE_list("seeds", ["1", "2", "3"], "Of train.seed.")
_FOLDER = flags.DEFINE_string("folder", "runs/documents", "Of the paragraphs and the runs.")
_OUTPUT = flags.DEFINE_string("output", "docs/results/documents.json", "Where the figures go.")

CASES = {
    "stream": (),
    "masked": ("data.documents=masked",),
    "masked, best_fit": ("data.documents=masked", "data.packing=best_fit"),
}


def main(_: list[str]) -> None:
    folder = pathlib.Path(_FOLDER.value)
    sizes = _paragraphs(folder)
    found = []
    for seed in _SEEDS.value:
        for name, overrides in CASES.items():
            workdir = folder / f"{name.replace(', ', '-')}-{_STEPS.value}-{seed}"
            _python(
                "train.py", f"--workdir={workdir}", f"--config.train.steps={_STEPS.value}",
                "--config.train.eval_every=0",
                f"--config.data.source={folder}/train.jsonl", f"--config.train.seed={seed}",
                f"--config.data.validation_source={folder}/validation.jsonl", *(f"--config.{o}" for o in overrides),
            )  # fmt: skip
            run = {"case": name, "seed": int(seed), "steps": _STEPS.value}
            for reading in ("stream", "masked"):
                score = _python(
                    "eval.py", f"--workdir={workdir}", "--split=validation", f"--documents={reading}", "--json"
                )
                run[f"loss, read {reading}"] = json.loads(score.splitlines()[-1])["loss"]
            run["tokens_per_s"] = _rate(workdir)
            found.append(run)
            print(json.dumps(run), flush=True)
    pathlib.Path(_OUTPUT.value).write_text(
        json.dumps({"name": "documents", "paragraphs": sizes, "runs": found}, indent=1) + "\n"
    )
    for name in CASES:
        runs = [run for run in found if run["case"] == name]
        for reading in ("stream", "masked"):
            losses = [run[f"loss, read {reading}"] for run in runs]
            error = np.std(losses, ddof=1) / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
            print(f"{name}, read {reading}: {np.mean(losses):.4f} ± {error:.4f}")


def _paragraphs(folder: pathlib.Path) -> dict[str, int]:
    """Writes each split's paragraphs as documents → how many they are."""
    folder.mkdir(parents=True, exist_ok=True)
    config, sizes = load_config("configs/tiny.py"), {}
    for split in ("train", "validation"):
        texts = open_documents(config.data, split, config.cache_dir)
        rows = [line.strip() for text in texts for line in text.split("\n") if line.strip()]
        content = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        path = folder / f"{split}.jsonl"
        if not path.exists() or path.read_text() != content:
            path.write_text(content)
        sizes[split] = len(rows)
    return sizes


def _rate(workdir: pathlib.Path) -> float:
    """Median tokens a second of the second half."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rates = [record["tokens_per_s"] for record in records if "tokens_per_s" in record]
    return round(float(np.median(rates[len(rates) // 2 :])))


def _python(*arguments: str) -> str:
    run = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(f"{' '.join(arguments)} ended with exit code {run.returncode}")
    return run.stdout


if __name__ == "__main__":
    app.run(main)
