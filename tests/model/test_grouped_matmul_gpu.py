"""The grouped matmul of GPUs, interpreted, against loops over groups in float64; and its lowering without a GPU."""

import contextlib
import importlib
import re
import types
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import triton

from bigmac_jax.model.gathering import InStack
from bigmac_jax.model.kernels import grouped_matmul, grouped_matmul_gpu
from bigmac_jax.model.kernels.grouped_matmul_gpu import gmm, tgmm

from .tools import assert_close

# M, e, X, Y: neither X nor Y is a multiple of a tile or a power of two. The mean group of the second is long; the third
# has fewer rows than groups.
SHORT, LONG, FEW = (300, 6, 168, 136), (900, 2, 40, 264), (3, 6, 24, 40)
SIZES = {
    SHORT: [
        [0, 0, 0, 300, 0, 0],  # all rows in one group
        [300, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 300],
        [0, 0, 1, 0, 0, 0],  # one row
        [1, 1, 1, 1, 1, 1],
        [0, 50, 60, 70, 80, 40],  # empty: the first, one in the middle, the last
        [50, 60, 0, 0, 70, 120],
        [50, 60, 70, 80, 40, 0],
        [0, 0, 90, 0, 77, 0],
        [64, 64, 64, 64, 44, 0],  # as long as a tile, a row less, a row more
        [63, 65, 1, 127, 32, 12],
    ],
    LONG: [[450, 450], [0, 900], [900, 0], [1, 0], [0, 1], [128, 256], [127, 129], [257, 543], [129, 769]],
    FEW: [[1, 0, 1, 0, 0, 1], [0, 3, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]],
}


def draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_sizes(rng: np.random.Generator, M: int, e: int) -> np.ndarray:
    """Any lengths whose sum is at most M and not 0, some of them 0."""
    sizes = np.diff(np.sort(rng.integers(0, M + 1, e)), prepend=0)
    sizes = rng.permutation(np.where(rng.random(e) < 0.25, 0, sizes))
    return sizes if sizes.any() else random_sizes(rng, M, e)


def expected(x: Any, w: Any, dy: Any, sizes: Any) -> dict[str, np.ndarray]:
    """y, dx and dw of the rows that belong to a group."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    rows, dw, start = [], np.zeros_like(w), 0
    for i, size in enumerate(sizes):
        of_group = slice(start, start + size)
        rows.append((x[of_group] @ w[i], dy[of_group] @ w[i].T))
        dw[i] = x[of_group].T @ dy[of_group]
        start += size
    y, dx = (np.concatenate(a) for a in zip(*rows, strict=True))
    return {"y": y, "dx": dx, "dw": dw}


@jax.jit
def results(x: jax.Array, w: jax.Array, dy: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
    dx = gmm(dy, w, sizes, transpose_rhs=True, interpret=True)
    dw = tgmm(x, dy, sizes, dtype=w.dtype, interpret=True)
    return {"y": gmm(x, w, sizes, interpret=True), "dx": dx, "dw": dw}


def actual(x: Any, w: Any, dy: Any, sizes: Any, results: Any = results) -> dict[str, np.ndarray]:
    """The same, with NaN in all other rows."""
    filled = int(np.sum(sizes))
    x, dy = (np.where(np.arange(len(a))[:, None] < filled, a, np.nan).astype(a.dtype) for a in (x, dy))
    got = {name: np.asarray(a) for name, a in results(x, w, dy, np.asarray(sizes, np.int32)).items()}
    assert not got["dw"][np.asarray(sizes) == 0].any()  # exactly
    # The interpreter fills outputs with NaN: a tile that is written in full, and would race with its neighbour's on a
    # GPU, shows behind the last group.
    assert np.isnan(got["y"][filled:]).all() and np.isnan(got["dx"][filled:]).all()
    return {"y": got["y"][:filled], "dx": got["dx"][:filled], "dw": got["dw"]}


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        (LONG, 15),
        (FEW, 10),
        *(pytest.param(*c, marks=pytest.mark.full) for c in ((SHORT, 10), (SHORT, 70), (LONG, 30))),
    ],
)
def test_any_lengths_of_groups(shape: tuple[int, int, int, int], count: int) -> None:
    """Values and both gradients, for `count` vectors of lengths."""
    M, e, X, Y = shape
    x, w, dy = draw((M, X), 0), draw((e, X, Y), 1), draw((M, Y), 2)
    rng, vectors = np.random.default_rng(3), SIZES[shape]
    vectors = vectors + [random_sizes(rng, M, e) for _ in range(count - len(vectors))]
    for sizes in vectors:
        assert_close(actual(x, w, dy, sizes), expected(x, w, dy, sizes))


@pytest.mark.parametrize("kernel", ["gpu", "tpu"])
def test_matrices_are_read_where_they_stand(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three layers' matrices those of any layer, as if they were alone; groups without rows at both ends."""
    megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")  # the package has its function

    interpreted = {"gpu": partial(gmm, interpret=True), "tpu": partial(megablox.gmm, interpret=True)}
    monkeypatch.setattr(grouped_matmul_gpu, "gmm", interpreted["gpu"])
    monkeypatch.setattr(megablox, "gmm", interpreted["tpu"])
    monkeypatch.setattr(grouped_matmul, "platform", lambda: kernel)
    M, e, X, Y = 256, 4, 128, 256
    x, w = draw((M, X), 0), draw((3, e, X, Y), 1)
    for sizes in ([0, 100, 56, 0], [1, 0, 0, 255]):
        filled = sum(sizes)
        for layer in range(3):
            given = InStack(jnp.asarray(w), jnp.int32(layer))
            assert given.shape == (e, X, Y)
            y = jax.jit(grouped_matmul.grouped_matmul)(jnp.asarray(x), given, jnp.asarray(sizes, jnp.int32))
            want = expected(x, w[layer], np.zeros((M, Y)), sizes)["y"]
            assert_close({"y": y[:filled]}, {"y": want[:filled]})


def test_bytes_are_those_of_the_matrices_that_are_read() -> None:
    """A reader of programs takes a kernel's time from them."""
    M, e, X, Y = SHORT

    def bytes_of(w: jax.Array, *first: jax.Array) -> int:
        call = jax.make_jaxpr(gmm)(jnp.zeros((M, X)), w, jnp.zeros(e, jnp.int32), *first)
        return int(re.findall(r"bytes_accessed=(\d+)", str(call))[0])

    alone = 4 * (M * X + e * X * Y + M * Y)
    assert bytes_of(jnp.zeros((e, X, Y))) == alone == bytes_of(jnp.zeros((3 * e, X, Y)), jnp.int32(e))


def test_no_rows_at_all() -> None:
    M, e, X, Y = SHORT
    assert not actual(draw((M, X), 0), draw((e, X, Y), 1), draw((M, Y), 2), [0] * e)["dw"].any()


def test_nan_stays_in_its_group() -> None:
    """Neighbours in a tile's memory, the first and last rows among them, are masked and not multiplied by 0."""
    M, e, X, Y = SHORT
    x, w, dy, sizes = draw((M, X), 0), draw((e, X, Y), 1), draw((M, Y), 2), [50, 0, 30, 100, 20, 0]
    good = expected(x, w, dy, sizes)
    x[50:80], w[2], dy[50:80] = np.nan, np.nan, np.nan
    got = actual(x, w, dy, sizes)
    assert all(np.isnan(got[name][50:80]).all() for name in ("y", "dx")) and np.isnan(got["dw"][2]).all()
    for name, rows in (("y", np.r_[:50, 80:200]), ("dx", np.r_[:50, 80:200]), ("dw", np.array([0, 1, 3, 4, 5]))):
        assert_close({name: got[name][rows]}, {name: good[name][rows]})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bfloat16(dtype: str) -> None:
    """Sums are float32 and rounded once, by half of 2^-8 at most; the weights' gradient not even that if they are
    float32."""
    M, e, X, Y = SHORT
    x, w, dy = (jnp.asarray(a, jnp.bfloat16) for a in (draw((M, X), 0), draw((e, X, Y), 1), draw((M, Y), 2)))
    sizes = [0, 129, 7, 64, 0, 50]
    got, want = actual(x, w.astype(dtype), dy, sizes), expected(x, w, dy, sizes)
    assert got["y"].dtype == got["dx"].dtype == jnp.bfloat16 and got["dw"].dtype == dtype
    assert_close({name: got[name] for name in ("y", "dx")}, {name: want[name] for name in ("y", "dx")}, 2**-8)
    assert_close({"dw": got["dw"]}, {"dw": want["dw"]}, 1e-5 if dtype == "float32" else 2**-8)


def test_nothing_outside_the_arrays_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter pads arrays, a GPU has the next row or another array there: here a tile of which a position is
    outside and not masked is NaN as a whole."""

    def touches_outside(tile: Any, mask: jax.Array | None) -> jax.Array:
        indices, shape = tile.transforms[-1].indices, tile.ref.shape
        slices = [(index, size) for index, size in zip(indices, shape, strict=True) if hasattr(index, "start")]
        outside = jnp.zeros(tile.shape, bool)
        for axis, (index, size) in enumerate(slices):
            outside |= index.start + jax.lax.broadcasted_iota(jnp.int32, tile.shape, axis) >= size
        return jnp.any(outside if mask is None else outside & mask)

    def load(tile: Any, *, mask: jax.Array | None, other: Any) -> jax.Array:
        return jnp.where(touches_outside(tile, mask), jnp.nan, triton.load(tile, mask=mask, other=other))

    def store(tile: Any, value: jax.Array, *, mask: jax.Array | None) -> None:
        triton.store(tile, jnp.where(touches_outside(tile, mask), jnp.nan, value), mask=mask)

    checked = types.SimpleNamespace(load=load, store=store, dot=triton.dot, CompilerParams=triton.CompilerParams)
    monkeypatch.setattr(grouped_matmul_gpu, "plgpu", checked)
    for shape, sizes in ((SHORT, [0, 129, 7, 64, 0, 100]), (LONG, [450, 450])):
        M, e, X, Y = shape
        x, w, dy = draw((M, X), 0), draw((e, X, Y), 1), draw((M, Y), 2)
        afresh = jax.jit(lambda *arrays: results.__wrapped__(*arrays))
        assert_close(actual(x, w, dy, sizes, afresh), expected(x, w, dy, sizes))


def test_shapes_must_fit() -> None:
    """A kernel would read beyond an array."""
    x, w, sizes = jnp.ones((8, 4)), jnp.ones((2, 3, 4)), jnp.full((2,), 4, jnp.int32)
    with pytest.raises(ValueError, match=r"x \(8, 4\) and 2 groups do not fit w \(2, 3, 4\)"):
        gmm(x, w, sizes)
    with pytest.raises(ValueError, match=r"3 groups do not fit"):
        gmm(x, w, jnp.ones((3,), jnp.int32), transpose_rhs=True)
    with pytest.raises(ValueError, match="as many rows"):
        tgmm(x, jnp.ones((7, 4)), sizes)


def test_weights_are_cast_to_the_rows_dtype() -> None:
    """As the trainer casts them: a float32 weight meets bfloat16 rows as its nearest bfloat16."""
    M, e, X, Y = SHORT
    x, w = jnp.asarray(draw((M, X), 0), jnp.bfloat16), draw((e, X, Y), 1)
    sizes = jnp.full((e,), M // e, jnp.int32)
    y = jax.jit(gmm, static_argnames="interpret")
    np.testing.assert_array_equal(y(x, w, sizes, interpret=True), y(x, w.astype(jnp.bfloat16), sizes, interpret=True))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_for_gpus(dtype: str) -> None:
    """Every primitive of the kernels has a Triton counterpart, and the program says the useful work of each."""
    M, X, Y, e = 8192, 2688, 264, 64
    x, dy = (jax.ShapeDtypeStruct((M, width), dtype) for width in (X, Y))
    w, sizes = jax.ShapeDtypeStruct((e, X, Y), dtype), jax.ShapeDtypeStruct((e,), jnp.int32)

    def all_three(x: Any, w: Any, dy: Any, sizes: Any) -> Any:
        return gmm(x, w, sizes), gmm(dy, w, sizes, transpose_rhs=True), tgmm(x, dy, sizes)

    with h100():
        traced = jax.jit(all_three).trace(x, w, dy, sizes)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    names = ["grouped_matmul_fwd", "grouped_matmul_dx", "grouped_matmul_dw"]
    assert re.findall(r'\bname = "(grouped_\w+)"', program) == names
    assert program.count("__gpu$xla.gpu.triton") == 3
    flops, size = 2 * M * X * Y, (M * (X + Y) + e * X * Y) * jnp.dtype(dtype).itemsize
    assert (
        re.findall(r"flops\\22: \\22(\d+)\\22, \\22bytes_accessed\\22: \\22(\d+)", program)
        == [(str(flops), str(size))] * 3
    )
    estimates = re.findall(r"flops=(\d+), transcendentals=0, bytes_accessed=(\d+)", str(traced.jaxpr))
    assert estimates == [(str(flops), str(size))] * 3


def h100() -> Any:
    """What jax 0.12 asks for the GPU's architecture where there is no GPU; 0.10 assumes one of this kind."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh

    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))
