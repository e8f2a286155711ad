"""Damaged files as the programs meet them: recovered from, or one line and exit code 2; never other losses."""

import json
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import NamedTuple

import forks
import pytest
from training.tools import read_records, write_config

from .mutations import damage

SLOWEST = 20.0  # seconds more than without damage
TRAIN = ("train.py", "--config={here}/config.json", "--workdir={here}/run", "--config.cache_dir={here}/cache")
TO_4, TO_8 = ("--config.train.steps=4",), ("--config.train.steps=8",)
EVAL = ("eval.py", "--workdir={here}/run", "--json")
GENERATE = ("generate.py", "--workdir={here}/run", "--prompt=the state", "--max_tokens=8", "--json")
REPORT = ("bigmac_jax/report/__main__.py", "{here}/run", "-o", "{here}/report.html")
EXPORT = ("convert.py", "export", "--workdir={here}/run", "--output={here}/exported", "--max_shard_size=20KB")
IMPORT = ("convert.py", "import", "--checkpoint={here}/exported", "--workdir={here}/imported")
# (file, what reads it, seeds)
DAMAGES: list[tuple[str, Sequence[str], Sequence[int]]] = [
    ("run/config.json", (*TRAIN, *TO_8), (0, 7, 11)),
    ("run/run.json", (*TRAIN, *TO_8), (1, 9, 11)),
    ("run/metrics.jsonl", (*TRAIN, *TO_8), (2, 7, 11)),
    ("run/checkpoints/4/manifest.json", (*TRAIN, *TO_8), (3, 5, 7)),
    ("run/tokenizer.json", (*TRAIN, *TO_8), (4, 11)),
    ("cache/tokens/train-*/index.json", (*TRAIN, *TO_8), (9, 11)),
    ("cache/tokenizers/bpe-*.json", (*TRAIN, *TO_8), (0, 11)),
    ("run/config.json", EVAL, (3, 6, 9)),
    ("run/checkpoints/4/manifest.json", EVAL, (8,)),
    ("run/tokenizer.json", GENERATE, (7, 11)),
    ("run/run.json", GENERATE, (5,)),
    ("run/metrics.jsonl", REPORT, (8, 11)),
    ("exported/config.json", IMPORT, (6, 7)),
    ("exported/model.safetensors.index.json", IMPORT, (7,)),
]


class Ended(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float


def commands(folder: pathlib.Path, cases: dict[str, list[str]]) -> dict[str, Ended]:
    """What became of each, one after another."""
    folder.mkdir()

    def ended(name: str, argv: list[str]) -> Ended:
        out, err, start = folder / f"{name}.out", folder / f"{name}.err", time.monotonic()
        code = forks.start(argv, out, err).wait(100)
        return Ended(code, out.read_text(), err.read_text(), time.monotonic() - start)

    return {name: ended(name, argv) for name, argv in cases.items()}


def at(here: pathlib.Path, argv: Sequence[str]) -> list[str]:
    cpu = () if argv[0].endswith("__main__.py") else ("--cpu_devices=1",)
    return [part.format(here=here) for part in (*argv, *cpu)]


def losses(workdir: pathlib.Path, after: int) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_records(workdir) if "loss" in r and r["step"] > after]


@pytest.mark.full
def test_thirty_of_them(tmp_path: pathlib.Path) -> None:
    start = tmp_path / "start"
    start.mkdir()
    config = json.loads(write_config(start).read_text())
    config["data"]["tokenizer"], config["model"]["vocab_size"] = "bpe", 320
    config["train"] |= {"eval_every": 4, "checkpoint_every": 2}
    config["optimizer"]["schedule"] = "constant"  # the same whether it is to take 4 steps or 8
    (start / "config.json").write_text(json.dumps(config))
    made = commands(tmp_path / "made", {"train": at(start, (*TRAIN, *TO_4)), "export": at(start, EXPORT)})
    assert all(end.code == 0 for end in made.values()), made

    cases: dict[str, list[str]] = {}
    alone: dict[Sequence[str], str] = {}  # of each command, the case whose files are as they should be
    for argv in dict.fromkeys(argv for _, argv, _ in DAMAGES):
        alone[argv] = name = f"alone{len(cases)}"
        shutil.copytree(start, tmp_path / name)
        cases[name] = at(tmp_path / name, argv)
    damaged: dict[str, tuple[str, Sequence[str]]] = {}
    for file, argv, seed in ((file, argv, seed) for file, argv, seeds in DAMAGES for seed in seeds):
        name = f"damaged{len(damaged)}"
        shutil.copytree(start, tmp_path / name)
        (target,) = (tmp_path / name).glob(file)
        damaged[name] = f"{argv[0]}, {damage(target, seed)}", argv
        cases[name] = at(tmp_path / name, argv)
    assert len(damaged) == 30
    ends = commands(tmp_path / "results", cases)
    assert all(ends[name].code == 0 for name in alone.values()), ends

    def wrong(name: str, argv: Sequence[str]) -> str:
        end, whole = ends[name], ends[alone[argv]]
        lines = end.err.splitlines()
        if "Traceback" in end.out + end.err or end.seconds > whole.seconds + SLOWEST or end.code not in (0, 2):
            return "no line, or too late"
        if end.code == 2:
            return "" if [line for line in lines if line.startswith("error: ")] == lines[-1:] else "not one line"
        if argv[0] == "train.py":
            found, wanted = (losses(tmp_path / n / "run", 4) for n in (name, alone[argv]))
            return "" if found == wanted else "other losses"
        if argv in (EVAL, GENERATE) and "is passed over" not in end.err:  # of a checkpoint, then
            return "" if end.out.splitlines()[-1] == whole.out.splitlines()[-1] else "another answer"
        return ""

    bad = [f"{what}: {w}: {ends[name]}" for name, (what, argv) in damaged.items() if (w := wrong(name, argv))]
    assert not bad, "\n\n".join(bad)
    codes = [ends[name].code for name in damaged]
    assert 5 < codes.count(0) < 25, codes  # both happen
