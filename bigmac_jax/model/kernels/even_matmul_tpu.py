"""The experts' products on TPU where each rank sent as many rows to each expert: S ranks, e experts with a matrix X × Y
each, C rows.

Rows stay as they arrive, [S, e, C, X]: a tile takes the rows of one expert from several ranks. A matrix product of
XLA's, or a grouped one (`grouped_matmul`), would want them expert by expert, and so a copy of all rows before and
behind it. An expert's matrix, or as many of its columns as fit, stays in fast memory while all of its rows pass.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bigmac_jax.model.kernels import LANES
from bigmac_jax.model.kernels.grouped_matmul import on_this_rank

# Rows of a tile: at least as many as the matrix unit is wide, or weights come in more slowly than rows pass.
_ROWS, _MOST_ROWS = 256, 512
_BYTES = 12 << 20  # of fast memory; a kernel has 16 MiB on v5e


def fits(shape: tuple[int, ...], *matrix: int, itemsize: int) -> bool:
    """Whether tiles of rows [S, e, C, …] and of matrices X × Y, both ways, fit into fast memory, and fill the matrix
    unit: where the rows of several ranks do not stand behind each other there, each rank's are a product of their own.
    """
    rows, C = math.prod(_tile(shape, itemsize)), shape[2]
    full = C % (32 // itemsize) == 0 or C >= _ROWS // 2
    return full and rows > 0 and all(_columns(rows, X, itemsize) > 0 for X in matrix)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def even_matmul(x_SeCX: Array, w_eXY: Array, gradient: str, interpret: bool = False) -> Array:
    """Rows of expert i times matrix i → y_SeCY, in x's dtype, summed in float32.

    Args:
      gradient: the dtype that the gradient of w is written in, which is w's.
      interpret: for CPU.
    """
    return _forward(x_SeCX, w_eXY, gradient, interpret)[0]


def _forward(x_SeCX: Array, w_eXY: Array, gradient: str, interpret: bool) -> tuple[Array, Any]:
    w_eXY = w_eXY.astype(x_SeCX.dtype)
    product = functools.partial(_product, transposed=False, interpret=interpret)
    return on_this_rank(product, x_SeCX, w_eXY), (x_SeCX, w_eXY)


def _backward(gradient: str, interpret: bool, saved: Any, dy_SeCY: Array) -> tuple[Array, Array]:
    x_SeCX, w_eXY = saved
    dx_SeCX = on_this_rank(functools.partial(_product, transposed=True, interpret=interpret), dy_SeCY, w_eXY)
    dw_eXY = on_this_rank(functools.partial(_outer, dtype=jnp.dtype(gradient), interpret=interpret), x_SeCX, dy_SeCY)
    return dx_SeCX, dw_eXY


even_matmul.defvjp(_forward, _backward)


def _tile(shape: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Ranks of a tile, and rows of each: of several ranks all rows, of one perhaps a part; (0, 0) where no part of them
    fills whole rows of eight words."""
    S, _, C, _ = shape
    if C <= _MOST_ROWS:
        return next((d for d in range(1, S) if S % d == 0 and d * C >= _ROWS), S), C
    parts = [c for c in range(_MOST_ROWS, _ROWS // 2, -1) if C % c == 0 and c % (32 // itemsize) == 0]
    return (1, parts[0]) if parts else (0, 0)


def _columns(rows: int, X: int, itemsize: int) -> int:
    """The most columns of a tile of X × Y, multiplied with a tile of rows; 0 where there is no room."""
    # What is read and written is there twice, one tile while the other is used; the product is in float32 first.
    fixed, of_column = 2 * rows * X * itemsize, 2 * (X + rows) * itemsize + 4 * rows
    return max(0, (_BYTES - fixed) // of_column // LANES * LANES)


def _product(x_SeCX: Array, w: Array, *, transposed: bool, interpret: bool) -> Array:
    """x times w_eXY, or times the transposed w_eYX."""
    S, e, C, X = x_SeCX.shape
    Y, size = w.shape[1 if transposed else 2], x_SeCX.dtype.itemsize
    d, c = _tile(x_SeCX.shape, size)
    y = min(Y, _columns(d * c, X, size))
    matrix = (None, y, X) if transposed else (None, X, y)
    tiles, of_rank = pl.cdiv(Y, y), C // c
    return pl.pallas_call(
        functools.partial(_product_kernel, transposed=transposed),
        jax.ShapeDtypeStruct((S, e, C, Y), x_SeCX.dtype),
        name="even_matmul_dx" if transposed else "even_matmul",
        grid=(e, tiles, S // d * of_rank),  # the last changes fastest
        in_specs=[
            pl.BlockSpec((d, None, c, X), lambda i, j, n: (n // of_rank, i, n % of_rank, 0)),
            pl.BlockSpec(matrix, lambda i, j, n: (i, j, 0) if transposed else (i, 0, j)),
        ],
        out_specs=pl.BlockSpec((d, None, c, y), lambda i, j, n: (n // of_rank, i, n % of_rank, j)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * S * e * C * X * Y,
            bytes_accessed=size * (tiles * x_SeCX.size + w.size + S * e * C * Y),
            transcendentals=0,
        ),
        interpret=interpret,
    )(x_SeCX, w)


def _product_kernel(x_dCX: Any, w: Any, y_dCY: Any, *, transposed: bool) -> None:
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    for rows in _runs(x_dCX):
        x_NX = x_dCX[rows].reshape(-1, x_dCX.shape[2])
        y_NY = jax.lax.dot_general(x_NX, w[...], dims, preferred_element_type=jnp.float32)
        y_dCY[rows] = y_NY.astype(y_dCY.dtype).reshape(-1, *y_dCY.shape[1:])


def _outer(x_SeCX: Array, dy_SeCY: Array, *, dtype: Any, interpret: bool) -> Array:
    """Σ x ⊗ dy over the rows of each expert → dw_eXY, summed in float32."""
    (S, e, C, X), Y = x_SeCX.shape, dy_SeCY.shape[-1]
    size = x_SeCX.dtype.itemsize
    d, c = _tile(x_SeCX.shape, size)
    x, y = _outer_tile(d * c, X, Y, size)
    of_rank = C // c
    return pl.pallas_call(
        _outer_kernel,
        jax.ShapeDtypeStruct((e, X, Y), dtype),
        name="even_matmul_dw",
        grid=(e, pl.cdiv(X, x), pl.cdiv(Y, y), S // d * of_rank),
        in_specs=[
            pl.BlockSpec((d, None, c, x), lambda i, j, k, n: (n // of_rank, i, n % of_rank, j)),
            pl.BlockSpec((d, None, c, y), lambda i, j, k, n: (n // of_rank, i, n % of_rank, k)),
        ],
        out_specs=pl.BlockSpec((None, x, y), lambda i, j, k, n: (i, j, k)),
        scratch_shapes=[pltpu.VMEM((x, y), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * S * e * C * X * Y,
            bytes_accessed=size * (pl.cdiv(Y, y) * x_SeCX.size + pl.cdiv(X, x) * dy_SeCY.size)
            + e * X * Y * jnp.dtype(dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
    )(x_SeCX, dy_SeCY)


def _outer_tile(rows: int, X: int, Y: int, itemsize: int) -> tuple[int, int]:
    """Sides of a tile of the gradient, which is summed and perhaps written in float32."""
    y = min(Y, 512)
    for most in (1024, 512, 256):
        x = min(X, most)
        if 2 * rows * (x + y) * itemsize + (2 * 4 + 4) * x * y <= _BYTES:
            break
    return x, y


def _outer_kernel(x_dCX: Any, dy_dCY: Any, dw_XY: Any, sum_XY: Any) -> None:
    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        sum_XY[...] = jnp.zeros_like(sum_XY)

    for rows in _runs(x_dCX):
        x_NX, dy_NY = (v[rows].reshape(-1, v.shape[2]) for v in (x_dCX, dy_dCY))
        sum_XY[...] += jax.lax.dot_general(x_NX, dy_NY, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _() -> None:
        dw_XY[...] = sum_XY[...].astype(dw_XY.dtype)


def _runs(x_dCX: Any) -> list[slice]:
    """The ranks of a tile, together where their rows stand behind each other in fast memory: where C is a multiple of
    its rows of eight words."""
    d, C, _ = x_dCX.shape
    together = C % (32 // x_dCX.dtype.itemsize) == 0
    return [slice(0, d)] if together else [slice(s, s + 1) for s in range(d)]
