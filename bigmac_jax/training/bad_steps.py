"""Errors that end a run, and what a checkpoint keeps so that a resumed run judges bad steps as before."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from bigmac_jax.config import TrainConfig
from bigmac_jax.training.step import StepMetrics, TrainState


class RunError(RuntimeError):
    """The run cannot go on. The message is one line: the step, what happened, what is kept, the fix."""


class NonFiniteLossError(RunError):
    """The loss or the gradient is NaN or infinite, or the loss is a spike. `what` says so without the fix."""

    def __init__(self, step: int, metrics: StepMetrics, train: TrainConfig, end: str):
        self.step, self.loss, self.grad_norm = step, float(metrics.loss), float(metrics.grad_norm)
        self.what = f"step {step}: loss {self.loss:g}, gradient norm {self.grad_norm:g}"
        if math.isfinite(self.loss) and math.isfinite(self.grad_norm):
            self.what += (
                f": a spike, above train.spike_factor={train.spike_factor:g} × about the median of recent losses"
            )
        super().__init__(self.what + end)


def save_position(data_state: dict[str, int], bad_steps: int, state: TrainState) -> dict[str, Any]:
    """The data position of a checkpoint, with the number of bad steps and the recent losses where there are any."""
    saved: dict[str, Any] = dict(data_state)
    if bad_steps:
        saved["bad_steps"] = bad_steps
    if state.losses is not None:
        saved["losses"] = [float(loss) for loss in np.asarray(state.losses) if np.isfinite(loss)]
    return saved


def restore_losses(state: TrainState, abstract: TrainState, saved: dict[str, Any]) -> TrainState:
    """Gives a restored state the recent losses of its saved position; none if it was saved without any."""
    if abstract.losses is None:
        return state
    losses = np.full(abstract.losses.shape, np.inf, abstract.losses.dtype)
    if recent := saved.get("losses"):
        losses[-len(recent) :] = recent
    return dataclasses.replace(state, losses=jax.device_put(losses, abstract.losses.sharding))
