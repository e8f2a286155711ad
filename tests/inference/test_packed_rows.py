"""What the host tells an engine's programs, and what they answer, comes out as it was put in."""

from typing import Any

import jax
import numpy as np
from model.tools import on_mesh, split_batch, tiny

from bigmac_jax.inference.packed_rows import pack_row, pack_sampled, packed_size, read_sampled, unpack_rows
from bigmac_jax.inference.sampling import Sampled, Sampling

SAMPLING = Sampling(max_tokens=9, temperature=0.7, top_k=5, top_p=0.8, seed=2**32 - 3, logprobs=4)


def unpacked(rows: list[np.ndarray], tokens: int) -> Any:
    """Those of the second of two shards."""
    with on_mesh(tiny((2, 1, 1))):
        packed = split_batch(np.stack([np.zeros_like(rows), rows]))
        found = jax.jit(unpack_rows, static_argnums=1)(packed, tokens)
        return jax.tree.map(lambda v: np.asarray(v)[1].tolist(), found)


def test_rows_of_prompts() -> None:
    """One that goes on with token 0, one that ends its prompt, and one of nothing."""
    assert (packed_size(3), packed_size(3, 2)) == (13, 15)
    rows = [
        pack_row(SAMPLING, 11, 2, [7, 8, 9], [21, 22], 32, 0, 0),
        pack_row(Sampling(), 12, 1, [4, 0, 0], [23, 0], 16, slot=3),
        np.zeros(packed_size(3, 2), np.int32),
    ]
    assert all(row.dtype == np.int32 and row.shape == (15,) for row in rows)
    sampling, row, following, tokens = unpacked(rows, 2)
    np.testing.assert_allclose(sampling.temperature, [0.7, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(sampling.top_p, [0.8, 1, 0], rtol=1e-6)
    assert (sampling.top_k, sampling.seed, sampling.request) == ([5, 0, 0], [2**32 - 3, 0, 0], [11, 12, 0])
    assert sampling.alternatives == [4, 0, 0]
    assert (row.position_SW, row.count_SW, row.table_SWK) == ([32, 16, 0], [2, 1, 0], [[7, 8, 9], [4, 0, 0], [0] * 3])
    assert row.slot_SW == [0, 3, 2**31 - 1] and following == [0, -1, -1]
    assert tokens == [[21, 22], [23, 0], [0, 0]]


def test_slots_have_no_tokens() -> None:
    _, row, _, tokens = unpacked([pack_row(SAMPLING, 11, 40, [7, 8, 9]), np.zeros(packed_size(3), np.int32)], 0)
    assert (row.count_SW, row.table_SWK, row.slot_SW, tokens) == ([40, 0], [[7, 8, 9], [0, 0, 0]], None, [[], []])


def test_what_was_sampled() -> None:
    draw = np.random.default_rng(0)
    given = Sampled(
        draw.integers(0, 99, (2, 3)).astype(np.int32), draw.standard_normal((2, 3)).astype(np.float32),
        draw.integers(0, 99, (2, 3, 4)).astype(np.int32), draw.standard_normal((2, 3, 4)).astype(np.float32),
    )  # fmt: skip
    counts = np.asarray([[1, 0, 2], [3, 1, 0]], np.int32)
    with on_mesh(tiny((2, 1, 1))):
        packed = jax.jit(pack_sampled)(Sampled(*map(split_batch, given)), split_batch(counts))
        assert packed.shape == (2, 3, 3 + 2 * 4) and packed.dtype == np.int32
        count, found = read_sampled(packed)
    assert count.tolist() == counts.tolist()
    for out, value in zip(found, given, strict=True):
        np.testing.assert_array_equal(out, value)
