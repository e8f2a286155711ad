"""Mamba layers in an engine: a slot's past is its request's alone, whatever comes, goes, is drafted and is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from model.tools import on_mesh, random_model, split_batch, split_tokens

from bigmac_jax.config import Config
from bigmac_jax.inference import Generator, Speculation
from bigmac_jax.inference.kv_cache import Cache, advance, make_cache, make_decoder, settle, try_out
from bigmac_jax.model.attention import Rows
from bigmac_jax.model.mamba import Past, make_past
from bigmac_jax.model.mesh import BATCH, TENSOR

from .test_engine import CHUNK, LENGTH, PAGE, POSITIONS, SLOTS, Alone, assert_as_alone, config_on, play, schedule

SIZES: dict[str, Any] = {"chunk": CHUNK, "page_size": PAGE}
# Mesh, local experts of a draft on one rank, tokens of a draft: 300 schedules.
CASES = [((1, 1, 1), 2, 1), ((1, 1, 1), 2, 4), ((1, 1, 2), 0, 3), ((2, 1, 2), 0, 4), ((1, 2, 1, 2, True, True), 0, 3)]


def hybrid(mesh: tuple[int, ...], **fields: Any) -> Config:
    sizes = {"mamba_heads": 4, "mamba_head_dim": 4, "mamba_groups": 2, "mamba_state": 6, "mamba_chunk": 8}
    return config_on(mesh, blocks="M*EME", **sizes, **fields)


def compare(mesh: tuple[int, ...], local: int, tokens: int, seeds: range) -> None:
    """Plays schedules without drafts and with them."""
    config = hybrid(mesh)
    with on_mesh(config):
        model = random_model(config)
        plain = Generator(config, model)
        drafting = Generator(config, model, speculate=Speculation(tokens, local, least=0.0))
        positions = max(POSITIONS, LENGTH * int(np.prod(mesh[:4])))
        alone = Alone(plain, plain.engine(SLOTS, (), positions, **SIZES))
        engines = [(generator, generator.engine(SLOTS, (), positions, **SIZES)) for generator in (plain, drafting)]
        for seed in seeds:
            plans = schedule(seed)
            for generator, engine in engines:
                jobs = play(generator, engine, plans)
                assert_as_alone(jobs, plans, alone)
                assert not any(job.reused for job in jobs)  # pages have no state
    assert drafting.drafts is not None
    assert 0 < drafting.drafts.accepted < drafting.drafts.drafted


@pytest.mark.full
@pytest.mark.parametrize(("mesh", "local", "tokens"), CASES)
def test_many_schedules(mesh: tuple[int, ...], local: int, tokens: int) -> None:
    compare(mesh, local, tokens, range(100, 160))


def test_what_is_refused_was_never_there() -> None:
    """The past behind the tokens that stay is that of reading them alone; behind none, the same bits."""
    config = hybrid((1, 1, 1))
    stays_B, pages, C = np.array([0, 1, 2, 3, 4, 0, 4, 2], np.int32), 2, 4
    B, draw = len(stays_B), np.random.default_rng(0)
    table_BK = np.arange(B * pages, dtype=np.int32).reshape(B, pages)
    prompt_BC, next_BC = draw.integers(config.model.vocab_size, size=(2, B, C)).astype(np.int32)

    def pasts(cache: Cache) -> list[np.ndarray]:
        is_past = lambda node: isinstance(node, Past)  # noqa: E731
        return [np.asarray(v) for of in filter(is_past, jax.tree.leaves(cache, is_leaf=is_past)) for v in of]

    with on_mesh(config):
        decoder = make_decoder(config, random_model(config))
        read, tried = (jax.jit(of) for of in (advance, try_out))

        def rows(position: int, count_B: np.ndarray, *slot: np.ndarray) -> Rows:
            given = table_BK, np.full(B, position, np.int32), count_B.astype(np.int32), *slot
            return Rows(*(split_batch(v[None]) for v in given))

        all_B = np.full(B, C)
        cache = make_cache(decoder, B * pages, PAGE, B)
        before = read(
            decoder, cache, split_batch(prompt_BC.reshape(1, -1)), rows(0, all_B, np.arange(B, dtype=np.int32))
        )[1]
        _, cache, seen = tried(decoder, before, split_batch(next_BC.reshape(1, -1)), rows(C, all_B))
        settled = jax.jit(settle)(decoder, cache, seen, split_batch(stays_B[None]))
        expected = before
        for i in range(C):
            expected = read(decoder, expected, split_batch(next_BC[None, :, i]), rows(C + i, i < stays_B))[1]
    assert len(pasts(before)) == 8
    for old, held, new, right in zip(*map(pasts, (before, cache, settled, expected)), strict=True):
        np.testing.assert_array_equal(held, old)
        np.testing.assert_allclose(new, right, atol=1e-5 * np.abs(right).max())
        np.testing.assert_array_equal(new[:, :, stays_B == 0], old[:, :, stays_B == 0])
        moved_B = (new != old).any(tuple(axis for axis in range(new.ndim) if axis != 2))
        assert moved_B.tolist() == (stays_B > 0).tolist()


def test_where_the_past_of_a_slot_stands() -> None:
    """Layers, batch shards, slots, and then [taps, features] or [heads, …], over `tensor`."""
    config = hybrid((2, 1, 1, 2))
    with on_mesh(config):
        past = jax.eval_shape(lambda: make_past(config, 3, 2))
        found = [(leaf.shape[:3], leaf.sharding.spec) for leaf in past]
    tail = P(None, BATCH, None, None, TENSOR)
    assert found == [((2, 2, 3), spec) for spec in (tail, tail, tail, P(None, BATCH, None, TENSOR, None, None))]


@pytest.mark.full
def test_what_an_idle_slot_computes_reaches_no_past() -> None:
    """Not even NaN, which a request that overflowed may have left where an idle slot reads."""
    config, B = hybrid((1, 1, 1)), 4
    with on_mesh(config):
        layer: Any = jax.tree.map(lambda leaf: leaf[0], random_model(config).layers0_0.mamba)
        past = jax.tree.map(lambda v: jnp.ones_like(v[0]), make_past(config, B, 1))
        counts = split_batch(np.array([[0, 1, 0, 1]], np.int32))
        x_SBD = jnp.ones((1, B, config.model.hidden_size)).at[0, ::2].set(jnp.nan)
        _, after = layer.step(layer.project(split_tokens(x_SBD)), past, Rows(counts, counts, counts))
    for old, new in zip(past, after, strict=True):
        np.testing.assert_array_equal(np.asarray(new)[0, ::2], np.asarray(old)[0, ::2])
        assert np.isfinite(np.asarray(new)).all() and (np.asarray(new)[0, 1::2] != np.asarray(old)[0, 1::2]).any()
