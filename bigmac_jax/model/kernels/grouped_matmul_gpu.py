"""The grouped matmul of GPUs: M rows sorted by group, e groups with a matrix X × Y each; and its two gradients.

Pallas kernels, lowered through Triton. Groups have any length, 0 included: each has row tiles of its own, which start
at its first row, so that no tile holds rows of two groups, no two programs write the same element, and the programs
need no order. V: the row tiles that there can be. `sizes_e` are int32, their sum at most M; rows behind the last group
are undefined, those of results too. Products of float32 follow jax_default_matmul_precision: TF32 unless it is set.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from bigmac_jax.model.exchange.rows import bin_of


@dataclass(frozen=True)
class Tiles:
    """An output's tile is rows × columns, summed over `depth` a step; its warps, and the steps under way at once."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By bytes of an element, and whether the mean group has _LONG rows: a group's last tile is half empty on average, with
# the higher tile a quarter more work at 256 rows, but it reads the weights half as often. 64 rows are the least that
# the matrix units of Hopper take. Depth: 128 bytes, the widest row of shared memory that they read. Three stages of
# 128 × 128 take 96 KiB of it: an A100, H100 or B200 has more, an L4 99. Chosen by these limits and from compiled
# programs (no register spills, 16 bytes a load), not by time on a GPU.
_LONG = 256
_TILES = {
    (2, True): Tiles(128, 128, 64, 8, 3),
    (2, False): Tiles(64, 128, 64, 4, 3),
    (4, True): Tiles(128, 128, 32, 8, 3),
    (4, False): Tiles(64, 128, 32, 4, 3),
}
# Row tiles whose programs start side by side for one column tile: those of a group share the weights that they read.
_ABREAST = 8


def gmm(
    x_MX: Array,
    w_iXY: Array,
    sizes_e: Array,
    first: Array | None = None,
    *,
    transpose_rhs: bool = False,
    interpret: bool = False,
) -> Array:
    """Rows of group i times matrix i → y_MY, in x's dtype, summed in float32.

    Args:
      w_iXY: cast to x's dtype as it is read; [i, Y, X] if `transpose_rhs`. One for each group.
      first: the matrix of the first group, if there are more of them.
    """
    (M, X), e = x_MX.shape, sizes_e.size
    i, Y = w_iXY.shape[0], w_iXY.shape[1 if transpose_rhs else 2]
    if w_iXY.shape != ((i, Y, X) if transpose_rhs else (i, X, Y)) or (i != e if first is None else i < e):
        raise ValueError(f"x {x_MX.shape} and {e} groups do not fit w {w_iXY.shape} with {transpose_rhs=}")
    tiles = _TILES[x_MX.dtype.itemsize, e * _LONG <= M]
    visits = _visits(sizes_e, M, tiles.rows)
    if first is not None:
        visits = (visits[0] + first, *visits[1:])
    return _call(
        partial(_gmm, tiles=tiles, transpose_rhs=transpose_rhs),
        "grouped_matmul_dx" if transpose_rhs else "grouped_matmul_fwd",
        (_ABREAST, pl.cdiv(Y, tiles.columns), visits[0].size // _ABREAST),  # the first changes fastest on GPUs
        tiles,
        2 * M * X * Y,
        jax.ShapeDtypeStruct((M, Y), x_MX.dtype),
        visits,
        (x_MX, w_iXY),
        interpret,
        (i - e) * X * Y * w_iXY.dtype.itemsize,
    )


def tgmm(x_MX: Array, dy_MY: Array, sizes_e: Array, *, dtype: Any = None, interpret: bool = False) -> Array:
    """Σ x ⊗ dy over the rows of each group → dw_eXY, in `dtype` (None: x's), summed in float32; 0 without rows."""
    (M, X), Y, e = x_MX.shape, dy_MY.shape[1], sizes_e.size
    if dy_MY.shape[0] != M:
        raise ValueError(f"x {x_MX.shape} and dy {dy_MY.shape} must have as many rows")
    tiles = _TILES[x_MX.dtype.itemsize, True]  # tiles of X × Y here, which have any length of groups for their depth
    stop_e = jnp.cumsum(sizes_e)
    return _call(
        partial(_tgmm, tiles=tiles),
        "grouped_matmul_dw",
        (pl.cdiv(X, tiles.rows), pl.cdiv(Y, tiles.columns), e),
        tiles,
        2 * M * X * Y,
        jax.ShapeDtypeStruct((e, X, Y), dtype or x_MX.dtype),
        (stop_e - sizes_e, stop_e),
        (x_MX, dy_MY),
        interpret,
    )


def _call(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    tiles: Tiles,
    flops: int,
    out: jax.ShapeDtypeStruct,
    schedule: tuple[Array, ...],
    operands: tuple[Array, Array],
    interpret: bool,
    unread: int = 0,
) -> Array:
    """A kernel over whole arrays, which finds its tiles by the schedule; `unread` bytes of them it leaves alone."""
    size = sum(a.size * a.dtype.itemsize for a in (*operands, out)) - unread
    return pl.pallas_call(
        kernel,
        out,
        grid=grid,
        name=name,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=size, transcendentals=0),
        # Triton's lowering drops the estimate; this reaches the compiled program.
        metadata={"flops": str(flops), "bytes_accessed": str(size)},
        interpret=interpret,
    )(*schedule, *operands)


def _visits(sizes_e: Array, M: int, rows: int) -> tuple[Array, Array, Array]:
    """Group, first row and end of the group for each of V row tiles → i32[V] each; those that start at the end or
    behind it have no rows."""
    e = sizes_e.size
    most = (M + min(e, M) * (rows - 1)) // rows  # Σ ceil(size/rows) is no more
    V = pl.cdiv(most, _ABREAST) * _ABREAST
    visit_V = jnp.arange(V, dtype=jnp.int32)
    tiles_e = -(-sizes_e // rows)
    end_e, stop_e = jnp.cumsum(tiles_e), jnp.cumsum(sizes_e)
    group_V = jnp.minimum(bin_of(visit_V, end_e), e - 1)
    start_V = (stop_e - sizes_e)[group_V] + rows * (visit_V - (end_e - tiles_e)[group_V])
    return group_V, start_V, stop_e[group_V]


def _gmm(
    group_V: Any, start_V: Any, stop_V: Any, x_MX: Any, w_eXY: Any, y_MY: Any, *, tiles: Tiles, transpose_rhs: bool
) -> None:
    """One row tile of one group times one column tile of its matrix."""
    X, Y = x_MX.shape[1], y_MY.shape[1]
    v = pl.program_id(2) * _ABREAST + pl.program_id(0)
    start, stop, column = start_V[v], stop_V[v], pl.program_id(1) * tiles.columns
    rows, columns = pl.ds(start, tiles.rows), pl.ds(column, tiles.columns)

    @pl.when(start < stop)
    def _() -> None:
        group = group_V[v]
        in_group = _inside(start, tiles.rows, stop, 0)

        def step(i: Array, sum_rc: Array) -> Array:
            first = i * tiles.depth
            depth = pl.ds(first, tiles.depth)
            along_d, along_c = (1, 0) if transpose_rhs else (0, 1)
            # Both are masked behind X: what lies there may be NaN.
            x_rd = _load(x_MX.at[rows, depth], in_group, _inside(first, tiles.depth, X, 1))
            w = _load(
                w_eXY.at[(group, columns, depth) if transpose_rhs else (group, depth, columns)],
                _inside(first, tiles.depth, X, along_d),
                _inside(column, tiles.columns, Y, along_c),
            )
            return sum_rc + plgpu.dot(x_rd, w.astype(x_rd.dtype), trans_b=transpose_rhs)

        y_rc = jax.lax.fori_loop(0, pl.cdiv(X, tiles.depth), step, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))
        _store(y_MY.at[rows, columns], y_rc, in_group, _inside(column, tiles.columns, Y, 1))


def _tgmm(start_e: Any, stop_e: Any, x_MX: Any, dy_MY: Any, dw_eXY: Any, *, tiles: Tiles) -> None:
    """One tile of one group's X × Y, over all rows of the group."""
    (X, Y), group = dw_eXY.shape[1:], pl.program_id(2)
    x, y = pl.program_id(0) * tiles.rows, pl.program_id(1) * tiles.columns
    over_x, over_y = pl.ds(x, tiles.rows), pl.ds(y, tiles.columns)
    start, stop = start_e[group], stop_e[group]

    def step(i: Array, sum_xy: Array) -> Array:
        first = start + i * tiles.depth
        rows, in_group = pl.ds(first, tiles.depth), _inside(first, tiles.depth, stop, 0)
        # Both are masked: another group's rows may be NaN.
        x_rx = _load(x_MX.at[rows, over_x], in_group, _inside(x, tiles.rows, X, 1))
        dy_ry = _load(dy_MY.at[rows, over_y], in_group, _inside(y, tiles.columns, Y, 1))
        return sum_xy + plgpu.dot(x_rx, dy_ry, trans_a=True)

    steps = pl.cdiv(stop - start, tiles.depth)
    dw_xy = jax.lax.fori_loop(0, steps, step, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))
    _store(dw_eXY.at[group, over_x, over_y], dw_xy, _inside(x, tiles.rows, X, 0), _inside(y, tiles.columns, Y, 1))


def _inside(first: Any, size: int, end: Any, axis: int) -> Array | None:
    """Which of a tile's `size` positions along `axis` come before `end`: [size, 1] or [1, size]. None: all, where tiles
    begin at multiples of `size` and `end` is one."""
    if isinstance(end, int) and end % size == 0:
        return None
    return first + jax.lax.broadcasted_iota(jnp.int32, (size, 1) if axis == 0 else (1, size), axis) < end


def _load(tile: Any, *inside: Array | None) -> Array:
    """A tile, 0 outside."""
    mask = _mask(tile.shape, *inside)
    return plgpu.load(tile, mask=mask, other=None if mask is None else 0.0)


def _store(tile: Any, value: Array, *inside: Array | None) -> None:
    plgpu.store(tile, value.astype(tile.dtype), mask=_mask(tile.shape, *inside))


def _mask(shape: tuple[int, ...], *inside: Array | None) -> Array | None:
    masks = [jnp.broadcast_to(mask, shape) for mask in inside if mask is not None]
    return functools.reduce(jnp.logical_and, masks) if masks else None
