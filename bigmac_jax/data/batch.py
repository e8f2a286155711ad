"""What a step or an evaluation is given. B batch, L length."""

from typing import Any, NamedTuple

import numpy as np

NO_TARGET = -1  # of an input whose next token is not to be predicted
PADDING = -1  # the segment of what belongs to no document


class Batch(NamedTuple):
    """Windows of tokens, int32, as NumPy or jax arrays."""

    inputs_BL: Any
    targets_BL: Any  # the token that follows each input; NO_TARGET where none counts
    # A number for each document in a row, PADDING behind them. A token sees its own document alone, whose positions
    # begin at 0. None: it sees all that stands before it in its row.
    segments_BL: Any = None
    reference_BL: Any = None  # float32: -log p of each target under the reference of preferences


def of_windows(tokens_BL: Any) -> Batch:
    """The batch of tokens [B, L + 1], each of which but the first is predicted from those before it."""
    return Batch(tokens_BL[:, :-1], tokens_BL[:, 1:])


def segments(inputs_BL: np.ndarray, end: int) -> np.ndarray:
    """Documents that begin at each end-of-text token: it is the last target of one and the first input of the next."""
    return np.cumsum(inputs_BL == end, axis=-1, dtype=np.int32)
