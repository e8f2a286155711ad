"""What learning answers alone does to the loss and its gradient; packing changes neither."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from model.tools import leaves, on_mesh, random_model, split_batch, tiny

from bigmac_jax.config import Config, TuningConfig
from bigmac_jax.data.batch import NO_TARGET, PADDING, Batch
from bigmac_jax.data.conversations import Conversations
from bigmac_jax.data.pipeline import open_stream
from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.training.loss import WHOLE, loss_fn

ROWS = [
    {"prompt": "abcd", "completion": "ef"},
    {"prompt": "xyz", "completion": "w"},
    {"prompt": "kl", "completion": "mn"},
]
NEVER = ord("q")  # stands in no row


def config_of(folder: pathlib.Path, mesh: Any = (1, 1, 1, 1), length: int = 16, **fields: Any) -> Config:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = tiny(mesh, batch=4, length=length, tie_embeddings=False, balance_coefficient=0.0, num_layers=1, **fields)
    data = dataclasses.replace(config.data, source=str(file), validation_source=str(file), test_source=str(file))
    return dataclasses.replace(config, data=data, tuning=TuningConfig(objective="sft"), cache_dir=str(folder / "cache"))


def packed(config: Config) -> Batch:
    stream = open_stream(config, "train", ByteTokenizer())
    assert isinstance(stream, Conversations)
    windows = stream.pack(config.data.sequence_length)
    rows = [windows[w] for w in range(len(windows))]
    empty = np.stack(
        [np.zeros_like(rows[0][0]), np.full_like(rows[0][0], NO_TARGET), np.full_like(rows[0][0], PADDING)]
    )
    return Batch(*np.stack([*rows, *[empty] * (4 - len(rows))], axis=1))


def apart(batch: Batch) -> Batch:
    """Each conversation in a row of its own."""
    rows = []
    for inputs, targets, segments in zip(*batch[:3], strict=True):
        for segment in range(segments.max() + 1):
            row = np.stack([np.zeros_like(inputs), np.full_like(inputs, NO_TARGET), np.full_like(inputs, PADDING)])
            size = int((segments == segment).sum())
            row[:, :size] = np.stack([inputs, targets, np.zeros_like(inputs)])[:, segments == segment]
            rows.append(row)
    rows += [rows[-1] * 0 + np.array([[0], [NO_TARGET], [PADDING]], np.int32)] * (4 - len(rows))
    return Batch(*np.stack(rows, axis=1))


def loss_and_gradients(config: Config, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    with on_mesh(config):
        step = jax.jit(jax.value_and_grad(lambda m, b: loss_fn(m, b, dropout_key=None, share=WHOLE)[0]))
        loss, gradients = step(random_model(config), jax.tree.map(split_batch, batch))
        return float(loss), leaves(gradients)


@pytest.mark.full
def test_no_token_that_nobody_reads_or_predicts_has_a_gradient(tmp_path: pathlib.Path) -> None:
    config = config_of(tmp_path)
    batch = packed(config)
    spoilt = batch.inputs_BL.copy()
    spoilt[batch.segments_BL == PADDING] = NEVER  # what fills a window up
    _, gradients = loss_and_gradients(config, batch._replace(inputs_BL=spoilt))
    read = {int(token) for token in batch.inputs_BL[batch.segments_BL != PADDING]}
    by_row = np.abs(gradients["embedding_VD"]).max(1)
    assert {int(v) for v in np.flatnonzero(by_row)} == read and by_row[NEVER] == 0


@pytest.mark.full
@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("mesh", [(1, 1, 1, 1), (1, 1, 2, 2), (2, 1, 2, 1)])
def test_packed_is_apart(tmp_path: pathlib.Path, positions: str, mesh: Any) -> None:
    """Three conversations in one window, and each by itself; prompts have no loss, so that another one's last token
    changes nothing but what the answer sees."""
    config = config_of(tmp_path, mesh, 16, positions=positions)
    batch = packed(config)
    assert (batch.segments_BL[0] == 2).any()
    ours, of_ours = loss_and_gradients(config, batch)
    theirs, of_theirs = loss_and_gradients(config, apart(batch))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    for name, value in of_theirs.items():
        assert np.abs(of_ours[name] - value).max() <= 1e-5 * max(1e-3, np.abs(value).max()), name
