"""How fast a corpus is tokenised, by cores, and in how much memory: python -m benchmarks.corpus [--megabytes=2000]

Writes JSON lines made of the embedded speeches, or with --form=txt one document of them, then runs
`python -m bigmac_jax.data prepare` on one core and on all of them, each with an empty cache, and on all of them as two
processes that share a cache like two hosts. Memory is that of all processes together, shared pages counted once. Prints
a JSON line a run.
"""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

from absl import app, flags

from bigmac_jax.config import Config
from bigmac_jax.data.sotu import speech_files
from bigmac_jax.data.tokenizer import load_tokenizer

_MEGABYTES = flags.DEFINE_integer("megabytes", 2000, "Of the corpus.", lower_bound=1)
_FORM = flags.DEFINE_enum("form", "jsonl", ["jsonl", "txt"], "JSON lines of 100 MB a file, or one .txt.")
_TOKENIZERS = flags.DEFINE_list("tokenizers", ["bytes", "bpe"], "Which.")
_FOLDER = flags.DEFINE_string("folder", "runs/corpus", "Of the corpus and the cache.")
_FILE = 100_000_000  # bytes of a file


def main(_: list[str]) -> None:
    folder = pathlib.Path(_FOLDER.value)
    {"jsonl": write, "txt": write_one}[_FORM.value](folder / "text", _MEGABYTES.value * 10**6)
    config = Config()
    (folder / "bpe.json").write_bytes(load_tokenizer(config).content)
    cores = sorted(os.sched_getaffinity(0))
    for name in _TOKENIZERS.value:
        tokenizer = name if name != "bpe" else str(folder / "bpe.json")
        for kind, sets in (("one core", [cores[:1]]), ("all cores", [cores]), ("a host a core", [[c] for c in cores])):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            print(json.dumps({"tokenizer": name, "cores": kind} | measure(folder, tokenizer, sets)), flush=True)


def write(folder: pathlib.Path, size: int) -> None:
    """Documents of 100 to 8,000 characters, drawn from the speeches."""
    if made(folder, size, ".jsonl"):
        return
    texts, generator, left = [path.read_text() for _, path in speech_files()], random.Random(0), size
    for number in range(-(-size // _FILE)):
        with (folder / f"{number:04}.jsonl").open("wb") as file:
            room = min(_FILE, left)
            left -= room
            while room > 0:
                text = generator.choice(texts)
                at = generator.randrange(max(1, len(text) - 8000))
                row = json.dumps({"text": text[at : at + generator.randrange(100, 8000)]}).encode() + b"\n"
                row = row if len(row) <= room - 30 else b'{"text": "the end"}'.ljust(room - 1) + b"\n"
                file.write(row)
                room -= len(row)


def write_one(folder: pathlib.Path, size: int) -> None:
    """The speeches, one after the other and again from the first, as one document."""
    if made(folder, size, ".txt"):
        return
    text = "\n".join(path.read_text() for _, path in speech_files()).encode()
    with (folder / "document.txt").open("wb") as file:
        while size:
            size -= file.write(text[:size])


def made(folder: pathlib.Path, size: int, suffix: str) -> bool:
    """Whether it is there; else an empty folder is."""
    files = list(folder.iterdir()) if folder.exists() else []
    if files and sum(file.stat().st_size for file in files) == size and files[0].suffix == suffix:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return False


def measure(folder: pathlib.Path, tokenizer: str, sets: list[list[int]]) -> dict[str, float]:
    """One job of each set of cores, all at once."""
    command = [
        sys.executable, "-m", "bigmac_jax.data", "prepare", f"--config.data.source={folder / 'text'}",
        f"--config.data.tokenizer={tokenizer}", f"--config.cache_dir={folder / 'cache'}", "--splits=train",
        "--config.data.validation_source=-", "--config.data.test_source=-",
    ]  # fmt: skip
    jobs = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"}, preexec_fn=lambda cores=cores: os.sched_setaffinity(0, cores),
        )
        for cores in sets
    ]  # fmt: skip
    most = 0
    while any(job.poll() is None for job in jobs):
        most = max(most, sum(memory(job.pid) for job in jobs))
        time.sleep(0.2)
    lines = [job.stdout.read() for job in jobs if job.stdout]
    if any(job.returncode for job in jobs):
        sys.exit(f"{' '.join(command)} failed: {lines}")
    seconds = max(float(line.split()[-2]) for line in lines)
    size = sum(file.stat().st_size for file in (folder / "text").iterdir())
    rate, load = size / seconds, os.getloadavg()[0]
    figures = {"seconds": seconds, "megabytes_per_s": rate / 1e6, "gigabytes_per_hour": 3600 * rate / 1e9}
    return {name: round(v, 2) for name, v in (figures | {"memory_megabytes": most / 1e6, "load": load}).items()}


def memory(process: int) -> int:
    """Bytes of a process and all that it has started."""
    total, queue = 0, [process]
    while queue:
        folder = pathlib.Path(f"/proc/{queue.pop()}")
        try:
            rollup = (folder / "smaps_rollup").read_text()
            total += 1024 * int(rollup.split("Pss:")[1].split()[0])
            for task in (folder / "task").iterdir():
                queue += map(int, (task / "children").read_text().split())
        except (OSError, IndexError):
            continue  # it has ended
    return total


if __name__ == "__main__":
    app.run(main)
