"""Training steps of a config on one resident batch, to be timed or traced."""

import time

import jax
import numpy as np

from bigmac_jax.config import Config
from bigmac_jax.data.batch import batch_from_windows
from bigmac_jax.model.mesh import batch_spec, place
from bigmac_jax.training.step import make_trainer


class Stepper:
    """Called, it makes `steps` steps and returns the seconds of one.

    Attributes:
      compiled: the step; it has run once.
    """

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, steps: int):
        trainer, self.steps = make_trainer(config, mesh), steps
        shape = (config.data.batch_size, config.data.sequence_length + 1)
        tokens_BL = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
        self._batch, self._state = place(batch_from_windows(tokens_BL), batch_spec(2)), trainer.init(jax.random.key(0))
        self._rate = trainer.rate(0)
        self.compiled = trainer.step.lower(self._state, self._batch, self._rate).compile()
        self._run(1)

    def __call__(self) -> float:
        start = time.perf_counter()
        self._run(self.steps)
        return (time.perf_counter() - start) / self.steps

    def _run(self, steps: int) -> None:
        for _ in range(steps):
            self._state, metrics = self.compiled(self._state, self._batch, self._rate)
        jax.block_until_ready(metrics)
