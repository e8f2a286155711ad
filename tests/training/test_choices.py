"""More choices over time: what is not taken yet is as if there were no such choice, on every exchange."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from model.tools import (
    abstract_layer,
    assert_close,
    leaves,
    on_mesh,
    random_like,
    random_tokens,
    split_batch,
    split_tokens,
    tiny,
)

from bigmac_jax.config import Config, ConfigError, ModelConfig, TrainConfig, TuningConfig, load_config
from bigmac_jax.data.batch import PADDING
from bigmac_jax.model.exchange import STRATEGIES
from bigmac_jax.model.moe import MoE
from bigmac_jax.model.router import Padding
from bigmac_jax.training.choices import choices_at

from .tools import host, session


def growing(top_k: int = 4, **train: Any) -> Config:
    return Config(model=ModelConfig(top_k=top_k), train=TrainConfig(**train))


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        # By steps done: 2, 3 and 4 for two steps each, then 4.
        ({"choices_from": 2, "choices_steps": 6}, [2, 2, 3, 3, 4, 4, 4, 4]),
        ({"choices_from": 2, "choices_steps": 7}, [2, 2, 2, 3, 3, 4, 4, 4]),
        ({"choices_from": 3, "choices_steps": 2}, [3, 4, 4, 4]),
        ({"choices_from": 2, "choices_steps": 1}, [2, 4, 4]),  # 3 has no step of its own
    ],
)
def test_choices_by_step(train: dict[str, int], expected: list[int]) -> None:
    config = growing(**train)
    assert [int(choices_at(config, jnp.int32(done))) for done in range(len(expected))] == expected  # type: ignore[arg-type]


def test_choices_that_do_not_grow() -> None:
    done = jnp.int32(0)
    assert choices_at(growing(), done) is None
    for structure in ("dense", "vanilla"):  # which have no top_k; a line says that the field is not read
        config = load_config("tiny", (f"model.structure={structure}", "train.choices_from=2", "train.choices_steps=5"))
        assert choices_at(config, done) is None


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"choices_from": 4, "choices_steps": 5}, "choices_from=4 must be below model.top_k=4; use 0"),
        ({"choices_from": 2}, "choices_from=2 needs train.choices_steps, .*; use choices_steps=1000 for the whole run"),
        (
            {"choices_from": 1, "choices_steps": 5},
            "choices_from=1 with model.router_renormalize .*; use choices_from=2",
        ),
    ],
)
def test_what_is_refused(fields: dict[str, int], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        growing(**fields).check()


def test_what_does_not_combine() -> None:
    config = growing(choices_from=2, choices_steps=5)
    config.check()
    with pytest.raises(ConfigError, match="balance=quantile solves its bias for"):
        dataclasses.replace(config, model=dataclasses.replace(config.model, balance="quantile")).check()
    moving = dataclasses.replace(config.model, capacity_factor=1.25, overflow="next")
    with pytest.raises(ConfigError, match=r"choices_from=2: model\.overflow=next finds room .*; use overflow=drop"):
        dataclasses.replace(config, model=moving)
    tuned = dataclasses.replace(config.train, init_from="x")
    with pytest.raises(ConfigError, match="to fewer experts in training than its reference does; use choices_from=0"):
        dataclasses.replace(config, train=tuned, tuning=TuningConfig(objective="dpo")).check()


def test_loads_and_drops_by_hand() -> None:
    """Four tokens of eight experts, two of three choices taken: 0 and 1, 0 and 2, 0 and 1, 3 and 0. Expert 0 has room
    for ceil(1 · 4 · 3 / 8) = 2, as with all three choices, and first choices come first: of 0's four it drops two."""
    config = tiny(batch=1, length=4, num_layers=1, capacity_factor=1.0, latent_norm="none")
    x_LD = np.zeros((4, 16), np.float32)
    for token, ranked in enumerate([(0, 1, 2), (0, 2, 1), (0, 1, 4), (3, 0, 1)]):
        for place, expert in enumerate(ranked):
            x_LD[token, expert] = 5 - place
    with on_mesh(config):
        layer = random_like(abstract_layer(config), config, {"router_DE": np.eye(16, 8, dtype=np.float32)})
        both = jax.jit(lambda layer, x, choices: (layer(x, choices=choices)[1], layer(x, evaluating=True)[1]))
        stats, evaluated = both(layer, split_tokens(x_LD[None]), jnp.int32(2))
    np.testing.assert_allclose(stats.load[0], np.array([4, 2, 1, 1, 0, 0, 0, 0]) / 8)
    np.testing.assert_allclose(stats.drop_rate, [2 / 8])
    np.testing.assert_allclose(evaluated.load[0], np.array([4, 4, 2, 1, 1, 0, 0, 0]) / 12)
    assert not evaluated.drop_rate.any()


def layer_values(config: Config, choices: int | None, padded: bool) -> dict[str, np.ndarray]:
    """The layer's output, statistics, and the gradients of y · dy."""
    shape = config.data.batch_size, config.data.sequence_length, config.model.hidden_size
    draw = np.random.default_rng(3).standard_normal
    x_BLD, dy_BLD = (draw(shape).astype(np.float32) for _ in range(2))
    mask_BL = np.zeros(shape[:2], bool)
    mask_BL[1::3, -3:] = padded

    def loss(layer: MoE, x_BLD: Array, dy_BLD: Array, mask_BL: Array, choices: Array | None) -> tuple[Array, Any]:
        y_BLD, stats = layer(x_BLD, padding=Padding.of(mask_BL) if padded else None, choices=choices)
        return jnp.sum(y_BLD * dy_BLD), {"y": y_BLD, "load": stats.load.mean(0), "drop_rate": stats.drop_rate}

    with on_mesh(config):
        layer = random_like(abstract_layer(config), config)
        step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        given = split_tokens(x_BLD), split_tokens(dy_BLD), split_batch(mask_BL)
        (d_layer, dx), found = step(layer, *given, None if choices is None else jnp.int32(choices))
        assert not np.asarray(found.pop("drop_rate")).any()
        return leaves(d_layer) | {"dx": np.asarray(dx)} | {name: np.asarray(value) for name, value in found.items()}


EVERY = [
    name if name in ("all_to_all", "hierarchical") else pytest.param(name, marks=pytest.mark.full)
    for name in (*STRATEGIES, "rounds", "capacity")
]


@pytest.mark.parametrize("padded", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("exchange", EVERY)
def test_two_of_three_choices_are_a_top_2(exchange: str, padded: bool) -> None:
    """On two machines of two ranks, against one device that has but two choices."""
    execution: dict[str, Any] = {"exchange": exchange}
    if exchange == "rounds":
        execution = {"exchange": "dedup", "buffer_factor": 1.0}
    if exchange == "capacity":
        execution = {"exchange": "all_to_all", "capacity_factor": 8.0, "overlap_chunks": 2}
    found = layer_values(tiny((1, 2, 2), **execution), 2, padded)
    expected = layer_values(tiny((1, 1, 1), top_k=2), None, padded)
    assert_close(found, expected, 1e-5)


@pytest.mark.full
@pytest.mark.parametrize(("mesh", "parts"), [((1, 1, 1), 2), ((2, 1, 2), 2), ((2, 1, 4), 1)])
def test_a_step_takes_the_choices_of_its_time(mesh: tuple[int, ...], parts: int) -> None:
    """The first of three steps is that of a top-2, the last that of a top-3, balance loss and all."""
    base = tiny(mesh, batch=16, router="hyper", hyper_width=6, z_loss_coefficient=0.01)
    fields = {"accumulate_steps": parts}
    growing = dataclasses.replace(base, train=TrainConfig(**fields, choices_from=2, choices_steps=4))
    with session(growing) as run:
        before, metrics = [], []
        for seed in range(3):
            before.append(host(run.state))
            metrics.append(run.step(random_tokens(base, seed)))
        assert [int(m.choices) for m in metrics] == [2, 2, 3]
    for step, top_k in ((0, 2), (2, 3)):
        model = dataclasses.replace(base.model, top_k=top_k)
        with session(dataclasses.replace(base, model=model, train=TrainConfig(**fields))) as run:
            run.state = jax.tree.map(
                lambda v, of: jax.device_put(v, of.sharding), before[step], run.trainer.abstract_state
            )
            expected = run.step(random_tokens(base, step))
        assert expected.choices is None
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(getattr(metrics[step], name), getattr(expected, name), rtol=3e-6)
        aux, expected_aux = metrics[step].parts.aux, expected.parts.aux
        for name in ("balance_loss", "load", "router_entropy"):
            np.testing.assert_allclose(getattr(aux, name), getattr(expected_aux, name), rtol=1e-5)


def test_padding_and_choices_share_their_id() -> None:
    """Expert E is none: of a token of padding whatever is taken, of others behind what is taken."""
    config = tiny(batch=1, length=4)
    segments_BL = np.array([[0, 0, PADDING, PADDING]], np.int32)
    with on_mesh(config):
        layer = random_like(abstract_layer(config), config)
        x_BLD = split_tokens(np.random.default_rng(0).standard_normal((1, 4, 16)).astype(np.float32))
        routing, _ = layer.route(x_BLD, False, Padding.of(split_batch(segments_BL == PADDING)), jnp.int32(2))
    none_LK = np.asarray(routing.experts_BLK[0]) == config.model.expert_count
    np.testing.assert_array_equal(none_LK, [[False, False, True]] * 2 + [[True] * 3] * 2)
    np.testing.assert_allclose(routing.gates_BLK[0].sum(-1), [1, 1, 0, 0], rtol=1e-6)
    assert math.isclose(float(routing.shares_UE.sum()), 1, rel_tol=1e-5)
