"""The TPU's products of rows that each rank sent as many of, interpreted on CPU, against einsum."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmac_jax.model.kernels import even_matmul_tpu

from .tools import assert_close


@pytest.mark.parametrize(
    ("S", "e", "C", "X", "Y", "dtype"),
    [
        (4, 2, 96, 40, 24, "float32"),  # three ranks do not divide four, so a tile has the rows of all
        (4, 2, 80, 40, 24, "bfloat16"),
        (2, 2, 13, 40, 24, "float32"),  # ranks one by one: their rows do not stand behind each other
        pytest.param(2, 3, 133, 16, 300, "bfloat16", marks=pytest.mark.full),
        (2, 2, 1040, 16, 24, "float32"),  # a rank's rows in several tiles
        pytest.param(2, 2, 8, 8192, 200, "float32", marks=pytest.mark.full),  # columns in two tiles, the last cut off
        pytest.param(1, 2, 16, 1100, 520, "bfloat16", marks=pytest.mark.full),  # the gradient in four
    ],
)
def test_it_is_the_product_of_each_expert(S: int, e: int, C: int, X: int, Y: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, w, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((S, e, C, X), (e, X, Y), (S, e, C, Y)))
    if C != 13:  # it would be slow
        assert even_matmul_tpu.fits(x.shape, X, Y, itemsize=x.dtype.itemsize)

    def kernel(x: jax.Array, w: jax.Array) -> jax.Array:
        return even_matmul_tpu.even_matmul(x, w, "float32", True)

    def reference(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum("SeCX,eXY->SeCY", x, w, precision="highest", preferred_element_type=jnp.float32)

    def results(function: Any, x: jax.Array, w: jax.Array, dy: jax.Array) -> dict[str, jax.Array]:
        y, pull = jax.vjp(function, x, w)
        dx, dw = pull(dy.astype(y.dtype))
        return {"y": y, "dx": dx, "dw": dw}

    wide = [v.astype(jnp.float32) for v in (x, w, dy)]
    # The weights' gradient is in float32 whatever the rows are, and so w is.
    actual = results(kernel, x, wide[1], dy)
    assert actual["dw"].dtype == jnp.float32
    assert actual["y"].dtype == actual["dx"].dtype == x.dtype
    expected = results(reference, *wide)
    assert_close({"dw": actual.pop("dw")}, {"dw": expected.pop("dw")})
    rounded = {name: v.astype(dtype).astype(jnp.float32) for name, v in expected.items()}
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for name, v in actual.items():
        scale = float(jnp.max(jnp.abs(rounded[name])))
        np.testing.assert_allclose(v.astype(jnp.float32), rounded[name], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("shape", "widths", "itemsize", "expected"),
    [
        ((32, 4, 80, 2048), (2048, 1536), 2, True),
        ((1, 4, 1000, 2048), (2048, 768), 2, False),  # no part of 1,000 rows is a multiple of sixteen
        ((8, 4, 640, 2048), (2048, 768), 2, True),  # two tiles of 320
        ((32, 4, 80, 2048), (2048, 16384), 2, False),
        ((32, 4, 80, 512), (512, 6144), 2, True),
        ((32, 4, 10, 512), (512, 512), 2, False),  # a product for each rank, of ten rows
        ((2, 4, 133, 512), (512, 512), 2, True),
    ],
)
def test_what_fits(shape: tuple[int, ...], widths: tuple[int, ...], itemsize: int, expected: bool) -> None:
    assert even_matmul_tpu.fits(shape, *widths, itemsize=itemsize) == expected


@pytest.mark.parametrize(("rows", "X", "itemsize"), [(256, 2048, 2), (512, 4096, 2), (264, 1024, 4), (512, 768, 2)])
def test_a_tile_has_the_most_columns_that_fast_memory_takes(rows: int, X: int, itemsize: int) -> None:
    """Whole lanes of them: what is read and written stands there twice, beside the product in float32."""
    columns = even_matmul_tpu._columns(rows, X, itemsize)

    def taken(columns: int) -> int:
        return 2 * (rows * X + X * columns + rows * columns) * itemsize + 4 * rows * columns

    assert columns % 128 == 0 and taken(columns) <= 12 * 2**20 < taken(columns + 128)


def test_a_tile_without_room_has_no_column() -> None:
    assert even_matmul_tpu._columns(512, 16384, 2) == 0


def test_a_product_is_in_as_few_tiles_as_fast_memory_takes() -> None:
    """Four ranks' 80 rows make a tile of 320, beside which 896 of the 4,096 columns have room."""
    x, w = jax.ShapeDtypeStruct((8, 3, 80, 2048), "bfloat16"), jax.ShapeDtypeStruct((3, 2048, 4096), "bfloat16")
    product = functools.partial(even_matmul_tpu._product, transposed=False, interpret=True)
    (call,) = (e for e in jax.make_jaxpr(product)(x, w).eqns if e.primitive.name == "pallas_call")
    assert call.params["grid_mapping"].grid == (3, 5, 2)


@pytest.mark.parametrize(
    ("rows", "X", "Y", "expected"),
    [
        (1024, 2048, 2048, (1024, 512)),  # 6 MiB of rows, twice, and 6 MiB of the sum and of what is written, twice
        (1040, 2048, 2048, (512, 512)),
        (2304, 2048, 2048, (512, 512)),
        (2320, 2048, 2048, (256, 512)),
        (64, 40, 24, (40, 24)),
    ],
)
def test_a_tile_of_the_gradient(rows: int, X: int, Y: int, expected: tuple[int, int]) -> None:
    assert even_matmul_tpu._outer_tile(rows, X, Y, 2) == expected
