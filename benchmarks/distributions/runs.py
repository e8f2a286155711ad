"""Trains what a study compares, one process a run, and reads what it came to, domain by domain."""

import json
import pathlib
import shutil
import time
from typing import Any

import numpy as np

from benchmarks.distributions.domains import write_domains
from benchmarks.distributions.grid import Condition
from benchmarks.quality.runs import CONFIG, ROOT, command
from bigmac_jax.config import DataConfig, load_config
from bigmac_jax.data.corpus import open_documents
from bigmac_jax.data.tokenizer import train_bpe

Run = tuple[Condition, int]


def prepare(folder: pathlib.Path, size: int) -> None:
    """Writes the domains, and a tokenizer that was trained on the training text of all of them."""
    files = write_domains(folder, size)
    file = folder / "tokenizer.json"
    if not file.exists():
        data = DataConfig(mixture=",".join(f"{path}=1" for path in files.values()))
        size = load_config(ROOT / CONFIG).model.vocab_size
        part = file.with_suffix(".part")
        part.write_text(train_bpe(open_documents(data, "train", str(folder / "cache")).all_text(), size))
        part.replace(file)


def train(condition: Condition, seed: int, folder: pathlib.Path, cores: list[int]) -> dict[str, Any]:
    """Runs train.py, which goes on where it was stopped, and eval.py; raises RuntimeError with its last line."""
    key = condition.key(seed)
    workdir, start = folder / key, time.monotonic()
    fields = [f"--config.{field}" for field in condition.overrides(seed, folder.absolute())]
    command(workdir, cores, "train.py", f"--config={CONFIG}", f"--config.cache_dir={folder / 'cache'}", *fields)
    said = command(workdir, cores, "eval.py", "--sources=all", "--split=validation", "--json")
    found = json.loads(said.splitlines()[-1])
    for score in found["sources"].values():
        loads = score.pop("load")
        score["max_load_by_layer"] = [round(max(load), 3) for load in loads]
    record = {
        "key": key, "name": condition.name, "structure": condition.structure, "trained": condition.trained,
        "then": condition.then, "balance": condition.balance, "seed": seed, "steps": condition.steps,
        "read": found["sources"], "specialisation": found["specialisation"],
    }  # fmt: skip
    record |= read(workdir) | {"seconds": round(time.monotonic() - start)}
    shutil.rmtree(workdir / "checkpoints")
    return record


def read(workdir: pathlib.Path) -> dict[str, Any]:
    """From the run's metrics: losses by domain at evaluations; drops, load and router entropy over the steps."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "moe/load_cv" in record]
    names = ("moe/drop_rate", "moe/load_cv", "moe/max_load", "moe/router_entropy")
    series = {name.partition("/")[2]: [round(record[name], 5) for record in steps] for name in names}
    evaluations = [
        [r["step"], {n.removeprefix("eval/loss/"): round(v, 5) for n, v in r.items() if n.startswith("eval/loss/")}]
        for r in records
        if "eval/loss" in r
    ]
    last = slice(-max(1, len(steps) // 10), None)
    return {
        "evaluations": evaluations,
        "step": [record["step"] for record in steps],
        "series": series,
        "drop_rate": round(float(np.mean(series["drop_rate"][last])), 5),
        "load_cv": round(float(np.mean(series["load_cv"][last])), 5),
    }
