"""Steps over the paged cache give the logits of the full forward pass, at every position, however the pages stand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tools import PAPER, PRESENT, abstract_model, on_mesh, random_model, split_batch, split_tokens, tiny

from bigmac_jax.config import Config, ConfigError, TrainConfig, TuningConfig, check_batch, with_mesh
from bigmac_jax.inference.kv_cache import Cache, Decoder, advance, compute_last_logits, make_cache, make_decoder
from bigmac_jax.inference.layer_loop import Loop
from bigmac_jax.model.attention import Rows
from bigmac_jax.model.mesh import axes_of, batch_ranks
from bigmac_jax.model.transformer import init_model

ROWS, LENGTH, PAGE = 8, 20, 4
STRUCTURES = ("dense", "vanilla", "fine_grained", "bigmac")
MESHES = {"1x1": (1, 1, 1), "2x2": (2, 1, 2), "1x8": (1, 1, 8), "tensor": (1, 1, 2, 2, True, True), "node": (1, 2, 2),
          "heads": (1, 1, 2, 4)}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "present": {**PRESENT, "num_kv_heads": 2, "num_shared_experts": 1},
    "paper": PAPER,
    "hybrid": {**PRESENT, "mamba_heads": 8, "mamba_head_dim": 4, "mamba_groups": 4, "mamba_state": 6, "mamba_chunk": 3},
    "gated": {**PRESENT, "gated": True, "activation": "silu", "positions": "none", "tie_embeddings": False},
}
QUICK_CASES = [
    ("dense", "2x2", "present"),
    ("fine_grained", "tensor", "paper"),
    ("bigmac", "1x1", "hybrid"),
]


def cases() -> list[Any]:
    product = [(s, m, b) for s in STRUCTURES for m in MESHES for b in MODELS]
    return [pytest.param(*case, marks=[] if case in QUICK_CASES else pytest.mark.full) for case in product]


def config_of(structure: str, mesh: str, backbone: str, **model: Any) -> Config:
    experts = 64 if structure == "vanilla" and mesh == "1x8" else 32 if structure == "vanilla" else 8
    values = {"num_experts": experts, "down_ratio": 0.5, "capacity_factor": 0.5, **MODELS[backbone], **model}
    if backbone == "gated" and structure != "dense":
        values |= {"num_layers": 3, "first_dense_layers": 1}
    if backbone == "hybrid":
        values |= {"blocks": "M*E-ME" if structure != "dense" else "M*-M-", "num_layers": 1 + (mesh == "1x1")}
    return tiny(MESHES[mesh], batch=ROWS, length=LENGTH, structure=structure, **values)


def step(decoder: Decoder, cache: Cache, tokens_ST: jax.Array, rows: Rows) -> tuple[jax.Array, Cache]:
    x_STD, cache = advance(decoder, cache, tokens_ST, rows)
    return compute_last_logits(decoder, x_STD, rows.count_SW), cache


def paged_and_full(config: Config, exchange: str, gathered: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The logits of every position that a step ends at, [positions, V] each: prompts in rows of a page, then token by
    token."""
    draw = np.random.default_rng(1)
    tokens_NL = draw.integers(config.model.vocab_size, size=(ROWS, LENGTH)).astype(np.int32)
    length_N = np.array([1, 12, 3, 7, 2, 11, 5, 12], np.int32)
    with on_mesh(config):
        shards = batch_ranks()
        B = ROWS // shards
        model = random_model(config)
        full = jax.jit(lambda model, tokens: model(tokens, evaluating=True)[0])
        full_NLV = np.asarray(full(model, split_tokens(tokens_NL)))
        decoder = make_decoder(config, model, exchange, gathered=gathered)
        pages = LENGTH // PAGE
        # Any order of pages, one that belongs to nobody among them.
        order = [draw.permutation(B * pages + 1)[: B * pages].reshape(B, pages) for _ in range(shards)]
        table_NK = np.concatenate(order).astype(np.int32)
        cache = jax.jit(lambda decoder: make_cache(decoder, B * pages + 1, PAGE, B))(decoder)
        run = jax.jit(step, donate_argnums=1)
        found, expected = [], []

        def take(tokens_NC: np.ndarray, position_N: np.ndarray, count_N: np.ndarray) -> None:
            nonlocal cache
            slot_N = np.tile(np.arange(B, dtype=np.int32), shards)
            given = (table_NK, position_N, count_N) + ((slot_N,) if tokens_NC.ndim > 1 else ())
            rows = Rows(*(split_batch(v.reshape(shards, B, *v.shape[1:])) for v in given))
            logits, cache = run(decoder, cache, split_batch(tokens_NC.reshape(shards, -1)), rows)
            there = count_N > 0
            found.append(np.asarray(logits).reshape(ROWS, -1)[there])
            expected.append(full_NLV[there, (position_N + count_N - 1)[there]])

        for start in range(0, length_N.max(), PAGE):
            count_N = np.clip(length_N - start, 0, PAGE).astype(np.int32)
            tokens_NC = tokens_NL[:, start : start + PAGE].copy()
            tokens_NC[np.arange(PAGE) >= count_N[:, None]] = draw.integers(config.model.vocab_size)  # is not read
            take(tokens_NC, np.full(ROWS, start, np.int32), count_N)
        for at_N in length_N + np.arange(LENGTH, dtype=np.int32)[:, None]:
            there = (at_N < LENGTH).astype(np.int32)
            if not there.any():
                break
            at_N = np.minimum(at_N, LENGTH - 1)
            take(tokens_NL[np.arange(ROWS), at_N], at_N, there)
    return np.concatenate(found), np.concatenate(expected)


@pytest.mark.parametrize(("structure", "mesh", "backbone"), cases())
def test_steps_equal_the_full_forward_pass(structure: str, mesh: str, backbone: str) -> None:
    found, expected = paged_and_full(config_of(structure, mesh, backbone), "auto")
    assert len(found) == 8 * LENGTH - 53 + 16  # of a prompt every page's last
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.full
@pytest.mark.parametrize("exchange", ["all_to_all", "dedup", "hierarchical", "gather", "ragged"])
def test_every_exchange(exchange: str) -> None:
    found, expected = paged_and_full(config_of("bigmac", "node", "present"), exchange)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["1x1", "tensor"])
@pytest.mark.parametrize("router", ["hyper", "affine", "frozen"])
def test_every_router(router: str, mesh: str) -> None:
    found, expected = paged_and_full(config_of("bigmac", mesh, "gated", router=router, hyper_width=6), "auto")
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_decoder_has_the_matrix_and_no_network() -> None:
    """Or every step would make it. In float32, whatever the weights' dtype is."""
    config = tiny(router="hyper", hyper_width=6)
    with on_mesh(config):
        decoder = jax.eval_shape(lambda model: make_decoder(config, model, weights="int8"), abstract_model(config))
    moe: Any = decoder.groups[0][0].mlp
    assert moe.hyper is None and decoder.config.model.router == "affine"
    for name, shape in (("router_DE", (16, 8)), ("router_logit_bias_E", (8,))):
        value = getattr(moe, name).get_value()
        assert (value.shape[1:], str(value.dtype)) == (shape, "float32")


@pytest.mark.parametrize("weights", ["", pytest.param("int8", marks=pytest.mark.full)])
def test_what_fsdp_split_is_gathered_once(weights: str) -> None:
    """The same numbers, on each rank those that it computes with: of experts its own, of all else all."""
    config = tiny((2, 1, 2, 1, True, False), batch=ROWS, length=LENGTH)
    with on_mesh(config):
        model = random_model(config)
        split, gathered = (
            jax.tree_util.tree_leaves_with_path(make_decoder(config, model, weights=weights, gathered=gathered))
            for gathered in (False, True)
        )
    assert any("data" in axes_of(w.sharding.spec) for _, w in split)
    for (path, w), (_, whole) in zip(split, gathered, strict=True):
        np.testing.assert_array_equal(w, whole)
        matrix_of_experts = "experts" in str(path) and whole.ndim == 4
        assert axes_of(whole.sharding.spec) - {"tensor"} == ({"node", "expert"} if matrix_of_experts else set()), path


@pytest.mark.parametrize("weights", ["", "int8"])
def test_experts_in_host_memory_stay_split(weights: str) -> None:
    """A host has no room for the whole ones of each of its ranks, and a rank copies its share alone."""
    config = tiny((2, 1, 2, 1, True, False), num_layers=3, resident_layers=1)
    with on_mesh(config):
        decoder = make_decoder(config, random_model(config), weights=weights, gathered=True)
    stored, others = jax.tree.leaves(decoder.store), jax.tree.leaves((decoder.ends, decoder.groups))
    assert any("data" in axes_of(w.sharding.spec) for w in stored)
    assert not any("data" in axes_of(w.sharding.spec) for w in others)


@pytest.mark.full
def test_experts_that_stay_split_compute_beside_gathered_weights() -> None:
    config = config_of("bigmac", "2x2", "present", num_layers=3, resident_layers=1)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=True))
    found, expected = paged_and_full(config, "auto", gathered=True)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("weights", "fsdp", "structure"),
    [("", False, "bigmac"), ("", True, "fine_grained"), ("int8", False, "bigmac"), ("", False, "dense")],
)
def test_experts_stay_in_their_stack(weights: str, fsdp: bool, structure: str) -> None:
    """Their matrices alone, and where they are used as they stand: neither from eight bits nor gathered."""
    config = tiny((2, 1, 2, 1, fsdp), structure=structure, use_bias=True)
    with on_mesh(config):
        (group,) = make_decoder(config, random_model(config), weights=weights).groups
        loop = Loop.of(group)
        stay = [leaf.shape for leaf in loop.stay if leaf is not None]
        kept = not (weights or fsdp) and structure == "bigmac"
        assert stay == ([(2, 8, 4, 16), (2, 8, 16, 4)] if kept else [])
        assert all((sliced is None) != (stack is None) for sliced, stack in zip(loop.sliced, loop.stay, strict=True))


@pytest.mark.parametrize("mesh", ["1x1", pytest.param("2x2", marks=pytest.mark.full)])
def test_nothing_of_other_requests_is_read(mesh: str) -> None:
    """A cache in which all that nobody has written is NaN gives what an empty one gives, bit by bit: short prompts in
    long rows, and a token behind them."""
    config = config_of("bigmac", mesh, "present", num_layers=2)
    draw = np.random.default_rng(2)
    with on_mesh(config):
        B, shards = ROWS // batch_ranks(), batch_ranks()
        decoder = make_decoder(config, random_model(config))
        empty = jax.jit(lambda: make_cache(decoder, B * 5 + 1, PAGE, B))()
        table_SBK = np.tile(1 + np.arange(B * 5, dtype=np.int32).reshape(B, 5), (shards, 1, 1))
        tokens_SW = split_batch(draw.integers(config.model.vocab_size, size=(shards, B * 16)).astype(np.int32))
        count_SB = np.tile(np.array([1, 16, 6, 9, 3, 13, 2, 8], np.int32)[:B], (shards, 1))
        slot_SB = np.tile(np.arange(B, dtype=np.int32), (shards, 1))
        found = []
        for cache in (empty, jax.tree.map(lambda pages: jnp.full_like(pages, jnp.nan), empty)):
            run = jax.jit(step)
            rows = Rows(*(split_batch(v) for v in (table_SBK, 0 * count_SB, count_SB, slot_SB)))
            first, cache = run(decoder, cache, tokens_SW, rows)
            rows = Rows(*(split_batch(v) for v in (table_SBK, count_SB, 0 * count_SB + 1)))
            found.append((first, run(decoder, cache, tokens_SW[:, :B], rows)[0]))
        assert all(np.isfinite(logits).all() for logits in found[0])
        for logits, expected in zip(found[1], found[0], strict=True):
            np.testing.assert_array_equal(logits, expected)


@pytest.mark.full
def test_what_is_gathered_in_fewer_bits_is_rounded_in_a_loop_too() -> None:
    """A run in float32 that gathers in bfloat16 was trained with rounded weights."""
    config = config_of("bigmac", "1x8", "present", num_layers=2)
    config = dataclasses.replace(config, execution=dataclasses.replace(config.execution, gather_dtype="bfloat16"))
    found, expected = paged_and_full(config, "all_to_all")
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("unroll", "groups"), [(0, 2), (1, 1), (2, 2)])
def test_layers_stand_apart_where_no_loop_goes_through_them(unroll: int, groups: int) -> None:
    """On CPU by default, elsewhere where all are unrolled: a loop would copy each layer's weights out of the stack."""
    config = tiny((1, 1, 1), unroll_layers=unroll)
    with on_mesh(config):
        decoder = jax.eval_shape(lambda: make_decoder(config, init_model(config, jax.random.key(0))))
    assert len(decoder.groups) == groups


def test_a_decoder_has_the_rules_of_no_training() -> None:
    """What a run could train with on its exchange and mesh is read, and decoded, with others: nothing is dropped."""
    config = tiny((1, 1, 1), capacity_factor=1.25, exchange="dedup")
    train, tuning = TrainConfig(init_from="x"), TuningConfig(objective="dpo")
    config = dataclasses.replace(config, train=train, tuning=tuning)
    check_batch(config, 1)
    elsewhere = with_mesh(config, ["mesh.expert=2"])
    with pytest.raises(ConfigError, match=r"use capacity_factor=inf with tuning\.objective=dpo$"):
        check_batch(elsewhere, 1)
    with on_mesh(config):
        decoder = jax.eval_shape(lambda: make_decoder(config, init_model(config, jax.random.key(0))))
    assert decoder.config.execution.exchange == "auto"
