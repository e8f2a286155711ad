"""Scores text by a frozen reference model, which DPO measures against. W windows, L length."""

import numpy as np

from bigmac_jax.data.batch import Batch
from bigmac_jax.data.conversations import PackedConversations
from bigmac_jax.data.pipeline import pad_batch
from bigmac_jax.model.mesh import batch_ranks, batch_spec, place
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.runtime.clock import clock
from bigmac_jax.runtime.progress import Progress
from bigmac_jax.training import programs


def reference_nll(model: Transformer, windows: PackedConversations, batch_size: int, quiet: bool) -> np.ndarray:
    """Computes -log p of every target, float32 [W, L], on every process; dropless. Where there is no target it is any
    number.

    Args:
      batch_size: windows at a time; padded to a multiple of the mesh's batch shards.
    """
    rows, found = -(-batch_size // batch_ranks()) * batch_ranks(), []
    with Progress("reference", len(windows), "window", silent=quiet) as bar:
        for first in range(0, len(windows), rows):
            batch = Batch(*np.stack([windows[w] for w in range(first, min(first + rows, len(windows)))], axis=1)[:3])
            scores = programs.evaluate(model, place(pad_batch(batch, rows), batch_spec(2)))
            found.append(np.asarray(scores.nll_BL, np.float32)[: len(batch.inputs_BL)])
            bar.update(len(found[-1]))
            clock.tick()
    return np.concatenate(found)
