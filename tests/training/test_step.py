"""The training step: accumulation, meshes, the balance bias, the optimizer, dtypes, donation and dropout keys."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tools import assert_close, leaf_name, leaves, on_mesh, random_tokens, split_batch, tiny

from bigmac_jax.config import Config, OptimizerConfig, TrainConfig
from bigmac_jax.data.batch import batch_from_windows
from bigmac_jax.model.mesh import ExpertGroup, make_mesh
from bigmac_jax.runtime import environment
from bigmac_jax.training.programs import step_program
from bigmac_jax.training.step import _Programs, make_trainer

from .tools import host, session

# A large eps makes the update proportional to the gradient: Adam's own first step is its sign.
LINEAR = OptimizerConfig(learning_rate=1.0, warmup_steps=0, eps=1.0, clip_norm=0.0)


def with_parts(config: Config, **parts: Any) -> Config:
    return dataclasses.replace(config, **parts)


def one_step(mesh: tuple[int, int, int], parts: int, **model: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Metrics and the whole state by name."""
    config = tiny(mesh, z_loss_coefficient=0.01, **model)
    config = with_parts(config, optimizer=LINEAR, train=TrainConfig(accumulate_steps=parts))
    with session(config) as run:
        metrics = run.step(random_tokens(config))
        return metrics, leaves(run.state)


@pytest.fixture(scope="module")
def whole() -> tuple[Any, dict[str, np.ndarray]]:
    return one_step((1, 1, 1), 1)


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        pytest.param((1, 1, 1), 4, marks=pytest.mark.full),
        pytest.param((2, 1, 2), 2, marks=pytest.mark.full),
        pytest.param((1, 1, 1), 2, marks=pytest.mark.full),
        pytest.param((2, 1, 2), 1, marks=pytest.mark.full),
        pytest.param((1, 2, 2), 2, marks=pytest.mark.full),
    ],
)
def test_parts_and_meshes_change_nothing(whole: Any, mesh: tuple[int, int, int], parts: int) -> None:
    """Loss, balance loss, load, gradients (in the first moment) and new parameters are those of one whole batch."""
    metrics, state = one_step(mesh, parts)
    expected_metrics, expected = whole
    for name in ("loss", "grad_norm", "learning_rate"):
        np.testing.assert_allclose(getattr(metrics, name), getattr(expected_metrics, name), rtol=2e-6, err_msg=name)
    aux, expected_aux = metrics.parts.aux, expected_metrics.parts.aux
    np.testing.assert_allclose(metrics.parts.cross_entropy, expected_metrics.parts.cross_entropy, rtol=2e-6)
    for name in ("balance_loss", "z_loss", "load", "router_entropy"):
        np.testing.assert_allclose(getattr(aux, name), getattr(expected_aux, name), rtol=1e-5, err_msg=name)
    assert_close(state, expected)


@pytest.mark.full
def test_balance_by_part_is_the_mean_of_the_parts_alone() -> None:
    """Loss and gradients, which are linear in the parts then; of the whole step they are not."""
    config = tiny((1, 1, 1), balance_coefficient=1.0, balance_scope="part")
    config = with_parts(config, optimizer=LINEAR, train=TrainConfig(accumulate_steps=2))
    tokens = random_tokens(config)

    def balance_and_loss(config: Config, tokens: np.ndarray) -> np.ndarray:
        with session(config) as run:
            metrics = run.step(tokens)
        return np.array([metrics.parts.aux.balance_loss.sum(), metrics.loss])

    half = with_parts(config, data=dataclasses.replace(config.data, batch_size=len(tokens) // 2), train=TrainConfig())
    alone = np.mean([balance_and_loss(half, tokens[m::2]) for m in range(2)], axis=0)
    np.testing.assert_allclose(balance_and_loss(config, tokens), alone, rtol=2e-6)
    whole_step = with_parts(config, model=dataclasses.replace(config.model, balance_scope="step"))
    assert abs(balance_and_loss(whole_step, tokens) - alone).min() > 1e-4


@pytest.mark.full
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2)], ids=str)
def test_parts_that_solve_quantiles_for_themselves(mesh: tuple[int, int, int]) -> None:
    """Of the halves of a batch: loss and gradients are the mean of theirs, and so is the bias that the step leaves."""
    config = tiny(mesh, num_layers=1, balance="quantile", balance_step="same")
    config = with_parts(config, optimizer=LINEAR, train=TrainConfig(accumulate_steps=2))
    tokens = random_tokens(config)

    def stepped(config: Config, tokens: np.ndarray) -> tuple[Any, np.ndarray]:
        with session(config) as run:
            metrics = run.step(tokens)
            state = leaves(run.state)
        gradients = [leaf for name, leaf in state.items() if ".mu." in name]  # the first moment
        return [metrics.loss, metrics.parts.aux.load, *gradients], state["rest.layers.mlp.router_bias_E"]

    half = with_parts(config, data=dataclasses.replace(config.data, batch_size=len(tokens) // 2), train=TrainConfig())
    (found, bias_YE), *halves = stepped(config, tokens), *(stepped(half, tokens[m::2]) for m in range(2))
    (first, first_YE), (second, second_YE) = halves
    for value, of_first, of_second in zip(found, first, second, strict=True):
        np.testing.assert_allclose(value, (of_first + of_second) / 2, rtol=1e-5, atol=1e-7)
    assert len(found) > 10
    np.testing.assert_allclose(bias_YE, (first_YE + second_YE) / 2, atol=1e-6)
    assert np.abs(first_YE - second_YE).max() > 1e-3


@pytest.mark.parametrize(
    ("remat", "top_ks"), [("none", 2), pytest.param("layer", 3, marks=pytest.mark.full), ("exchange", 3)]
)
def test_what_evens_a_step_is_computed_once(remat: str, top_ks: int) -> None:
    """One top-k is its own, one chooses; where a layer is computed again, it chooses again."""
    config = tiny(balance="quantile", balance_step="same", remat=remat)
    with on_mesh(config):
        trainer = make_trainer(config, jax.sharding.get_mesh())
        batch = jax.tree.map(split_batch, batch_from_windows(random_tokens(config)))
        program = str(trainer.step.trace(trainer.abstract_state, batch, trainer.rate(0)).jaxpr)
    assert program.count(" top_k[") == top_ks


def test_the_loss_is_the_sum_of_its_parts(whole: Any) -> None:
    metrics, _ = whole
    aux = metrics.parts.aux
    expected = metrics.parts.cross_entropy + 0.1 * aux.balance_loss.sum() + 0.01 * aux.z_loss.sum()
    np.testing.assert_allclose(metrics.loss, expected, rtol=1e-6)
    assert aux.balance_loss.shape == (2,) and (aux.balance_loss > 1).all() and (aux.z_loss > 0).all()


class Half(NamedTuple):
    """Steps in bfloat16 with dropout and the balance bias, on one repeated batch."""

    donated: list[bool]
    dtypes: dict[str, Any]
    metrics: Any  # of the first step
    bias: tuple[np.ndarray, np.ndarray]  # before and after it
    same_step: float  # losses from the same parameters, as the same step and as the next one
    next_step: float
    losses: list[float]


@pytest.fixture(scope="module")
def half() -> Half:
    config = tiny((1, 1, 2), dtype="bfloat16", dropout=0.2, balance="bias", balance_bias_rate=0.25)
    optimizer = OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-2, warmup_steps=0)
    tokens = random_tokens(config)
    with session(with_parts(config, optimizer=optimizer)) as run:
        first, second = (jax.tree.map(jnp.copy, run.state) for _ in range(2))
        (bias,) = jax.tree.leaves(host(run.state.rest))
        given = run.state
        metrics = run.step(tokens)
        donated = [leaf.is_deleted() for leaf in jax.tree.leaves(given.params)]
        dtypes = {leaf_name(path): leaf.dtype for path, leaf in jax.tree_util.tree_flatten_with_path(run.state)[0]}
        (new_bias,) = jax.tree.leaves(host(run.state.rest))
        run.state = dataclasses.replace(second, step=second.step + 1)
        next_step = run.step(tokens).loss
        run.state = first
        losses = [run.step(tokens).loss for _ in range(6)]
    return Half(donated, dtypes, metrics, (bias, new_bias), losses[0], next_step, losses)


def test_the_balance_bias_moves_by_its_rate(half: Half) -> None:
    """Up for experts below the mean load, down above it, and no balance term in the loss."""
    load_YE = half.metrics.parts.aux.load
    assert (load_YE > 1 / 8).any() and (load_YE < 1 / 8).any()
    np.testing.assert_array_equal(half.bias[1], half.bias[0] + 0.25 * np.sign(1 / 8 - load_YE))
    assert half.metrics.loss == half.metrics.parts.cross_entropy
    assert half.metrics.parts.aux.balance_loss.min() > 0


def test_parameters_and_optimizer_stay_float32(half: Half) -> None:
    for part in ("router_DE", "router_bias_E", "embedding_VD"):
        assert any(part in name for name in half.dtypes)
    for name, dtype in half.dtypes.items():
        assert dtype == (jnp.int32 if name.endswith(("step", "count")) else jnp.float32), name


def test_the_state_is_donated(half: Half) -> None:
    assert all(half.donated)


def test_dropout_is_drawn_from_the_step(half: Half) -> None:
    """A resumed run repeats the masks, and no two steps share one."""
    assert half.same_step == half.metrics.loss
    assert half.next_step != half.metrics.loss


def test_a_repeated_batch_is_learnt(half: Half) -> None:
    assert half.losses[-1] < half.losses[0] - 0.1, half.losses


def lowered(**optimizer: Any) -> tuple[str, str]:
    """The texts of a run's first programs."""
    steps = optimizer.pop("steps", 1000)
    config = dataclasses.replace(tiny(), optimizer=OptimizerConfig(**optimizer))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    with on_mesh(config):
        mesh = jax.sharding.get_mesh()
        trainer = make_trainer(config, mesh)
        return step_program(config, mesh, trainer).lower().as_text(), trainer.init.lower(jax.random.key(0)).as_text()


@pytest.mark.full
def test_the_schedule_is_no_part_of_the_programs() -> None:
    """So a run with more steps, or another rate, finds its programs in the cache."""
    base = lowered()
    others = {"steps": 77, "learning_rate": 0.1, "final_learning_rate": 0.0, "warmup_steps": 3, "decay_steps": 9}
    assert lowered(**others, schedule="wsd") == base
    assert lowered(weight_decay=0.2)[0] != base[0]


@pytest.mark.parametrize("chunks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_compiler_options_reach_the_step(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def options(device: Any, overlap: bool, given: dict[str, Any], **_: bool) -> dict[str, bool]:
        return {f"xla_of_{device.platform}_{overlap}": True} | given

    monkeypatch.setattr(environment, "compiler_options", options)
    config = tiny(overlap_chunks=chunks)
    with on_mesh(config):
        trainer = make_trainer(config, make_mesh(config))
        batch = jax.tree.map(split_batch, batch_from_windows(random_tokens(config)))
        lowered = trainer.step.lower(trainer.abstract_state, batch, trainer.rate(0))
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"xla_of_cpu_{chunks > 1}"):
            lowered.compile()


@pytest.mark.parametrize(
    ("exchange", "capacity", "ranks", "ragged"),
    [("auto", math.inf, 2, True), ("auto", 1.25, 2, False), ("auto", math.inf, 1, False), ("ragged", 1.25, 2, True)],
)
def test_the_compiler_is_told_of_ragged_exchanges(
    exchange: Any, capacity: float, ranks: int, ragged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that `auto` takes on GPUs as well: one of its schedules is not safe with them."""
    told = {}
    monkeypatch.setattr(environment, "compiler_options", lambda device, **options: told.update(options))
    of_gpus = ExpertGroup((1, ranks), "gpu", "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("bigmac_jax.training.step.current_group", lambda: of_gpus)
    config = tiny(exchange=exchange, capacity_factor=capacity)
    with on_mesh(config):
        make_trainer(config, make_mesh(config))
        assert told["ragged"] is ragged
        if (exchange, capacity) == ("auto", 1.25):  # a teacher drops nothing, whatever it was trained with
            make_trainer(config, make_mesh(config), config)
            assert told["ragged"]


def test_a_configs_options_reach_the_step() -> None:
    config = tiny(compiler_options="xla_no_such=3")
    with on_mesh(config):
        trainer = make_trainer(config, make_mesh(config))
        batch = jax.tree.map(split_batch, batch_from_windows(random_tokens(config)))
        lowered = trainer.step.lower(trainer.abstract_state, batch, trainer.rate(0))
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such"):
            lowered.compile()


def test_what_is_a_spike() -> None:
    """Above twice the 17th of 32 recent losses; a bad step's loss is not remembered."""
    of_run: Any = SimpleNamespace(config=SimpleNamespace(train=SimpleNamespace(spike_factor=2.0)))
    recent = np.random.default_rng(0).permutation(32).astype(np.float32) + 1

    def judge(loss: float, norm: float, losses: np.ndarray | None) -> tuple[bool, Any]:
        bad, after = _Programs._judge(of_run, jnp.float32(loss), jnp.float32(norm), losses)
        return bool(bad), after if after is None else np.asarray(after).tolist()

    assert judge(34.0, 1.0, recent) == (False, [*recent[1:], 34.0])
    for loss, norm in ((34.01, 1.0), (math.nan, 1.0), (math.inf, 1.0), (3.0, math.inf), (3.0, math.nan)):
        assert judge(loss, norm, recent) == (True, recent.tolist())
    few = np.sort(recent)[::-1].copy()
    few[:16] = np.inf  # none is a spike before 17 are known
    assert judge(1e9, 1.0, few)[0] is False
    few[15] = 16.0
    assert judge(32.5, 1.0, few)[0] is True
    assert judge(1e9, 1.0, None) == (False, None) and judge(1e9, math.inf, None) == (True, None)
