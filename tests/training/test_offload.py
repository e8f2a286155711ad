"""Training state in host memory: layers' inputs and the optimizer's moments are the same numbers there."""

import dataclasses
import functools
import pathlib
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from model.tools import assert_close, leaves, on_mesh, random_tokens, tiny

from bigmac_jax.config import Config, ConfigError, OptimizerConfig, TrainConfig
from bigmac_jax.model.mesh import AXES, HOST, REPLICA, make_mesh
from bigmac_jax.model.parameters import Declaration, state_spec
from bigmac_jax.training import step
from bigmac_jax.training.checkpoint import Checkpoints
from bigmac_jax.training.offload import check_offload

from .tools import Session, session

# Of a large eps, clipped and with decay: a step depends on the size of a gradient, of all gradients, of a parameter.
ADAM = OptimizerConfig(learning_rate=0.1, warmup_steps=0, eps=1e-3, clip_norm=0.1, weight_decay=0.1)
MUON = dataclasses.replace(ADAM, name="muon", average_decay=0.5)
SHORT = dataclasses.replace(MUON, moment_dtype="bfloat16")
HYBRID = {"blocks": "ME*E", "num_layers": 2, "mtp_modules": 1, "mamba_groups": 2, "mamba_state": 8}
REPLICAS = (2, 1, 1, 1, True, False, 2, "sharded")
CASES = {
    "layers": (tiny((1, 1, 2), num_layers=2), ADAM),
    "split": (tiny((2, 1, 2, 2, True), num_layers=2, tie_embeddings=False), ADAM),
    "muon": (tiny((1, 2, 2, 1, True), num_layers=2, first_dense_layers=1), MUON),
    "muon, bfloat16": (tiny((1, 2, 2, 1, True), num_layers=2, first_dense_layers=1), SHORT),
    "hybrid": (tiny((2, 1, 1), mamba_head_dim=16, **HYBRID), MUON),
    "replicas": (tiny(REPLICAS, num_layers=2), ADAM),
    "replicas, muon": (tiny(REPLICAS, num_layers=2), MUON),
}


def make_config(case: str, **execution: Any) -> Config:
    config, optimizer = CASES[case]
    execution_of = dataclasses.replace(config.execution, **execution)
    train = TrainConfig(on_bad_step="skip")
    return dataclasses.replace(config, execution=execution_of, optimizer=optimizer, train=train)


def check_places(run: Session) -> None:
    """Moments and nothing else are in host memory, if they are asked to be there."""
    state, offloads = run.state, run.trainer.config.execution.offload_optimizer
    moments = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
    assert moments == {HOST if offloads else "device"}
    others = [state.params, state.rest, state.average, [v for v in jax.tree.leaves(state.opt_state) if not v.ndim]]
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(others)} == {"device"}


def three_steps(config: Config) -> tuple[Any, dict[str, np.ndarray]]:
    """Metrics of the first step, and the state after two steps and a bad one, by name."""
    with session(config) as run:
        metrics = run.step(random_tokens(config, seed=1))
        run.step(random_tokens(config, seed=2))
        check_places(run)
        before, params = leaves(run.state.opt_state), run.state.params
        good = jax.tree.map(jnp.copy, params)
        run.state = dataclasses.replace(run.state, params=jax.tree.map(lambda w: w * jnp.nan, params))
        assert run.step(random_tokens(config, seed=3)).bad
        check_places(run)
        after = leaves(run.state.opt_state)
        assert {name for name in after if not np.array_equal(after[name], before[name])} <= {
            name for name in after if before[name].ndim == 0
        }
        run.state = dataclasses.replace(run.state, params=good)
        return metrics, leaves(run.state)


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_moments_on_the_host_are_updated_alike(case: str) -> None:
    """Bit by bit where the optimizer is elementwise, but for what a compiler fuses otherwise."""
    at_host, on_device = (make_config(case, offload_optimizer=on) for on in (True, False))
    (metrics, state), (expected_metrics, expected) = three_steps(at_host), three_steps(on_device)
    # Replicas split other dimensions, so that the norm of all gradients is summed in another order.
    rounds = 1e-6 if at_host.mesh.replica > 1 else 0
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rounds), metrics, expected_metrics)
    assert state.keys() == expected.keys()
    zeros = {name for name, value in expected.items() if not value.any()}
    assert all(not state[name].any() for name in zeros)
    # What bfloat16 keeps of a moment is a 256th of it.
    tolerance = 1e-2 if CASES[case][1] is SHORT else 1e-5
    rest = expected.keys() - zeros
    assert_close({name: state[name] for name in rest}, {name: expected[name] for name in rest}, tolerance)
    if CASES[case][1] is ADAM and not rounds:
        equal = [name for name in rest if np.array_equal(state[name], expected[name])]
        assert len(equal) >= 0.9 * len(rest)


def test_layers_of_a_state_that_is_updated_by_layers_are_whole() -> None:
    """Replicas split each of them; elsewhere they split the layers, which Muon need not gather again."""
    of, sizes = Declaration("DF", "mlp", 1.0), {axis: 2 for axis in AXES}
    for by_layers, expected in ((True, P(None, ("data", REPLICA), "tensor")), (False, P(REPLICA, "data", "tensor"))):
        spec = P(None, "data", "tensor")
        assert state_spec(of, (4, 8, 6), spec, True, sizes, by_layers) == expected
        assert state_spec(of, (4, 8, 6), spec, False, sizes, by_layers) == spec


def random_moments(run: Session) -> Any:
    draw = np.random.default_rng(0).standard_normal
    moments = jax.tree.map(
        lambda v: v if v.ndim == 0 else jax.device_put(draw(v.shape).astype(v.dtype), v.sharding), run.state.opt_state
    )
    return dataclasses.replace(run.state, opt_state=moments)


@pytest.mark.parametrize("before", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_run_goes_on_with_its_moments_elsewhere(before: bool, tmp_path: pathlib.Path) -> None:
    """From host memory to the device's, and back: a checkpoint is the same."""
    configs = {offloads: make_config("split", offload_optimizer=offloads) for offloads in (True, False)}
    with session(configs[before]) as run:
        state = run.state = random_moments(run)
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(state, {}, configs[before], 1, eval_loss=None)
        checkpoints.wait()
        checkpoints.close()
        saved = leaves(state)
    with session(configs[not before]) as run:
        checkpoints = Checkpoints(tmp_path)
        run.state, _ = checkpoints.restore(1, run.trainer.abstract_state)
        checkpoints.close()
        check_places(run)
        found = leaves(run.state)
    assert found.keys() == saved.keys()
    for name, value in saved.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_devices_without_host_memory_are_refused_in_a_line() -> None:
    def mesh_of(*kinds: str) -> Any:
        memories = [SimpleNamespace(kind=kind) for kind in kinds]
        device = SimpleNamespace(device_kind="Abacus", addressable_memories=lambda: memories)
        return SimpleNamespace(devices=np.array([device]))

    both, neither = tiny(remat="offload", offload_optimizer=True), tiny(remat="layer")
    with pytest.raises(ConfigError, match=r"^execution\.remat=offload and execution\.offload_optimizer=True needs .* Abacus has device, unpinned_host alone; use execution\.remat=layer and .*=False$"):  # fmt: skip  # noqa: E501
        check_offload(both, mesh_of("device", "unpinned_host"))
    check_offload(neither, mesh_of("device"))
    check_offload(both, mesh_of("device", HOST))
    check_offload(both, mesh_of())  # compiled for alone


def test_it_is_refused_before_anything_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Config, mesh: Any) -> None:
        raise ConfigError("no host memory")

    monkeypatch.setattr(step, "check_offload", refuse)
    monkeypatch.setattr(step, "_Programs", lambda _: pytest.fail("something is traced"))
    config = make_config("layers", offload_optimizer=True)
    with on_mesh(config), pytest.raises(ConfigError, match="no host memory"):
        step.make_trainer(config, make_mesh(config))
