"""Optimizers, schedules and the average of the parameters, against hand-worked numbers and NumPy."""

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from model.tools import PAPER, abstract_model, leaves, on_mesh, random_like, random_tokens, tiny

from bigmac_jax.config import Config, OptimizerConfig, TrainConfig
from bigmac_jax.model.parameters import Declaration
from bigmac_jax.training.optimizer import learning_rate, make_optimizer, optimizer_notes, plan_moves, update_average
from bigmac_jax.training.step import split_model

from .tools import session


def with_optimizer(config: Config, **fields: Any) -> Config:
    return dataclasses.replace(config, optimizer=OptimizerConfig(**fields))


# The update is what the optimizer says, with nothing multiplied or added.
PLAIN = {"learning_rate": 1.0, "final_learning_rate": 1.0, "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": 0.0}


def test_schedule() -> None:
    optimizer = OptimizerConfig(learning_rate=8.0, final_learning_rate=2.0, warmup_steps=10)
    rate = learning_rate(Config(optimizer=optimizer, train=TrainConfig(steps=30)))
    expected = {0: 8 / 11, 5: 8 * 6 / 11, 10: 8.0, 20: 5.0, 30: 2.0, 99: 2.0}
    np.testing.assert_allclose([rate(step) for step in expected], list(expected.values()), rtol=1e-6)
    quarter = 2 + 6 * (1 + math.cos(math.pi / 4)) / 2
    np.testing.assert_allclose(rate(15), quarter, rtol=1e-6)

    fixed = dataclasses.replace(optimizer, warmup_steps=0, decay_steps=4)
    rate = learning_rate(Config(optimizer=fixed, train=TrainConfig(steps=30)))
    np.testing.assert_allclose([rate(0), rate(2), rate(4), rate(30)], [8, 5, 2, 2], rtol=1e-6)


def test_weight_decay_reaches_the_matrices_alone() -> None:
    """Norms, biases and learned positions keep their size."""
    model = PAPER | {"gated": True, "num_shared_experts": 1, "latent_norm": "pre_dispatch", "qk_norm": True,
                     "projection_init": "random"}  # fmt: skip
    config = tiny(tie_embeddings=False, **model)
    config = with_optimizer(config, learning_rate=1.0, warmup_steps=0, weight_decay=0.5)
    with on_mesh(config):
        _, abstract, _ = split_model(abstract_model(config))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract)
    optimizer = make_optimizer(config)
    update = jax.jit(optimizer.update)
    updates, _ = update(jax.tree.map(np.zeros_like, params), optimizer.init(params), params, rate=1.0)
    for name, update in leaves(updates).items():
        last = name.split(".")[-1]
        kept = last.startswith(("b_", "scale", "bias", "positions"))
        np.testing.assert_array_equal(update, 0 if kept else -0.5, err_msg=name)
    matrices = {"router_DE", "embedding_VD", "unembedding_VD", "w_in_eRF", "w_out_eFR", "w_gate_eRF"}
    assert matrices <= {name.split(".")[-1] for name in leaves(params)}


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.full)])
def test_the_rate_of_the_projections(name: str) -> None:
    """From a selection W↓ and W↑ move an eighth as far, decay included; all else, the gate's W_g too, as it did."""
    config, updates = tiny(latent_norm="gate"), {}
    with on_mesh(config):
        _, abstract, _ = split_model(abstract_model(config))
        draw = np.random.default_rng(0)
        params, grads = (jax.tree.map(lambda v: draw.normal(size=v.shape).astype(v.dtype), abstract) for _ in range(2))
        for rate in (1.0, 0.125, 0.0):
            optimizer = make_optimizer(with_optimizer(config, name=name, warmup_steps=0, projection_rate=rate))
            update = jax.jit(optimizer.update)
            updates[rate] = leaves(update(grads, optimizer.init(params), params, rate=3e-4)[0])
    slow = {"layers.mlp.down.w_DF", "layers.mlp.up.w_DF"}
    assert slow < updates[1.0].keys()
    for leaf, update in updates[1.0].items():
        for rate in (0.125, 0.0):  # which is that of a selection
            np.testing.assert_array_equal(updates[rate][leaf], update * (0.125 if leaf in slow else 1), err_msg=leaf)


@pytest.mark.parametrize(("clip_norm", "norm"), [(2.0, 2.0), (100.0, 13.0), (0.0, 13.0)])
def test_clipping(clip_norm: float, norm: float) -> None:
    """Gradients (3, 4) and 12 have norm 13 together."""
    config = Config(optimizer=OptimizerConfig(clip_norm=clip_norm, b1=0.5))
    matrix = Declaration("D", "mlp", 1.0)
    values = {"w_a": jnp.array([3.0, 4.0]), "b": jnp.array(12.0)}
    gradients = {name: nnx.Param(value, declaration=matrix) for name, value in values.items()}
    optimizer = make_optimizer(config)
    _, state = optimizer.update(gradients, optimizer.init(gradients), gradients, rate=1.0)
    moment = optax.tree_utils.tree_get(state, "mu")
    chex.assert_trees_all_close(moment, jax.tree.map(lambda g: g * 0.5 * norm / 13, gradients), rtol=1e-6)


def rates(steps: dict[int, float], **fields: Any) -> list[float]:
    optimizer = OptimizerConfig(learning_rate=8.0, final_learning_rate=2.0, warmup_steps=2, **fields)
    rate = learning_rate(Config(optimizer=optimizer, train=TrainConfig(steps=20)))
    return [float(rate(step)) for step in steps]


@pytest.mark.parametrize(
    ("schedule", "decay_steps", "expected"),
    [
        ("constant", 0, {0: 8 / 3, 1: 16 / 3, 2: 8, 19: 8, 99: 8}),
        ("linear", 0, {0: 8 / 3, 2: 8, 11: 5, 20: 2, 99: 2}),
        ("linear", 6, {2: 8, 5: 5, 8: 2, 99: 2}),
        ("wsd", 0, {0: 8 / 3, 2: 8, 16: 8, 18: 5, 20: 2, 99: 2}),
        ("wsd", 6, {2: 8, 14: 8, 17: 5, 20: 2}),
        ("wsd", 99, {1: 16 / 3, 2: 8, 11: 5, 20: 2}),  # longer than what the warm-up leaves
    ],
    ids=str,
)
def test_schedules(schedule: str, decay_steps: int, expected: dict[int, float]) -> None:
    found = rates(expected, schedule=schedule, decay_steps=decay_steps)
    np.testing.assert_allclose(found, list(expected.values()), rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "peak", "steps", "expected"),
    [
        ("linear", 8.0, 2, [8, 2, 2]),
        ("cosine", 8.0, 2, [8, 2, 2]),
        ("cosine", 0.0, 2, [0, 2, 2]),
        ("wsd", 8.0, 2, [8, 2, 2]),
        ("wsd", 8.0, 1, [8, 2, 2]),
        ("wsd", 8.0, 4, [8, 8, 2]),  # a fifth of four steps is less than one
        ("wsd", 8.0, 3, [8, 2, 2]),
        ("constant", 8.0, 2, [8, 8, 8]),
    ],
)
def test_a_run_that_is_about_as_long_as_its_warm_up(
    schedule: Any, peak: float, steps: int, expected: list[float]
) -> None:
    """The rate then falls in one step; here are those behind 2, 3 and 4 steps."""
    optimizer = OptimizerConfig(learning_rate=peak, final_learning_rate=2.0, warmup_steps=2, schedule=schedule)
    rate = learning_rate(Config(optimizer=optimizer, train=TrainConfig(steps=steps)))
    np.testing.assert_allclose([float(rate(step)) for step in (2, 3, 4)], expected, rtol=1e-6)


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 1.0), ("linear", 1.0)])
def test_a_schedule_from_nothing_rises(schedule: Any, middle: float) -> None:
    optimizer = OptimizerConfig(learning_rate=0.0, final_learning_rate=2.0, warmup_steps=2, schedule=schedule)
    rate = learning_rate(Config(optimizer=optimizer, train=TrainConfig(steps=20)))
    np.testing.assert_allclose([float(rate(step)) for step in (0, 2, 11, 20, 99)], [0, 0, middle, 2, 2], rtol=1e-6)


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Five steps of the quintic iteration, in float64 (Jordan et al., 2024)."""
    x = np.float64(matrix)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / (np.linalg.norm(wide) + 1e-8)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


def expected_muon(gradients: list[np.ndarray]) -> np.ndarray:
    """The last update of matrices [..., X, Z]: Nesterov momentum, corrected for its first steps, made orthogonal."""
    mu = np.zeros_like(gradients[0], np.float64)
    for gradient in gradients:
        mu = 0.95 * mu + 0.05 * gradient
    steps = len(gradients)
    nesterov = 0.95 * mu / (1 - 0.95 ** (steps + 1)) + 0.05 * gradients[-1] / (1 - 0.95**steps)
    orthogonal = [newton_schulz(matrix) for matrix in nesterov.reshape(-1, *nesterov.shape[-2:])]
    return 0.2 * math.sqrt(max(nesterov.shape[-2:])) * np.reshape(orthogonal, nesterov.shape)


def gradient_like(step: int, param: jax.Array) -> jax.Array:
    """Some gradient; of matrices such that no singular value is tiny, whose rounding the iteration would multiply."""
    gradient = 0.1 * param * (1 - step) + 0.1 * jnp.sin(40 * param)
    return gradient + jnp.eye(*param.shape[-2:])[(None,) * (param.ndim - 2)] if param.ndim > 2 else gradient


MESHES = {
    "1x1": (1, 1, 1),
    "2x2": (2, 1, 2),
    "fsdp": (2, 1, 4, 1, True),
    "tensor": (2, 1, 2, 2, False, True),
    "tensor fsdp": (1, 2, 2, 2, True, True),
}


@pytest.mark.full  # in make test test_padding has two steps
@pytest.mark.parametrize("mesh", MESHES)
def test_muon(mesh: str) -> None:
    """Two steps of every parameter: matrices, also of experts, by Newton-Schulz in NumPy, all else by Adam."""
    config = tiny(MESHES[mesh], num_shared_experts=1, use_bias=True, tie_embeddings=False, projection_init="random")
    config = with_optimizer(config, name="muon", **PLAIN)
    with on_mesh(config):
        _, abstract, _ = split_model(abstract_model(config))
        params = random_like(abstract, config)
        gradients = [jax.tree.map(functools.partial(gradient_like, step), params) for step in range(2)]
        optimizer = make_optimizer(config)

        def steps(params: Any, gradients: Any) -> Any:
            state = optimizer.init(params)
            for gradient in gradients:
                updates, state = optimizer.update(gradient, state, params, rate=1.0)
            return updates

        # Compiled as a run's is: without LLVM's optimisations divisions are less exact.
        updates = jax.jit(steps)(params, gradients)
        for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert update.sharding == param.sharding
        found, given = leaves(updates), [leaves(gradient) for gradient in gradients]
    by_muon = set()
    for name, update in found.items():
        first, last = (np.float64(of[name]) for of in given)
        if first.ndim > 2:  # a stack of something
            expected = expected_muon([first, last])
            # 3e-6 with jax 0.10, 1.4e-5 with 0.12, which rounds otherwise: the iteration multiplies that by ten.
            if np.abs(update + expected).max() < 3e-5 * np.abs(expected).max():
                by_muon.add(name.removeprefix("layers."))
                continue
        mean = (0.9 * 0.1 * first + 0.1 * last) / (1 - 0.9**2)
        square = (0.95 * 0.05 * first**2 + 0.05 * last**2) / (1 - 0.95**2)
        np.testing.assert_allclose(update, -mean / (np.sqrt(square) + 1e-8), rtol=1e-4, atol=1e-6, err_msg=name)
    attention = {f"attention.{kind}.w_DF" for kind in ("query", "key", "value", "out")}
    experts = {"mlp.experts.w_in_eRF", "mlp.experts.w_out_eFR", "mlp.shared.up.w_DF", "mlp.shared.down.w_DF"}
    assert by_muon == attention | experts | {"mlp.down.w_DF", "mlp.up.w_DF"}


def test_what_muon_makes_stands_as_the_parameters_do() -> None:
    """With what the type of an array cannot say: all ranks of an axis gather the same matrices."""
    config = with_optimizer(tiny(MESHES["tensor"], num_layers=1), name="muon")
    with on_mesh(config):
        _, params, _ = split_model(abstract_model(config))
        optimizer = make_optimizer(config)
        updates, _ = jax.eval_shape(lambda w: optimizer.update(w, optimizer.init(w), w, rate=1.0), params)
        for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert (update.shape, update.sharding.spec) == (param.shape, param.sharding.spec)


def test_matrices_are_dealt_out() -> None:
    """No two ranks compute the same one, where they divide; what can't be dealt is gathered."""
    P, sizes = jax.sharding.PartitionSpec, {"data": 4, "node": 1, "expert": 2, "tensor": 1}
    assert plan_moves((8, 6, 5), P(None, None, None), sizes) == [("data", None, 0), ("expert", None, 0)]
    columns = P(None, None, ("data", "node", "expert"))
    assert plan_moves((8, 6, 8), columns, sizes) == [("expert", 2, 0), ("data", 2, 0)]
    assert plan_moves((2, 6, 8), columns, sizes) == [("expert", 2, 0), ("data", 2, None)]
    assert plan_moves((3, 4, 8, 5), P(None, ("node", "expert"), "data", None), sizes) == [("data", 2, None)]
    assert plan_moves((4, 2, 8, 5), P(None, ("node", "expert"), "data", None), sizes) == [("data", 2, 0)]
    assert plan_moves((3, 6, 5), P(None, None, None), sizes) == []


def test_moments_in_bfloat16() -> None:
    """Kept rounded, computed in float32, and the update is of what was not rounded yet."""
    config = with_optimizer(Config(), moment_dtype="bfloat16", **PLAIN)
    gradients = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    optimizer, value = make_optimizer(config), nnx.Param(jnp.zeros(64), declaration=Declaration("D", "mlp", 1.0))
    state, update = optimizer.init({"w": value}), jax.jit(optimizer.update)
    mu = nu = np.zeros(64, np.float32)
    for step, gradient in enumerate(gradients, 1):
        updates, state = update(
            {"w": nnx.Param(jnp.asarray(gradient), declaration=value.declaration)}, state, {"w": value}, rate=1.0
        )
        mu, nu = 0.9 * mu + 0.1 * gradient, 0.95 * nu + 0.05 * gradient**2
        expected = -(mu / (1 - 0.9**step)) / (np.sqrt(nu / (1 - 0.95**step)) + 1e-8)
        np.testing.assert_allclose(updates["w"][...], expected, rtol=1e-5)
        mu, nu = (v.astype(jnp.bfloat16).astype(np.float32) for v in (mu, nu))
        for name, moment in (("mu", mu), ("nu", nu)):
            (kept,) = jax.tree.leaves(optax.tree_utils.tree_get(state, name))
            assert kept.dtype == jnp.bfloat16
            np.testing.assert_allclose(kept.astype(np.float32), moment, rtol=2**-7)


def test_average_of_the_parameters() -> None:
    """By hand: after three steps with decay 1/2 the values 8, 4, 2 have weights 1/7, 2/7, 4/7, and nothing before."""
    config, average = Config(optimizer=OptimizerConfig(average_decay=0.5)), jnp.asarray([1e6])
    for step, (value, expected) in enumerate([(8.0, 8.0), (4.0, 16 / 3), (2.0, 24 / 7)], 1):
        average = update_average(config, average, jnp.asarray([value]), jnp.asarray(step))
        np.testing.assert_allclose(average, [expected], rtol=1e-6)


def test_the_average_is_what_is_evaluated() -> None:
    """And the step goes on from the parameters themselves."""
    config = tiny()
    config = with_optimizer(config, average_decay=0.5, warmup_steps=0)
    with session(config) as run:
        seen = []
        for seed in range(2):
            run.step(random_tokens(config, seed))
            seen.append(leaves(run.state.params))
        model = {name: value for name, value in leaves(run.trainer.model(run.state)).items() if name in seen[0]}
    chex.assert_trees_all_close(model, {name: (seen[0][name] + 2 * seen[1][name]) / 3 for name in model}, rtol=1e-5)
    assert model


@pytest.mark.parametrize(
    ("step", "optimizer", "steps", "expected"),
    [
        (11, {}, 20, None),
        (11, {"learning_rate": 4.0}, 20, "optimizer.learning_rate 8.0 → 4.0: step 12 has the learning rate 3, not 5"),
        (11, {"weight_decay": 0.5}, 20, "optimizer.weight_decay 0.1 → 0.5: step 12 has the learning rate 5 as before"),
        (11, {"clip_norm": 0.5}, 20, "optimizer.clip_norm 1.0 → 0.5: step 12 has the learning rate 5 as before"),
        (11, {}, 38, "train.steps 20 → 38: step 12 has the learning rate 6.5, not 5"),
        (2, {}, 38, None),  # the rate is that of the end of the warm-up
        (11, {"decay_steps": 18}, 38, "optimizer.decay_steps 0 → 18: step 12 has the learning rate 5 as before"),
        (11, {"decay_steps": 12}, 38, "optimizer.decay_steps 0 → 12, train.steps 20 → 38: step 12 has the learning "
         "rate 3.5, not 5"),
    ],
)  # fmt: skip
def test_a_resume_with_other_rates_is_a_line(
    step: int, optimizer: dict[str, Any], steps: int, expected: str | None
) -> None:
    """From 8 to 2 in the 18 steps behind a warm-up of two."""
    fields = {"learning_rate": 8.0, "final_learning_rate": 2.0, "warmup_steps": 2, "schedule": "linear",
              "weight_decay": 0.1, "clip_norm": 1.0}  # fmt: skip
    before, after = (
        Config(optimizer=OptimizerConfig(**fields | changed), train=TrainConfig(steps=number))
        for changed, number in (({}, 20), (optimizer, steps))
    )
    assert optimizer_notes(before, after, step) == ([expected] if expected else [])
