"""Training state in host memory: layers' inputs and the optimizer's moments are the same numbers there."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from model.tools import assert_close, leaves, on_mesh, random_tokens, tiny

from bigmac_jax.config import Config, ConfigError, OptimizerConfig, TrainConfig
from bigmac_jax.model.mesh import HOST
from bigmac_jax.training.step import make_trainer

from .tools import session

ADAM = OptimizerConfig(learning_rate=1.0, warmup_steps=0, eps=1e-3, clip_norm=0.1, weight_decay=0.1)
SKIP = TrainConfig(on_bad_step="skip", spike_factor=0.0)


def two_steps(config: Config, **execution: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Metrics of the second step, and the whole state by name."""
    config = dataclasses.replace(config, execution=dataclasses.replace(config.execution, **execution))
    with session(config) as run:
        run.step(random_tokens(config, seed=1))
        metrics = run.step(random_tokens(config, seed=2))
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(run.state.opt_state) if leaf.ndim}
        assert kinds == {HOST if config.execution.offload_optimizer else "device"}
        assert all(leaf.sharding.memory_kind == "device" for leaf in jax.tree.leaves(run.state.params))
        return metrics, leaves(run.state)


CASES = {
    "adam": (tiny((1, 1, 2), num_layers=3), ADAM, TrainConfig()),
    "muon": (tiny((1, 2, 2, 1, True), num_layers=2), dataclasses.replace(ADAM, name="muon"), SKIP),
}


@pytest.mark.parametrize("case", CASES)
def test_moments_on_the_host_are_updated_alike(case: str) -> None:
    config, optimizer, train = CASES[case]
    config = dataclasses.replace(config, optimizer=optimizer, train=train)
    (metrics, state), (expected_metrics, expected) = (two_steps(config, offload_optimizer=on) for on in (True, False))
    jax.tree.map(np.testing.assert_array_equal, metrics, expected_metrics)
    assert state.keys() == expected.keys()
    print({k: np.abs(state[k]-expected[k]).max() for k in state})
    assert_close(state, expected)
