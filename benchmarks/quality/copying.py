"""How much of a loss is in tokens that could be copied: python -m benchmarks.quality.copying RUN... [--windows=160]

A token can be copied where the one before it stood in the window already, and was followed by it the last time: what an
induction head predicts (Olsson et al. 2022, arXiv 2209.11895). Models learn that at some point of their training, some
seeds earlier than others. Read are windows of the held-out text (benchmarks.quality.unrepeated), drawn with one seed;
the runs' checkpoints are where --folder of benchmarks.quality left them.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

import bigmac_jax
from benchmarks.quality.runs import write
from benchmarks.quality.unrepeated import CORPUS

_LENGTH, _ROWS = 256, 16  # tokens of a window, windows at a time
OUTPUT = pathlib.Path("docs/results/copying.json")


def can_be_copied(tokens_L: np.ndarray) -> np.ndarray:
    """Whether each token but the first is the one that followed on the same token the last time → [L - 1]."""
    followed, found = dict[int, int](), []
    for before, token in zip(tokens_L[:-1].tolist(), tokens_L[1:].tolist(), strict=True):
        found.append(followed.get(before) == token)
        followed[before] = token
    return np.array(found)


def read_windows(tokenizer: pathlib.Path, text: pathlib.Path, count: int) -> np.ndarray:
    """Windows of the documents of a file, one behind the other → [count, L + 1]."""
    encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    documents = (json.loads(line)["text"] for line in text.read_text().splitlines())
    tokens = np.concatenate([encoder.encode(document).ids for document in documents]).astype(np.int32)
    starts = np.random.default_rng(0).integers(0, len(tokens) - _LENGTH - 1, count)
    return np.stack([tokens[start : start + _LENGTH + 1] for start in starts])


def measure(run: pathlib.Path, windows_NL: np.ndarray) -> dict[str, Any]:
    """A run's losses, of tokens that can be copied and of the others, nats a token."""
    _, model = bigmac_jax.restore(run)

    @jax.jit
    def losses(tokens_BL: jax.Array) -> jax.Array:
        logits_BLV, _ = model(tokens_BL[:, :-1], evaluating=True)
        logs_BLV = jax.nn.log_softmax(logits_BLV.astype(jnp.float32))
        return -jnp.take_along_axis(logs_BLV, tokens_BL[:, 1:, None], axis=2)[..., 0]

    found = np.concatenate([losses(windows_NL[i : i + _ROWS]) for i in range(0, len(windows_NL), _ROWS)])
    copied = np.stack([can_be_copied(window) for window in windows_NL])
    return {
        "key": run.name,
        "loss": round(float(found.mean()), 4),
        "copied": round(float(found[copied].mean()), 4),
        "others": round(float(found[~copied].mean()), 4),
        "share": round(float(copied.mean()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.copying")
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="Folders of runs.")
    parser.add_argument("--windows", type=int, default=160, help=f"Windows of {_LENGTH} tokens.")
    given = parser.parse_args()
    known = {run["key"]: run for run in json.loads(OUTPUT.read_text())["runs"]} if OUTPUT.exists() else {}
    windows_NL = read_windows(given.runs[0] / "tokenizer.json", CORPUS / "validation.jsonl", given.windows)
    for run in given.runs:
        known[run.name] = measure(run, windows_NL)
        write(OUTPUT, "copying", list(known.values()))
        print(json.dumps(known[run.name], allow_nan=False), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
