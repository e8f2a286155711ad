"""A golden course: 200 steps of configs/tiny.py, made small, on the embedded text, and the batches that it begins with.

    python -m pytest -n0 -s tests/run/test_golden.py

prints what is stored here. The first losses are the same but for rounding; by the end that has grown.
"""

import hashlib
import itertools
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from training.tools import read_records

from bigmac_jax.config import Config, load_config
from bigmac_jax.data.pipeline import TrainIterator, open_stream
from bigmac_jax.data.tokenizer import load_tokenizer
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.run.loop import train

SMALL = (
    "mesh.data=1", "model.vocab_size=512", "model.hidden_size=32", "model.num_layers=2", "model.num_experts=8",
    "model.top_k=2", "model.shared_expert_hidden_size=64", "data.sequence_length=64", "optimizer.warmup_steps=20",
    "train.steps=200", "train.log_every=10", "train.eval_every=0", "train.checkpoint_every=0",
)  # fmt: skip
LOSSES = {10: 6.05287, 20: 5.50380, 200: 4.67899}
BAND = 0.003  # ten times what the experts of a layer on four ranks move the end
BATCHES = {
    "stream": "a47fa5288c27519b69ebfcc6ae283834af64f098249035db0f03f042e600c022",
    "best_fit": "6a671a076448e9144ca60e4f98784a55eb0f63d719362eb9deb11c73e58ada73",
}


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, pathlib.Path]:
    folder = tmp_path_factory.mktemp("golden")
    config = load_config("tiny", (*SMALL, f"cache_dir={folder / 'cache'}"))
    with jax.set_mesh(make_mesh(config)):
        train(config, folder / "run")
    return config, folder / "run"


def test_losses(course: Any) -> None:
    _, workdir = course
    losses = {r["step"]: r["loss"] for r in read_records(workdir) if r.get("step") in LOSSES and "loss" in r}
    print("losses", losses)
    assert losses.keys() == LOSSES.keys() and losses[10] < math.log(512)
    np.testing.assert_allclose([losses[10], losses[20]], [LOSSES[10], LOSSES[20]], rtol=1e-4)
    assert abs(losses[200] - LOSSES[200]) < BAND


@pytest.mark.parametrize("packing", BATCHES)
def test_the_first_ten_batches(course: Any, packing: str) -> None:
    config, workdir = course
    documents = "stream" if packing == "stream" else "masked"
    overrides = (f"data.packing={packing}", f"data.documents={documents}", f"cache_dir={config.cache_dir}")
    config = load_config(workdir / "config.json", overrides)
    batches = TrainIterator(config, open_stream(config, "train", load_tokenizer(config)))
    digest = hashlib.sha256()
    for batch in itertools.islice(batches, 10):
        for array in batch:
            digest.update(b"" if array is None else np.asarray(array, np.int32).tobytes())
    batches.close()
    print(packing, digest.hexdigest())
    assert digest.hexdigest() == BATCHES[packing]
