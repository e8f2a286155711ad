"""Small runs: a few thousand bytes of text, a model of width 16, and compiled pieces of a trainer."""

import contextlib
import dataclasses
import json
import math
import pathlib
import random
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from model.tools import leaves, random_model, split_batch

from bigmac_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, load_config
from bigmac_jax.data.batch import batch_from_windows
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.step import Trainer, TrainState, make_trainer, split_model

ROOT = pathlib.Path(__file__).parents[2]


def text(documents: int, seed: int) -> list[str]:
    """Documents of words that repeat often enough to be learnt from."""
    draw = random.Random(seed)
    words = ("the", "of", "and", "state", "union", "people", "congress", "government", "year", "nation", "peace", "law")
    return [" ".join(draw.choices(words, k=60)) + ".\n" for _ in range(documents)]


def write_config(folder: pathlib.Path) -> pathlib.Path:
    """A config file over texts in `folder`, for `load_config` and for --config."""
    for seed, (name, documents) in enumerate((("train", 20), ("validation", 1), ("test", 1))):
        rows = text(documents, seed)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    config = Config(
        model=ModelConfig(
            num_layers=1, hidden_size=16, num_heads=2, vocab_size=264, num_experts=8, top_k=2, capacity_factor=math.inf
        ),
        data=DataConfig(
            source=str(folder / "train.jsonl"),
            validation_source=str(folder / "validation.jsonl"),
            test_source=str(folder / "test.jsonl"),
            tokenizer="bytes",
            sequence_length=16,
            batch_size=8,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=2),
        train=TrainConfig(steps=6, log_every=1, eval_every=3, checkpoint_every=2),
    )
    path = folder / "config.json"
    path.write_text(config.to_json())
    return path


def small(folder: pathlib.Path, *overrides: str) -> Config:
    """The config of `write_config`, on one device unless the overrides say more."""
    return load_config(write_config(folder), ("mesh.data=1", f"cache_dir={folder / 'cache'}", *overrides))


def as_saved(config: Config) -> Config:
    """What is read of a workdir: where caches lie is of the reader."""
    return dataclasses.replace(config.resolved, cache_dir=Config().cache_dir)


def read_records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def of_training(record: dict[str, Any]) -> dict[str, Any]:
    """What of a record does not depend on the clock: two equal runs have it in common."""
    times = {"step_time_s", "tokens_per_s", "mfu", "mfu_causal", "memory/host_bytes"}
    return {k: v for k, v in record.items() if k not in times and not k.startswith(("start/", "goodput/"))}


def leaves_of(config: Config, workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """The state of a checkpoint, by name."""
    with jax.set_mesh(make_mesh(config)):
        checkpoints = Checkpoints(workdir)
        state, _ = checkpoints.restore(step, make_trainer(config, jax.sharding.get_mesh()).abstract_state)
        checkpoints.close()
        return leaves(state)


class Session:
    """A trainer on the current mesh whose step compiles quickly, and a state with random parameters."""

    def __init__(self, config: Config):
        self.trainer: Trainer = make_trainer(config, jax.sharding.get_mesh())
        _, params, rest = split_model(random_model(config))
        abstract = self.trainer.abstract_state
        opt_state = jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), abstract.opt_state)
        step = jax.device_put(np.int32(0), abstract.step.sharding)
        average = None if abstract.average is None else jax.tree.map(jnp.copy, params)
        self.state = TrainState(step, params, rest, opt_state, average=average)
        self._compiled: Any = None

    def step(self, tokens: np.ndarray) -> Any:
        """One step on [B, L + 1] tokens; metrics on the host."""
        batch = jax.tree.map(split_batch, batch_from_windows(tokens))
        arguments = self.state, batch, self.trainer.rate(np.int32(self.state.step))
        if self._compiled is None:
            self._compiled = self.trainer.step.lower(*arguments).compile()
        self.state, metrics = self._compiled(*arguments)
        return jax.tree.map(np.asarray, metrics)


@contextlib.contextmanager
def session(config: Config) -> Iterator[Session]:
    with jax.set_mesh(make_mesh(config)):
        yield Session(config)


def host(tree: Any) -> Any:
    """A copy that no donation reaches."""
    return jax.tree.map(np.array, tree)
