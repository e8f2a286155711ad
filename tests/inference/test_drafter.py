"""Drafts: what a rank computes by its own experts, and which of them stands in for another's."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tools import QUICK, leaves, on_mesh, random_model, split_tokens, tiny

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.inference.drafter import NEAREST, NONE, Speculation, make_drafter
from bigmac_jax.inference.kv_cache import Decoder, make_decoder
from bigmac_jax.model.exchange import Local
from bigmac_jax.model.mesh import EXPERT_GROUP

EXPERTS, CHOICES = 8, 3


def config_on(mesh: tuple, **fields: object) -> Config:
    return tiny(mesh, num_layers=1, structure="bigmac", latent_norm="none", num_shared_experts=0, **fields)


def test_choices_with_one_stand_in_are_computed_once() -> None:
    """By hand: two experts here, three choices of three tokens among four."""
    exchange = Local(4, (1, 2), np.inf, EXPERT_GROUP, stand_in_E=jnp.asarray([0, 1, 1, 2], jnp.int32))
    experts_TK = jnp.asarray([[0, 2, 1], [3, 1, 2], [3, 0, 1]], jnp.int32)
    gates_TK = jnp.asarray([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.7, 0.2, 0.1]])
    plan = exchange.plan(experts_TK)
    x_TR = jnp.ones((3, 2))
    rows, gates = exchange.dispatch(plan, x_TR, gates_TK)
    assert plan.expert_NK is not None and plan.expert_NK.tolist() == [[0, 1, 2], [2, 1, 2], [2, 0, 1]]
    here = np.asarray(plan.expert_NK) < 2
    np.testing.assert_allclose(np.where(here, gates, 0), [[0.5, 0.5, 0], [0, 0.4, 0], [0, 0.2, 0.1]], rtol=1e-6)
    assert rows is x_TR and plan.counts_E.tolist() == [2, 3, 2, 2] and int(plan.dropped) == 0


def tables(config: Config, how: Speculation, given: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """[ranks, E] of the one layer."""
    with on_mesh(config):
        decoder = make_decoder(config, random_model(config, given))
        drafter = make_drafter(decoder, how)
        (group,) = drafter.groups
        return np.asarray(group.mlp.stand_ins[...])[0]


def in_pairs(config: Config) -> dict[str, np.ndarray]:
    """Experts i and i + 4 are nearly the same."""
    R, F, draw = config.model.wire_size, config.model.expert_width, np.random.default_rng(5).standard_normal
    given = {}
    for name, shape in (("w_in_eRF", (R, F)), ("w_out_eFR", (F, R))):
        w = draw((1, 4, *shape)).astype(np.float32) / np.sqrt(shape[0])
        given[f"layers.mlp.experts.{name}"] = np.concatenate([w, w * (1 + 0.01 * draw(w.shape))], 1).astype(np.float32)
    return given


@pytest.mark.full
@pytest.mark.parametrize("mesh", [(1, 1, 2), (1, 2, 1, 2, False, True), (2, 1, 2, 1, True)])
def test_the_nearest_stands_in(mesh: tuple) -> None:
    config = config_on(mesh)
    found = tables(config, Speculation(2, stand_ins=NEAREST), in_pairs(config))
    ranks = math.prod(int(size) for size in mesh[:4])
    assert found.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]] * ranks


@pytest.mark.full
def test_the_nearest_is_that_of_the_outputs() -> None:
    """Against distances of outputs, expert by expert, in NumPy."""
    config = config_on((1, 1, 4))
    with on_mesh(config):
        p = {name.rpartition(".")[2]: w[0].astype(np.float64) for name, w in leaves(random_model(config)).items()
             if name.startswith("layers.mlp.experts")}  # fmt: skip
        w_down = leaves(random_model(config))["layers.mlp.down.w_DF"][0].astype(np.float64)
        scale = leaves(random_model(config))["layers.mlp_norm.scale_D"][0].astype(np.float64)
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, 64, config.model.hidden_size)))[0].astype(np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.model.norm_eps) * scale @ w_down
    y = [np.maximum(x @ p["w_in_eRF"][i], 0) ** 2 @ p["w_out_eFR"][i] for i in range(EXPERTS)]
    found = tables(config, Speculation(2, stand_ins=NEAREST))
    for rank in range(4):
        here = [2 * rank, 2 * rank + 1]
        expected = [min((0, 1), key=lambda j: ((y[i] - y[here[j]]) ** 2).sum()) for i in range(EXPERTS)]
        assert found[rank].tolist() == expected


def test_left_out_and_fewer() -> None:
    config = config_on((1, 1, 2))
    assert tables(config, Speculation(2, stand_ins=NONE)).tolist() == [[0, 1, 2, 3, *[4] * 4], [*[4] * 4, 0, 1, 2, 3]]
    few = tables(config, Speculation(2, local_experts=1, stand_ins=NONE))
    assert few.tolist() == [[0, *[4] * 7], [*[4] * 4, 0, 4, 4, 4]]


@pytest.mark.parametrize(
    ("stand_ins", "mesh"),
    [(NONE, (1, 1, 4)), pytest.param(NEAREST, (1, 1, 2), marks=pytest.mark.full),
     pytest.param(NEAREST, (1, 2, 1, 2, False, True), marks=pytest.mark.full)],
)  # fmt: skip
def test_a_layer_computes_its_stand_ins(stand_ins: str, mesh: tuple) -> None:
    """Against a loop over tokens and choices, each with the table of the rank on which the token lives."""
    config = config_on(mesh, gated=False)
    with on_mesh(config):
        model = random_model(config)
        p = {name.removeprefix("layers.mlp."): w[0] for name, w in leaves(model).items() if "layers.mlp." in name}
        drafter = make_drafter(make_decoder(config, model), Speculation(2, stand_ins=stand_ins))
        x_BLD = np.random.default_rng(1).standard_normal((8, 4, config.model.hidden_size)).astype(np.float32)
        y_BLD = np.asarray(_layer(drafter, split_tokens(x_BLD)))
        table = np.asarray(drafter.groups[0].mlp.stand_ins[...])[0]
    sizes = [int(size) for size in mesh[:4]]
    tensor = sizes[3] if len(sizes) > 3 else 1
    shards, held = int(np.prod(sizes[:3])), EXPERTS // int(np.prod(sizes[1:3]))
    computed = 0
    for b in range(8):
        for t in range(4):
            shard = b // (8 // shards)
            rank = shard * tensor + t // (4 // tensor)
            x = x_BLD[b, t].astype(np.float64)
            logits = x @ p["router_DE"].astype(np.float64)
            shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            chosen = np.argsort(-shares)[:CHOICES]
            gates = shares[chosen] / (shares[chosen].sum() if config.model.router_renormalize else 1)
            y = np.zeros(p["down.w_DF"].shape[1])
            for expert, gate in zip(chosen, gates * config.model.router_scale, strict=True):
                local = table[rank, expert]
                if local == held:
                    continue
                i = held * (shard % (EXPERTS // held)) + local
                hidden = np.maximum(x @ p["down.w_DF"] @ p["experts.w_in_eRF"][i], 0) ** 2
                y += gate * (hidden @ p["experts.w_out_eFR"][i])
                computed += 1
            np.testing.assert_allclose(y_BLD[b, t], y @ p["up.w_DF"], atol=1e-4 * np.abs(y_BLD).max())
    assert computed == 96 if stand_ins == NEAREST else 10 < computed < 60


@functools.partial(jax.jit, compiler_options=QUICK)
def _layer(drafter: Decoder, x_BLD: jax.Array) -> jax.Array:
    layer = jax.tree.map(lambda leaf: leaf[0], drafter.groups[0])
    return layer.mlp(x_BLD, evaluating=True)[0]


@pytest.mark.parametrize(
    ("mesh", "fields", "how", "message"),
    [
        ((1, 1, 1), {}, {}, "saves exchanges, and on one rank of experts there are none: .*; use speculate=0, mesh"),
        ((1, 1, 1), {}, {"local_experts": 8}, "on one rank of experts"),
        ((1, 1, 2), {}, {"local_experts": 5}, "local_experts=5 must be at most the 4 that a rank holds"),
        ((2, 1, 1), {"structure": "dense"}, {}, "model.structure=dense has no experts; use speculate=0"),
    ],
)
def test_what_saves_nothing_is_refused(mesh: tuple, fields: dict, how: dict, message: str) -> None:
    config = tiny(mesh, **fields)
    with on_mesh(config):
        Speculation(0, **how).check(config)
        with pytest.raises(ConfigError, match=message):
            Speculation(4, **how).check(config)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"tokens": 33}, r"speculate=33 must lie in \[0, 32\]"),
        ({"local_experts": -1}, "local_experts=-1 must be at least 0"),
        ({"stand_ins": "best"}, "stand_ins='best' must be none or nearest"),
        ({"least": 2.0}, r"least_acceptance=2.0 must lie in \[0, 1\]"),
    ],
)
def test_values_out_of_range(how: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Speculation(**how)
