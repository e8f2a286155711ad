"""Drafts: what a rank computes by its own experts, and which of them stands in for another's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.test_exchange import on_ranks
from model.tools import leaves, on_mesh, random_model, split_tokens, tiny

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.inference.drafter import Speculation, make_drafter
from bigmac_jax.inference.drafts import Drafts
from bigmac_jax.inference.kv_cache import Decoder, make_decoder
from bigmac_jax.model.exchange import Local, Plan
from bigmac_jax.model.mesh import EXPERT_GROUP

EXPERTS, CHOICES = 8, 3


def config_on(mesh: tuple, **fields: object) -> Config:
    return tiny(mesh, num_layers=1, structure="bigmac", latent_norm="none", num_shared_experts=0, **fields)


@pytest.mark.parametrize(
    ("computed", "expected"), [(2, [[0, 2, 1], [2, 1, 2], [2, 0, 1]]), (1, [[0, 2, 2], [2, 2, 2], [2, 0, 2]])]
)
def test_choices_elsewhere_are_left_out(computed: int, expected: list[list[int]]) -> None:
    """By hand: of four experts two are on each of two ranks; three choices of three tokens on each."""
    exchange = Local(4, (1, 2), np.inf, EXPERT_GROUP, computed=computed)
    first_TK = np.asarray([[0, 2, 1], [3, 1, 2], [3, 0, 1]], np.int32)
    experts = np.concatenate([first_TK, (first_TK + 2) % 4])  # for the second rank the same of its own experts
    found = on_ranks((1, 2), lambda experts_TK: exchange.plan(experts_TK).expert_NK)(experts)
    assert found.tolist() == expected * 2
    plan, x_TR, gates_TK = Plan(None, None, None, None), jnp.ones((3, 2)), jnp.ones((3, 3))
    rows, gates = exchange.dispatch(plan, x_TR, gates_TK)
    assert rows is x_TR and gates is gates_TK and exchange.combine(plan, x_TR, gates_TK) is x_TR


@pytest.mark.parametrize(
    ("mesh", "local_experts"),
    [((1, 1, 4), 0), pytest.param((1, 1, 2), 3, marks=pytest.mark.full),
     pytest.param((1, 2, 1, 2, False, True), 0, marks=pytest.mark.full)],
)  # fmt: skip
def test_a_layer_computes_its_own_experts(mesh: tuple, local_experts: int) -> None:
    """Against a loop over tokens and choices, each with the experts of the rank on which the token lives."""
    config = config_on(mesh, gated=False)
    with on_mesh(config):
        model = random_model(config)
        p = {name.removeprefix("layers.mlp."): w[0] for name, w in leaves(model).items() if "layers.mlp." in name}
        drafter = make_drafter(make_decoder(config, model), Speculation(2, local_experts))
        x_BLD = np.random.default_rng(1).standard_normal((8, 4, config.model.hidden_size)).astype(np.float32)
        y_BLD = np.asarray(_layer(drafter, split_tokens(x_BLD)))
    sizes = [int(size) for size in mesh[:4]]
    shards, held = int(np.prod(sizes[:3])), EXPERTS // int(np.prod(sizes[1:3]))
    computed = 0
    for b in range(8):
        for t in range(4):
            shard = b // (8 // shards)
            x = x_BLD[b, t].astype(np.float64)
            logits = x @ p["router_DE"].astype(np.float64)
            shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            chosen = np.argsort(-shares)[:CHOICES]
            gates = shares[chosen] / (shares[chosen].sum() if config.model.router_renormalize else 1)
            y = np.zeros(p["down.w_DF"].shape[1])
            for expert, gate in zip(chosen, gates * config.model.router_scale, strict=True):
                if not 0 <= expert - held * (shard % (EXPERTS // held)) < (local_experts or held):
                    continue
                hidden = np.maximum(x @ p["down.w_DF"] @ p["experts.w_in_eRF"][expert], 0) ** 2
                y += gate * (hidden @ p["experts.w_out_eFR"][expert])
                computed += 1
            np.testing.assert_allclose(y_BLD[b, t], y @ p["up.w_DF"], atol=1e-4 * np.abs(y_BLD).max())
    assert 10 < computed < 60


@functools.partial(jax.jit)
def _layer(drafter: Decoder, x_BLD: jax.Array) -> jax.Array:
    layer = jax.tree.map(lambda leaf: leaf[0], drafter.groups[0][0])
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
    ("how", "modules", "expected"),
    [
        ({}, 1, False),
        ({"tokens": 1}, 1, True),
        ({"tokens": 1}, 0, False),
        ({"tokens": 4, "by": "local"}, 1, False),
        ({"tokens": 1, "by": "mtp"}, 0, True),  # and `check` refuses it
    ],
)
def test_who_drafts(how: dict, modules: int, expected: bool) -> None:
    assert Speculation(**how).by_module(tiny(mtp_modules=modules)) == expected


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"tokens": 33}, r"speculate=33 must lie in \[0, 32\]"),
        ({"local_experts": -1}, "local_experts=-1 must be at least 0"),
        ({"least": 2.0}, r"least_acceptance=2.0 must lie in \[0, 1\]"),
    ],
)
def test_values_out_of_range(how: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Speculation(**how)


def test_values_at_their_limits() -> None:
    """And fewer experts than a rank holds, where there is one, as studies have it."""
    assert Speculation() == Speculation(0, 0, 0.25, "auto")
    for how in ({"tokens": 32}, {"least": 0}, {"least": 1}, {"local_experts": 0}):
        Speculation(**how)
    for mesh, local_experts in (((1, 1, 1), 7), ((1, 1, 1), 1), ((1, 1, 2), 4), ((1, 1, 2), 0)):
        with on_mesh(config := config_on(mesh)):
            Speculation(1, local_experts).check(config)
    with on_mesh(config := tiny(mtp_modules=1)):
        Speculation(1).check(config), Speculation(1, by="mtp").check(config)
        for how, message in (
            ({"tokens": 1, "local_experts": 1}, "a next-token module drafts; use local_experts=0"),
            ({"by": "mtp"}, "speculate=0 drafts none; use speculate=1 or more"),
            ({"tokens": 1, "by": "local"}, "on one rank of experts"),
        ):
            with pytest.raises(ConfigError, match=message):
                Speculation(**how).check(config)
    with pytest.raises(ConfigError, match="draft_with=mtp needs a next-token module"), on_mesh(config := tiny()):
        Speculation(1, by="mtp").check(config)


def test_drafting_pauses_after_a_window_of_too_few_accepted() -> None:
    """512 drafted tokens are a window, and 512 steps a pause; what a request could not use was not drafted for it."""
    drafts = Drafts(None, Speculation(4, least=0.5))  # type: ignore[arg-type]

    def steps_without() -> int:
        return next(steps for steps in range(1000) if drafts.should_draft())

    for _ in range(126):
        drafts.count(2, usable=9)
    drafts.count(2, usable=4)
    drafts.count(1, usable=3)
    assert (drafts.drafted, drafts.accepted) == (127 * 4 + 3, 255) and steps_without() == 0
    drafts.count(1, usable=1)  # the window is full: half of it were accepted
    assert (drafts.drafted, drafts.accepted) == (512, 256) and steps_without() == 0
    for accepted in (2,) * 128 + (2,) * 127 + (1,):
        assert steps_without() == 0
        drafts.count(accepted, usable=4)
    assert steps_without() == 512 and steps_without() == 0
    for _ in range(127):
        drafts.count(0, usable=4)
    assert steps_without() == 0  # until the next window is full
    drafts.count(0, usable=4)
    assert steps_without() == 512
