"""A batch of a training step or an evaluation. B batch, L length."""

from typing import Any, NamedTuple

import numpy as np

NO_TARGET = -1  # where an input's next token is not to be predicted
PADDING = -1  # the segment of tokens that belong to no document


class Batch(NamedTuple):
    """Windows of tokens, int32, as NumPy or jax arrays."""

    inputs_BL: Any
    targets_BL: Any  # the token after each input; NO_TARGET where it does not count
    # A number for each document of a row, PADDING after the last. A token sees its own document alone, in which
    # positions begin at 0. None: a token sees everything before it in its row.
    segments_BL: Any = None
    reference_BL: Any = None  # float32; -log p of each target under the reference model of DPO


def batch_from_windows(tokens_BL: Any) -> Batch:
    """The batch of tokens [B, L + 1], each of which but the first is predicted from those before it."""
    return Batch(tokens_BL[:, :-1], tokens_BL[:, 1:])


def number_documents(inputs_BL: np.ndarray, eos_id: int) -> np.ndarray:
    """The segments of a batch: a document begins at each end-of-text token, which is also the last target of the
    document before."""
    return np.cumsum(inputs_BL == eos_id, axis=-1, dtype=np.int32)
